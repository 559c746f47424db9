"""Durations with units and instants, as in settings, rules and overrides: parsed and formatted."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)
DURATION_FORMS: Final = "a number with a unit: 90s, 15m, 24h, 7d, 2w"

_TIME: Final = re.compile(r"(.*T[0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?) ([0-9]{2}:?[0-9]{2})", re.ASCII)
_INSTANT_FORMS: Final = "an instant with its offset, such as 2026-12-31T00:00:00Z, or a date"
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)

# Later instants might not fit a database column, and a longer ttl is a mistake.
MAX_TTL: Final = timedelta(days=36500)


def parse_duration(text: str) -> timedelta:
    """Parse ``90s``, ``15m``, ``24h``, ``7d`` or ``2w``; a number without a unit is refused as ambiguous.

    Raises: ValueError, which says what is accepted and does not repeat *text*.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(DURATION_FORMS)
    number, unit = match.groups()
    try:
        duration = timedelta(**{_UNITS[unit]: int(number)})
    except OverflowError:
        duration = timedelta.max
    if duration > MAX_TTL:
        raise ValueError(f"{DURATION_FORMS}; at most 100 years")
    return duration


def format_duration(seconds: int) -> str:
    """Format whole *seconds* in the largest unit that fits: the inverse of parse_duration."""
    for unit, size in (("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def parse_ttl(text: str) -> timedelta | None:
    """Parse a duration above zero, or ``forever`` as None.

    Raises: ValueError, which says what is accepted.
    """
    if text.strip() == "forever":
        return None
    try:
        duration = parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{error}, or forever") from None
    if not duration:
        raise ValueError("more than zero")
    return duration


def parse_instant(text: str) -> datetime:
    """Parse an ISO 8601 instant with its offset, or a date as its end in UTC; a time without an offset is ambiguous.

    A ``+`` that was not percent-encoded has become a blank.

    Raises: ValueError, which says what is accepted; OverflowError.
    """
    text = text.upper()
    if _DATE.fullmatch(text):
        instant = datetime.fromisoformat(f"{text}T00:00:00Z") + timedelta(days=1)
    else:
        try:
            instant = datetime.fromisoformat(_TIME.sub(r"\1+\2", text))
        except ValueError:
            raise ValueError(_INSTANT_FORMS) from None
    if instant.tzinfo is None or not 2000 <= instant.year <= 2200:
        raise ValueError(_INSTANT_FORMS)
    return instant.astimezone(UTC)
