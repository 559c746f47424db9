"""The start of a worker: it is seen, and ends what another configuration left behind."""

from datetime import timedelta
from functools import partial

import pytest

from service.core.attempts import Step, Verdict
from service.core.lifecycle import Move, State
from service.ledger import claiming, daily_limit, heartbeats, pausing
from service.ledger.outcomes import Settlement
from service.ledger.pausing import Kind, Pause
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    KEY,
    claim,
    claim_one,
    copy,
    deferred,
    row_of,
    settle,
    store,
    utc_now,
)
from workers.ledger import WorkerLedger


def worker(database, *, limit=None, is_dry_run=False):
    return WorkerLedger(database, limit=limit, is_dry_run=is_dry_run, actor=ACTOR, key=KEY, min_ttl=HOUR, now=utc_now)


async def test_a_worker_is_seen_in_the_ledger_and_writes_rarely(database):
    before = utc_now()
    ledger = worker(database)
    await ledger.beat()
    first = await database.read(partial(heartbeats.last_beat, name=heartbeats.WORKER))
    await ledger.beat()
    second = await database.read(partial(heartbeats.last_beat, name=heartbeats.WORKER))

    assert before <= first <= utc_now()
    assert second == first


@pytest.fixture
async def limited(database):
    """Deletions are paused after two of two today."""
    for _ in range(3):
        await store(database)
        await copy(database, await claim_one(database), limit=2)
    assert await kinds(database) == [Kind.DAILY_LIMIT]


async def kinds(database):
    return [one.kind for one in await database.read(pausing.find_pauses)]


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize(("limit", "is_paused"), [(None, False), (3, False), (2, True), (1, True)])
async def test_a_start_with_a_higher_daily_limit_or_none_ends_its_pause(database, limit, is_paused):
    await worker(database, limit=limit).beat()

    assert (Kind.DAILY_LIMIT in await kinds(database)) is is_paused


@pytest.mark.usefixtures("limited")
async def test_a_dry_run_ends_no_pause_of_the_daily_limit(database):
    await worker(database, is_dry_run=True).beat()

    assert await kinds(database) == [Kind.DAILY_LIMIT]


async def test_a_start_ends_no_other_pause(database):
    await database.write(partial(pausing.pause, wanted=Pause(Kind.OPERATOR, utc_now(), "an operator", "audit", None)))
    await worker(database).beat()

    assert await kinds(database) == [Kind.OPERATOR]
    assert not await database.write(partial(daily_limit.end_pause, account=ACCOUNT, limit=None, now=utc_now()))


async def test_what_a_dry_run_rehearsed_is_due_once_it_is_switched_off(database):
    rehearsed = await store(database)
    item = await claim_one(database)
    step = Step(Move.DEFER, item.progress, retry_at=utc_now() + HOUR)
    await settle(database, Settlement(item, Verdict.DONE, step, error=claiming.DRY_RUN, is_key_good=True))
    failing = await store(database)
    later = utc_now() + HOUR
    await settle(database, deferred(await claim_one(database), retry_at=later))
    future = await store(database, due_in=HOUR)

    await worker(database, is_dry_run=True).beat()
    assert await claim(database) == []
    await worker(database).beat()

    assert [one.key for one in await claim(database)] == [rehearsed]
    assert (await row_of(database, failing)).wake_at == later
    row = await row_of(database, future)
    assert (row.state, row.wake_at - utc_now() > timedelta(minutes=59)) == (State.SCHEDULED, True)
