"""Opening the ledger's database and running statements in it: SQLite in threads, PostgreSQL on the event loop.

Statements are plain functions of a Connection, written once. On SQLite all writes of a process go through one thread,
so a whole transaction costs one hop and writers queue fairly; on PostgreSQL asyncpg runs the same functions.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

T = TypeVar("T")

# A writer in another process is waited for this long; a longer lock is answered 503 or tried again later.
BUSY_TIMEOUT_SECONDS = 5.0
WRITE_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 10.0
# An index on a table of millions takes minutes; nobody waits for an answer meanwhile.
MIGRATION_SECONDS = 3600.0
_LOOK_AGAIN_SECONDS = 0.001
_READ_THREADS = 4
# The classes of SQL states for values that do not fit: data exceptions, and limits such as an index entry's.
_REFUSED_STATES = ("22", "54")


class ConflictError(Exception):
    """Another process wrote the same key first; nothing was written, and a look at the ledger tells more."""


class RefusedDataError(Exception):
    """The database cannot hold a value; the transaction it was in is undone, and would be again."""


class LedgerUnavailableError(Exception):
    """The database cannot be reached, or cannot commit; nothing is known to have been written."""


@runtime_checkable  # Litestar checks what it injects
class Database(Protocol):
    """A database that runs functions of a connection, each in a transaction of its own."""

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Run *function* in a transaction and return its result once that is durable.

        Raises: ConflictError, RefusedDataError, LedgerUnavailableError; whatever *function* raises. Nothing is
        written then.
        """

    async def read(self, function: Callable[[Connection], T]) -> T:
        """Run *function* on a consistent view and return its result.

        Raises: LedgerUnavailableError.
        """


@asynccontextmanager
async def open_database(url: URL, *, write_seconds: float = WRITE_TIMEOUT_SECONDS) -> AsyncIterator[Database]:
    """Open the database at *url*, ``sqlite`` or ``postgresql``; it connects at the first statement.

    A write may take *write_seconds*.
    """
    is_sqlite = url.get_backend_name() == "sqlite"
    database = SqliteDatabase(url, write_seconds) if is_sqlite else PostgresDatabase(url, write_seconds)
    try:
        yield database
    finally:
        await database.close()


class SqliteDatabase:
    """SQLite in WAL mode with every commit synced to the disk."""

    def __init__(self, url: URL, write_seconds: float = WRITE_TIMEOUT_SECONDS) -> None:
        self._write_seconds = write_seconds
        self._engine = create_engine(
            url.set(drivername="sqlite"),
            connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
            pool_size=_READ_THREADS + 1,
            hide_parameters=True,
        )
        event.listen(self._engine, "connect", _prepare_sqlite)
        event.listen(self._engine, "begin", _begin_sqlite)
        self._writing_engine = self._engine.execution_options(is_writing=True)
        self._writing: Connection | None = None
        self._writer = ThreadPoolExecutor(1, "ledger-writer")
        self._readers = ThreadPoolExecutor(_READ_THREADS, "ledger-reader")

    async def write(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        return await self._run(self._writer, function, self._write_seconds)

    async def read(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        return await self._run(self._readers, function, READ_TIMEOUT_SECONDS)

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[Connection], T], limit: float) -> T:
        loop = asyncio.get_running_loop()
        transaction = partial(self._transaction, function, is_write=threads is self._writer)
        try:
            async with asyncio.timeout(limit):
                return await loop.run_in_executor(threads, transaction)
        except (SQLAlchemyError, sqlite3.Error, TimeoutError) as error:
            raise _translated(error) from error

    def _transaction(self, function: Callable[[Connection], T], *, is_write: bool) -> T:
        if is_write:
            return self._written(function)
        with self._engine.connect() as connection:
            return _in_transaction(connection, function)

    def _written(self, function: Callable[[Connection], T]) -> T:
        """Run a write on the writer's own connection, which stays out of the pool and so costs a fifth less."""
        if self._writing is None:
            self._writing = self._writing_engine.connect()
            self._writing.connection.cursor().execute("PRAGMA busy_timeout=0")  # see _begin_writing
        try:
            return _in_transaction(self._writing, function)
        except BaseException:
            # Whatever it was, the next write begins with a connection that nothing has happened to.
            self._close_writing()
            raise

    def _close_writing(self) -> None:
        if self._writing is not None:
            self._writing.close()
            self._writing = None

    async def close(self) -> None:
        """Wait for what is under way, then close."""
        self._writer.submit(self._close_writing)
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._readers.shutdown)
        self._engine.dispose()


class PostgresDatabase:
    """PostgreSQL 14 or later through asyncpg."""

    def __init__(self, url: URL, write_seconds: float = WRITE_TIMEOUT_SECONDS) -> None:
        self._write_seconds = write_seconds
        import asyncpg  # noqa: PLC0415 - 8 MB that SQLite has no use for
        from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415

        # The driver itself reads the URL: it knows libpq's parameters, of which SQLAlchemy hands on some.
        dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=partial(asyncpg.connect, dsn, timeout=5, command_timeout=write_seconds),
            pool_size=10,
            max_overflow=5,
            pool_timeout=WRITE_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
        )

    async def write(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        return await self._run(function, self._write_seconds)

    async def read(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        return await self._run(function, READ_TIMEOUT_SECONDS)

    async def _run(self, function: Callable[[Connection], T], limit: float) -> T:
        try:
            async with asyncio.timeout(limit), self._engine.connect() as connection:
                return await connection.run_sync(_in_transaction, function)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            raise _translated(error) from error

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


def _in_transaction(connection: Connection, function: Callable[[Connection], T]) -> T:
    with connection.begin():
        return function(connection)


def _prepare_sqlite(connection: Any, _record: object) -> None:  # noqa: ANN401 - the driver's own type
    connection.isolation_level = None  # transactions begin where _begin_sqlite says, not where the driver guesses
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",  # a commit survives a power cut; WAL's usual NORMAL may lose the last ones
        "fullfsync=1",  # macOS: reach the disk, not only its cache
        "cache_size=-2048",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # Straight to the driver: SQLAlchemy's way there would be a tenth of a small transaction's time.
    cursor = connection.connection.cursor()
    if connection.get_execution_options().get("is_writing", False):
        _begin_writing(cursor)
    else:
        cursor.execute("BEGIN")


def _begin_writing(cursor: DBAPICursor) -> None:
    """Take the write lock, however busily another process writes.

    SQLite's own wait looks every 0.1 s in the end and so misses the moments between the commits of a busy worker.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            # A deferred transaction that reads first cannot become a writer later: it fails at once as "locked".
            cursor.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_AGAIN_SECONDS)
        else:
            return


def _translated(error: Exception) -> Exception:
    """Translate a database error without its statement and parameters, which hold URLs and texts of users."""
    if isinstance(error, (IntegrityError, sqlite3.IntegrityError)):
        return ConflictError("the key is taken")
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    if str(getattr(cause, "sqlstate", "")).startswith(_REFUSED_STATES) or isinstance(cause, sqlite3.DataError):
        return RefusedDataError("the database cannot hold one of the values")
    if isinstance(error, TimeoutError):
        return LedgerUnavailableError("the database did not answer in time")
    return LedgerUnavailableError(f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"[:300])
