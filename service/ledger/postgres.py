"""PostgreSQL: asyncpg runs the statements on the event loop."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Generic, TypeVar

import asyncpg
from sqlalchemy import URL, Connection, ExceptionContext, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

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


# After a failover old sessions are read-only (25006) or ended by the server (57P01 to 57P03), and new ones may write.
_STALE_STATES: Final = ("25006", "57P01", "57P02", "57P03")
# A commit returns after it is on the disk, whatever the role or the database sets.
_SESSION: Final = {"synchronous_commit": "on"}


class PostgresDatabase:
    """PostgreSQL 14 or later through asyncpg."""

    def __init__(self, url: URL, write_seconds: float) -> None:
        self._write_seconds = write_seconds
        # asyncpg parses the URL: it knows all of libpq's parameters, of which SQLAlchemy passes on some.
        dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        options: dict[str, Any] = {"timeout": 5, "command_timeout": write_seconds, "server_settings": _SESSION}
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=partial(_connect, dsn, options),
            pool_size=10,
            max_overflow=5,
            pool_timeout=WRITE_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
        )
        # See SQLAlchemy's documentation: "DialectEvents.handle_error", "is_disconnect".
        event.listen(self._engine.sync_engine, "handle_error", _mark_stale)
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


async def _connect(dsn: str, options: dict[str, Any]) -> asyncpg.Connection:
    connection = await asyncpg.connect(dsn, **options)
    try:
        # Not as a parameter of the connection, which poolers refuse.
        await connection.execute(f"SET idle_in_transaction_session_timeout = '{ABANDONED_SECONDS}s'")
    except BaseException:
        connection.terminate()
        raise
    return connection


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
