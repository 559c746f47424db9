"""What rules can ask about a generation, and the matchers that ask.

A matcher never matches a fact that is missing. Webhooks lack some facts that the API's answer has.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Final

import msgspec

from service.core.key import DEFAULT_ACCOUNT

# A set of characters in a glob; a ] that comes first is one of them.
_SET: Final = re.compile(r"\[!?+\]?+[^\]]*+\]")


class Facts(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What rules can ask about a generation; None and empty: missing, or not known yet.

    *project*, *source* and *output_file_name* are in the API's answer, and not in webhooks. *is_complete* says that
    the API has answered; *output_duration* is in seconds.
    """

    account: str = DEFAULT_ACCOUNT
    status: str | None = None
    model: str | None = None
    error_code: str | None = None
    project: str | None = None
    source: str | None = None
    output_file_name: str | None = None
    input_types: tuple[str, ...] = ()
    output_duration: float | None = None
    labels: Mapping[str, str] = {}
    is_complete: bool = False


def values_of(facts: Facts, name: str) -> tuple[str, ...]:
    """Return the values of the fact *name*, or of the label ``label.NAME``; none if it is missing."""
    if name == "input_type":
        return facts.input_types
    value: str | None = facts.labels.get(name[6:]) if name.startswith("label.") else getattr(facts, name)
    return (value,) if value else ()


@dataclass(frozen=True, slots=True)
class Pattern:
    """A text, or a glob with ``*``, ``?`` and ``[…]``; upper and lower case differ."""

    text: str
    _regex: re.Pattern[str] | None = field(repr=False, compare=False)

    @classmethod
    def of(cls, text: str) -> "Pattern":
        """Compile *text*.

        Raises: ValueError for a glob with a ``[`` that is not closed.
        """
        if "[" in _SET.sub("", text):
            raise ValueError("a ] for each [; [[] stands for the character itself")
        return cls(text, re.compile(translate(text)) if any(mark in text for mark in "*?[") else None)

    @property
    def is_glob(self) -> bool:
        """Whether it can match several texts."""
        return self._regex is not None

    @property
    def prefix(self) -> str:
        """What each text that it matches begins with."""
        return re.split(r"[*?\[]", self.text, maxsplit=1)[0]

    def matches(self, text: str) -> bool:
        """Whether it matches the whole of *text*, in time that grows linearly with the length of *text*."""
        return text == self.text if self._regex is None else self._regex.match(text) is not None

    def covers(self, other: "Pattern") -> bool:
        """Whether it surely matches each text that *other* matches; False also if that is hard to tell."""
        if self.text in (other.text, "*"):
            return True
        if "[" in self.text or "[" in other.text:
            return not other.is_glob and self.matches(other.text)
        # A `*` of the other is a text of any length, which only a `*` here takes in.
        return self.matches(other.text) and ("*" not in other.text or "?" not in self.text)


class Texts(msgspec.Struct, frozen=True, gc=False):
    """A matcher of the fact *name*, or of the label ``label.NAME``: one of *patterns* must match."""

    name: str
    patterns: tuple[Pattern, ...]

    def matches(self, facts: Facts) -> bool:
        """Whether one pattern matches; no pattern matches what is missing."""
        for value in values_of(facts, self.name):
            for pattern in self.patterns:
                if pattern.matches(value):
                    return True
        return False

    def covers(self, other: "Texts") -> bool:
        """Whether it surely matches whatever *other* does."""
        return self.name == other.name and all(
            any(mine.covers(pattern) for mine in self.patterns) for pattern in other.patterns
        )


class Seconds(msgspec.Struct, frozen=True, gc=False):
    """A matcher of the output's duration: from *low* to *high* seconds, both included unless said otherwise."""

    low: float = 0
    high: float = float("inf")
    is_low_out: bool = False
    is_high_out: bool = False

    def matches(self, facts: Facts) -> bool:
        """Whether the duration is within the bounds."""
        found = facts.output_duration
        if found is None or not self.low <= found <= self.high:
            return False
        return not (self.is_low_out and found == self.low) and not (self.is_high_out and found == self.high)

    def covers(self, other: "Seconds") -> bool:
        """Whether it matches whatever *other* does."""
        return (self.low, self.is_low_out) <= (other.low, other.is_low_out) and (
            (-self.high, self.is_high_out) <= (-other.high, other.is_high_out)
        )
