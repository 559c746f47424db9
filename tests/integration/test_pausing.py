"""While deletions are paused nothing is claimed; one record at a time probes a refused key."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import event

from service.core.attempts import Verdict
from service.core.lifecycle import State
from service.ledger import pausing, settling
from service.ledger.opening import open_database
from service.ledger.outcomes import Settled
from service.ledger.pausing import PROBE_EVERY, Kind, Pause
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    KEY,
    arrival,
    claim,
    claim_one,
    confirmed,
    deferred,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)

SECOND = timedelta(seconds=1)


async def pause(database, kind, *, until=None):
    account = pausing.ALL_ACCOUNTS if kind is Kind.OPERATOR else ACCOUNT
    wanted = Pause(kind, utc_now(), "an operator", "a reason", until, account)
    return await database.write(partial(pausing.pause, wanted=wanted))


async def kinds(database):
    return [one.kind for one in await database.read(pausing.find_pauses)]


async def test_without_a_pause_all_may_be_claimed(database):
    now = utc_now()

    assert await database.write(partial(pausing.take_allowance, account=ACCOUNT, now=now)) == pausing.UNLIMITED


async def test_an_operators_pause_stops_claims_until_the_resume(database):
    key = await store(database)
    await pause(database, Kind.OPERATOR)

    assert await claim(database) == []
    assert await claim(database, now=utc_now() + timedelta(days=9)) == []
    assert await database.write(partial(pausing.resume, kinds=[Kind.OPERATOR])) == [Kind.OPERATOR]
    assert (await claim_one(database)).key == key


async def throttle(database, seconds, *, ago=0):
    now = utc_now() - timedelta(seconds=ago)
    wait = timedelta(seconds=seconds)
    await database.write(partial(pausing.throttle, wait=wait, now=now, actor="a worker", account=ACCOUNT))


async def test_after_a_429_nothing_is_claimed_until_its_time_is_over(database):
    await store(database)
    await store(database)
    await throttle(database, 60)
    assert await claim(database) == []
    await database.write(partial(pausing.resume, kinds=[Kind.THROTTLED]))
    await throttle(database, 60, ago=61)

    assert len(await claim(database)) == 2
    assert await kinds(database) == []


async def test_of_two_429s_the_longer_one_counts(database):
    await throttle(database, 60)
    await throttle(database, 600)
    await throttle(database, 5)
    (one,) = await database.read(pausing.find_pauses)

    assert one.until is not None
    assert timedelta(seconds=590) < one.until - utc_now() <= timedelta(seconds=600)


async def test_no_probe_is_taken_while_another_pause_is_in_force(database):
    past = utc_now() - SECOND
    await store(database)
    await pause(database, Kind.UNAUTHORIZED, until=past)
    await pause(database, Kind.OPERATOR)
    assert await claim(database) == []
    (probe, _) = await database.read(pausing.find_pauses)
    assert probe.until == past
    await database.write(partial(pausing.resume, kinds=[Kind.OPERATOR]))

    assert len(await claim(database)) == 1


async def test_a_worker_whose_clock_is_ahead_does_not_delay_the_next_probe(postgres_url):
    async with open_database(postgres_url) as database:
        await store(database)
        await pause(database, Kind.UNAUTHORIZED, until=utc_now() - SECOND)
        ahead = utc_now() + timedelta(hours=3)
        assert await database.write(partial(pausing.take_allowance, account=ACCOUNT, now=ahead)) == 1
        (probe,) = await database.read(pausing.find_pauses)

    assert probe.until is not None
    assert probe.until <= utc_now() + PROBE_EVERY


async def test_a_pause_keeps_its_first_reason_and_ends_once(database):
    assert await pause(database, Kind.OPERATOR)
    since = (await database.read(pausing.find_pauses))[0].since

    assert not await pause(database, Kind.OPERATOR)
    assert [one.since for one in await database.read(pausing.find_pauses)] == [since]
    await database.write(partial(pausing.resume, kinds=list(Kind)))
    assert await database.write(partial(pausing.resume, kinds=list(Kind))) == []


async def test_a_refused_key_pauses_deletions_and_counts_no_failure(database):
    await receive(database, arrival(), arrival())
    first = (await claim(database, limit=1))[0]
    await settle(database, deferred(first, verdict=Verdict.UNAUTHORIZED))
    (found,) = await database.read(pausing.find_pauses)

    assert (found.kind, found.actor, found.reason) == (Kind.UNAUTHORIZED, ACTOR, "the API refuses the key")
    assert await claim(database) == []


async def test_one_worker_a_minute_probes_a_refused_key(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        await receive(one, *(arrival() for _ in range(10)))
        await pause(one, Kind.UNAUTHORIZED, until=utc_now() - SECOND)
        probes = await asyncio.gather(*(claim(database, limit=5) for database in (one, other) * 5))

        assert sorted(len(claims) for claims in probes) == [0] * 9 + [1]
        (found,) = await one.read(pausing.find_pauses)
        assert found.until is not None
        assert timedelta(0) < found.until - utc_now() <= PROBE_EVERY


async def test_a_successful_probe_ends_the_pause_of_the_key(database):
    await receive(database, arrival(), arrival())
    await pause(database, Kind.UNAUTHORIZED, until=utc_now() - SECOND)
    await settle(database, replace(confirmed(await claim_one(database)), is_key_good=True))

    assert await kinds(database) == []
    assert len(await claim(database)) == 1


async def test_an_answer_that_an_invalid_key_could_get_ends_no_pause(database):
    await store(database)
    await pause(database, Kind.UNAUTHORIZED, until=utc_now() - SECOND)
    await settle(database, deferred(await claim_one(database), verdict=Verdict.RETRY))

    assert await kinds(database) == [Kind.UNAUTHORIZED]


async def test_a_valid_key_does_not_end_the_pause_of_an_operator(database):
    await store(database)
    item = await claim_one(database)
    await pause(database, Kind.OPERATOR)
    await settle(database, confirmed(item))

    assert await kinds(database) == [Kind.OPERATOR]


async def test_an_operators_pause_also_stops_the_probes(database):
    await store(database)
    await pause(database, Kind.UNAUTHORIZED, until=utc_now() - SECOND)
    await pause(database, Kind.OPERATOR)

    assert await claim(database) == []


async def test_the_pause_of_the_daily_limit_ends_by_itself(database):
    await store(database)
    await pause(database, Kind.DAILY_LIMIT, until=utc_now() + timedelta(hours=1))
    assert await claim(database) == []

    await database.write(partial(pausing.resume, kinds=[Kind.DAILY_LIMIT]))
    await pause(database, Kind.DAILY_LIMIT, until=utc_now() - SECOND)
    assert len(await claim(database)) == 1
    assert await kinds(database) == []


async def test_workers_refused_at_the_same_moment_all_commit_their_attempts(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        await receive(one, *(arrival() for _ in range(8)))
        claims = await claim(one, limit=8)
        ends = [deferred(item, verdict=Verdict.UNAUTHORIZED) for item in claims]
        results = await asyncio.gather(
            *(settle(database, end) for database, end in zip((one, other) * 4, ends, strict=True))
        )
        states = {(await row_of(one, item.key)).state for item in claims}

        assert results == [[Settled.SETTLED]] * 8
        assert states == {State.SCHEDULED}
        assert await kinds(one) == [Kind.UNAUTHORIZED]


async def test_pausing_twice_at_once_is_one_pause(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        results = await asyncio.gather(*(pause(database, Kind.OPERATOR) for database in (one, other) * 4))

        assert sorted(results) == [False] * 7 + [True]
        assert await kinds(one) == [Kind.OPERATOR]


async def test_a_resume_never_deadlocks_with_workers_that_read_the_allowance(postgres_url):
    async with open_database(postgres_url) as one, open_database(postgres_url) as other:
        for _ in range(30):
            now = utc_now()
            # The later one is written first.
            for kind, since in ((Kind.DAILY_LIMIT, now), (Kind.UNAUTHORIZED, now - SECOND)):
                await one.write(partial(pausing.pause, wanted=Pause(kind, since, "a worker", "a reason", now, ACCOUNT)))
            look = other.write(partial(pausing.take_allowance, account=ACCOUNT, now=utc_now()))
            await asyncio.gather(look, one.write(partial(pausing.resume, kinds=list(Kind))))

            assert await kinds(one) == []


def slowly(function):
    """Have *function* wait after each change of a pause, so that two of them meet for sure."""

    def wait(connection, _cursor, statement, _parameters, _context, _is_many):
        if "pauses" in statement and statement.startswith(("DELETE", "UPDATE")):
            connection.exec_driver_sql("SELECT pg_sleep(0.2)")

    def run(connection):
        event.listen(connection, "after_cursor_execute", wait)
        return function(connection)

    return run


@pytest.mark.parametrize("is_look_first", [True, False])
async def test_a_look_at_pauses_and_the_end_of_attempts_never_wait_for_ever(postgres_url, *, is_look_first):
    async with open_database(postgres_url) as one, open_database(postgres_url) as other:
        await receive(one, arrival(), arrival())
        accepted, throttled = await claim(one, limit=2)
        past = utc_now() - SECOND
        for kind, since in ((Kind.THROTTLED, past - SECOND), (Kind.UNAUTHORIZED, past)):
            await one.write(partial(pausing.pause, wanted=Pause(kind, since, "a worker", "a reason", past, ACCOUNT)))
        ends = [replace(deferred(accepted), is_key_good=True), replace(deferred(throttled), throttle=60 * SECOND)]
        writes = [
            one.write(slowly(partial(settling.settle_attempts, key=KEY, settlements=ends, now=utc_now(), actor=ACTOR))),
            other.write(slowly(partial(pausing.take_allowance, account=ACCOUNT, now=utc_now()))),
        ]
        results = await asyncio.gather(*(reversed(writes) if is_look_first else writes))
        settled = results[1 if is_look_first else 0]

        assert settled == [Settled.SETTLED] * 2
        assert await kinds(one) == [Kind.THROTTLED]  # the new one, and not ended with the old one
