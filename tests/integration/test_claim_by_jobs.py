"""A job claims exactly the attempt that it asks for; the row in the ledger decides every race."""

import asyncio
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import asyncpg
from sqlalchemy import event

from service.core.key import Key
from service.core.lifecycle import Move, State
from service.ledger import claiming, outlook, pausing
from service.ledger.claiming import Claim, NotYet, Wanted
from service.ledger.opening import open_database
from service.ledger.pausing import Kind, Pause
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    LEASE,
    claim_one,
    confirmed,
    deferred,
    moves_of,
    row_of,
    settle,
    store,
    utc_now,
)


async def claim_wanted(database, *wanted: Wanted, now=None):
    write = partial(
        claiming.claim_wanted, account=ACCOUNT, wanted=wanted, now=now or utc_now(), lease=LEASE, actor=ACTOR
    )
    return await database.write(write)


@asynccontextmanager
async def locked_by_another(url, key):
    """Keep the record of *key* locked, as a process does that froze in the middle of its transaction."""
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.fetch("SELECT seq FROM records WHERE id = $1 FOR UPDATE", key.id)
            yield
    finally:
        await connection.close()


async def find_waiting(database, **bounds):
    read = partial(outlook.find_waiting, account=ACCOUNT, **({"since": None, "until": utc_now(), "limit": 10} | bounds))
    return await database.read(read)


async def peek(database):
    return await database.read(partial(pausing.peek_allowance, account=ACCOUNT, now=utc_now()))


async def pause(database, kind, *, until=None):
    await database.write(partial(pausing.pause, wanted=Pause(kind, utc_now(), ACTOR, "a reason", until)))


async def test_a_job_claims_its_record_at_its_attempt(database):
    key = await store(database)
    other = await store(database)
    (found,) = await claim_wanted(database, Wanted(key, 1))

    assert isinstance(found, Claim)
    assert (found.key, found.attempt) == (key, 1)
    assert (await row_of(database, key)).state == State.DELETING
    assert (await row_of(database, other)).state == State.SCHEDULED
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM]


async def test_a_record_that_another_has_locked_holds_up_no_other(postgres_url):
    async with open_database(postgres_url) as database:
        locked, free, gone = await store(database), await store(database), Key("default", "gone")
        async with locked_by_another(postgres_url, locked):
            begun = time.monotonic()
            waits, claimed, nothing = await claim_wanted(database, *(Wanted(key, 1) for key in (locked, free, gone)))
            assert time.monotonic() - begun < 2
        (afterwards,) = await claim_wanted(database, Wanted(locked, 1))

    assert waits == NotYet(timedelta(seconds=1))
    assert nothing is None
    assert [one.key for one in (claimed, afterwards) if isinstance(one, Claim)] == [free, locked]


async def test_a_claim_by_key_reads_no_record_but_those_asked_for(sqlite_database):
    plans: dict[str, str] = {}

    def explain(_connection, cursor, statement, parameters, _context, is_many):
        if statement.startswith(("SELECT", "UPDATE")) and "records" in statement:
            one = parameters[0] if is_many else parameters
            found = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", one).fetchall()
            plans[statement] = "; ".join(row[3] for row in found)

    keys = [await store(sqlite_database) for _ in range(3)]

    def explained(connection):
        event.listen(connection, "before_cursor_execute", explain)
        wanted = [Wanted(key, 1) for key in keys]
        return claiming.claim_wanted(connection, ACCOUNT, wanted, now=utc_now(), lease=LEASE, actor=ACTOR)

    claims = await sqlite_database.write(explained)
    by_key, by_number = plans.values()

    assert len(claims) == 3
    assert "(account=? AND id=?)" in by_key
    assert "INTEGER PRIMARY KEY" in by_number


async def test_answers_come_in_the_order_of_the_jobs(database):
    keys = [await store(database, id=name) for name in ("c", "a", "b")]
    found = await claim_wanted(database, *(Wanted(key, 1) for key in keys))

    assert [one.key for one in found] == keys


async def test_a_job_for_a_past_attempt_claims_nothing(database):
    key = await store(database)
    first = await claim_one(database)

    assert await claim_wanted(database, Wanted(key, 1)) == [None]  # under way
    await settle(database, deferred(first))
    assert await claim_wanted(database, Wanted(key, 1), Wanted(key, 3)) == [None, None]  # stale, and one too many
    (second,) = await claim_wanted(database, Wanted(key, 2))
    await settle(database, confirmed(second))
    assert await claim_wanted(database, Wanted(key, 2), Wanted(key, 3)) == [None, None]  # deleted


async def test_a_job_without_a_record_or_with_a_held_record_claims_nothing(database):
    held = await store(database, hold="legal")
    kept = await store(database, due_in=None)

    assert await claim_wanted(database, *(Wanted(key, 1) for key in (held, kept, Key("default", "none")))) == [None] * 3


async def test_a_key_of_another_account_claims_nothing(database):
    key = await store(database)

    assert await claim_wanted(database, Wanted(Key("other", key.id), 1)) == [None]


async def test_of_two_jobs_for_one_attempt_the_first_claims(database):
    key = await store(database)
    first, second = await claim_wanted(database, Wanted(key, 1), Wanted(key, 1))

    assert isinstance(first, Claim)
    assert second is None
    assert (await row_of(database, key)).attempts == 1


async def test_a_claim_for_an_early_job_returns_the_wait(database):
    key = await store(database, due_in=HOUR)
    (found,) = await claim_wanted(database, Wanted(key, 1))

    assert isinstance(found, NotYet)
    assert timedelta(minutes=59) < found.wait <= HOUR
    assert (await row_of(database, key)).state == State.SCHEDULED


async def test_a_claim_before_the_time_of_the_next_attempt_returns_the_wait(database):
    key = await store(database)
    await settle(database, deferred(await claim_one(database), retry_at=utc_now() + HOUR))
    (found,) = await claim_wanted(database, Wanted(key, 2))

    assert isinstance(found, NotYet)
    assert found.wait > timedelta(minutes=59)


async def test_a_clock_that_runs_ahead_of_postgresql_claims_nothing_early(postgres_url):
    async with open_database(postgres_url) as database:
        key = await store(database, due_in=HOUR)
        (found,) = await claim_wanted(database, Wanted(key, 1), now=utc_now() + 2 * HOUR)

    assert isinstance(found, NotYet)


async def test_while_deletions_are_paused_no_job_claims(database):
    key = await store(database)
    await pause(database, Kind.OPERATOR)

    assert await claim_wanted(database, Wanted(key, 1)) == [None]
    assert (await row_of(database, key)).state == State.SCHEDULED


async def test_one_job_probes_a_refused_key_when_its_minute_is_over(database):
    keys = [await store(database) for _ in range(3)]
    await pause(database, Kind.UNAUTHORIZED, until=utc_now() - timedelta(seconds=1))
    assert await peek(database) == 1
    found = await claim_wanted(database, *(Wanted(key, 1) for key in keys))

    assert [one is not None for one in found] == [True, False, False]
    assert await peek(database) == 0


async def test_a_peek_ends_no_pause_and_takes_no_probe(database):
    assert await peek(database) == pausing.UNLIMITED
    await pause(database, Kind.THROTTLED, until=utc_now() - timedelta(seconds=1))
    assert await peek(database) == pausing.UNLIMITED
    await pause(database, Kind.UNAUTHORIZED, until=utc_now() - timedelta(seconds=1))
    assert [await peek(database), await peek(database)] == [1, 1]
    await pause(database, Kind.DAILY_LIMIT, until=utc_now() + HOUR)
    assert await peek(database) == 0

    assert len(await database.read(pausing.find_pauses)) == 3


async def test_twenty_jobs_at_once_claim_each_record_once(database):
    keys = [await store(database) for _ in range(5)]
    found = await asyncio.gather(*(claim_wanted(database, *(Wanted(key, 1) for key in keys)) for _ in range(20)))
    claims = [one.key for answers in found for one in answers if isinstance(one, Claim)]

    assert len(claims) == 5
    assert set(claims) == set(keys)
    assert {(await row_of(database, key)).attempts for key in keys} == {1}


async def test_waiting_records_are_found_soonest_first_up_to_the_limit(database):
    late, later = [await store(database, due_in=-timedelta(minutes=minutes)) for minutes in (20, 10)]
    soon = await store(database, due_in=HOUR)
    await store(database, due_in=None)
    await store(database, hold="legal")

    def keys(found):
        return [wanted.key for wanted, _ in found]

    assert keys(await find_waiting(database)) == [late, later]
    assert keys(await find_waiting(database, limit=1)) == [late]
    assert keys(await find_waiting(database, since=utc_now(), until=utc_now() + 2 * HOUR)) == [soon]
    assert keys(await find_waiting(database, since=utc_now() - timedelta(minutes=15))) == [later]
    (wanted, at) = (await find_waiting(database, limit=1))[0]
    assert (wanted.attempt, at) == (1, (await row_of(database, late)).wake_at)
