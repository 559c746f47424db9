"""The dispatcher cleans what is due, as many at once as allowed, whatever wakes it, and stops without loss."""

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from service.generation import Key
from service.ledger import reading
from service.ledger.database import Database, LedgerUnavailableError
from service.lifecycle import State
from service.retention import Verdict
from service.tasks import end
from tests.support.ledger import (
    HOUR,
    arrival,
    claim,
    confirmed,
    deferred,
    end_lease,
    lose_leases,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)
from tests.support.waiting import eventually
from workers import dispatch
from workers.dispatch import Dispatcher
from workers.heartbeat import beat, is_alive
from workers.reconcile import reconcile


class Work:
    """Cleanups that wait at a gate, and a note of all that was asked for."""

    def __init__(self, database: Database, concurrency: int) -> None:
        self.database = database
        self.concurrency = concurrency
        self.gate = asyncio.Event()
        self.gate.set()
        self.looks = 0
        self.beats = 0
        self.claims: list[int] = []
        self.cleaned: list[Key] = []
        self.given_back: list[Key] = []
        self.running = self.most_running = 0
        self.faults: list[Exception] = []
        self.budget: int | None = None  # how many records may be begun; None is any number

    def beat(self):
        self.beats += 1

    async def allow(self, limit):
        if self.budget is None:
            return limit
        allowed = min(limit, self.budget)
        self.budget -= allowed
        await asyncio.sleep(0.01)
        return allowed

    async def claim(self, limit):
        if self.faults:
            raise self.faults.pop()
        claims = await claim(self.database, limit=limit)
        self.claims.append(len(claims))
        return claims

    async def next_wake(self):
        self.looks += 1
        return await self.database.read(reading.next_wake)

    async def clean(self, item):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.gate.wait()
        await settle(self.database, confirmed(item))
        self.cleaned.append(item.key)
        self.running -= 1
        return Verdict.DONE

    async def give_back(self, item):
        self.given_back.append(item.key)
        await settle(self.database, deferred(item))


@pytest.fixture
def running(sqlite_database, metrics):
    """Run a dispatcher over real records: ``async with running(concurrency=3) as (dispatcher, work)``."""

    @asynccontextmanager
    async def run(concurrency=3):
        work = Work(sqlite_database, concurrency)
        dispatcher = Dispatcher(
            allow=work.allow,
            claim=work.claim,
            next_wake=work.next_wake,
            clean=work.clean,
            give_back=work.give_back,
            beat=work.beat,
            now=utc_now,
            concurrency=concurrency,
            metrics=metrics,
        )
        task = asyncio.create_task(dispatcher.run())
        try:
            yield dispatcher, work
        finally:
            work.gate.set()
            dispatcher.stop()
            await asyncio.wait_for(task, 10)

    return run


async def store_many(database, number):
    await receive(database, *(arrival() for _ in range(number)))


async def test_all_that_is_due_is_cleaned_once_and_no_more_at_a_time_than_allowed(running, sqlite_database):
    await store_many(sqlite_database, 25)
    async with running(concurrency=3) as (_, work):
        await eventually(lambda: len(work.cleaned) == 25)

    assert len(set(work.cleaned)) == 25
    assert work.most_running == 3


async def test_as_many_again_are_claimed_beside_those_under_way_and_in_batches(running, sqlite_database):
    await store_many(sqlite_database, 30)
    async with running(concurrency=5) as (_, work):
        work.gate.clear()
        await eventually(lambda: work.running == 5)
        await asyncio.sleep(0.05)

        assert sum(work.claims) == 10
        work.gate.set()
        await eventually(lambda: len(work.cleaned) == 30)

    assert len([size for size in work.claims if size]) <= 9


async def test_no_more_is_claimed_than_the_budget_allows_and_the_rest_as_soon_as_it_does(running, sqlite_database):
    async with running(concurrency=5) as (dispatcher, work):
        work.budget = 3
        await store_many(sqlite_database, 8)
        dispatcher.ring()
        await eventually(lambda: len(work.cleaned) == 3)
        await asyncio.sleep(0.1)
        states = await sqlite_database.read(reading.counts)
        assert (states[State.DELETED], states[State.SCHEDULED], states[State.DELETING]) == (3, 5, 0)
        work.budget = None

        await eventually(lambda: len(work.cleaned) == 8, seconds=1)


async def test_a_bell_wakes_it_at_once(running, sqlite_database, monkeypatch):
    monkeypatch.setattr(dispatch, "TICK", HOUR)
    async with running() as (dispatcher, work):
        await eventually(lambda: work.looks)
        await store(sqlite_database)
        await asyncio.sleep(0.05)
        assert work.cleaned == []

        dispatcher.ring()
        await eventually(lambda: len(work.cleaned) == 1, seconds=2)


async def test_without_a_bell_it_wakes_when_the_ledger_has_the_next_one_due(running, sqlite_database, monkeypatch):
    monkeypatch.setattr(dispatch, "TICK", HOUR)
    key = await store(sqlite_database, due_in=timedelta(seconds=0.5))
    due_at = (await row_of(sqlite_database, key)).due_at
    async with running() as (_, work):
        await eventually(lambda: work.cleaned == [key], seconds=3)
        row = await row_of(sqlite_database, key)

    assert due_at <= utc_now() <= due_at + timedelta(seconds=2)
    assert row.state == State.DELETED


async def test_without_bell_or_next_time_it_looks_every_tick(running, sqlite_database, monkeypatch):
    monkeypatch.setattr(dispatch, "TICK", timedelta(seconds=0.1))
    async with running() as (_, work):
        await eventually(lambda: work.looks)
        key = await store(sqlite_database)
        await eventually(lambda: work.cleaned == [key], seconds=2)


async def test_with_nothing_to_do_it_does_not_spin(running, sqlite_database):
    await store(sqlite_database, due_in=HOUR)
    async with running() as (_, work):
        await asyncio.sleep(0.3)

        assert (work.looks, work.claims) == (1, [])


async def test_a_record_that_is_due_and_cannot_be_claimed_does_not_make_it_spin(running, sqlite_database):
    await store(sqlite_database)
    (item,) = await claim(sqlite_database)
    await end_lease(sqlite_database, item.key)
    async with running() as (_, work):
        await asyncio.sleep(0.3)

        assert work.claims == [0]


async def test_a_stop_ends_what_is_under_way_and_gives_back_what_was_not_begun(running, sqlite_database):
    await store_many(sqlite_database, 10)
    async with running(concurrency=2) as (dispatcher, work):
        work.gate.clear()
        await eventually(lambda: work.running == 2)
        dispatcher.stop()
        await eventually(lambda: len(work.given_back) == 2)
        assert work.cleaned == []

    assert len(work.cleaned) == 2
    states = await sqlite_database.read(reading.counts)
    assert (states[State.DELETED], states[State.SCHEDULED], states[State.DELETING]) == (2, 8, 0)


async def test_it_works_on_after_a_ledger_that_was_away_and_after_a_fault(
    running, sqlite_database, metrics, monkeypatch
):
    monkeypatch.setattr(dispatch, "_ERROR_PAUSE", timedelta(seconds=0.02))
    key = await store(sqlite_database)
    async with running() as (dispatcher, work):
        await eventually(lambda: work.cleaned == [key])
        work.faults = [LedgerUnavailableError("away"), ZeroDivisionError()]
        other = await store(sqlite_database)
        dispatcher.ring()
        await eventually(lambda: work.cleaned == [key, other])

    assert metrics.registry.get_sample_value("mayfly_loops_failed_total", {"loop": "dispatch"}) == 2


# The reconciler and the heartbeat


@asynccontextmanager
async def reconciling(lose, ring, metrics):
    task = asyncio.create_task(reconcile(lose_leases=lose, ring=ring, metrics=metrics, every=timedelta(seconds=0.02)))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_reconciler_takes_back_lost_records_and_rings_for_them(database, metrics):
    key = await store(database)
    await claim(database)
    await end_lease(database, key)
    rung = asyncio.Event()
    async with reconciling(lambda: lose_leases(database), rung.set, metrics):
        await asyncio.wait_for(rung.wait(), 5)

    assert (await row_of(database, key)).state == State.SCHEDULED


async def test_the_reconciler_outlives_a_ledger_that_is_away_and_a_fault(metrics):
    faults = [LedgerUnavailableError("away"), ZeroDivisionError()]
    rounds = []

    async def lose():
        rounds.append(1)
        if len(rounds) <= len(faults):
            raise faults[len(rounds) - 1]
        return 0

    async with reconciling(lose, lambda: None, metrics):
        await eventually(lambda: len(rounds) >= 4)

    assert metrics.registry.get_sample_value("mayfly_loops_failed_total", {"loop": "reconcile"}) == 2


async def test_each_round_shows_that_the_worker_lives_also_while_the_ledger_is_away(running, monkeypatch):
    monkeypatch.setattr(dispatch, "_ERROR_PAUSE", timedelta(seconds=0.02))
    async with running() as (dispatcher, work):
        work.faults = [LedgerUnavailableError("away")] * 3
        await store(work.database)
        dispatcher.ring()

        await eventually(lambda: len(work.cleaned) == 1)
    assert work.beats >= 4


def test_a_worker_is_alive_for_a_minute_after_its_last_beat(tmp_path):
    now = utc_now().timestamp()
    assert not is_alive(tmp_path, now_seconds=now)
    beat(tmp_path)

    assert is_alive(tmp_path, now_seconds=now)
    assert not is_alive(tmp_path, now_seconds=now + 61)


def test_a_heartbeat_that_cannot_be_written_keeps_nobody_from_work(tmp_path):
    with capture_logs() as logs:
        beat(tmp_path / "gone")

    assert [entry["event"] for entry in logs] == ["heartbeat.failed"]


# Stopping


async def test_a_helper_that_loses_a_cancellation_is_cancelled_again():
    lost: list[int] = []

    async def careless():
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:  # what asyncio.wait_for does with it before Python 3.12
                if len(lost) == 2:
                    raise
                lost.append(1)

    helpers = [asyncio.create_task(careless()), asyncio.create_task(asyncio.sleep(60))]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await end(helpers)

    assert len(lost) == 2
    assert all(helper.cancelled() for helper in helpers)
