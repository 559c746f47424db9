"""Faults that can be scripted, and the plan that assigns them to calls.

A fault is written ``name`` or ``name:key=value,key=value``, such as ``429:retry_after=2``. In a script the suffix
``*20`` repeats it 20 times, and ``*`` repeats it forever.
"""

import random
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from service.simulator.calls import Operation

_REPEATED = re.compile(r"(?P<text>.*?)\*(?P<times>[0-9]*)", re.DOTALL)
PARAMETERS = frozenset(
    {
        *(
            "retry_after",
            "date",
            "body",
        ),  # 429, 503: the header's text; the header as a date in so many seconds; the body's number
        "location",  # 301, 302, 307, 308
        "interval",  # slow: seconds between two bytes
        "megabytes",  # huge
        "answer",  # 404, 410: the body, one of ABSENT_BODIES; with it the operation has no effect
        "effect",  # any: 1 or 0, whether the operation takes effect despite the answer
    }
)
# Bodies of 404 and 410 that say nothing about the generation, and the API's own.
ABSENT_BODIES = frozenset({"empty", "object", "gateway", "html", "route", "organization", "project", "own"})
NUMBERS = frozenset({"date", "body", "interval", "megabytes"})


class FaultName(StrEnum):
    """What goes wrong with one call. With those of ``WITH_EFFECT`` the operation takes effect nevertheless."""

    PROCESSING_CONFLICT = "409"
    CONFLICT = "409-conflict"
    RATE_LIMITED = "429"
    INTERNAL_ERROR = "500"
    BAD_GATEWAY = "502"  # HTML
    UNAVAILABLE = "503"
    GATEWAY_TIMEOUT = "504"
    BAD_REQUEST = "400"
    METHOD_NOT_ALLOWED = "405"
    UNPROCESSABLE = "422"
    UNAUTHORIZED = "401"
    FORBIDDEN = "403"
    FORBIDDEN_HTML = "403-html"  # a block page in front of the API
    NOT_FOUND = "404"  # another client has just deleted it
    GONE = "410"
    ACCEPTED = "202"
    NO_CONTENT = "204"
    MOVED_PERMANENTLY = "301"
    FOUND = "302"
    TEMPORARY_REDIRECT = "307"
    PERMANENT_REDIRECT = "308"
    DROP = "drop"  # the connection is closed without an answer, before the effect
    RESET = "reset"  # the same, by a TCP reset
    LOST = "lost"  # the effect happens, then the connection is closed without an answer
    TRUNCATED = "truncated"  # Content-Length is larger than the body
    SLOW = "slow"  # one byte per interval
    HUGE = "huge"  # a body of so many megabytes
    INVALID_JSON = "invalid-json"
    HTML = "html"  # 200, by a proxy in front of the API
    WRONG_ID = "wrong-id"  # 200 about another generation
    NON_UTF8 = "non-utf8"
    HOLD = "hold"  # waits at a gate before the effect, until released
    HOLD_AFTER = "hold-after"  # waits at a gate after the effect
    PROCESSING = "processing"  # a GET says PROCESSING


WITH_EFFECT = frozenset(
    {
        *(FaultName.NOT_FOUND, FaultName.GONE, FaultName.ACCEPTED, FaultName.NO_CONTENT, FaultName.LOST),
        *(FaultName.TRUNCATED, FaultName.SLOW, FaultName.HUGE, FaultName.INVALID_JSON, FaultName.WRONG_ID),
        *(FaultName.NON_UTF8, FaultName.HOLD, FaultName.HOLD_AFTER),
    }
)


@dataclass(frozen=True, slots=True)
class Fault:
    name: FaultName
    parameters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Parse ``name:key=value,…``. Raises: ValueError for an unknown name or key."""
        name, _, rest = text.partition(":")
        pairs = [part.partition("=") for part in rest.split(",") if part]
        parameters = {key: value for key, _, value in pairs}
        if unknown := parameters.keys() - PARAMETERS:
            raise ValueError(f"fault {text!r}: unknown parameter {min(unknown)!r}, known: {sorted(PARAMETERS)}")
        if (body := parameters.get("answer")) is not None and body not in ABSENT_BODIES:
            raise ValueError(f"fault {text!r}: answer is not one of: {', '.join(sorted(ABSENT_BODIES))}")
        for key in NUMBERS & parameters.keys():
            try:
                float(parameters[key])
            except ValueError:
                raise ValueError(f"fault {text!r}: {key} is not a number") from None
        try:
            return cls(FaultName(name), parameters)
        except ValueError:
            raise ValueError(f"fault {text!r} is not one of: {', '.join(FaultName)}") from None

    def number(self, key: str, default: float) -> float:
        return float(self.parameters.get(key, default))

    @property
    def has_effect(self) -> bool:
        if (effect := self.parameters.get("effect")) is not None:
            return effect == "1"
        return self.name in WITH_EFFECT and "answer" not in self.parameters

    def __str__(self) -> str:
        rest = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.name}:{rest}" if rest else self.name.value


def _operation(name: str) -> Operation:
    try:
        return Operation(name)
    except ValueError:
        raise ValueError(f"operation {name!r} of a fault is not one of: {', '.join(Operation)}") from None


def _parse_repeated(text: str) -> tuple[Fault, int | None]:
    """Parse a fault and its number of repetitions; None is forever."""
    repeated = _REPEATED.fullmatch(text)
    if repeated is None:
        return Fault.parse(text), 1
    return Fault.parse(repeated["text"]), int(repeated["times"]) if repeated["times"] else None


class Plan:
    """Assigns faults to calls: by a script, else the standing fault, else at random."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self.standing: dict[Operation, Fault] = {}
        self._scripts: dict[tuple[str | None, Operation], deque[tuple[Fault, int | None]]] = {}
        self._mixes: dict[Operation, list[tuple[Fault, float]]] = {}
        self._draws: dict[tuple[str, Operation], int] = {}

    def script(self, operation: str, faults: Sequence[str], generation_id: str | None = None) -> None:
        """Queue *faults*, one per call, for one generation or, without an id, for any call."""
        parsed = [_parse_repeated(text) for text in faults]
        self._scripts.setdefault((generation_id, _operation(operation)), deque()).extend(parsed)

    def stand(self, operation: str, fault: str | None) -> None:
        """Apply *fault* to every call of *operation* until it is set to None."""
        operation = _operation(operation)
        self.standing.pop(operation, None)
        if fault is not None:
            self.standing[operation] = Fault.parse(fault)

    def mix(self, operation: str, probabilities: Mapping[str, float]) -> None:
        """Apply faults to calls of *operation* at random; an empty mapping ends it."""
        operation = _operation(operation)
        self._mixes.pop(operation, None)
        if any(share < 0 for share in probabilities.values()) or sum(probabilities.values()) > 1:
            raise ValueError("the probabilities of a mix are negative or add up to more than 1")
        if probabilities:
            self._mixes[operation] = [(Fault.parse(text), share) for text, share in probabilities.items()]

    def next(self, operation: Operation, generation_id: str) -> Fault | None:
        if self._scripts:
            for key in ((generation_id, operation), (None, operation)):
                if key in self._scripts:
                    return self._next_scripted(key)
        if self.standing and (standing := self.standing.get(operation)):
            return standing
        return self._draw(operation, generation_id) if operation in self._mixes else None

    def _next_scripted(self, key: tuple[str | None, Operation]) -> Fault:
        script = self._scripts[key]
        fault, times = script[0]
        if times is not None and times > 1:
            script[0] = (fault, times - 1)
        elif times is not None:
            script.popleft()
        if not script:
            del self._scripts[key]
        return fault

    def _draw(self, operation: Operation, generation_id: str) -> Fault | None:
        # Seeded by generation, operation and count: a seed gives the same faults in whatever order calls arrive.
        draws = self._draws[generation_id, operation] = self._draws.get((generation_id, operation), 0) + 1
        place = f"{self.seed}:{generation_id}:{operation}:{draws}" if self.seed is not None else None
        point = random.Random(place).random()  # noqa: S311 (faults, not secrets)
        for fault, share in self._mixes[operation]:
            if point < share:
                return fault
            point -= share
        return None
