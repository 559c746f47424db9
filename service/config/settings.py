"""The settings: read once from the environment and checked; secrets are never shown.

``OPTIONS`` is the whole list; a test checks the README's table against it.
"""

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import URL

from service.config.accounts import Account, Keys, join_accounts, read_keys
from service.config.parsers import (
    LogFormat,
    duration_reader,
    number_reader,
    read_base_url,
    read_database_url,
    read_flag,
    read_header_value,
    read_log_format,
    read_public_url,
    read_rate,
    read_redis_url,
    read_secrets,
    read_token,
)
from service.config.rules_file import RulesFile, RulesFileError, read_rules_file
from service.config.targets import find_loops, read_targets
from service.config.unknown_variables import find_unknown
from service.config.url_options import UrlOptionError
from service.core.adopting import Scope
from service.core.durations import parse_ttl
from service.core.errors import ExplainedError
from service.core.forwarding import Target
from service.core.rate import Rate
from service.core.record_ttls import RecordTtls
from service.core.retention import Bounds, Policy
from service.core.secret import Secret


class SettingsError(ExplainedError):
    """The settings are missing or invalid; each of *problems* names a variable and what it accepts."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Option:
    """One environment variable; *default* is the text that an unset one has, None for no value."""

    name: str
    read: Callable[[str], Any]
    default: str | None
    accepts: str
    is_secret: bool = False  # then NAME_FILE may name a file that contains it


@dataclass(frozen=True, slots=True)
class Settings:
    """The parsed settings; None is an option that is not set."""

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
    intake_token: Secret | None
    is_dry_run: bool
    api_rate: Rate
    max_deletes_per_day: int | None
    give_up_after: timedelta
    concurrency: int
    queue_horizon: timedelta
    record_ttl: timedelta | None
    log_format: LogFormat | None
    config_path: Path | None
    public_url: str | None
    rules_file: RulesFile  # what is in the file at config_path
    keys: Mapping[str, Keys]  # by account
    targets: tuple[Target, ...]  # that webhooks are forwarded to

    @property
    def policy(self) -> Policy:
        """The retention policy."""
        bounds = {
            one.id: Bounds(max(one.min_ttl or self.min_ttl, self.min_ttl), one.max_ttl)
            for one in self.rules_file.accounts
        }
        return Policy(self.ttl, self.min_ttl, self.rules_file.rules, bounds)

    def min_ttl_of(self, account: str) -> timedelta:
        """Return the time that nothing of *account* is kept for less than."""
        return self.policy.bounds_of(account).min_ttl

    @property
    def record_ttls(self) -> RecordTtls:
        """How long records are kept after their generations are gone."""
        return RecordTtls.of(self.record_ttl, self.rules_file.rules)

    @property
    def accounts(self) -> tuple[Account, ...]:
        """The accounts whose webhooks are taken and whose generations are deleted."""
        return join_accounts(self.keys, self.rules_file.accounts, self.api_rate)

    @property
    def scopes(self) -> Mapping[str, Scope]:
        """What the sweep adopts, for each account that is swept."""
        found = (Scope(one.id, self.public_url, one.adopt) for one in self.accounts)
        return {scope.account: scope for scope in found if not scope.is_empty}

    @property
    def account_ids(self) -> tuple[str, ...]:
        """The names of the accounts."""
        return tuple(self.keys)

    @property
    def ledger_url(self) -> URL:
        """The URL of the ledger: MAYFLY_DATABASE_URL, else SQLite in the data directory."""
        return self.database_url or URL.create("sqlite", database=str(self.data_dir / "ledger.db"))


def read_settings(
    environment: Mapping[str, str] = os.environ, *, defaults: Mapping[str, str] = MappingProxyType({})
) -> Settings:
    """Read all options from *environment*; an empty value counts as not set.

    *defaults* has, by name, what an unset variable is instead of its option's default.

    Raises: SettingsError with all problems at once.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field, option in OPTIONS.items():
        try:
            text = _option_text(option, environment) or defaults.get(option.name) or option.default
            values[field] = None if text is None else option.read(text)
        except UrlOptionError as error:
            problems.append(f"{option.name} is invalid: {error}")
        except ValueError:
            problems.append(f"{option.name} is invalid: it accepts {option.accepts}")
        except OSError as error:
            problems.append(f"{option.name}_FILE cannot be read: {error.strerror}")
    values["webhook_secrets"] = values.get("webhook_secrets") or ()
    rules = values["rules_file"] = _read_rules_file(values.get("config_path"), problems)
    default = Keys(values.get("api_key"), values["webhook_secrets"])
    values["keys"] = read_keys(rules.accounts, default, environment, problems)
    values["targets"] = read_targets(rules.forwards, environment, problems)
    problems += find_loops(values["targets"], values["keys"], *map(values.get, ("public_url", "host", "port")))
    if values.get("intake_token") is not None and values["intake_token"] == values.get("api_token"):
        problems.append(_SAME)
    problems = [*find_unknown(environment, _names(), values["rules_file"].variables), *problems]
    if problems:
        raise SettingsError(problems)
    return Settings(**values)


def _names() -> set[str]:
    """Return the names of all options, and those of the files of secrets."""
    return {option.name for option in OPTIONS.values()} | {
        f"{option.name}_FILE" for option in OPTIONS.values() if option.is_secret
    }


def _read_rules_file(path: Path | None, problems: list[str]) -> RulesFile:
    """Read the file at *path*, none without one; add to *problems* what is wrong with it."""
    try:
        return RulesFile() if path is None else read_rules_file(path)
    except RulesFileError as error:
        problems += error.problems
    except OSError as error:
        problems.append(f"MAYFLY_CONFIG names {path}, which cannot be read: {error.strerror}")
    return RulesFile()


def require_webhook_secret(settings: Settings) -> None:
    """Raise SettingsError unless each account has a secret to verify webhooks with."""
    _require(
        f"{one.secret_name} is not set: copy the whsec_… secret from sync.so/settings/webhooks into it"
        for one in settings.accounts
        if not one.keys.webhook_secrets
    )


def require_key_or_secret(settings: Settings) -> None:
    """Raise SettingsError unless each account has a webhook secret, or an API key to fetch it with."""
    _require(
        f"{one.secret_name} is not set: copy the whsec_… secret from sync.so/settings/webhooks into it, or set "
        f"{one.key_name}, with which Mayfly fetches it"
        for one in settings.accounts
        if one.keys == Keys()
    )


def require_api_key(settings: Settings) -> None:
    """Raise SettingsError unless each account has an API key to delete with."""
    _require(
        f"{one.key_name} is not set: put an API key of your sync.so organisation into it"
        for one in settings.accounts
        if one.keys.api_key is None
    )


def _require(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise SettingsError(found)


def _option_text(option: Option, environment: Mapping[str, str]) -> str:
    text = environment.get(option.name, "").strip()
    path = environment.get(f"{option.name}_FILE", "").strip() if option.is_secret else ""
    if not text and path:
        text = Path(path).read_text(encoding="utf-8").strip()
        if not text:
            raise OSError(errno.ENODATA, "it is empty")
    return text


# Of a worker by itself, which serves its health and metrics: beside an api on one machine it needs a port of its own.
WORKER_DEFAULTS: Final[Mapping[str, str]] = MappingProxyType({"MAYFLY_PORT": "8081"})

_SAME: Final = (
    "MAYFLY_INTAKE_TOKEN is the same as MAYFLY_API_TOKEN: whoever may only add generations could then delete them; "
    "choose another one"
)
_DURATION = "a duration such as 90s, 15m, 24h, 7d, 2w"
OPTIONS: Final[Mapping[str, Option]] = {
    "api_key": Option("SYNC_API_KEY", read_header_value, None, "the whole API key, printable ASCII", is_secret=True),
    "webhook_secrets": Option(
        "SYNC_WEBHOOK_SECRET",
        read_secrets,
        None,
        "the whole whsec_… secret, several separated by commas",
        is_secret=True,
    ),
    "base_url": Option(
        "SYNC_BASE_URL",
        read_base_url,
        "https://api.sync.so",
        "an https URL without /v2 (http only within your own network)",
    ),
    "ttl": Option("MAYFLY_TTL", parse_ttl, "24h", f"{_DURATION}, or forever"),
    "min_ttl": Option("MAYFLY_MIN_TTL", duration_reader(timedelta(seconds=1)), "1m", _DURATION),
    "webhook_tolerance": Option("MAYFLY_WEBHOOK_TOLERANCE", duration_reader(timedelta(seconds=1)), "5m", _DURATION),
    "database_url": Option(
        "MAYFLY_DATABASE_URL", read_database_url, None, "postgresql://… or sqlite:///path", is_secret=True
    ),
    "redis_url": Option(
        "MAYFLY_REDIS_URL",
        read_redis_url,
        None,
        "redis://…, rediss://…, unix://… or sentinel://…",
        is_secret=True,
    ),
    "data_dir": Option("MAYFLY_DATA_DIR", Path, "./.mayfly", "a folder"),
    "host": Option("MAYFLY_HOST", str, "127.0.0.1", "an address to listen on"),
    "port": Option("MAYFLY_PORT", number_reader(0, 65535), "8080", "a port number"),
    "api_token": Option(
        "MAYFLY_API_TOKEN",
        read_token,
        None,
        "16 or more printable ASCII characters without spaces",
        is_secret=True,
    ),
    "intake_token": Option(
        "MAYFLY_INTAKE_TOKEN",
        read_token,
        None,
        "16 or more printable ASCII characters without spaces",
        is_secret=True,
    ),
    "is_dry_run": Option("MAYFLY_DRY_RUN", read_flag, "false", "true or false"),
    "api_rate": Option("MAYFLY_API_RATE", read_rate, "300/minute", "a number per second, minute or hour: 300/minute"),
    "max_deletes_per_day": Option("MAYFLY_MAX_DELETES_PER_DAY", number_reader(0, 10**9), None, "a whole number"),
    "give_up_after": Option("MAYFLY_GIVE_UP_AFTER", duration_reader(timedelta(minutes=1)), "7d", _DURATION),
    "concurrency": Option("MAYFLY_CONCURRENCY", number_reader(1, 1000), "50", "a whole number from 1 to 1000"),
    "queue_horizon": Option("MAYFLY_QUEUE_HORIZON", duration_reader(timedelta(minutes=1)), "48h", _DURATION),
    "record_ttl": Option("MAYFLY_RECORD_TTL", parse_ttl, "forever", f"{_DURATION}, or forever"),
    "config_path": Option("MAYFLY_CONFIG", Path, None, "a TOML file with rules, accounts and targets"),
    "public_url": Option("MAYFLY_PUBLIC_URL", read_public_url, None, "an https URL without a query"),
    "log_format": Option("MAYFLY_LOG_FORMAT", read_log_format, None, "console or json"),
}
