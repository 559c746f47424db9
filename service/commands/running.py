"""How commands start and fail: settings, one line per problem, exit codes.

Exit codes: 0 success, 2 invalid settings, 130 Ctrl-C, 1 anything else.
"""

import asyncio
import getpass
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import click
import msgspec
import structlog

from service.config.rules_advice import find_warnings
from service.config.settings import WORKER_DEFAULTS, Settings, SettingsError, read_settings
from service.core.errors import ExplainedError
from service.ledger import migrating
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.migrating import SchemaError
from service.ledger.opening import open_database
from service.runtime.logging import configure_logging
from service.runtime.terminal import plain, plain_json

log = structlog.get_logger()

T = TypeVar("T")

EXIT_FAILED: Final = 1
EXIT_SETTINGS: Final = 2
EXIT_INTERRUPTED: Final = 130

# The same option for all commands.
as_json = click.option("--json", "is_json", is_flag=True, help="Print JSON, for scripts.")
ACCOUNT_HELP: Final = "The account, as in [[account]]; the only one, else default, unless given."
of_account = click.option("--account", metavar="NAME", help=ACCOUNT_HELP)


def settings_or_exit(
    *requirements: Callable[[Settings], None],
    environment: Mapping[str, str] = os.environ,
    is_worker: bool = False,
) -> Settings:
    """Read the settings and check *requirements*; print each problem on a line and exit with code 2.

    *is_worker*: with the default port of a worker by itself.
    """
    try:
        settings = read_settings(environment, defaults=WORKER_DEFAULTS if is_worker else {})
    except SettingsError as error:
        _exit_with(error.problems)
    if problems := [problem for require in requirements for problem in _missing_settings(require, settings)]:
        _exit_with(problems)
    configure_logging(settings.log_format)
    return settings


def warn_of_policy(settings: Settings) -> None:
    """Log which rules are in force, and what is odd about them."""
    file = settings.rules_file
    if file.path is None:
        return
    log.info("policy.read", file=str(file.path), rules=len(file.rules.rules), accounts=len(file.accounts))
    for warning in find_warnings(file, min_ttl=settings.min_ttl, now=datetime.now(UTC)):
        log.warning("policy.doubtful", warning=warning)


def _missing_settings(require: Callable[[Settings], None], settings: Settings) -> list[str]:
    try:
        require(settings)
    except SettingsError as error:
        return error.problems
    return []


def _exit_with(problems: list[str]) -> NoReturn:
    for problem in problems:
        click.echo(f"mayfly: {plain(problem)}", err=True)
    sys.exit(EXIT_SETTINGS)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run *work*, on uvloop where there is one, and return its result; print an error in one line, exit with code 1."""
    try:
        import uvloop  # noqa: PLC0415 - not on Windows
    except ImportError:
        runner = asyncio.Runner()
    else:
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    try:
        with runner:
            return runner.run(work)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the outermost handler
        _fail_with(error)


def on_stop(act: Callable[[], object]) -> None:
    """Call *act* on the running loop at Ctrl-C, SIGTERM or SIGHUP, also if the shell ignores Ctrl-C or this is pid 1.

    It is called once: uvicorn raises the signal again after it has stopped, during an orderly shutdown.
    """
    pending = [act]

    def handle() -> None:
        if pending:
            pending.pop()()

    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it, and means it
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, handle)


def fail(problem: str) -> NoReturn:
    """Print *problem* in one line and exit with code 1."""
    click.echo(f"mayfly: {plain(problem)}", err=True)
    sys.exit(EXIT_FAILED)


def _fail_with(error: BaseException) -> NoReturn:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, SettingsError):
        _exit_with(error.problems)
    if isinstance(error, LedgerUnavailableError):
        fail(f"the ledger cannot be opened: {error}; check MAYFLY_DATABASE_URL")
    if isinstance(error, ExplainedError):
        fail(str(error))
    if isinstance(error, OSError):
        fail(f"{error.strerror or error}: {error.filename or 'check MAYFLY_HOST and MAYFLY_PORT'}")
    log.error("mayfly.crashed", exc_info=error)
    sys.exit(EXIT_FAILED)


def is_ledger_missing(settings: Settings) -> bool:
    """Whether the ledger is an SQLite file that does not exist yet; opening it would create an empty one."""
    url = settings.ledger_url
    return url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file()


def own_url(settings: Settings) -> str:
    """Return the URL at which a Mayfly with these settings answers on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


@asynccontextmanager
async def open_ledger(settings: Settings) -> AsyncIterator[Database]:
    """Open the existing ledger.

    Raises: SchemaError if there is none, or its tables do not fit this release; LedgerUnavailableError.
    """
    if is_ledger_missing(settings):
        raise SchemaError(_no_ledger(settings))
    async with open_database(settings.ledger_url) as database:
        await database.read(migrating.check)
        yield database


def _no_ledger(settings: Settings) -> str:
    """Say where no ledger is, and that another current directory has another one: a second, empty one is no help."""
    where = f"there is no ledger at {Path(settings.ledger_url.database or '').absolute()} yet"
    if settings.database_url is None and not settings.data_dir.is_absolute():
        where += f": MAYFLY_DATA_DIR, {settings.data_dir}, is relative to the current directory"
    return f"{where}; mayfly up or mayfly migrate makes it"


def actor() -> str:
    """Return the user of the command line, for the audit trail."""
    try:
        return f"{getpass.getuser()} (command line)"
    except (KeyError, OSError):  # a container's uid without a name
        return f"uid {os.getuid()} (command line)"


def print_json(value: object) -> None:
    """Print *value* as JSON, indented on a terminal; control characters in its texts are escaped as JSON does."""
    encoded = msgspec.json.encode(value)
    click.echo(plain_json((msgspec.json.format(encoded, indent=2) if sys.stdout.isatty() else encoded).decode()))
