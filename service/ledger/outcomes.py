"""What a worker writes of its attempts, and what becomes of it: copies, settlements, and their results."""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from service.core.attempts import Step, Verdict
from service.core.generation import Generation
from service.core.retention import Retention
from service.ledger.claiming import Claim


@dataclass(frozen=True, slots=True)
class Copy:
    """The generation as the API showed it, to be stored before the DELETE."""

    claim: Claim
    generation: Generation
    body: str
    is_rehearsal: bool = False  # no DELETE follows


@dataclass(frozen=True, slots=True)
class Settlement:
    """The outcome of an attempt: *receipt* is the API's final answer as JSON, *error* a sentence without secrets."""

    claim: Claim
    verdict: Verdict
    step: Step
    receipt: str | None = None
    error: str | None = None
    is_refund: bool = False  # its DELETE was allowed, and certainly deleted nothing
    is_key_good: bool = False  # the API gives this answer only to a valid key
    is_shown: bool = False  # the API showed the generation
    throttle: timedelta | None = None  # for how long the API wants no calls
    retention: Retention | None = None  # from an override that only the API showed; with a DEFER
    status: str | None = None  # what the API shows of one that was added by its id, and that is not deleted yet


class CopyResult(StrEnum):
    """Whether a copy was stored, and whether the DELETE may follow."""

    KEPT = "kept"  # stored; the DELETE may follow
    LOST = "lost"  # not stored: the lease is over, and the next claim decides
    LIMITED = "limited"  # stored, but the daily limit is reached
    PAUSED = "paused"  # stored, but an operator paused deletions after the claim


class Settled(StrEnum):
    """What became of a settlement."""

    SETTLED = "settled"
    DOUBTED = "doubted"  # deferred, not called gone: the key may be another organisation's, and deletions pause
    ALREADY = "already"  # by an earlier try, whose commit succeeded although its answer was lost
    LOST = "lost"  # not stored: the lease is over, and the next claim decides
