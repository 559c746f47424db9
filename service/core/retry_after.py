"""The header Retry-After of an answer. Source: RFC 9110, section 10.2.3."""

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

_MOST_SECONDS: Final = 10**9  # keeps timedelta from overflowing; whoever waits clamps further
_SECONDS: Final = re.compile(r"[0-9]{1,400}", re.ASCII)


def parse_retry_after(text: str, *, now: datetime) -> timedelta | None:
    """Parse a Retry-After, in seconds or as an HTTP date; None for anything else. It is not clamped."""
    text = text.strip().partition(".")[0]
    if _SECONDS.fullmatch(text):
        return timedelta(seconds=min(int(text), _MOST_SECONDS))
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # "-0000" gives a naive datetime; HTTP dates are GMT.
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return at - now
