"""Parsers of settings: each takes the text of one variable.

They raise ValueError for a text that they do not accept, and never repeat it, because it may be a secret.
"""

import ipaddress
from collections.abc import Callable
from datetime import timedelta
from typing import Literal
from urllib.parse import urlsplit

from sqlalchemy import URL

from service.config.database_url import parse_database_url
from service.config.redis_url import check_url
from service.core.durations import parse_duration
from service.core.rate import Rate
from service.core.secret import Secret

LogFormat = Literal["console", "json"]


def read_secrets(text: str) -> tuple[Secret, ...]:
    """Read one or several webhook secrets, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    # A short secret could be guessed. All of sync.so's begin with whsec_; without it none verifies.
    if any(not part.startswith("whsec_") or len(part) < 16 for part in parts):
        raise ValueError
    return tuple(Secret(part) for part in parts)


def read_token(text: str) -> Secret:
    """Read a bearer token that is long enough not to be guessed."""
    if len(text) < 16:
        raise ValueError
    return read_header_value(text)


def read_header_value(text: str) -> Secret:
    """Read a header value. A key pasted with its mask, such as ``sk-…``, must not fail each record."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError
    return Secret(text)


def read_base_url(text: str) -> str:
    """Read the base URL of the Sync API."""
    parts = urlsplit(text)
    is_complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not is_complete or parts.username or "?" in text or "#" in text:
        raise ValueError
    # The API key travels with every call.
    if parts.scheme == "http" and not is_near(parts.hostname or ""):
        raise ValueError
    # With /v2 twice in the path, every generation would be unknown.
    if parts.path.rstrip("/").endswith("/v2"):
        raise ValueError
    return text.rstrip("/")


def read_public_url(text: str) -> str:
    """Read the URL under which sync.so reaches this service, without its route for webhooks."""
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or parts.port == 0 or parts.username or "?" in text or "#" in text:
        raise ValueError
    return text.rstrip("/").removesuffix("/webhooks/sync")


def is_near(host: str) -> bool:
    """Whether *host* is in a private network: a private address, or a name without a domain."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host


def read_database_url(text: str) -> URL:
    """Read the URL of the ledger's database; see database_url.py."""
    return parse_database_url(text)


def read_redis_url(text: str) -> Secret:
    """Read the URL of Redis; see redis_url.py."""

    if not text.startswith(("redis://", "rediss://", "unix://", "sentinel://")):
        raise ValueError
    check_url(text)
    return Secret(text)


def read_flag(text: str) -> bool:
    """Read a boolean."""
    flags = {
        "true": True,
        "1": True,
        "yes": True,
        "on": True,
        "false": False,
        "0": False,
        "no": False,
        "off": False,
    }
    try:
        return flags[text.lower()]
    except KeyError:
        raise ValueError from None


def number_reader(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from *low* to *high*."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError
        return int(text)

    return read


def duration_reader(low: timedelta) -> Callable[[str], timedelta]:
    """Return a parser of durations of at least *low*."""

    def read(text: str) -> timedelta:
        duration = parse_duration(text)
        if duration < low:
            raise ValueError
        return duration

    return read


def read_rate(text: str) -> Rate:
    """Read a number of calls per second, minute or hour."""
    calls, _, unit = text.partition("/")
    periods = {"second": 1, "minute": 60, "hour": 3600}
    if unit not in periods:
        raise ValueError
    return Rate(number_reader(1, 1_000_000)(calls), periods[unit])


def read_log_format(text: str) -> LogFormat:
    """Read the format of logs."""
    if text == "console":
        return "console"
    if text == "json":
        return "json"
    raise ValueError
