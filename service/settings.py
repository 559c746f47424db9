"""What an operator can set: read once from the environment, every value checked, no secret ever shown.

``OPTIONS`` is the whole list; the README's table is held to it by a test.
"""

import difflib
import errno
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from service.retention import Policy, parse_duration, parse_ttl


class SettingsError(Exception):
    """The environment is not one to start with; each of *problems* names a variable and what it accepts."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Secret:
    """A text that shows itself only when asked to."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text; it goes to the wire and nowhere else."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True, slots=True)
class Rate:
    """So many calls in so many seconds."""

    calls: int
    seconds: int


@dataclass(frozen=True, slots=True)
class Option:
    """One environment variable: *default* is the text it has when not set; None there means no value at all."""

    name: str
    read: Callable[[str], Any]
    default: str | None
    accepts: str
    is_secret: bool = False  # then NAME_FILE may name a file that holds it


LogFormat = Literal["console", "json"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings as read; durations are timedeltas, None is what is not set."""

    api_key: Secret | None
    webhook_secrets: tuple[Secret, ...]
    base_url: str
    ttl: timedelta | None
    min_ttl: timedelta
    webhook_tolerance: timedelta
    database_url: URL | None
    redis_url: Secret | None
    data_dir: Path
    host: str
    port: int
    api_token: Secret | None
    is_dry_run: bool
    api_rate: Rate
    max_deletes_per_day: int | None
    give_up_after: timedelta
    concurrency: int
    queue_horizon: timedelta
    log_format: LogFormat | None

    @property
    def policy(self) -> Policy:
        """How long generations are kept."""
        return Policy(self.ttl, self.min_ttl)

    @property
    def ledger_url(self) -> URL:
        """Where the ledger is: as set, else SQLite in the data directory."""
        return self.database_url or URL.create("sqlite", database=str(self.data_dir / "ledger.db"))


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read all options from *environment*; an empty value counts as not set.

    Raises: SettingsError with all problems at once.
    """
    problems = _unknown(environment)
    values: dict[str, Any] = {}
    for field, option in OPTIONS.items():
        try:
            text = _text(option, environment)
            values[field] = None if text is None else option.read(text)
        except ValueError:
            problems.append(f"{option.name} is not usable: it accepts {option.accepts}")
        except OSError as error:
            problems.append(f"{option.name}_FILE cannot be read: {error.strerror}")
    values["webhook_secrets"] = values.get("webhook_secrets") or ()
    if problems:
        raise SettingsError(problems)
    return Settings(**values)


def require_webhook_secret(settings: Settings) -> None:
    """Raise SettingsError unless there is a secret to prove webhooks with."""
    if not settings.webhook_secrets:
        raise SettingsError(
            ["SYNC_WEBHOOK_SECRET is not set: copy the whsec_… secret from sync.so/settings/webhooks into it"]
        )


NO_API_KEY: Final = "SYNC_API_KEY is not set: put an API key of your sync.so organisation into it"


def require_api_key(settings: Settings) -> None:
    """Raise SettingsError unless there is a key to delete with."""
    if settings.api_key is None:
        raise SettingsError([NO_API_KEY])


def _text(option: Option, environment: Mapping[str, str]) -> str | None:
    text = environment.get(option.name, "").strip()
    path = environment.get(f"{option.name}_FILE", "").strip() if option.is_secret else ""
    if not text and path:
        text = Path(path).read_text(encoding="utf-8").strip()
        if not text:
            raise OSError(errno.ENODATA, "it is empty")
    return text or option.default


def _unknown(environment: Mapping[str, str]) -> list[str]:
    """Name variables that nothing reads: MAYFLY_DRY ignored in silence would delete for real."""
    known = {option.name for option in OPTIONS.values()}
    known |= {f"{option.name}_FILE" for option in OPTIONS.values() if option.is_secret}
    problems = []
    for name in sorted(environment.keys() - known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if name.startswith("MAYFLY_") else 0.88)
        if name in NOT_SUPPORTED:
            problems.append(f"{name} is set, but this release does not support it yet: unset it")
        elif name.startswith("MAYFLY_") and not _LINK.search(name) and name not in TOLERATED:
            problems.append(f"{name} is not an option" + (f": did you mean {near[0]}?" if near else ""))
        elif name.startswith("SYNC_") and near:
            problems.append(f"{name} is not an option: did you mean {near[0]}?")
    return problems


def _secrets(text: str) -> tuple[Secret, ...]:
    parts = [part.strip() for part in text.split(",")]
    # A short key could be guessed; whsec_ is how all of theirs begin, and a key without it never verifies.
    if any(not part.startswith("whsec_") or len(part) < 16 for part in parts):
        raise ValueError
    return tuple(Secret(part) for part in parts)


def _token(text: str) -> Secret:
    if len(text) < 16:
        raise ValueError
    return _header_value(text)


def _header_value(text: str) -> Secret:
    """Read what travels in a header: one pasted with its mask, as in ``sk-…``, would fail each record by itself."""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError
    return Secret(text)


def _base_url(text: str) -> str:
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


def _database_url(text: str) -> URL:
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


def _redis_url(text: str) -> Secret:
    from service.queue import check_url  # noqa: PLC0415 - Redis' library, which most commands do without

    if not text.startswith(("redis://", "rediss://", "unix://", "sentinel://")):
        raise ValueError
    check_url(text)
    return Secret(text)


def _flag(text: str) -> bool:
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


def _number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError
        return int(text)

    return read


def _duration(low: timedelta) -> Callable[[str], timedelta]:
    def read(text: str) -> timedelta:
        duration = parse_duration(text)
        if duration < low:
            raise ValueError
        return duration

    return read


def _rate(text: str) -> Rate:
    calls, _, unit = text.partition("/")
    periods = {"second": 1, "minute": 60, "hour": 3600}
    if unit not in periods:
        raise ValueError
    return Rate(_number(1, 1_000_000)(calls), periods[unit])


def _log_format(text: str) -> LogFormat:
    if text == "console":
        return "console"
    if text == "json":
        return "json"
    raise ValueError


_DURATION = "a duration such as 90s, 15m, 24h, 7d, 2w"
# Named in the design, read by a later release: to ignore one of these in silence could delete what it was to keep.
NOT_SUPPORTED: Final = frozenset({"MAYFLY_CONFIG", "MAYFLY_ARCHIVE_URL"})
# Named there as well, and harmless where nothing reads it.
TOLERATED: Final = frozenset({"MAYFLY_PUBLIC_URL"})
# What Kubernetes and container links set for a service called mayfly-something.
_LINK: Final = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_[0-9]+_(TCP|UDP).*)?$|_ENV_|_NAME$")

OPTIONS: Final[Mapping[str, Option]] = {
    "api_key": Option("SYNC_API_KEY", _header_value, None, "the whole API key, printable ASCII", is_secret=True),
    "webhook_secrets": Option(
        "SYNC_WEBHOOK_SECRET",
        _secrets,
        None,
        "the whole whsec_… secret, several with commas between",
        is_secret=True,
    ),
    "base_url": Option(
        "SYNC_BASE_URL",
        _base_url,
        "https://api.sync.so",
        "an https URL without /v2 (http only within your own network)",
    ),
    "ttl": Option("MAYFLY_TTL", parse_ttl, "24h", f"{_DURATION}, or forever"),
    "min_ttl": Option("MAYFLY_MIN_TTL", _duration(timedelta(seconds=1)), "1m", _DURATION),
    "webhook_tolerance": Option("MAYFLY_WEBHOOK_TOLERANCE", _duration(timedelta(seconds=1)), "5m", _DURATION),
    "database_url": Option(
        "MAYFLY_DATABASE_URL", _database_url, None, "postgresql://… or sqlite:///path", is_secret=True
    ),
    "redis_url": Option(
        "MAYFLY_REDIS_URL",
        _redis_url,
        None,
        "redis://…, rediss://…, unix://… or sentinel://…",
        is_secret=True,
    ),
    "data_dir": Option("MAYFLY_DATA_DIR", Path, "./.mayfly", "a folder"),
    "host": Option("MAYFLY_HOST", str, "127.0.0.1", "an address to listen on"),
    "port": Option("MAYFLY_PORT", _number(0, 65535), "8080", "a port number"),
    "api_token": Option(
        "MAYFLY_API_TOKEN",
        _token,
        None,
        "16 or more printable ASCII characters without spaces",
        is_secret=True,
    ),
    "is_dry_run": Option("MAYFLY_DRY_RUN", _flag, "false", "true or false"),
    "api_rate": Option("MAYFLY_API_RATE", _rate, "300/minute", "a number per second, minute or hour: 300/minute"),
    "max_deletes_per_day": Option("MAYFLY_MAX_DELETES_PER_DAY", _number(0, 10**9), None, "a whole number"),
    "give_up_after": Option("MAYFLY_GIVE_UP_AFTER", _duration(timedelta(minutes=1)), "7d", _DURATION),
    "concurrency": Option("MAYFLY_CONCURRENCY", _number(1, 1000), "50", "a whole number from 1 to 1000"),
    "queue_horizon": Option("MAYFLY_QUEUE_HORIZON", _duration(timedelta(minutes=1)), "48h", _DURATION),
    "log_format": Option("MAYFLY_LOG_FORMAT", _log_format, None, "console or json"),
}
