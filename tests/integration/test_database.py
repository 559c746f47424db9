"""Writes run one after another, each in its transaction, also beside other programs; a read sees one snapshot."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from sqlalchemy import URL, delete, event, func, select, text
from sqlalchemy.util import await_only

from service.ledger import postgres
from service.ledger.database import LedgerUnavailableError, RefusedDataError, RowLockedError
from service.ledger.opening import open_database
from service.ledger.schema import records
from tests.support.ledger import count, store

ROWS = text("SELECT word FROM words ORDER BY rowid")


@pytest.fixture
async def words(sqlite_url):
    """A database with one table of words."""
    async with open_database(sqlite_url) as database:
        await database.write(lambda connection: connection.execute(text("CREATE TABLE words (word TEXT)")))
        yield database


@pytest.fixture
def other(sqlite_url):
    """Another program's connection to the same file."""
    with closing(sqlite3.connect(sqlite_url.database, isolation_level=None, check_same_thread=False)) as connection:
        yield connection


def adding(word: str):
    def add(connection):
        connection.execute(text("INSERT INTO words VALUES (:word)"), {"word": word})
        return word

    return add


def do_nothing(_connection):
    pass


async def all_words(database):
    return list(await database.read(lambda connection: connection.scalars(ROWS).all()))


async def test_a_postgresql_transaction_that_is_abandoned_gives_its_locks_back(postgres_url, monkeypatch):
    monkeypatch.setattr(postgres, "ABANDONED_SECONDS", 1)
    async with open_database(postgres_url) as database:
        await store(database)
        begun = time.monotonic()

        def freeze(connection):
            connection.execute(select(records.c.seq).with_for_update())
            # As if the process stood still between two statements: the event loop has nothing more to do for it.
            await_only(asyncio.sleep(5))

        frozen = asyncio.create_task(database.write(freeze))
        await asyncio.sleep(0.2)
        refused = 0
        while time.monotonic() - begun < 4:
            try:
                await database.write(lambda connection: connection.execute(delete(records)))
                break
            except RowLockedError:
                refused += 1
        assert refused in (1, 2)
        assert await count(database) == 0
        with pytest.raises(LedgerUnavailableError):
            await frozen


async def test_a_write_waits_for_another_program_without_blocking_the_loop(words, other):
    other.execute("BEGIN IMMEDIATE")
    write = asyncio.create_task(words.write(adding("late")))
    begun = time.monotonic()
    await asyncio.sleep(0.2)
    assert time.monotonic() - begun < 0.4
    assert not write.done()
    other.execute("COMMIT")

    assert await write == "late"
    assert await all_words(words) == ["late"]


async def test_writes_succeed_beside_a_program_that_writes_constantly(words, other):
    is_over = threading.Event()

    def write_on_and_on():
        while not is_over.is_set():
            other.execute("BEGIN IMMEDIATE")
            time.sleep(0.02)
            other.execute("COMMIT")
            time.sleep(0.001)

    busy = asyncio.create_task(asyncio.to_thread(write_on_and_on))
    try:
        async with asyncio.timeout(15):  # SQLite's own way of waiting took minutes for so many
            for number in range(20):
                await words.write(adding(str(number)))
    finally:
        is_over.set()
        await busy

    assert await all_words(words) == [str(number) for number in range(20)]


async def test_a_failed_write_is_rolled_back_and_the_next_one_succeeds(words):
    def fail(connection):
        adding("half")(connection)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        await words.write(fail)
    await words.write(adding("whole"))

    assert await all_words(words) == ["whole"]


async def test_a_cancelled_caller_does_not_undo_its_write(words):
    has_begun = threading.Event()

    def add_slowly(connection):
        has_begun.set()
        time.sleep(0.1)
        return adding("0")(connection)

    first = asyncio.create_task(words.write(add_slowly))
    others = [asyncio.create_task(words.write(adding(str(number)))) for number in range(1, 10)]
    await asyncio.to_thread(has_begun.wait)
    first.cancel()
    results = await asyncio.gather(first, *others, return_exceptions=True)

    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [str(number) for number in range(1, 10)]
    assert await all_words(words) == [str(number) for number in range(10)]


async def test_a_queued_write_whose_caller_is_cancelled_is_not_made(words, other):
    other.execute("BEGIN IMMEDIATE")
    first = asyncio.create_task(words.write(adding("first")))
    second = asyncio.create_task(words.write(adding("second")))
    await asyncio.sleep(0.1)
    second.cancel()
    await asyncio.sleep(0)
    other.execute("COMMIT")

    assert await first == "first"
    await words.write(adding("third"))
    assert await all_words(words) == ["first", "third"]


async def test_a_write_that_timed_out_does_not_break_the_next_one(sqlite_url, other):
    async with open_database(sqlite_url, write_seconds=0.3) as database:
        await database.write(lambda connection: connection.execute(text("CREATE TABLE words (word TEXT)")))
        other.execute("BEGIN IMMEDIATE")
        for _ in range(2):
            with pytest.raises(LedgerUnavailableError, match="did not answer in time"):
                await database.write(adding("late"))
        other.execute("ROLLBACK")

        assert await database.write(adding("next")) == "next"
        # The first one had begun, and was made once the lock was free; the second was still waiting for its turn.
        assert await all_words(database) == ["late", "next"]


async def test_a_failed_commit_is_rolled_back_and_the_next_write_succeeds(words, other):
    other.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    other.execute("CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    words._writing.dispose()
    event.listen(words._writing, "connect", lambda driver, _record: driver.execute("PRAGMA foreign_keys=ON"))

    def add_an_orphan(connection):
        adding("lost")(connection)
        connection.execute(text("INSERT INTO child VALUES (1)"))  # noticed by the commit alone

    with pytest.raises(RefusedDataError):
        await words.write(add_an_orphan)
    await words.write(adding("kept"))

    assert await all_words(words) == ["kept"]


async def test_a_second_opening_does_not_let_another_program_remove_the_wal(words, sqlite_url):
    # Closing any descriptor of a file drops all locks that the process has on it, SQLite's as well; a program that
    # then closes the database takes itself for the last one, and removes the log in which later commits are lost.
    await words.write(adding("before"))
    async with open_database(sqlite_url) as second:
        await second.write(do_nothing)
    look = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT word FROM words').fetchall())"
    for word in ("first", "second"):
        await words.write(adding(word))
        shown = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", look, sqlite_url.database],
            capture_output=True,
            text=True,
            check=True,
        )
        assert word in shown.stdout

    assert await all_words(words) == ["before", "first", "second"]


async def test_database_files_are_readable_by_their_owner_only(tmp_path):
    tmp_path.chmod(0o755)
    url = URL.create("sqlite", database=str(tmp_path / "ledger.db"))
    async with open_database(url) as database:
        await database.write(do_nothing)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}

    assert modes == dict.fromkeys(("ledger.db", "ledger.db-shm", "ledger.db-wal"), 0o600)


async def test_a_slow_write_does_not_block_the_loop(words):
    write = asyncio.create_task(words.write(lambda _connection: time.sleep(0.3)))
    turns = 0
    while not write.done():
        await asyncio.sleep(0.01)
        turns += 1

    assert turns > 10


async def test_a_read_sees_what_was_committed_before_it(words):
    for number in range(20):
        await words.write(adding(str(number)))
        assert (await all_words(words))[-1] == str(number)


async def test_all_statements_of_a_read_see_one_snapshot(database_url):
    has_seen, may_go_on = threading.Event(), threading.Event()
    counting = select(func.count()).select_from(records)

    def count_twice(connection):
        before = connection.scalar(counting)
        has_seen.set()
        # On PostgreSQL statements run on the loop, so that the other write has a loop of its own.
        assert may_go_on.wait(10)
        return before, connection.scalar(counting)

    def write_meanwhile():
        async def store_one():
            async with open_database(database_url) as other:
                await store(other)

        assert has_seen.wait(10)
        asyncio.run(store_one())
        may_go_on.set()

    async with open_database(database_url) as database:
        await store(database)
        writing = asyncio.create_task(asyncio.to_thread(write_meanwhile))
        seen = await database.read(count_twice)
        await writing

        assert seen == (1, 1)
        assert await database.read(lambda connection: connection.scalar(counting)) == 2


async def test_a_read_on_postgresql_cannot_write(postgres_url):
    async with open_database(postgres_url) as database:
        with pytest.raises(LedgerUnavailableError, match="read-only"):
            await database.read(lambda connection: connection.execute(delete(records)))
        await store(database)  # and the connection that it had can write again
        assert await count(database) == 1


async def test_queued_writes_are_refused_when_the_database_closes(sqlite_url, other):
    async with open_database(sqlite_url) as database:
        await database.write(lambda connection: connection.execute(text("CREATE TABLE words (word TEXT)")))
        writes = [asyncio.create_task(database.write(adding(str(number)))) for number in range(20)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*writes, return_exceptions=True)

    made = [result for result in results if isinstance(result, str)]
    assert {type(result) for result in results} <= {str, LedgerUnavailableError}
    assert [word for (word,) in other.execute("SELECT word FROM words")] == made


async def test_a_write_that_gets_no_thread_is_not_made_later(words, other, monkeypatch):
    def refuse(_threads, _function, *_arguments: object):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", refuse)
        with pytest.raises(MemoryError):
            await words.write(adding("lost"))
    other.execute("BEGIN IMMEDIATE")
    other.execute("ROLLBACK")

    assert await words.write(adding("next")) == "next"
    assert await all_words(words) == ["next"]


async def test_opening_fails_if_the_thread_cannot_start(sqlite_url, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            async with open_database(sqlite_url):
                raise AssertionError("it was opened")

    async with open_database(sqlite_url) as database:
        assert await database.write(lambda _connection: "well") == "well"


async def test_the_error_names_a_lock_that_lasts_too_long(sqlite_url, other):
    async with open_database(sqlite_url, write_seconds=0.3) as database:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailableError, match="did not answer in time"):
            await database.write(do_nothing)
        other.execute("ROLLBACK")
