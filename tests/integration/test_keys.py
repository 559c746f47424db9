"""One record per key on SQLite, whoever inserts, dies or undoes, and whatever has been merged by then."""

import asyncio
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import URL, func, select, text

from service.generation import Key
from service.ledger import keys, migrating, reading, receiving, sequence
from service.ledger.database import REMEMBERED, ConflictError, open_database
from service.ledger.schema import key_buffer, key_index, records
from tests.integration.test_migrating import FOLDER
from tests.support.ledger import ACCOUNT, arrival, count, receive, receive_as_the_web_side_does, row_of, store

# So small that a few records are several runs.
RUN = 8
# What may happen next: who does it, which generations are announced, and how it ends.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["one", "other"]),
        st.lists(st.integers(0, 99), min_size=1, max_size=12),
        st.sampled_from(["committed"] * 6 + ["undone", "commit fails", "killed"]),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture
def short_runs(monkeypatch):
    monkeypatch.setattr(keys, "RUN", RUN)
    # And a filter that learns slowly, and of which one bit stands for many keys.
    monkeypatch.setattr(keys, "_LEARNT", 1)
    monkeypatch.setattr(keys, "_FILTER_BITS", 64)


@pytest.fixture
def few_hashes(monkeypatch):
    """Have keys share hashes, as of millions hardly two do."""
    whole = keys.hash_of
    monkeypatch.setattr(keys, "hash_of", lambda key: whole(key) % 23)


@pytest.fixture
def jumping_clocks(monkeypatch):
    """Give each look at the clock another time of the last ten minutes, as the clocks of several machines might."""
    now, chance = time.time_ns(), random.Random(7)  # noqa: S311 - nobody has to guess it
    monkeypatch.setattr(time, "time_ns", lambda: now - chance.randrange(600 * 10**9))


class UndoneError(Exception):
    """A write that changed its mind."""


class Processes:
    """Two processes with the ledger in one file, as far as what they remember is concerned."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._open: dict[str, AsyncExitStack] = {}
        self._databases: dict[str, Any] = {}
        self._last_numbers: dict[str, int] = {}
        self.stored: set[str] = set()

    async def announce(self, who: str, numbers: list[int], end: str) -> None:
        """Announce generations, and check what the ledger says of each as *end* has it."""
        arrivals = [arrival(id=f"g{number}") for number in numbers]
        database = await self._database(who)
        sequence._last = self._last_numbers[who]  # no process knows of another's
        try:
            await self._announce(database, who, arrivals, end)
        finally:
            self._last_numbers[who] = sequence._last

    async def _announce(self, database, who, arrivals, end) -> None:
        if end == "undone":
            with pytest.raises(UndoneError):
                await database.write(partial(self._receive_and_raise, arrivals=arrivals), is_quick=True)
            return
        if end == "commit fails":
            with pytest.raises(ConflictError):
                await database.write(partial(self._receive_an_orphan, arrivals=arrivals), is_quick=True)
            return
        names = [item.key.id for item in arrivals]
        receipts = await receive_as_the_web_side_does(database, arrivals)
        firsts = {name for name, receipt in zip(names, receipts, strict=True) if receipt.is_new}
        assert firsts == set(names) - self.stored
        assert sum(receipt.is_new for receipt in receipts) == len(firsts)
        self.stored |= firsts
        if end == "killed":
            await self._open.pop(who).aclose()

    async def _database(self, who: str):
        if who not in self._open:
            self._open[who] = stack = AsyncExitStack()
            self._last_numbers[who] = 0
            self._databases[who] = await stack.enter_async_context(open_database(self._url))
            await self._databases[who].write(lambda connection: connection.execute(select(1)))
            self._databases[who]._writing.connection.cursor().execute("PRAGMA foreign_keys=ON")
        return self._databases[who]

    @staticmethod
    def _receive_and_raise(connection, arrivals) -> None:
        receiving.receive(connection, arrivals)
        raise UndoneError

    @staticmethod
    def _receive_an_orphan(connection, arrivals) -> None:
        receiving.receive(connection, arrivals)
        connection.execute(text("INSERT INTO child VALUES (1)"))  # noticed by the commit alone

    async def close(self) -> None:
        """Close what is open."""
        for stack in self._open.values():
            await stack.aclose()


@pytest.fixture(scope="module")
def new_ledger(tmp_path_factory):
    """An empty ledger to copy, with a table whose orphans no commit takes."""
    path = tmp_path_factory.mktemp("new") / "ledger.db"

    def prepare(connection):
        migrating.migrate(connection)
        connection.execute(text("CREATE TABLE parent (id INTEGER PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"))

    async def make():
        async with open_database(URL.create("sqlite", database=str(path))) as database:
            await database.write(prepare)

    asyncio.run(make())
    return path


async def play(path: Path, steps) -> None:
    """Play *steps* in the ledger at *path*, then look at it from outside."""
    url = URL.create("sqlite", database=str(path))
    processes = Processes(url)
    try:
        for step in steps:
            await processes.announce(*step)
    finally:
        await processes.close()
    async with open_database(url) as database:
        names = await database.read(lambda connection: connection.scalars(select(records.c.id)).all())
        assert Counter(names) == Counter(processes.stored)
        assert await number_of(database, key_buffer) <= 8 * RUN
        for name in names:
            assert (await row_of(database, Key(ACCOUNT, name))).id == name
        assert await database.read(partial(reading.find, key=Key(ACCOUNT, "unheard of"))) is None


def play_any(new_ledger: Path, folder: Path) -> None:
    """Play what Hypothesis thinks of."""

    @settings(max_examples=150, deadline=None, database=None)
    @given(STEPS)
    def check(steps):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            asyncio.run(play(Path(shutil.copy(new_ledger, name)), steps))

    check()


@pytest.mark.usefixtures("short_runs", "jumping_clocks")
def test_a_key_has_one_record_whatever_happens_between_its_announcements(new_ledger, tmp_path):
    play_any(new_ledger, tmp_path)


@pytest.mark.usefixtures("short_runs", "jumping_clocks", "few_hashes")
def test_keys_that_share_their_hashes_have_a_record_each(new_ledger, tmp_path):
    play_any(new_ledger, tmp_path)


async def number_of(database, table):
    return await database.read(lambda connection: connection.scalar(select(func.count()).select_from(table)))


async def test_what_is_not_merged_stays_small_and_all_of_it_is_found(sqlite_database, monkeypatch):
    monkeypatch.setattr(keys, "RUN", 100)
    sizes = []
    for batch in range(60):
        await receive(sqlite_database, *(arrival(id=f"g{batch}-{number}") for number in range(20)))
        sizes.append(await number_of(sqlite_database, key_buffer))

    assert 200 <= max(sizes) <= 260
    assert await number_of(sqlite_database, key_index) + sizes[-1] >= 1200
    for batch in range(60):
        assert (await row_of(sqlite_database, Key(ACCOUNT, f"g{batch}-7"))).id == f"g{batch}-7"
    assert not any(one.is_new for one in await receive(sqlite_database, arrival(id="g0-0"), arrival(id="g59-19")))


async def test_restarts_do_not_keep_a_run_from_its_end(sqlite_url, monkeypatch):
    monkeypatch.setattr(keys, "RUN", 60)
    for number in range(300):
        async with open_database(sqlite_url) as database:
            await receive(database, arrival(id=f"g{number}"))

    async with open_database(sqlite_url) as database:
        assert await number_of(database, key_buffer) <= 150
        assert not any([(await receive(database, arrival(id=f"g{number}")))[0].is_new for number in range(300)])


async def test_of_two_processes_the_one_that_seldom_writes_does_not_remember_all(sqlite_url, monkeypatch):
    monkeypatch.setattr(keys, "RUN", 20)
    async with open_database(sqlite_url) as busy, open_database(sqlite_url) as other:
        idle: Any = other
        for number in range(1000):
            await receive(busy, arrival(id=f"g{number}"))
            if number % 40 == 0:
                await receive(idle, arrival(id=f"h{number}"))
        remembered = idle._writing.info[REMEMBERED]._numbers

        assert len(remembered) <= 5 * keys.RUN + 40
        receipts = await receive(idle, *(arrival(id=f"g{number}") for number in range(1000)))
        assert not any(receipt.is_new for receipt in receipts)


@pytest.mark.parametrize("survivor", [0, 1])
async def test_the_one_that_is_left_of_two_processes_goes_on_trimming(sqlite_url, monkeypatch, survivor):
    monkeypatch.setattr(keys, "RUN", 20)
    async with AsyncExitStack() as ends:
        stacks = [await ends.enter_async_context(AsyncExitStack()) for _ in range(2)]
        both: list[Any] = [await stack.enter_async_context(open_database(sqlite_url)) for stack in stacks]
        for number in range(400):
            await receive(both[number % 2], arrival(id=f"g{number}"))
        await stacks[1 - survivor].aclose()
        left = both[survivor]
        for number in range(400, 800):
            await receive(left, arrival(id=f"g{number}"))

        assert await number_of(left, key_buffer) <= 3 * keys.RUN
        assert len(left._writing.info[REMEMBERED]._numbers) <= 3 * keys.RUN
        receipts = await receive(left, *(arrival(id=f"g{number}") for number in range(800)))
        assert not any(receipt.is_new for receipt in receipts)


@pytest.mark.parametrize("is_written_between", [False, True])
async def test_an_older_ledger_that_is_put_in_place_while_it_runs_gets_no_record_twice(
    sqlite_url, monkeypatch, tmp_path, is_written_between
):
    monkeypatch.setattr(keys, "RUN", 20)

    def copy_ledger(source, target):
        with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
            one.backup(other)

    async with open_database(sqlite_url) as database:
        for number in range(60):
            await receive(database, arrival(id=f"g{number}"))
        copy_ledger(sqlite_url.database, tmp_path / "older.db")
        for number in range(60, 75):
            await receive(database, arrival(id=f"g{number}"))
        copy_ledger(tmp_path / "older.db", sqlite_url.database)
        if is_written_between:
            async with open_database(sqlite_url) as other:
                await receive(other, arrival(id="between"))
        for number in range(200, 300):
            await receive(database, arrival(id=f"g{number}"))

        receipts = await receive(database, *(arrival(id=f"g{number}") for number in range(60)))
        assert not any(receipt.is_new for receipt in receipts)


def test_the_hash_of_a_key_is_what_it_was_when_ledgers_were_written():
    assert keys.hash_of(Key("default", "a-1")) == 8070757590860851191
    assert keys.hash_of(Key("default", "größe/🪰")) == 471426079583669658


async def test_a_record_whose_key_is_not_noted_is_refused(sqlite_database):
    await store(sqlite_database, id="g1")
    again = text(
        "INSERT INTO records (seq, account, id, state, status, notification, received_at, attempts, failures, refusals,"
        " rule) SELECT seq + 1, account, id, state, status, notification, received_at, 0, 0, 0, rule FROM records"
    )

    with pytest.raises(ConflictError):
        await sqlite_database.write(lambda connection: connection.execute(again))
    assert await count(sqlite_database) == 1


async def test_the_records_of_an_older_ledger_are_known_after_the_migration(tmp_path):
    def to_the_first_step(connection):
        config = Config()
        config.set_main_option("script_location", str(FOLDER))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")

    older = [arrival(id=f"g{number}", due_in=None) for number in range(50)]
    insert = text(
        "INSERT INTO records (seq, account, id, state, status, notification, received_at, attempts, failures, refusals,"
        " rule) VALUES (:seq, 'default', :id, 'kept', 'COMPLETED', '{}', 1, 0, 0, 0, 'MAYFLY_TTL')"
    )
    rows = [{"seq": number, "id": item.key.id} for number, item in enumerate(older)]
    async with open_database(URL.create("sqlite", database=str(tmp_path / "older.db"))) as database:
        await database.write(to_the_first_step)
        await database.write(lambda connection: connection.execute(insert, rows))
        assert await database.write(migrating.migrate) == ("0001", migrating.HEAD)

        receipts = await receive(database, *older, arrival(id="new"))

        assert [receipt.seq for receipt in receipts[:-1]] == list(range(50))
        assert [receipt.is_new for receipt in receipts] == [False] * 50 + [True]
        assert (await row_of(database, older[7].key)).seq == 7
