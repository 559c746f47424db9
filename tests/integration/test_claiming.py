"""Claiming due records: each one has one worker at a time, and the leases of dead workers end."""

import asyncio
from datetime import timedelta
from typing import Any

from sqlalchemy import event, update

from service.core.attempts import MAX_FREE_LOSSES, Progress
from service.core.lifecycle import Move, State
from service.ledger import claiming, reading
from service.ledger.opening import open_database
from service.ledger.schema import records
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    LEASE,
    arrival,
    claim,
    claim_one,
    deferred,
    end_lease,
    lose_leases,
    moves_of,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)

SECOND = timedelta(seconds=1)


async def test_a_claim_gives_a_due_record_a_lease(database):
    key = await store(database)
    now = utc_now()
    item = await claim_one(database, now=now)
    row = await row_of(database, key)

    assert (item.key, item.attempt, item.lease_until) == (key, 1, now + LEASE)
    assert item.progress == Progress(None, 0, 0)
    assert (row.state, row.attempts) == (State.DELETING, 1)
    assert now + LEASE <= row.wake_at < now + LEASE + SECOND
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM]


async def test_a_record_that_is_not_due_held_or_kept_is_not_claimed(database):
    await store(database, due_in=HOUR)
    await store(database, due_in=None)
    await store(database, hold="wait")

    assert await claim(database) == []


async def test_claims_read_no_record_but_those_that_are_due(sqlite_database):
    plans: dict[str, str] = {}

    def explain(_connection, cursor, statement, parameters, _context, is_many):
        if statement.startswith(("SELECT", "UPDATE")):
            one = parameters[0] if is_many else parameters
            found = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", one).fetchall()
            plans[statement] = "; ".join(row[3] for row in found)

    def claim_explained(connection):
        event.listen(connection, "before_cursor_execute", explain)
        return claiming.claim_due(connection, ACCOUNT, now=utc_now(), lease=LEASE, limit=100, actor=ACTOR)

    await receive(sqlite_database, *(arrival() for _ in range(100)))
    claims = await sqlite_database.write(claim_explained)
    used = [plan for statement, plan in plans.items() if "records" in statement]

    assert len(claims) == 100
    assert ["records_account_state_wake_at" in used[0], "INTEGER PRIMARY KEY" in used[1], len(used)] == [
        True,
        True,
        2,
    ], used


async def test_a_record_is_claimed_once_until_its_lease_ends(database):
    await store(database)
    await claim_one(database)

    assert await claim(database) == []
    assert await claim(database, now=utc_now() + LEASE + SECOND) == []


async def test_the_most_overdue_records_are_claimed_first_up_to_the_limit(database):
    keys = [await store(database, due_in=-number * HOUR) for number in (1, 3, 2)]
    claims = await claim(database, limit=2)

    assert [item.key for item in claims] == [keys[1], keys[2]]
    assert [item.key for item in await claim(database)] == [keys[0]]


async def test_twenty_workers_at_once_claim_each_record_once(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        await receive(one, *(arrival() for _ in range(60)))
        rounds = await asyncio.gather(*(claim(database, limit=5) for database in (one, other) * 10))
        rest = await claim(one, limit=100)

    claimed = [item.key for claims in [*rounds, rest] for item in claims]
    assert len(claimed) == len(set(claimed)) == 60


async def test_a_worker_whose_clock_is_ahead_claims_nothing_early_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        await store(database, due_in=HOUR)

        assert await claim(database, now=utc_now() + 2 * HOUR) == []


async def test_a_worker_whose_clock_is_ahead_ends_no_lease_early_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        await store(database)
        await claim_one(database)

        assert await lose_leases(database, now=utc_now() + 2 * HOUR) == 0


async def test_a_worker_whose_clock_is_slow_keeps_its_whole_lease_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        key = await store(database, due_in=-3 * HOUR)
        item = await claim_one(database, now=utc_now() - HOUR)

        assert item.lease_until < utc_now()  # by the worker's own clock, which it compares it with
        assert await lose_leases(database) == 0
        assert (await row_of(database, key)).wake_at > utc_now() + LEASE - 10 * SECOND


async def test_a_claim_reads_no_more_of_postgresql_than_what_is_due(postgres_url):
    def explain_claim(connection):
        seen: list[Any] = []
        event.listen(connection, "before_cursor_execute", lambda *given: seen.append(given[2:4]))
        claiming.claim_due(connection, ACCOUNT, now=utc_now(), lease=LEASE, limit=10, actor=ACTOR)
        statement, parameters = next(pair for pair in seen if "SKIP LOCKED" in pair[0])
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # the table is too small to need its index
        return list(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())

    async with open_database(postgres_url) as database:
        plan = await database.write(explain_claim)

    assert any("Index Cond" in line and "wake_at <=" in line for line in plan), plan


async def test_the_next_attempt_has_the_next_number_and_the_progress_so_far(database):
    await store(database)
    await settle(database, deferred(await claim_one(database), retry_at=utc_now() - SECOND))
    again = await claim_one(database)

    assert again.attempt == 2
    assert again.progress.failures == 1
    assert again.progress.failing_since is not None


async def test_a_record_whose_worker_died_is_scheduled_at_once(database):
    key = await store(database)
    await claim_one(database)
    await end_lease(database, key)

    assert await lose_leases(database) == 1
    row = await row_of(database, key)
    assert (row.state, row.failures, row.last_error) == (
        State.SCHEDULED,
        1,
        "its worker did not finish",
    )
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.LOSE_LEASE]
    assert (await claim_one(database)).attempt == 2


async def test_a_lease_that_has_not_ended_is_unchanged(database):
    await store(database)
    await claim_one(database)

    assert await lose_leases(database) == 0


async def test_a_record_that_crashes_its_worker_repeatedly_is_retried_more_slowly(database):
    key = await store(database)
    for _ in range(MAX_FREE_LOSSES + 1):
        await claim_one(database)
        await end_lease(database, key)
        await lose_leases(database)

    assert await claim(database) == []
    wake_at = (await row_of(database, key)).wake_at
    assert wake_at > utc_now()


async def test_leases_end_once_and_up_to_a_limit_per_call(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        await receive(one, *(arrival() for _ in range(10)))
        for item in await claim(one, limit=10):
            await end_lease(one, item.key)
        taken = await asyncio.gather(*(lose_leases(database, limit=3) for database in (one, other) * 4))

    assert sum(taken) == 10
    assert max(taken) <= 3


async def test_next_wake_is_the_earliest_due_time_attempt_or_lease(database):
    assert await database.read(reading.next_wake) is None
    await store(database, due_in=None)
    await store(database, due_in=HOUR)
    key = await store(database, due_in=-HOUR)

    assert await database.read(reading.next_wake) == (await row_of(database, key)).due_at
    item = await claim_one(database)
    assert item.lease_until <= await database.read(reading.next_wake) < item.lease_until + SECOND


async def test_time_without_attempts_does_not_count_toward_give_up_after(database):
    key = await store(database)
    await settle(database, deferred(await claim_one(database)))
    past = utc_now() - timedelta(days=7)
    put_back = update(records).values(wake_at=past, failing_since=past - HOUR)
    await database.write(lambda connection: connection.execute(put_back))
    (again,) = await claim(database)

    assert again.key == key
    assert again.progress.failing_since is not None
    assert abs(again.progress.failing_since - (utc_now() - HOUR)) < timedelta(minutes=1)


async def test_a_claim_reads_no_bodies(database):
    statements: list[str] = []

    def claim_and_listen(connection):
        event.listen(connection, "before_cursor_execute", lambda *given: statements.append(given[2]))
        claiming.claim_due(connection, ACCOUNT, now=utc_now(), lease=LEASE, limit=10, actor=ACTOR)
        claiming.end_expired_leases(connection, ACCOUNT, now=utc_now(), limit=10, actor=ACTOR)

    await store(database)
    await database.write(claim_and_listen)

    assert not [one for one in statements if "notification" in one or "records.copy" in one]
