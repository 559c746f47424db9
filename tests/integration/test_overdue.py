"""The safety net enqueues jobs that are missing, and cleans due records itself without Redis."""

import asyncio
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import update
from structlog.testing import capture_logs

from service.core.attempts import Verdict
from service.core.key import Key
from service.core.lifecycle import State
from service.core.rate import Rate
from service.core.secret import Secret
from service.jobs import connection, enqueue
from service.jobs.enqueue import CleanupJob
from service.ledger import outlook, pausing, reading
from service.ledger.database import LedgerUnavailableError
from service.ledger.pausing import Kind, Pause
from service.ledger.schema import records
from service.runtime.tasks import cancel_and_wait
from service.sync.rate_limit import Budget
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    claim,
    confirmed,
    end_holds,
    end_lease,
    lose_leases,
    row_of,
    settle,
    store,
    utc_now,
)
from tests.support.waiting import eventually
from workers import overdue
from workers.cleanup import Attempts
from workers.heartbeat import beat, is_alive
from workers.overdue import AT_ONCE, LATE, LedgerCalls, Overdue

MINUTE = timedelta(minutes=1)
UNLIMITED = Rate(100_000, 1)


class Net:
    """A safety net over a real ledger and Redis, without an arq worker beside it."""

    def __init__(self, database, pool, metrics, *, rate=UNLIMITED) -> None:
        self.database = database
        self.pool = pool
        self.beats = 0
        self.rounds = 0
        self.faults: list[Exception] = []
        self.redis_faults: list[Exception] = []
        self.claim_faults: list[Exception] = []
        self.cleaned: list[Key] = []
        self.stopping = asyncio.Event()
        clock = asyncio.get_running_loop().time
        self.budget = Budget(rate, pool, Secret("sk-1"), clock=clock, stopping=self.stopping)
        self.attempts = Attempts(self.clean, limit=10)
        self.overdue = Overdue(
            account="default",
            ledger=LedgerCalls(self.read_outlook, self.end_leases, self.end_holds, self.claim, self.beat_in_ledger),
            enqueue=self.enqueue,
            budget=self.budget,
            attempts=self.attempts,
            beat=self.beat,
            now=utc_now,
            horizon=48 * HOUR,
            metrics=metrics,
            stopping=self.stopping,
        )

    async def beat_in_ledger(self):
        """See test_starting.py."""

    def beat(self):
        self.beats += 1

    async def read_outlook(self, since, until):
        self.rounds += 1
        if self.faults:
            raise self.faults.pop()
        read = partial(
            outlook.read_outlook, account=ACCOUNT, now=utc_now(), late=LATE, since=since, until=until, limit=AT_ONCE
        )
        return await self.database.read(read)

    async def end_leases(self):
        return await lose_leases(self.database)

    async def end_holds(self):
        return await end_holds(self.database, min_ttl=HOUR)

    async def claim(self, limit):
        if self.claim_faults:
            raise self.claim_faults.pop()
        return await claim(self.database, limit=limit)

    async def clean(self, item):
        await settle(self.database, confirmed(item))
        self.cleaned.append(item.key)
        return Verdict.DONE

    async def enqueue(self, jobs):
        if self.redis_faults:
            raise self.redis_faults[0]
        return await enqueue.enqueue_jobs(self.pool, enqueue.queue_of(ACCOUNT), jobs, now=utc_now())

    async def jobs(self):
        return {job_id.decode() for job_id in await self.pool.zrange(connection.QUEUE, 0, -1)}


@pytest.fixture
async def net(sqlite_database, pool, metrics):
    return Net(sqlite_database, pool, metrics)


@asynccontextmanager
async def running(net, monkeypatch, every=0.05):
    monkeypatch.setattr(overdue, "EVERY", timedelta(seconds=every))
    task = asyncio.create_task(net.overdue.run())
    try:
        yield
    finally:
        net.stopping.set()
        await asyncio.wait_for(task, 10)


async def rounds(net, number=2):
    """Wait until *number* more rounds have begun, and so the one before has ended."""
    wanted = net.rounds + number
    await eventually(lambda: net.rounds >= wanted)


async def test_exactly_the_records_due_within_the_horizon_get_a_job(net, sqlite_database, monkeypatch):
    late = await store(sqlite_database, due_in=-MINUTE)
    soon = await store(sqlite_database, due_in=HOUR)
    await store(sqlite_database, due_in=72 * HOUR)
    await store(sqlite_database, due_in=None)
    await store(sqlite_database, hold="legal")
    async with running(net, monkeypatch):
        await rounds(net)

    assert await net.jobs() == {f"default:{late.id}:1", f"default:{soon.id}:1"}


async def test_a_late_job_is_brought_forward_and_any_other_is_unchanged(net, sqlite_database, monkeypatch):
    key = await store(sqlite_database, due_in=-MINUTE)
    job_id = f"default:{key.id}:1"
    for score, is_moved in ((int((utc_now() + HOUR).timestamp() * 1000), True), (1, False)):
        await net.pool.zadd(connection.QUEUE, {job_id: score})
        net.stopping.clear()
        async with running(net, monkeypatch):
            await rounds(net)

        found = await net.pool.zscore(connection.QUEUE, job_id)
        assert (found < score) if is_moved else (found == score)


async def test_a_record_that_has_just_become_due_is_left_to_its_job(net, sqlite_database, monkeypatch):
    async with running(net, monkeypatch):
        await rounds(net)
        await store(sqlite_database, due_in=-timedelta(seconds=1))  # within the two seconds that a job may take
        await rounds(net)

        assert await net.jobs() == set()


async def test_an_emptied_redis_is_noticed_although_another_wrote_to_it_first(net, sqlite_database, monkeypatch):
    key = await store(sqlite_database, due_in=HOUR)
    async with running(net, monkeypatch, every=0.3):
        await rounds(net)
        await net.pool.flushall()
        of_the_web_side = CleanupJob(Key("default", "new"), 1, utc_now() + HOUR)
        await enqueue.enqueue_jobs(net.pool, enqueue.queue_of(ACCOUNT), [of_the_web_side], now=utc_now())
        await rounds(net, 4)

    assert await net.jobs() == {f"default:{key.id}:1", "default:new:1"}


async def test_after_redis_was_emptied_records_within_the_horizon_get_their_jobs_again(
    net, sqlite_database, monkeypatch
):
    key = await store(sqlite_database, due_in=HOUR)
    async with running(net, monkeypatch):
        await rounds(net)
        assert len(await net.jobs()) == 1
        await net.pool.flushall()
        await rounds(net, 4)

    assert await net.jobs() == {f"default:{key.id}:1"}


async def test_records_of_dead_workers_get_a_job_for_the_next_attempt(net, sqlite_database, monkeypatch):
    key = await store(sqlite_database, due_in=-MINUTE)
    await claim(sqlite_database)
    await end_lease(sqlite_database, key)
    async with running(net, monkeypatch):
        await rounds(net)
        await eventually(lambda: net.rounds > 50, seconds=10)  # due for two seconds since it was taken back
    row = await row_of(sqlite_database, key)

    assert row.state == State.SCHEDULED
    assert await net.jobs() == {f"default:{key.id}:2"}


async def test_during_a_pause_nothing_is_enqueued_and_afterwards_all_of_it(net, sqlite_database, monkeypatch):
    await store(sqlite_database, due_in=-MINUTE)
    wanted = Pause(Kind.OPERATOR, utc_now(), ACTOR, "a reason", None)
    await sqlite_database.write(partial(pausing.pause, wanted=wanted))
    async with running(net, monkeypatch):
        await rounds(net)
        assert await net.jobs() == set()
        await sqlite_database.write(partial(pausing.resume, kinds=[Kind.OPERATOR]))
        await rounds(net, 3)

        assert len(await net.jobs()) == 1


async def test_a_refused_key_is_probed_by_one_job(net, sqlite_database, monkeypatch):
    for _ in range(5):
        await store(sqlite_database, due_in=-MINUTE)
    until = utc_now() - timedelta(seconds=1)
    wanted = Pause(Kind.UNAUTHORIZED, utc_now(), ACTOR, "a reason", until)
    await sqlite_database.write(partial(pausing.pause, wanted=wanted))
    async with running(net, monkeypatch):
        await rounds(net, 3)

    assert len(await net.jobs()) == 1


async def test_without_redis_the_safety_net_cleans_due_records_itself(net, sqlite_database, monkeypatch):
    keys = [await store(sqlite_database) for _ in range(25)]
    net.redis_faults = [ConnectionError()]
    async with running(net, monkeypatch, every=0.5):
        await eventually(lambda: len(net.cleaned) == 25, seconds=10)

    assert set(net.cleaned) == set(keys)
    assert await net.jobs() == set()


async def test_the_safety_net_starts_no_more_than_budget_and_places_allow(sqlite_database, pool, metrics, monkeypatch):
    net = Net(sqlite_database, pool, metrics, rate=Rate(10, 3600))
    for _ in range(10):
        await store(sqlite_database)
    net.redis_faults = [ConnectionError()]
    async with running(net, monkeypatch, every=0.5):
        await rounds(net, 3)

        assert len(net.cleaned) <= 5
        assert (await sqlite_database.read(reading.count_by_state))[State.DELETING] == 0


async def test_the_safety_net_returns_attempts_whose_claim_fails(sqlite_database, pool, metrics, monkeypatch):
    net = Net(sqlite_database, pool, metrics, rate=Rate(1, 3600))
    key = await store(sqlite_database)
    net.redis_faults = [ConnectionError()]
    net.claim_faults = [LedgerUnavailableError("unavailable")]
    async with running(net, monkeypatch, every=0.5):
        await eventually(lambda: net.cleaned == [key], seconds=5)

    assert net.claim_faults == []


async def test_the_safety_net_cleans_a_stuck_record_although_redis_answers(net, sqlite_database, monkeypatch):
    # No arq worker runs here, as if it held the id of a worker that was killed.
    stuck = await store(sqlite_database, due_in=-timedelta(seconds=11))
    async with running(net, monkeypatch, every=0.5):
        await eventually(lambda: net.cleaned == [stuck], seconds=5)


async def test_the_safety_net_continues_after_a_ledger_outage_and_an_error(net, sqlite_database, metrics, monkeypatch):
    await store(sqlite_database, due_in=-MINUTE)
    net.faults = [LedgerUnavailableError("unavailable"), ZeroDivisionError()]
    with capture_logs() as logs:
        async with running(net, monkeypatch):
            await rounds(net, 5)

    assert metrics.registry.get_sample_value("mayfly_loops_failed_total", {"loop": "overdue"}) == 2
    assert [entry["event"] for entry in logs if entry["event"].startswith("overdue.")][:2] == [
        "overdue.crashed",
        "overdue.failed",
    ]
    assert len(await net.jobs()) == 1
    assert net.beats >= 5  # also while the ledger did not answer


async def test_a_stop_ends_the_safety_net_at_once(net, monkeypatch):
    async with running(net, monkeypatch, every=60):
        await eventually(lambda: net.rounds == 1)
        begun = time.monotonic()

    assert time.monotonic() - begun < 1


def test_a_worker_is_alive_for_a_minute_after_its_last_heartbeat(tmp_path):
    now = utc_now().timestamp()
    assert not is_alive(tmp_path, now_seconds=now)
    beat(tmp_path)

    assert is_alive(tmp_path, now_seconds=now)
    assert not is_alive(tmp_path, now_seconds=now + 61)


def test_a_heartbeat_that_cannot_be_written_raises_nothing(tmp_path):
    with capture_logs() as logs:
        beat(tmp_path / "gone")

    assert [entry["event"] for entry in logs] == ["heartbeat.failed"]


async def test_a_task_that_loses_a_cancellation_is_cancelled_again():
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
        await cancel_and_wait(helpers)

    assert len(lost) == 2
    assert all(helper.cancelled() for helper in helpers)


async def test_a_hold_that_reached_its_end_is_ended_by_the_safety_net(net):
    key = await store(net.database, hold="wait")
    past = update(records).where(records.c.id == key.id).values(hold_until=utc_now() - MINUTE)
    await net.database.write(lambda connection: connection.execute(past).rowcount)
    running = asyncio.create_task(net.overdue.run())
    try:
        await eventually(lambda: net.rounds > 1)
    finally:
        net.stopping.set()
        await running

    assert (await row_of(net.database, key)).state == State.SCHEDULED
