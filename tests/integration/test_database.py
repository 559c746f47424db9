"""Writes take turns, each alone in its transaction, whoever else writes and whoever stops waiting."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from service.ledger.thread import CallingThread
from sqlalchemy import URL, text

from service.ledger.database import ConflictError, LedgerUnavailableError, open_database

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


@pytest.mark.parametrize("is_quick", [True, False])
async def test_a_write_waits_for_another_programs_and_leaves_the_loop_free(words, other, is_quick):
    other.execute("BEGIN IMMEDIATE")
    write = asyncio.create_task(words.write(adding("late"), is_quick=is_quick))
    begun = time.monotonic()
    await asyncio.sleep(0.2)
    assert time.monotonic() - begun < 0.4
    assert not write.done()
    other.execute("COMMIT")

    assert await write == "late"
    assert await all_words(words) == ["late"]


async def test_writes_get_their_turns_beside_a_program_that_hardly_pauses(words, other):
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
                await words.write(adding(str(number)), is_quick=number % 2 == 0)
    finally:
        is_over.set()
        await busy

    assert await all_words(words) == [str(number) for number in range(20)]


@pytest.mark.parametrize("is_quick", [True, False])
async def test_what_fails_leaves_nothing_behind_and_the_next_write_is_well(words, is_quick):
    def fail(connection):
        adding("half")(connection)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        await words.write(fail, is_quick=is_quick)
    await words.write(adding("whole"), is_quick=is_quick)

    assert await all_words(words) == ["whole"]


@pytest.mark.parametrize("is_quick", [True, False])
async def test_who_stops_waiting_neither_undoes_a_write_nor_mixes_it_with_the_next(words, is_quick):
    writes = [asyncio.create_task(words.write(adding(str(number)), is_quick=is_quick)) for number in range(10)]
    await asyncio.sleep(0)
    writes[0].cancel()
    results = await asyncio.gather(*writes, return_exceptions=True)

    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [str(number) for number in range(1, 10)]
    assert await all_words(words) == [str(number) for number in range(10)]


async def test_a_commit_that_cannot_be_made_leaves_nothing_behind_and_the_next_write_is_well(words, other):
    other.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    other.execute("CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    await words.write(do_nothing)
    words._writing.connection.cursor().execute("PRAGMA foreign_keys=ON")

    def add_an_orphan(connection):
        adding("lost")(connection)
        connection.execute(text("INSERT INTO child VALUES (1)"))  # noticed by the commit alone

    with pytest.raises(ConflictError):
        await words.write(add_an_orphan, is_quick=True)
    await words.write(adding("kept"), is_quick=True)

    assert await all_words(words) == ["kept"]


async def test_a_second_opening_does_not_let_another_program_take_the_log_away(words, sqlite_url):
    # Closing any descriptor of a file drops all locks that the process has on it, SQLite's as well; a program that
    # then closes the database takes itself for the last one, and removes the log in which later commits are lost.
    await words.write(adding("before"))
    async with open_database(sqlite_url) as second:
        await second.write(do_nothing)
    look = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT word FROM words').fetchall())"
    for word in ("first", "second"):
        await words.write(adding(word), is_quick=True)
        shown = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", look, sqlite_url.database],
            capture_output=True,
            text=True,
            check=True,
        )
        assert word in shown.stdout

    assert await all_words(words) == ["before", "first", "second"]


async def test_the_files_are_their_owners_alone_wherever_they_are(tmp_path):
    tmp_path.chmod(0o755)
    url = URL.create("sqlite", database=str(tmp_path / "ledger.db"))
    async with open_database(url) as database:
        await database.write(do_nothing)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}

    assert modes == dict.fromkeys(("ledger.db", "ledger.db-shm", "ledger.db-wal"), 0o600)


async def test_after_a_slow_quick_write_the_next_ones_leave_the_loop_free(words):
    def dawdle(_connection):
        time.sleep(0.1)
        threads.append(threading.current_thread())

    threads: list[threading.Thread] = []
    await words.write(adding("first"))
    for _ in range(2):
        await words.write(dawdle, is_quick=True)

    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


async def test_writes_that_wait_while_the_database_closes_are_refused_and_none_is_half_made(sqlite_url, other):
    async with open_database(sqlite_url) as database:
        await database.write(lambda connection: connection.execute(text("CREATE TABLE words (word TEXT)")))
        writes = [asyncio.create_task(database.write(adding(str(number)), is_quick=True)) for number in range(20)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*writes, return_exceptions=True)

    made = [result for result in results if isinstance(result, str)]
    assert {type(result) for result in results} <= {str, LedgerUnavailableError}
    assert [word for (word,) in other.execute("SELECT word FROM words")] == made


async def test_a_quick_write_whose_commit_cannot_be_handed_over_holds_no_lock(words, other, monkeypatch):
    def refuse(_thread, _function, _ended):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(CallingThread, "call", refuse)
        with pytest.raises(MemoryError):
            await words.write(adding("lost"), is_quick=True)
    other.execute("BEGIN IMMEDIATE")
    other.execute("ROLLBACK")

    assert await words.write(adding("next"), is_quick=True) == "next"
    assert await all_words(words) == ["next"]


async def test_a_thread_that_could_not_be_started_is_started_at_the_next_write(sqlite_url, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    async with open_database(sqlite_url) as database:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                await database.write(do_nothing)

        assert await database.write(lambda _connection: "well") == "well"


async def test_a_lock_that_is_held_for_too_long_is_named(sqlite_url, other):
    async with open_database(sqlite_url, write_seconds=0.3) as database:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailableError, match="did not answer in time"):
            await database.write(do_nothing, is_quick=True)
        other.execute("ROLLBACK")
