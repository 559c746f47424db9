"""PostgreSQL: asyncpg runs the statements on the event loop."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import asyncpg
from sqlalchemy import URL, Connection, Dialect, ExceptionContext, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.config.database_url import POOLED_OPTION
from service.ledger.database import (
    READ_TIMEOUT_SECONDS,
    WRITE_TIMEOUT_SECONDS,
    LedgerUnavailableError,
    UnknownOutcomeError,
    translate_error,
)

T = TypeVar("T")

# How long a transaction keeps its locks whose process froze between two statements, or whose machine died: without it
# as long as TCP takes to notice, which is two hours.
ABANDONED_SECONDS: Final = 20
# How long a statement waits for a locked row. Commits take milliseconds: who holds a row for longer may be frozen, and
# those that share a group commit with that row must not wait for it until their own timeouts.
LOCK_SECONDS: Final = 0.5
# For one connection, unless the URL has connect_timeout.
_CONNECT_SECONDS: Final = 5.0

# After a failover old sessions are read-only (25006) or ended by the server (57P01 to 57P03), and new ones may write.
_STALE_STATES: Final = ("25006", "57P01", "57P02", "57P03")
# Behind a pooler the next transaction may run on another server connection. A prepared statement without a name needs
# no later one: PostgreSQL keeps it until the next one is parsed, so that none is left behind on the server.
# See "Prepared Statement Name with PGBouncer" in SQLAlchemy's documentation of asyncpg.
_POOLED: Final = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: "",
}
# A commit returns after it is on the disk, whatever the role or the database sets.
_SETTINGS: Final = text(
    "SELECT set_config('synchronous_commit', 'on', true), set_config('lock_timeout', :locked, true), "
    "set_config('idle_in_transaction_session_timeout', :abandoned, true)"
)


class PostgresDatabase:
    """PostgreSQL 14 or later through asyncpg, also behind a pooler that pools transactions, such as pgbouncer."""

    def __init__(self, url: URL, write_seconds: float) -> None:
        self._write_seconds = write_seconds
        self._is_pooled = url.query.get(POOLED_OPTION) == "true"
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            connect_args=_connect_args(url) | {"command_timeout": write_seconds},
            pool_size=10,
            max_overflow=5,
            pool_timeout=WRITE_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
            isolation_level="READ COMMITTED",  # whatever the role or the database sets
        )
        # See SQLAlchemy's documentation: "DialectEvents.handle_error", "is_disconnect".
        event.listen(self._engine.sync_engine, "handle_error", _mark_stale)
        event.listen(self._engine.sync_engine, "do_connect", self._connect)
        event.listen(self._engine.sync_engine, "begin", _set_locally)
        # All statements of a read see one snapshot.
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    async def write(self, function: Callable[[Connection], T]) -> T:
        """See Database. If its connection turns out to be stale, *function* runs once more on a new one."""
        attempt = _Attempt(function)
        try:
            async with asyncio.timeout(self._write_seconds):
                try:
                    return await attempt.run(self._engine)
                except DBAPIError as error:
                    if not error.connection_invalidated or attempt.is_committing:
                        raise
                    return await attempt.run(self._engine)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            translated = translate_error(error)
            if attempt.is_committing and isinstance(translated, LedgerUnavailableError):
                raise UnknownOutcomeError(str(translated)) from error
            raise translated from error

    async def read(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_SECONDS), self._reading.begin() as connection:
                return await connection.run_sync(function)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            raise translate_error(error) from error

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    def _connect(
        self, dialect: Dialect, _record: object, arguments: list[Any], options: dict[str, Any]
    ) -> DBAPIConnection:
        """Connect, as "DialectEvents.do_connect" is documented; again without named statements if there is a pooler."""
        if not self._is_pooled:
            connection = dialect.connect(*arguments, **options)
            if _is_direct(connection):
                return connection
            connection.close()
            self._is_pooled = True
        return dialect.connect(*arguments, **options | _POOLED)


def _connect_args(url: URL) -> dict[str, Any]:
    """Return the arguments of asyncpg.connect(). It parses the URL: it knows most of libpq's parameters."""
    dsn = url.set(drivername="postgresql").difference_update_query([POOLED_OPTION, "connect_timeout"])
    seconds = float(str(url.query.get("connect_timeout", 0)))
    arguments: dict[str, Any] = {"timeout": seconds or _CONNECT_SECONDS}
    if url.query.get("sslrootcert") == "system":
        arguments["ssl"] = _trust_system(url)
        dsn = dsn.difference_update_query(["sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword"])
    return arguments | {"dsn": dsn.render_as_string(hide_password=False)}


def _trust_system(url: URL) -> ssl.SSLContext:
    """Return the context for ``sslrootcert=system``, which asyncpg takes for a file."""
    context = ssl.create_default_context()
    certificate, key, password = (str(url.query.get(name, "")) for name in ("sslcert", "sslkey", "sslpassword"))
    if certificate:
        context.load_cert_chain(certificate, key or None, password)
    return context


def _is_direct(connection: DBAPIConnection) -> bool:
    """Whether *connection* leads to a server process itself: a pooler gives itself another process number.

    Raises: LedgerUnavailableError.
    """
    try:
        return bool(connection.run_async(_has_own_process))
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise translate_error(error) from error


async def _has_own_process(connection: asyncpg.Connection) -> bool:
    # A transaction, and no name: with either of them missing this would itself fail behind a pooler.
    async with connection.transaction():
        statement = await connection.prepare("SELECT pg_backend_pid()", name="")
        return bool(await statement.fetchval() == connection.get_server_pid())


def _set_locally(connection: Connection) -> None:
    """Set what each transaction needs, for itself alone: behind a pooler the next one may have another session."""
    connection.execute(_SETTINGS, {"abandoned": f"{ABANDONED_SECONDS}s", "locked": f"{LOCK_SECONDS * 1000:.0f}ms"})


class _Attempt(Generic[T]):
    """Runs one function in a transaction, and knows whether its commit has begun."""

    def __init__(self, function: Callable[[Connection], T]) -> None:
        self._function = function
        self.is_committing = False

    async def run(self, engine: AsyncEngine) -> T:
        async with engine.begin() as connection:
            result = await connection.run_sync(self._function)
            self.is_committing = True
        return result


def _mark_stale(context: ExceptionContext) -> None:
    """Let SQLAlchemy drop the connection and all of the pool that are as old."""
    if getattr(context.original_exception, "sqlstate", None) in _STALE_STATES:
        context.is_disconnect = True
