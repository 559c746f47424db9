"""A job makes one attempt and ends with it; in a pause, at a stop or without budget it starts none."""

import asyncio
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import cast

import pytest
from arq.worker import Retry

from service.core.attempts import Verdict
from service.core.key import Key
from service.core.lifecycle import State
from service.core.rate import Rate
from service.core.secret import Secret
from service.jobs import connection, enqueue
from service.jobs.enqueue import CleanupJob
from service.ledger import claiming, pausing
from service.ledger.claiming import Wanted
from service.ledger.database import LedgerUnavailableError
from service.ledger.pausing import Kind, Pause
from service.runtime.tasks import cancel_and_wait
from service.sync.rate_limit import Budget
from tests.support.ledger import ACCOUNT, ACTOR, HOUR, LEASE, confirmed, deferred, row_of, settle, store, utc_now
from tests.support.waiting import eventually
from workers import cleanup, ground, runner
from workers import ledger as worker_ledger
from workers.batch import Batches
from workers.cleanup import Attempts, CleanupJobs
from workers.copy import Looks

UNLIMITED = Rate(100_000, 1)


class Work:
    """Jobs over a real ledger and Redis; attempts wait at a gate and are noted."""

    def __init__(self, database, pool, *, rate=UNLIMITED) -> None:
        self.database = database
        self.stopping = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun: list[Key] = []
        self.ended: list[Key] = []
        self.peeks = 0
        self.peek_seconds = 0.0
        self.peek_fault: Exception | None = None
        self.faults: list[Exception] = []
        self.budget = Budget(rate, pool, Secret("sk-1"), clock=asyncio.get_running_loop().time, stopping=self.stopping)
        self.attempts = Attempts(self.clean, limit=10)
        self.jobs = CleanupJobs(
            peek=self.peek,
            clock=asyncio.get_running_loop().time,
            budget=self.budget,
            claim=self.claim,
            attempts=self.attempts,
            stopping=self.stopping,
        )

    async def peek(self):
        self.peeks += 1
        await asyncio.sleep(self.peek_seconds)
        if self.peek_fault is not None:
            raise self.peek_fault
        return await self.database.read(partial(pausing.peek_allowance, account=ACCOUNT, now=utc_now()))

    async def claim(self, wanted):
        if self.faults:
            raise self.faults.pop()
        write = partial(
            claiming.claim_wanted, account=ACCOUNT, wanted=[wanted], now=utc_now(), lease=LEASE, actor=ACTOR
        )
        return (await self.database.write(write))[0]

    async def clean(self, claim):
        self.begun.append(claim.key)
        await self.gate.wait()
        await settle(self.database, confirmed(claim))
        self.ended.append(claim.key)
        return Verdict.DONE

    async def run(self, key, attempt=1):
        await cleanup.cleanup({"jobs": self.jobs}, key.account, key.id, attempt)


def jobs_of(work: Work, concurrency: int = 5) -> runner.Jobs:
    """Return the jobs of *work*, without early looks and batches."""
    others = (cast("Looks", None), cast("Batches", None))
    return runner.jobs_of_account(ACCOUNT, work.jobs, *others, concurrency, (), None)


@pytest.fixture
async def work(sqlite_database, pool):
    return Work(sqlite_database, pool)


async def pause(database, kind=Kind.OPERATOR):
    await database.write(partial(pausing.pause, wanted=Pause(kind, utc_now(), ACTOR, "a reason", None)))


async def test_a_job_ends_with_its_attempt(work, sqlite_database):
    key = await store(sqlite_database)
    work.gate.clear()
    job = asyncio.create_task(work.run(key))
    await eventually(lambda: work.begun == [key])
    await asyncio.sleep(0.05)
    assert not job.done()
    work.gate.set()
    await job

    assert work.ended == [key]
    assert (await row_of(sqlite_database, key)).state == State.DELETED


async def test_a_duplicate_or_stale_job_does_nothing(work, sqlite_database):
    key = await store(sqlite_database)
    await work.run(key)
    await work.run(key)
    await work.run(key, attempt=2)
    await work.run(Key("default", "nobody's"))

    assert work.begun == [key]


async def test_an_early_job_is_retried_when_its_record_is_due(work, sqlite_database):
    key = await store(sqlite_database, due_in=timedelta(seconds=30))
    with pytest.raises(Retry) as raised:
        await work.run(key)

    assert 25_000 < (raised.value.defer_score or 0) <= 30_000
    assert work.begun == []


async def test_a_job_that_is_days_early_is_left_to_the_ledger(work, sqlite_database):
    await work.run(await store(sqlite_database, due_in=72 * HOUR))

    assert work.begun == []


async def test_jobs_in_a_pause_end_and_a_thousand_of_them_read_the_pauses_once(work, sqlite_database):
    key = await store(sqlite_database)
    await pause(sqlite_database)
    await asyncio.gather(*(work.run(key) for _ in range(1000)))

    assert work.begun == []
    assert work.peeks == 1
    assert await work.budget.grant(1) == 1


async def test_a_pause_that_ended_is_seen_within_half_a_second(work, sqlite_database):
    key = await store(sqlite_database)
    await pause(sqlite_database)
    await work.run(key)
    await sqlite_database.write(partial(pausing.resume, kinds=[Kind.OPERATOR]))
    await asyncio.sleep(0.55)
    await work.run(key)

    assert work.ended == [key]


async def test_without_budget_a_job_claims_nothing_and_is_retried(sqlite_database, pool, monkeypatch):
    monkeypatch.setattr(cleanup, "BUDGET_SECONDS", 0.2)
    work = Work(sqlite_database, pool, rate=Rate(1, 3600))
    first, second = [await store(sqlite_database) for _ in range(2)]
    await work.run(first)
    with pytest.raises(Retry) as raised:
        await work.run(second)

    assert raised.value.defer_score is None  # in its old place: it is the next one
    assert (await row_of(sqlite_database, second)).attempts == 0


async def test_a_job_without_a_claim_returns_its_attempt_to_the_budget(sqlite_database, pool):
    work = Work(sqlite_database, pool, rate=Rate(1, 3600))
    key = await store(sqlite_database)
    await work.run(Key("default", "nobody's"))
    await work.run(key)

    assert work.ended == [key]


async def test_a_job_whose_claim_fails_returns_its_attempt_to_the_budget(sqlite_database, pool, monkeypatch):
    monkeypatch.setattr(cleanup, "_LEDGER_AGAIN_SECONDS", 1.1)  # longer than a second
    work = Work(sqlite_database, pool, rate=Rate(1, 3600))
    work.faults = [LedgerUnavailableError("unavailable")]
    key = await store(sqlite_database)
    with pytest.raises(Retry):
        await work.run(key)
    await work.run(key)

    assert work.ended == [key]


async def test_after_a_stop_jobs_that_arq_has_read_start_nothing_and_stay_queued(work, sqlite_database):
    key = await store(sqlite_database)
    work.stopping.set()
    with pytest.raises(Retry) as raised:
        await work.run(key)

    assert raised.value.defer_score is None
    assert (await row_of(sqlite_database, key)).attempts == 0


async def test_a_job_is_retried_if_the_ledger_does_not_answer(work, sqlite_database, monkeypatch):
    monkeypatch.setattr(cleanup, "_LEDGER_AGAIN_SECONDS", 0.01)
    key = await store(sqlite_database)
    work.faults = [LedgerUnavailableError("unavailable")]
    with pytest.raises(Retry):
        await work.run(key)
    await work.run(key)

    assert work.ended == [key]


async def test_jobs_wait_once_for_a_ledger_that_hangs(work, sqlite_database):
    keys = [await store(sqlite_database) for _ in range(20)]
    work.peek_seconds, work.peek_fault = 0.3, LedgerUnavailableError("it hangs")
    begun = time.monotonic()
    ends = await asyncio.gather(*(work.run(key) for key in keys), return_exceptions=True)

    assert {type(end) for end in ends} == {Retry}
    assert work.peeks == 1
    assert time.monotonic() - begun < 3
    work.peek_fault = None
    await asyncio.gather(*(work.run(key) for key in keys))
    assert len(work.ended) == 20


async def test_a_cancelled_job_does_not_cancel_the_attempt(work, sqlite_database):
    key = await store(sqlite_database)
    work.gate.clear()
    job = asyncio.create_task(work.run(key))
    await eventually(lambda: work.begun == [key])
    await cancel_and_wait([job])
    assert work.attempts.room == 9
    assert not await work.attempts.wait(0.05)
    work.gate.set()

    assert await work.attempts.wait(5)
    assert work.ended == [key]
    assert work.attempts.room == 10


# With arq and Redis


@asynccontextmanager
async def working(work, pool, metrics):
    """Run what ``mayfly worker`` runs, without the safety net."""
    running = asyncio.create_task(runner.run_jobs(pool, jobs_of(work), metrics, work.stopping))
    try:
        yield
    finally:
        work.gate.set()
        work.stopping.set()
        await asyncio.wait_for(running, 10)


async def put(pool, *keys: Key, at=None):
    jobs = [CleanupJob(key, 1, at or utc_now()) for key in keys]
    await enqueue.enqueue_jobs(pool, enqueue.queue_of(ACCOUNT), jobs, now=utc_now())


async def test_arq_runs_the_jobs_that_are_enqueued_when_they_are_due(work, pool, metrics, sqlite_database):
    now, soon, later = [await store(sqlite_database, due_in=timedelta(seconds=seconds)) for seconds in (-1, 1, 3600)]
    async with working(work, pool, metrics):
        await put(pool, now)
        await put(pool, soon, at=utc_now() + timedelta(seconds=1))
        await put(pool, later, at=utc_now() + HOUR)
        await eventually(lambda: work.ended == [now, soon], seconds=5)

    assert await pool.zrange(connection.QUEUE, 0, -1) == [f"default:{later.id}:1".encode()]
    assert (await row_of(sqlite_database, soon)).deleted_at >= (await row_of(sqlite_database, soon)).due_at


async def test_a_record_whose_attempt_is_deferred_is_deleted_by_the_next_job(work, pool, metrics, sqlite_database):
    key = await store(sqlite_database)

    async def clean(claim):
        if claim.attempt == 1:
            await settle(sqlite_database, deferred(claim))
            await ground.enqueue_next(pool, metrics, claim.key, 2, utc_now())
        else:
            await settle(sqlite_database, confirmed(claim))
            work.ended.append(claim.key)

    work.attempts._attempt = clean
    async with working(work, pool, metrics):
        await put(pool, key)
        await eventually(lambda: work.ended == [key], seconds=5)

    assert (await row_of(sqlite_database, key)).attempts == 2


async def test_a_stop_waits_for_running_attempts_and_leaves_the_rest_in_the_queue(work, pool, metrics, sqlite_database):
    keys = [await store(sqlite_database) for _ in range(30)]
    work.gate.clear()
    running = asyncio.create_task(runner.run_jobs(pool, jobs_of(work), metrics, work.stopping))
    await put(pool, *keys)
    await eventually(lambda: len(work.begun) == 10)  # twice the places at the API
    work.stopping.set()
    await asyncio.sleep(0.3)
    assert not running.done()
    work.gate.set()
    await asyncio.wait_for(running, 5)

    assert len(work.ended) == 10
    assert await pool.zcard(connection.QUEUE) == 20


async def test_arq_that_loses_redis_is_started_again_and_attempts_go_on(
    work, pool, metrics, sqlite_database, monkeypatch
):
    monkeypatch.setattr(runner, "_ARQ_RESTART_SECONDS", 0.05)
    first, second = [await store(sqlite_database) for _ in range(2)]
    work.gate.clear()
    async with working(work, pool, metrics):
        await put(pool, first)
        await eventually(lambda: work.begun == [first])
        await pool.set(connection.QUEUE, "of another type")
        await eventually(lambda: failures(metrics) >= 1, seconds=5)
        assert work.ended == []
        await pool.delete(connection.QUEUE)
        work.gate.set()
        await put(pool, second)
        await eventually(lambda: set(work.ended) == {first, second}, seconds=8)


def failures(metrics):
    return metrics.registry.get_sample_value("mayfly_loops_failed_total", {"loop": "jobs"}) or 0


async def test_arq_is_built_with_the_settings_that_keep_jobs_from_being_lost(work, pool):
    worker = runner._arq_worker(pool, jobs_of(work, 50))
    is_built = {
        "queue_name": connection.QUEUE,
        "keep_result_s": 0,
        "keep_result_forever": False,
        "max_tries": 10**6,
        "max_jobs": 100,
        "allow_abort_jobs": False,
        "job_serializer": pool.job_serializer,
        "job_deserializer": pool.job_deserializer,
        "burst": False,
        "cron_jobs": [],
        "on_job_start": None,  # a hook that raises would end the worker
        "on_job_end": None,
        "after_job_end": None,
    }

    assert {name: getattr(worker, name) for name in is_built} == is_built
    assert list(worker.functions) == [enqueue.CLEANUP, enqueue.COPY, enqueue.BATCH]
    assert worker.queue_read_limit >= 10 * worker.max_jobs
    # It may wait for the budget and then hold a whole lease; and so long arq keeps the id of a worker that died.
    assert cleanup.BUDGET_SECONDS + worker_ledger.LEASE.total_seconds() < worker.job_timeout_s <= 90
    assert all(one.timeout_s is None and one.max_tries is None for one in worker.functions.values())


async def test_a_job_claims_by_its_arguments(work):
    found = []

    async def run(wanted):
        found.append(wanted)

    work.jobs.run = run
    await cleanup.cleanup({"jobs": work.jobs}, "default", "g1", 3)

    assert found == [Wanted(Key("default", "g1"), 3)]
