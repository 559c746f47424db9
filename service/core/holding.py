"""Holds: who holds a record, why and until when. Pure decisions that take *now*."""

from datetime import UTC, datetime
from typing import Final

import msgspec

from service.core.durations import DURATION_FORMS, parse_duration, parse_instant

NO_REASON: Final = "no reason given"
# The actor of the move that ends a hold at its time.
ENDED: Final = "hold ended"
UNTIL_FORMS: Final = f"a date, 2026-12-31, an instant with its offset, or {DURATION_FORMS}"


class Hold(msgspec.Struct, frozen=True):
    """Who put a record on hold, why, and until when; None is until a release."""

    by: str
    reason: str | None
    until: datetime | None

    def is_longer_than(self, other: "Hold") -> bool:
        """Whether this hold ends later than *other*; one without an end is the longest."""
        return other.until is not None and (self.until is None or self.until > other.until)


def longer_hold(first: Hold | None, second: Hold | None) -> Hold | None:
    """Return the hold that ends later, *first* if both end at once; None without any."""
    if first is None or second is None:
        return first or second
    return second if second.is_longer_than(first) else first


def parse_until(text: str, *, now: datetime) -> datetime:
    """Parse the end of a hold: a date as its end in UTC, an instant, or a duration from *now*.

    Raises: ValueError, which says what is accepted and does not repeat *text*.
    """
    try:
        until = now + parse_duration(text) if text.strip()[-1:] in "smhdw" else parse_instant(text.strip())
    except (ValueError, OverflowError):
        raise ValueError(UNTIL_FORMS) from None
    if until <= now:
        raise ValueError("a time in the future")
    return until.astimezone(UTC)
