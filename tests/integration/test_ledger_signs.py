"""The ledger tells the truth: readiness commits, a file that is gone is noticed, a failover needs no restart."""

import asyncio
import shutil
import time
from datetime import UTC, datetime
from functools import partial

import asyncpg
import pytest
from sqlalchemy import URL, text

from service.ledger import heartbeats, migrating
from service.ledger.database import LedgerMovedError, LedgerUnavailableError, UnknownOutcomeError
from service.ledger.migrating import SchemaError
from service.ledger.opening import open_database
from service.web.ledger_check import LedgerCheck
from tests.support.ledger import count, store, utc_now
from tests.support.waiting import eventually
from tests.support.webhooks import webhook


def scalar(statement):
    return lambda connection: connection.scalar(text(statement))


async def connect(url: URL):
    """Connect as another program does."""
    return await asyncpg.connect(user=url.username, host=url.query.get("host") or url.host, database=url.database)


# Readiness commits (C1)


class CountingDatabase:
    """Counts the writes of rows, and fails them on demand as a full disk does."""

    def __init__(self) -> None:
        self.rows = 0
        self.is_full = False

    async def write(self, function):
        await asyncio.sleep(0)
        if function is migrating.check_writable:
            return
        self.rows += 1
        if self.is_full:
            raise LedgerUnavailableError("database or disk is full")

    async def read(self, function):
        raise NotImplementedError

    async def close(self):
        raise NotImplementedError


@pytest.fixture
def counting():
    return CountingDatabase()


async def test_readiness_writes_one_row_a_second_however_often_it_is_asked(counting):
    clock = [0.0]
    check = LedgerCheck(counting, now=utc_now, clock=lambda: clock[0])
    for at in (0, 0.3, 0.9, 1.1, 1.9, 2.2):
        clock[0] = at
        await asyncio.gather(*(check.find_failure() for _ in range(20)))

    assert counting.rows == 3


async def test_a_failed_commit_of_readiness_is_remembered_until_the_next_one(counting):
    clock = [0.0]
    check = LedgerCheck(counting, now=utc_now, clock=lambda: clock[0])
    counting.is_full = True
    found = [await check.find_failure(), await check.find_failure()]
    counting.is_full = False
    found.append(await check.find_failure())
    clock[0] = 1.1
    found.append(await check.find_failure())

    assert [one is not None for one in found] == [True, True, True, False]
    assert counting.rows == 2


async def test_a_failed_commit_of_a_webhook_makes_readiness_fail(counting):
    check = LedgerCheck(counting, now=utc_now)
    check.note_commit(has_failed=True)
    failing = await check.find_failure()
    check.note_commit(has_failed=False)

    assert failing == "the last commit of a webhook failed"
    assert await check.find_failure() is None


async def test_readiness_commits_a_row_of_its_own(app_client, database):
    before = datetime.now(UTC)
    answer = await eventually(partial(_ready, app_client))
    at = await database.read(partial(heartbeats.last_beat, name=heartbeats.READINESS))

    assert answer.status_code == 200
    assert at >= before
    assert await count(database) == 0


async def _ready(client):
    answer = await client.get("/health/ready")
    return answer if answer.status_code == 200 else None


# The file is taken away (C2)


def move_away(path, elsewhere):
    for suffix in ("", "-wal", "-shm"):
        shutil.move(f"{path}{suffix}", f"{elsewhere}{suffix}")


def put_another_in_place(path, elsewhere):
    shutil.copy(path, elsewhere)
    shutil.move(elsewhere, path)


def remove_the_log(path, _elsewhere):
    path.with_name(f"{path.name}-wal").unlink()


@pytest.mark.parametrize("take", [move_away, put_another_in_place, remove_the_log])
async def test_no_webhook_is_accepted_into_a_file_that_was_taken_away(sqlite_url, tmp_path, open_client, take):
    path = tmp_path / "ledger.db"
    assert str(path) == sqlite_url.database
    async with open_database(sqlite_url) as database, open_client(database) as client:
        sent = [webhook(), webhook()]
        taken = await client.post("/webhooks/sync", content=sent[0].body, headers=sent[0].headers)
        await asyncio.to_thread(take, path, tmp_path / "elsewhere.db")
        missed = await client.post("/webhooks/sync", content=sent[1].body, headers=sent[1].headers)
        ready = await client.get("/health/ready")
        metrics = (await client.get("/metrics")).text

    assert (taken.status_code, missed.status_code, ready.status_code) == (202, 503, 503)
    assert "was taken away" in ready.json()["parts"]["ledger"]["detail"]
    assert take is not move_away or not path.exists()  # nor is an empty one made
    assert "mayfly_ledger_up 0.0" in metrics


async def test_a_file_that_is_put_back_is_used_again(sqlite_url, tmp_path):
    path = tmp_path / "ledger.db"
    async with open_database(sqlite_url) as database:
        await store(database)
        await asyncio.to_thread(move_away, path, tmp_path / "elsewhere.db")
        with pytest.raises(LedgerMovedError, match="was taken away"):
            await store(database)
        await asyncio.to_thread(move_away, tmp_path / "elsewhere.db", path)
        await store(database)

        assert await count(database) == 2


async def test_a_file_that_is_moved_during_a_write_is_noticed_before_the_commit(sqlite_url, tmp_path):
    path = tmp_path / "ledger.db"

    def move(_connection):
        move_away(path, tmp_path / "elsewhere.db")

    async with open_database(sqlite_url) as database:
        with pytest.raises(LedgerMovedError):
            await database.write(move)


# PostgreSQL after a failover (C4)


async def test_sessions_that_turned_read_only_are_replaced_without_a_restart(postgres_url):
    async with open_database(postgres_url) as database:
        await asyncio.gather(*(store(database) for _ in range(5)))
        # As on a server that was demoted: each session stays, and can only read.
        await database.read(scalar("SELECT 1"))
        for connection in await held_open(database, 5):
            await connection.exec_driver_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
            await connection.commit()
            await connection.close()
        await asyncio.gather(*(store(database) for _ in range(5)))

        assert await count(database) == 10


async def held_open(database, number):
    """Check *number* connections out of the pool."""
    return [await database._engine.connect() for _ in range(number)]


async def test_a_session_that_ends_during_a_write_is_replaced_and_the_write_repeated(postgres_url):
    runs = []

    def write(connection):
        runs.append(connection.scalar(text("SELECT pg_backend_pid()")))
        if len(runs) == 1:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        heartbeats.record_beat(connection, "test", now=utc_now())
        return len(runs)

    async with open_database(postgres_url) as database:
        assert await database.write(write) == 2

    assert len(set(runs)) == 2


async def test_a_database_that_stays_read_only_is_tried_twice_and_reported(postgres_url):
    runs = []

    def write(connection):
        runs.append(1)
        heartbeats.record_beat(connection, "test", now=utc_now())

    url = postgres_url.update_query_dict({"options": "-c default_transaction_read_only=on"})
    async with open_database(url) as database:
        with pytest.raises(LedgerUnavailableError, match="read-only") as raised:
            await database.write(write)

    assert len(runs) == 2
    assert not isinstance(raised.value, UnknownOutcomeError)


async def test_an_error_in_the_commit_is_not_repeated_and_leaves_it_unknown(postgres_url):
    runs = []

    def write(connection):
        runs.append(1)
        connection.exec_driver_sql("CREATE TEMPORARY TABLE doomed (a int)")
        connection.exec_driver_sql(
            "CREATE FUNCTION pg_temp.die() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END'"
        )
        connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON doomed DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION pg_temp.die()"
        )
        connection.exec_driver_sql("INSERT INTO doomed VALUES (1)")

    async with open_database(postgres_url) as database:
        with pytest.raises(UnknownOutcomeError):
            await database.write(write)

    assert runs == [1]


# What PostgreSQL is set to (C6, C7)


async def test_a_commit_is_synchronous_whatever_the_role_sets(postgres_url):
    owner = await connect(postgres_url)
    try:
        await owner.execute("ALTER DATABASE mayfly SET synchronous_commit = off")
        async with open_database(postgres_url) as database:
            shown = await database.write(scalar("SHOW synchronous_commit"))
    finally:
        await owner.execute("ALTER DATABASE mayfly RESET synchronous_commit")
        await owner.close()

    assert shown == "on"


async def test_a_database_in_another_encoding_is_refused(latin_url):
    async with open_database(latin_url) as database:
        for call in (partial(database.write, migrating.migrate), partial(database.read, migrating.check)):
            with pytest.raises(SchemaError, match="encoding is LATIN1"):
                await call()


async def test_a_character_that_the_encoding_lacks_is_not_the_senders_fault(latin_url):
    async with open_database(latin_url) as database:
        with pytest.raises(LedgerUnavailableError):
            await database.write(lambda connection: connection.scalar(text("SELECT CAST(:a AS text)"), {"a": "😀"}))


# A slow commit (C10)


async def test_a_commit_slower_than_its_timeout_is_reported_as_unknown(sqlite_url, open_client):
    sent = webhook()
    async with open_database(sqlite_url, write_seconds=0.2) as database, open_client(database) as client:
        blocking = asyncio.create_task(database.write(lambda _connection: time.sleep(0.6)))
        await asyncio.sleep(0.05)
        answer = await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
        with pytest.raises(UnknownOutcomeError):
            await blocking

    assert answer.status_code == 503
    assert "it is not known whether it was stored; send it again" in answer.json()["detail"]


async def test_a_write_that_failed_before_its_commit_stored_nothing(app_client, database):
    await database.write(lambda connection: connection.execute(text("ALTER TABLE records RENAME TO away")))
    sent = webhook()
    try:
        answer = await app_client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
    finally:
        await database.write(lambda connection: connection.execute(text("ALTER TABLE away RENAME TO records")))

    assert answer.status_code == 503
    assert "nothing was stored" in answer.json()["detail"]
