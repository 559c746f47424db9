"""The scenes of the demo: one generation each, its faults, and its expected end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from service.core.attempts import Outcome
from service.core.lifecycle import State


@dataclass(frozen=True, slots=True)
class Scene:
    """One generation: *faults* are the API's first answers, *override* is the query of its webhookUrl.

    The app answers 503 to its webhook as often as *refusals* says.
    """

    title: str
    status: str = "COMPLETED"
    is_spoken: bool = False  # its input is a text, so it has a synthesizedAudioUrl
    override: str = ""
    faults: Mapping[str, Sequence[str]] = field(default_factory=dict)
    refusals: int = 0
    ends: State = State.DELETED
    outcome: Outcome | None = Outcome.DELETED


SCENES: Final = (
    Scene("with a recorded voice"),
    Scene("speaks a text", is_spoken=True),
    Scene("its app is busy: 503", refusals=1),
    Scene("has failed", "FAILED"),
    Scene("was rejected", "REJECTED"),
    Scene("still processing: 409", faults={"DELETE": ["409"]}),
    Scene("the API breaks: 500", is_spoken=True, faults={"GET": ["500"]}),
    Scene("too many calls: 429, 2 s", faults={"DELETE": ["429:retry_after=2"]}),
    Scene("the answer gets lost", faults={"DELETE": ["lost"]}, outcome=Outcome.DELETED),
    Scene("?ttl=forever", override="?ttl=forever", ends=State.KEPT, outcome=None),
    Scene("?hold=legal", override="?hold=legal", ends=State.HELD, outcome=None),
)
