"""PostgreSQL: asyncpg runs the statements on the event loop."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import asyncpg
from sqlalchemy import URL, Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.ledger.database import READ_TIMEOUT_SECONDS, WRITE_TIMEOUT_SECONDS, translate_error

T = TypeVar("T")

# How long a transaction keeps its locks whose process froze between two statements, or whose machine died: without it
# as long as TCP takes to notice, which is two hours.
ABANDONED_SECONDS: Final = 20


class PostgresDatabase:
    """PostgreSQL 14 or later through asyncpg."""

    def __init__(self, url: URL, write_seconds: float) -> None:
        self._write_seconds = write_seconds
        # asyncpg parses the URL: it knows all of libpq's parameters, of which SQLAlchemy passes on some.
        dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=partial(_connect, dsn, write_seconds),
            pool_size=10,
            max_overflow=5,
            pool_timeout=WRITE_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
        )
        # All statements of a read see one snapshot.
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    async def write(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        return await self._run(self._engine, function, self._write_seconds)

    async def read(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        return await self._run(self._reading, function, READ_TIMEOUT_SECONDS)

    async def _run(self, engine: AsyncEngine, function: Callable[[Connection], T], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds), engine.begin() as connection:
                return await connection.run_sync(function)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            raise translate_error(error) from error

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


async def _connect(dsn: str, command_seconds: float) -> asyncpg.Connection:
    connection = await asyncpg.connect(dsn, timeout=5, command_timeout=command_seconds)
    try:
        # Not as a parameter of the connection, which poolers refuse.
        await connection.execute(f"SET idle_in_transaction_session_timeout = '{ABANDONED_SECONDS}s'")
    except BaseException:
        connection.terminate()
        raise
    return connection
