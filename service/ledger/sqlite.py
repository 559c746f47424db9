"""SQLite: the writes of a process take turns at one connection; all but the statements of quick ones run in threads."""

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from service.ledger.bulk import driver_of
from service.ledger.database import READ_TIMEOUT_SECONDS, REMEMBERED, LedgerUnavailableError, translated
from service.ledger.thread import CallingThread
from service.tasks import settle

T = TypeVar("T")

# A writer in another process is waited for this long; a longer lock is answered 503 or tried again later.
BUSY_TIMEOUT_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 0.001
# A quick write that takes so long meets a slow disk; the next ones go to the thread for a while.
_SLOW_SECONDS = 0.05
_SLOW_FOR_SECONDS = 10.0
_READ_THREADS = 4


class SqliteDatabase:
    """SQLite in WAL mode with every commit synced to the disk."""

    def __init__(self, url: URL, write_seconds: float) -> None:
        self._write_seconds = write_seconds
        if url.database:
            _make_private(url.database)
        self._engine = create_engine(
            url.set(drivername="sqlite"),
            connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
            pool_size=_READ_THREADS + 1,
            hide_parameters=True,
        )
        event.listen(self._engine, "connect", _prepare_sqlite)
        event.listen(self._engine, "begin", _begin_sqlite)
        self._writing: Connection | None = None
        self._quick_again_at = 0.0  # on the monotonic clock
        self._turn = asyncio.Lock()
        self._is_closed = False
        self._writer = CallingThread("ledger-writer")
        self._readers = ThreadPoolExecutor(_READ_THREADS, "ledger-reader")

    async def write(self, function: Callable[[Connection], T], *, is_quick: bool = False) -> T:
        """See Database."""
        try:
            async with asyncio.timeout(self._write_seconds):
                await self._turn.acquire()
                if self._is_closed:
                    self._turn.release()
                    raise LedgerUnavailableError("the ledger is closed")
                return await self._started(function, is_quick=is_quick)
        except (SQLAlchemyError, sqlite3.Error, TimeoutError) as error:
            raise translated(error) from error

    async def read(self, function: Callable[[Connection], T]) -> T:
        """See Database."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, function)
        except (SQLAlchemyError, sqlite3.Error, TimeoutError) as error:
            raise translated(error) from error

    def _read(self, function: Callable[[Connection], T]) -> T:
        with self._engine.connect() as connection, connection.begin():
            return function(connection)

    def _started(self, function: Callable[[Connection], T], *, is_quick: bool) -> asyncio.Future[T]:
        """Start a write whose turn it is. Whoever stops waiting does not stop it: the turn ends when it does.

        Quick statements run here and now, and the thread has only the commit, which waits for the disk. In the thread
        each statement would give up the interpreter's lock and have to win it back from a busy loop: measured with 32
        connections, a webhook took 185 µs of processor time that way and 134 µs this way.
        """
        try:
            rest = (self._stated(function) if is_quick else None) or partial(self._written, function)
            future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._writer.call(rest, partial(self._ended, future))
        except BaseException:
            self._undo()  # what was stated has no commit any more
            self._turn.release()
            raise
        return future

    def _ended(self, future: asyncio.Future[T], outcome: T | BaseException) -> None:
        self._turn.release()
        settle(future, outcome)

    def _stated(self, function: Callable[[Connection], T]) -> Callable[[], T] | None:
        """Run *function* and return the commit that is left to do; None if there is something to wait for first."""
        begun_at = time.monotonic()
        if self._writing is None or begun_at < self._quick_again_at:
            return None
        with self._undone_on_error():
            try:
                _begin_writing(self._writing)
            except sqlite3.OperationalError as error:
                if _is_busy(error):
                    return None
                raise
            result = function(self._writing)
        if time.monotonic() - begun_at > _SLOW_SECONDS:
            self._quick_again_at = time.monotonic() + _SLOW_FOR_SECONDS
        return partial(self._committed, self._writing, result)

    def _written(self, function: Callable[[Connection], T]) -> T:
        if self._writing is None:
            # The writer's own connection, which stays out of the pool and so costs a fifth less.
            self._writing = self._engine.connect()
            driver_of(self._writing).execute("PRAGMA busy_timeout=0")
        with self._undone_on_error():
            _patiently(partial(_begin_writing, self._writing))
            result = function(self._writing)
        return self._committed(self._writing, result)

    def _committed(self, connection: Connection, result: T) -> T:
        with self._undone_on_error():
            connection.commit()  # to SQLAlchemy there is a transaction only if a statement went by its way
            driver_of(connection).commit()
        return result

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        """Roll back, in SQLite itself as well: to SQLAlchemy a commit that failed is the end of its transaction."""
        if self._writing is None:
            return
        try:
            self._writing.info.pop(REMEMBERED, None)
            self._writing.rollback()
            driver_of(self._writing).rollback()
        except Exception:  # noqa: BLE001 - whatever it is, that connection is of no more use
            self._writing.invalidate()
            self._close_writing()

    def _close_writing(self) -> None:
        if self._writing is not None:
            self._writing.close()
            self._writing = None

    async def close(self) -> None:
        """Wait for what is under way, then close; what waits for its turn is refused."""
        async with self._turn:
            self._is_closed = True
        if self._writing is not None:
            self._writer.call(self._close_writing, lambda _: None)
        await self._writer.close()
        await asyncio.to_thread(self._readers.shutdown)
        self._engine.dispose()


def _make_private(path: str) -> None:
    """Make the file, if there is none yet, for its owner alone; SQLite gives those beside it the same mode.

    One that is there is not opened: to close it again would drop the locks that SQLite has on it in this process.
    """
    with contextlib.suppress(OSError):  # whoever opens it says what is wrong
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _prepare_sqlite(connection: Any, _record: object) -> None:  # noqa: ANN401 - the driver's own type
    connection.isolation_level = None  # transactions begin where we say, not where the driver guesses
    _patiently(lambda: connection.execute("PRAGMA journal_mode=WAL"))  # the one that SQLite itself does not wait for
    for pragma in (
        "synchronous=FULL",  # a commit survives a power cut; WAL's usual NORMAL may lose the last ones
        "fullfsync=1",  # macOS: reach the disk, not only its cache
        "cache_size=-2048",
        # The commit that meets it waits for the log to be copied back: one of 130, with 32 webhooks of 23 pages in each
        # while no keys are merged. Measured: p99 over 32 connections 17.2 ms at SQLite's own 1000 pages, 13.5 ms here.
        "wal_autocheckpoint=3000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _patiently(call: Callable[[], T]) -> T:
    """Make *call* again for as long as another process has the lock that it needs.

    SQLite's own wait looks every 0.1 s in the end and so misses the moments between the commits of a busy worker.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            return call()
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_AGAIN_SECONDS)


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY  # whichever kind of it


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that writes has begun already.
    driver = driver_of(connection)
    if not driver.in_transaction:
        driver.execute("BEGIN")


def _begin_writing(connection: Connection) -> None:
    # A deferred transaction that reads first cannot become a writer later: it fails at once as "locked". Straight to
    # the driver, as most statements of a webhook are: SQLAlchemy's own begin() and commit() would take 30 µs.
    driver_of(connection).execute("BEGIN IMMEDIATE")
