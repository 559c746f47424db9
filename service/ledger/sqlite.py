"""SQLite: one thread writes, others read."""

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from service.ledger.database import (
    READ_TIMEOUT_SECONDS,
    LedgerMovedError,
    LedgerUnavailableError,
    UnknownOutcomeError,
    translate_error,
)

T = TypeVar("T")

# How long to wait for a lock of another process; after that a webhook is answered 503, an attempt is retried.
BUSY_TIMEOUT_SECONDS = 5.0
_TRY_AGAIN_SECONDS = 0.001
_READ_THREADS = 4


class SqliteDatabase:
    """SQLite in WAL mode; every commit is synced to the disk."""

    def __init__(self, url: URL, write_seconds: float) -> None:
        self._write_seconds = write_seconds
        if url.database:
            _make_private(url.database)
        self._files = _Files(url.database)
        self._writing = _engine(url, connections=1, busy_seconds=0, begin=_begin_immediate)
        self._reading = _engine(url, connections=_READ_THREADS, busy_seconds=BUSY_TIMEOUT_SECONDS, begin=_begin)
        event.listen(self._writing, "connect", self._files.forget_wal)
        self._writer = ThreadPoolExecutor(1, "ledger-writer")
        self._readers = ThreadPoolExecutor(_READ_THREADS, "ledger-reader")
        self._is_closed = False
        # The thread starts here: if it could not start later, a write would stay in the executor's queue.
        self._writer.submit(int)

    async def write(self, function: Callable[[Connection], T]) -> T:
        """See Database. Neither a timeout nor cancelling the caller stops a write that has started."""
        try:
            return await self._run(self._writer, self._write, function, self._write_seconds)
        except LedgerUnavailableError as error:
            if isinstance(error.__cause__, TimeoutError):
                raise UnknownOutcomeError(str(error)) from error
            raise

    async def read(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        return await self._run(self._readers, self._read, function, READ_TIMEOUT_SECONDS)

    async def _run(
        self,
        threads: ThreadPoolExecutor,
        call: Callable[[Callable[[Connection], T]], T],
        function: Callable[[Connection], T],
        seconds: float,
    ) -> T:
        if self._is_closed:
            raise LedgerUnavailableError("the ledger is closed")
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(threads, call, function)
        except (SQLAlchemyError, sqlite3.Error, TimeoutError) as error:
            raise translate_error(error) from error

    def _write(self, function: Callable[[Connection], T]) -> T:
        if self._is_closed:
            raise LedgerUnavailableError("the ledger is closed")
        self._files.check()
        with self._writing.begin() as connection:
            self._files.check_all()
            result = function(connection)
            self._files.check_all()
        self._files.check_all()  # moved during the commit
        return result

    def _read(self, function: Callable[[Connection], T]) -> T:
        self._files.check()
        with self._reading.begin() as connection:
            return function(connection)

    async def close(self) -> None:
        """Wait for calls in progress, then close; queued writes are refused."""
        self._is_closed = True
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._readers.shutdown)
        self._writing.dispose()
        self._reading.dispose()


class _Files:
    """Notices when the ledger's file, or its write-ahead log, is moved or removed: SQLite goes on without them.

    Two calls of stat() take 4 µs; a commit waits for the disk.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path if path and path != ":memory:" else None
        self._main = self._identity("")
        self._wal: tuple[int, int] | None = None

    def check(self) -> None:
        """Return if the file is the one that was opened; before a connection, which would make an empty one.

        Raises: LedgerMovedError.
        """
        main = self._identity("")
        self._main = self._main or main
        if main != self._main:
            raise LedgerMovedError("the ledger's file was taken away: put it back, or restart Mayfly with another one")

    def check_all(self) -> None:
        """Do the same for both files; call it in a write transaction, which opens the log.

        Raises: LedgerMovedError.
        """
        self.check()
        wal = self._identity("-wal")
        self._wal = self._wal or wal
        if wal != self._wal:
            raise LedgerMovedError("the ledger's write-ahead log was taken away: restart Mayfly")

    def forget_wal(self, _connection: object, _record: object) -> None:
        """Accept another log: SQLite removes it with the last connection, and a new connection makes one."""
        self._wal = None

    def _identity(self, suffix: str) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            status = os.stat(f"{self._path}{suffix}")
        except OSError:
            return None
        return status.st_dev, status.st_ino


def _make_private(path: str) -> None:
    """Create the file with mode 0600 if it is missing; SQLite gives the -wal and -shm files the same mode.

    An existing file is not opened: closing it would drop the locks that SQLite has on it in this process.
    """
    with contextlib.suppress(OSError):  # SQLite reports it when it opens the file
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _engine(url: URL, *, connections: int, busy_seconds: float, begin: Callable[[Connection], None]) -> Engine:
    engine = create_engine(
        url.set(drivername="sqlite"),
        connect_args={"timeout": busy_seconds, "check_same_thread": False},
        pool_size=connections,
        max_overflow=0,
        hide_parameters=True,
    )
    # See SQLAlchemy's documentation: "Pysqlite", "Enabling Non-Legacy SQLite Transactional Modes".
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", begin)
    return engine


def _set_pragmas(connection: Any, _record: object) -> None:  # noqa: ANN401 - the driver's own type
    connection.isolation_level = None  # the driver starts no transactions; _begin() does
    _retry_while_busy(
        lambda: connection.execute("PRAGMA journal_mode=WAL")
    )  # the one that SQLite itself does not wait for
    for pragma in (
        "synchronous=FULL",  # a commit survives a power cut; with NORMAL, the default of WAL, the last ones may be lost
        "fullfsync=1",  # macOS: flush the disk's cache, too
        "cache_size=-2048",
        # In pages; the commit that reaches it waits for the checkpoint.
        "wal_autocheckpoint=3000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: Connection) -> None:
    # A deferred transaction that reads first and writes later fails at once as "locked".
    _retry_while_busy(lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"))


def _retry_while_busy(call: Callable[[], T]) -> T:
    """Repeat *call* while another process has the lock, for up to BUSY_TIMEOUT_SECONDS.

    SQLite's own wait polls every 0.1 s at the end, and so misses the gaps between the commits of a busy worker.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            return call()
        except (OperationalError, sqlite3.OperationalError) as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
        time.sleep(_TRY_AGAIN_SECONDS)


def _is_busy(error: OperationalError | sqlite3.OperationalError) -> bool:
    cause = error.orig if isinstance(error, OperationalError) else error
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY  # or an extended code of it
