"""Holds: until when, before the first webhook, against whatever happens at the same time, and how they end."""

import asyncio
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import create_async_engine

from service.core.holding import ENDED, Hold
from service.core.key import Key
from service.core.lifecycle import IllegalMoveError, Move, State
from service.ledger import claiming, history, holding, receiving
from service.ledger.claiming import Wanted
from service.ledger.moving import Grace
from service.ledger.opening import open_database
from service.ledger.outcomes import CopyResult
from service.ledger.schema import holds, records
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    LEASE,
    arrival,
    claim,
    claim_one,
    confirmed,
    copy,
    end_holds,
    given_up,
    move,
    moves_of,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)

MINUTE = timedelta(minutes=1)
UNSEEN = Key(ACCOUNT, "g-unseen")


async def stored_hold(database, key=UNSEEN):
    return await database.read(partial(holding.find_hold, key=key))


async def events_of(database, key):
    row = await row_of(database, key)
    return await database.read(partial(history.read_entries, record=row.seq))


async def let_hold_end(database, key):
    """Let the hold of a record have ended a minute ago."""
    past = update(records).where(records.c.id == key.id).values(hold_until=utc_now() - MINUTE)
    await database.write(lambda connection: connection.execute(past).rowcount)


def hold_of(row):
    return row.state, row.hold_by, row.hold_reason, row.hold_until


# Until when


async def test_a_hold_has_its_end_in_the_record_and_in_the_history(database):
    key, until = await store(database, due_in=HOUR), utc_now() + HOUR
    await move(database, key, Move.HOLD, reason="audit", until=until)
    entry = (await events_of(database, key))[-1]

    assert hold_of(await row_of(database, key)) == (State.HELD, "ann", "audit", until)
    assert (entry.move, entry.actor, sorted(entry.detail)) == (Move.HOLD, "ann", ["reason", "until"])


async def test_a_longer_hold_replaces_a_shorter_one_and_not_the_reverse(database):
    key, until = await store(database, due_in=HOUR), utc_now() + HOUR
    for by, end in (("ann", until), ("bob", until - MINUTE), ("carl", until + MINUTE), ("dora", None), ("eve", until)):
        await move(database, key, Move.HOLD, by=by, until=end)

    assert hold_of(await row_of(database, key)) == (State.HELD, "dora", "why", None)
    assert [entry.actor for entry in await events_of(database, key)] == ["webhook", "ann", "carl", "dora"]


async def test_the_override_of_a_later_webhook_outlasts_a_hold_with_an_end(database):
    key = await store(database, id="g1", due_in=HOUR)
    await move(database, key, Move.HOLD, until=utc_now() + HOUR)
    await receive(database, arrival(id="g1", due_in=HOUR, hold="legal"))

    assert hold_of(await row_of(database, key)) == (State.HELD, "webhook", "legal", None)


async def test_an_operators_hold_does_not_shorten_that_of_an_override(database):
    key = await store(database, hold="legal")
    await move(database, key, Move.HOLD, until=utc_now() + HOUR)

    assert hold_of(await row_of(database, key)) == (State.HELD, "webhook", "legal", None)


@pytest.mark.parametrize("wanted", [Move.RELEASE, Move.KEEP])
async def test_a_release_or_a_keep_removes_the_end_of_the_hold(database, wanted):
    key = await store(database, due_in=HOUR)
    await move(database, key, Move.HOLD, until=utc_now() + HOUR)
    await move(database, key, wanted, grace=Grace(timedelta(0), HOUR))
    row = await row_of(database, key)

    assert (row.hold_by, row.hold_reason, row.hold_until) == (None, None, None)


# The end of a hold


async def test_a_hold_that_ended_leaves_a_fresh_minimum_ttl(database):
    key = await store(database, due_in=-HOUR, hold="wait")
    await let_hold_end(database, key)
    before = utc_now()
    ended = await end_holds(database, min_ttl=HOUR)
    row, entry = await row_of(database, key), (await events_of(database, key))[-1]

    assert (ended, row.state, row.hold_until) == (1, State.SCHEDULED, None)
    assert before + HOUR - MINUTE < row.due_at == row.wake_at <= utc_now() + HOUR + MINUTE
    assert (entry.move, entry.actor) == (Move.RELEASE, ENDED)
    assert await claim(database) == []


async def test_a_hold_that_ended_makes_nothing_due_earlier(database):
    key = await store(database, due_in=9 * HOUR, hold="wait")
    due_at = (await row_of(database, key)).due_at
    await let_hold_end(database, key)
    await end_holds(database, min_ttl=HOUR)

    assert (await row_of(database, key)).wake_at == due_at


async def test_a_record_without_a_due_time_is_kept_when_its_hold_ends(database):
    key = await store(database, due_in=None, hold="wait")
    await let_hold_end(database, key)
    await end_holds(database)
    row = await row_of(database, key)

    assert (row.state, row.due_at, row.wake_at) == (State.KEPT, None, None)
    assert (await moves_of(database, key))[-2:] == [Move.RELEASE, Move.KEEP]


async def test_only_holds_that_reached_their_end_are_ended(database):
    endless, later = [await store(database, hold="wait") for _ in range(2)]
    await move(database, await store(database), Move.HOLD, until=utc_now() + HOUR)
    await move(database, later, Move.RELEASE, grace=Grace(HOUR, HOUR))
    await move(database, later, Move.HOLD, until=utc_now() + HOUR)

    assert not await database.read(partial(holding.has_ended, account=ACCOUNT, now=utc_now()))
    assert await end_holds(database) == 0
    assert (await row_of(database, endless)).state == (await row_of(database, later)).state == State.HELD


async def test_holds_end_in_bounded_steps_and_each_once(database):
    keys = [await store(database, hold="wait") for _ in range(5)]
    for key in keys:
        await let_hold_end(database, key)
    ended = [await end_holds(database, limit=2) for _ in range(4)]

    assert ended == [2, 2, 1, 0]
    assert {tuple(await moves_of(database, key)) for key in keys} == {(Move.RECEIVE, Move.HOLD, Move.RELEASE)}


async def test_two_workers_at_once_end_each_hold_once(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        keys = [await store(one, hold="wait") for _ in range(20)]
        for key in keys:
            await let_hold_end(one, key)
        ended = await asyncio.gather(*(end_holds(database, limit=20) for database in (one, other, one, other)))

        assert sum(ended) == 20
        assert {len(await moves_of(one, key)) for key in keys} == {3}


async def test_a_clock_that_is_ahead_ends_no_hold_early_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        key = await store(database, due_in=-HOUR)
        await move(database, key, Move.HOLD, until=utc_now() + HOUR)
        ahead = utc_now() + 2 * HOUR

        assert not await database.read(partial(holding.has_ended, account=ACCOUNT, now=ahead))
        assert await end_holds(database, now=ahead) == 0


async def test_a_clock_that_is_behind_shortens_no_minimum_ttl_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        key = await store(database, due_in=-72 * HOUR)
        await move(database, key, Move.HOLD)
        end = update(records).values(hold_until=utc_now() - 5 * HOUR)
        await database.write(lambda connection: connection.execute(end).rowcount)

        assert await end_holds(database, now=utc_now() - 4 * HOUR, min_ttl=HOUR) == 1
        assert (await row_of(database, key)).due_at > utc_now() + HOUR - MINUTE


# Before the first webhook


async def test_a_generation_that_is_held_before_its_webhook_is_held_from_the_beginning(database):
    until = utc_now() + HOUR
    stored = await move(database, UNSEEN, Move.HOLD, reason="audit", until=until)
    (receipt,) = await receive(database, arrival(id=UNSEEN.id, due_in=-HOUR))

    assert stored == Hold("ann", "audit", until)
    assert (receipt.state, receipt.is_new) == (State.HELD, True)
    assert hold_of(await row_of(database, UNSEEN)) == (State.HELD, "ann", "audit", until)
    assert [(entry.move, entry.actor) for entry in await events_of(database, UNSEEN)] == [
        (Move.RECEIVE, "webhook"),
        (Move.HOLD, "ann"),
    ]
    assert await stored_hold(database) is None
    assert await claim(database) == []


async def test_a_hold_before_the_webhook_also_holds_what_would_be_kept(database):
    await move(database, UNSEEN, Move.HOLD)
    await receive(database, arrival(id=UNSEEN.id, due_in=None))

    assert (await row_of(database, UNSEEN)).state == State.HELD


@pytest.mark.parametrize(("until", "by"), [(HOUR, "webhook"), (None, "ann")])
async def test_of_a_hold_before_the_webhook_and_its_override_the_longer_counts(database, until, by):
    await move(database, UNSEEN, Move.HOLD, until=until and utc_now() + until)
    await receive(database, arrival(id=UNSEEN.id, hold="legal"))
    row = await row_of(database, UNSEEN)

    assert (row.hold_by, row.hold_until) == (by, None)


async def test_of_two_holds_before_the_webhook_the_longer_one_counts(database):
    until = utc_now() + HOUR
    for by, end in (("ann", until), ("bob", until - MINUTE), ("carl", None), ("dora", until)):
        await move(database, UNSEEN, Move.HOLD, by=by, until=end)

    assert await stored_hold(database) == Hold("carl", "why", None)


async def test_a_release_removes_a_hold_before_the_webhook(database):
    await move(database, UNSEEN, Move.HOLD)
    removed = await move(database, UNSEEN, Move.RELEASE, grace=Grace(HOUR, HOUR))
    again = await move(database, UNSEEN, Move.RELEASE, grace=Grace(HOUR, HOUR))
    await receive(database, arrival(id=UNSEEN.id))

    assert (removed, again) == (Hold("ann", "why", None), None)
    assert (await row_of(database, UNSEEN)).state == State.SCHEDULED


async def test_the_hold_of_one_account_holds_no_generation_of_another(database):
    await move(database, Key("other", UNSEEN.id), Move.HOLD)
    await receive(database, arrival(id=UNSEEN.id))

    assert (await row_of(database, UNSEEN)).state == State.SCHEDULED


async def test_of_many_webhooks_in_one_commit_only_the_held_ones_are_held(database):
    arrivals = [arrival(due_in=-HOUR) for _ in range(20)]
    for item in arrivals[::3]:
        await move(database, item.key, Move.HOLD)
    receipts = await receive(database, *arrivals, *arrivals)

    assert [receipt.state for receipt in receipts[:20]] == [
        State.SCHEDULED if number % 3 else State.HELD for number in range(20)
    ]
    assert len(await claim(database, limit=50)) == 13


# Against the claim and the copy: a hold and a webhook that were committed at once, neither having seen the other


async def store_unseen_hold(database, key, hold=None):
    """Store the hold of a record as if its webhook had been committed at the same time."""
    write = partial(holding.hold_unseen, key=key, hold=hold or Hold("ann", "why", None), now=utc_now())
    await database.write(write)


async def claim_wanted(database, key, attempt=1):
    wanted = [Wanted(key, attempt)]
    write = partial(claiming.claim_wanted, account=ACCOUNT, wanted=wanted, now=utc_now(), lease=LEASE, actor=ACTOR)
    return (await database.write(write))[0]


@pytest.mark.parametrize("by_job", [True, False])
async def test_a_claim_holds_a_record_whose_hold_no_webhook_saw(database, by_job):
    key, other = await store(database, due_in=-2 * HOUR), await store(database)
    until = utc_now() + HOUR
    await store_unseen_hold(database, key, Hold("ann", "audit", until))
    claims = [await claim_wanted(database, one) for one in (key, other)] if by_job else await claim(database)

    assert [item.key for item in claims if item is not None] == [other]
    assert hold_of(await row_of(database, key)) == (State.HELD, "ann", "audit", until)
    assert (await row_of(database, key)).wake_at is None
    assert await moves_of(database, key) == [Move.RECEIVE, Move.HOLD]
    assert await stored_hold(database, key) is None


async def test_a_copy_holds_a_record_whose_hold_no_claim_saw(database):
    key, other = await store(database), await store(database)
    items = {item.key: item for item in await claim(database)}
    await store_unseen_hold(database, key)
    results = {one: await copy(database, items[one], limit=5) for one in (key, other)}

    assert results == {key: CopyResult.LOST, other: CopyResult.KEPT}
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.LOSE_LEASE, Move.HOLD]
    assert hold_of(await row_of(database, key)) == (State.HELD, "ann", "why", None)


async def test_another_webhook_finds_the_hold_that_the_first_did_not_see(database):
    key = await store(database, id="g1", due_in=HOUR)
    await store_unseen_hold(database, key)
    (receipt,) = await receive(database, arrival(id="g1", due_in=HOUR))

    assert receipt.state == State.HELD
    assert await stored_hold(database, key) is None


async def test_a_release_removes_a_hold_that_no_claim_has_seen(database):
    key = await store(database)
    await store_unseen_hold(database, key)
    await move(database, key, Move.RELEASE, grace=Grace(HOUR, HOUR))

    assert (await claim_one(database)).key == key


async def test_a_failed_record_with_an_unseen_hold_is_not_deleted_by_a_retry(database):
    key = await store(database)
    await settle(database, given_up(await claim_one(database)))
    await store_unseen_hold(database, key)
    await move(database, key, Move.RETRY)

    assert await claim(database) == []
    assert (await row_of(database, key)).state == State.HELD


@pytest.mark.parametrize("is_repeated", [False, True])
async def test_a_hold_that_an_open_webhook_cannot_see_is_in_force(postgres_url, is_repeated):
    engine = create_async_engine(postgres_url.set(drivername="postgresql+asyncpg"))
    item = arrival(due_in=-HOUR)
    async with open_database(postgres_url) as database, engine.connect() as other:
        (receipt,) = await other.run_sync(partial(receiving.receive, arrivals=[item]))
        answer = await move(database, item.key, Move.HOLD)
        await other.commit()
        if is_repeated:
            await move(database, item.key, Move.HOLD)

        assert (receipt.state, answer) == (State.SCHEDULED, Hold("ann", "why", None))
        assert await claim(database) == []
        assert (await row_of(database, item.key)).state == State.HELD
        assert await stored_hold(database, item.key) is None
    await engine.dispose()


async def test_holds_webhooks_claims_and_copies_at_once_delete_nothing_held(database_url):
    async def hold(database, key):
        try:
            await move(database, key, Move.HOLD)
        except IllegalMoveError:
            return False
        return True

    async def work(database):
        copied = []
        for _ in range(4):
            for item in await claim(database, limit=50):
                if await copy(database, item) is CopyResult.KEPT:
                    copied.append(item.key)
                    await settle(database, confirmed(item))
        return copied

    async with open_database(database_url) as one, open_database(database_url) as other:
        for _ in range(6):
            arrivals = [arrival(due_in=-HOUR) for _ in range(12)]
            parts = [*(hold(one, item.key) for item in arrivals), receive(other, *arrivals), work(one), work(other)]
            *answers, _, first, second = await asyncio.gather(*parts)
            deleted = {*first, *second, *await work(one)}
            held = {item.key for item, is_held in zip(arrivals, answers, strict=True) if is_held}

            assert held.isdisjoint(deleted)
            assert held | deleted == {item.key for item in arrivals}
            assert {(await row_of(one, key)).state for key in held} <= {State.HELD}
            assert not await one.read(lambda connection: connection.execute(holds.select()).all())


@pytest.mark.parametrize("delay", [0, 1])
async def test_a_hold_after_the_copy_is_refused_and_stores_nothing(database, delay):
    key = await store(database)
    await copy(database, await claim_one(database))
    if delay:
        await store_unseen_hold(database, key)
    with pytest.raises(IllegalMoveError, match="its DELETE may be in progress"):
        await move(database, key, Move.HOLD)
