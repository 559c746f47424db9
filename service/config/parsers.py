"""The values that settings may have: each reader takes the text of one variable.

Readers raise ValueError for what they do not accept; what they say repeats nothing of the text, which may be a secret.
"""

import ipaddress
from collections.abc import Callable
from datetime import timedelta
from typing import Literal
from urllib.parse import urlsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from service.config.redis_url import check_url
from service.core.durations import parse_duration
from service.core.rate import Rate
from service.core.secret import Secret

LogFormat = Literal["console", "json"]


def read_secrets(text: str) -> tuple[Secret, ...]:
    """Read one or several webhook secrets, with commas between."""
    parts = [part.strip() for part in text.split(",")]
    # A short key could be guessed; whsec_ is how all of theirs begin, and a key without it never verifies.
    if any(not part.startswith("whsec_") or len(part) < 16 for part in parts):
        raise ValueError
    return tuple(Secret(part) for part in parts)


def read_token(text: str) -> Secret:
    """Read a bearer token that cannot be guessed."""
    if len(text) < 16:
        raise ValueError
    return read_header_value(text)


def read_header_value(text: str) -> Secret:
    """Read what travels in a header: one pasted with its mask, as in ``sk-…``, would fail each record by itself."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError
    return Secret(text)


def read_base_url(text: str) -> str:
    """Read where the Sync API is."""
    parts = urlsplit(text)
    is_complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not is_complete or parts.username or "?" in text or "#" in text:
        raise ValueError
    # The API key travels with every call.
    if parts.scheme == "http" and not _is_near(parts.hostname or ""):
        raise ValueError
    # With it in the path twice every generation would be unknown.
    if parts.path.rstrip("/").endswith("/v2"):
        raise ValueError
    return text.rstrip("/")


def _is_near(host: str) -> bool:
    """Whether *host* is within one's own network: a private address, or a name without a domain."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host


def read_database_url(text: str) -> URL:
    """Read where the ledger is."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise ValueError from None
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ValueError
        return URL.create("sqlite", database=url.database)
    if url.drivername not in ("postgres", "postgresql", "postgresql+asyncpg"):
        raise ValueError
    # The driver reads libpq's parameters, but not these two, which hosters put into their URLs.
    return url.difference_update_query(["channel_binding", "connect_timeout"]).set(drivername="postgresql")


def read_redis_url(text: str) -> Secret:
    """Read where the queue is; see redis_url.py."""

    if not text.startswith(("redis://", "rediss://", "unix://", "sentinel://")):
        raise ValueError
    check_url(text)
    return Secret(text)


def read_flag(text: str) -> bool:
    """Read yes or no, in the usual words."""
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
    """Return the reader of a whole number from *low* to *high*."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError
        return int(text)

    return read


def duration_reader(low: timedelta) -> Callable[[str], timedelta]:
    """Return the reader of a duration of at least *low*."""

    def read(text: str) -> timedelta:
        duration = parse_duration(text)
        if duration < low:
            raise ValueError
        return duration

    return read


def read_rate(text: str) -> Rate:
    """Read so many calls in a period."""
    calls, _, unit = text.partition("/")
    periods = {"second": 1, "minute": 60, "hour": 3600}
    if unit not in periods:
        raise ValueError
    return Rate(number_reader(1, 1_000_000)(calls), periods[unit])


def read_log_format(text: str) -> LogFormat:
    """Read how logs are written."""
    if text == "console":
        return "console"
    if text == "json":
        return "json"
    raise ValueError
