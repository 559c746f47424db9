"""Instants as an operator writes them: absolute, or relative to now."""

import re
from datetime import UTC, datetime
from typing import Final

from service.core.durations import parse_duration

INSTANT_FORMS: Final = (
    "an instant with its offset, 2026-12-31T00:00:00Z; a date, the start of that day in UTC; or a time from now on: "
    "-1h is an hour ago, 1h in an hour"
)
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_SIGNED: Final = re.compile(r"([-+]?)([^-+]+)")


def parse_instant(text: str, *, now: datetime) -> datetime:
    """Parse an ISO 8601 instant, a date or a signed duration, and return it in UTC.

    Raises: ValueError, which says what is accepted and does not repeat *text*.
    """
    text = text.strip().upper()
    try:
        if _DATE.fullmatch(text):
            return datetime.fromisoformat(f"{text}T00:00:00Z")
        if "T" in text:
            found = datetime.fromisoformat(text)
            if found.tzinfo is not None:
                return found.astimezone(UTC)
        elif (match := _SIGNED.fullmatch(text)) is not None:
            duration = parse_duration(match[2].lower())
            return now - duration if match[1] == "-" else now + duration
    except (ValueError, OverflowError):
        pass
    raise ValueError(INSTANT_FORMS)
