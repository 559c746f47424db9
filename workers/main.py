"""The worker process: arq runs the cleanup jobs, and the safety net finds due records without a job."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final

import structlog
from arq.connections import ArqRedis
from arq.worker import Worker, func

from service.config.settings import NO_API_KEY, Settings, SettingsError
from service.core.key import Key
from service.core.secret import Secret
from service.jobs import connection, enqueue
from service.jobs.enqueue import CleanupJob
from service.ledger import key_history
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.group_commit import GroupCommit
from service.resources import Resources, open_queue
from service.runtime.causes import describe_cause
from service.runtime.metrics import Metrics
from service.runtime.tasks import cancel_and_wait
from service.sync.client import open_sync_api
from service.sync.rate_limit import Budget
from workers.attempt import Cleaner
from workers.cleanup import BUDGET_SECONDS, Attempts, CleanupJobs, cleanup
from workers.heartbeat import beat
from workers.key_proof import KeyProof
from workers.ledger import LEASE, WorkerLedger
from workers.overdue import LedgerCalls, Overdue

log = structlog.get_logger()

STOP_SECONDS: Final = LEASE.total_seconds() + 5
# How long a proof of the key waits for the budget; the attempt's GET and DELETE are used up.
_PROOF_SECONDS: Final = 5.0
_ARQ_RESTART_SECONDS: Final = 2.0
# The longest lag of a job while there is room; arq starts at most max_jobs jobs per poll. With 0.5, arq's default, the
# median lag was 310 ms, with 0.1 it is 88 ms; an idle worker takes 0.6 % of a core.
_POLL_SECONDS: Final = 0.1


async def run_worker(settings: Settings, resources: Resources, metrics: Metrics, stop: asyncio.Event) -> None:
    """Work until *stop* is set, then finish the attempts in progress and return.

    Raises: SettingsError without an API key; QueueError for a Redis that would drop jobs.
    """
    if settings.api_key is None:
        raise SettingsError([NO_API_KEY])
    stopping = asyncio.Event()
    async with (
        open_queue(resources.redis_url, retries=2) as pool,
        _open_parts(
            settings, settings.api_key, database=resources.database, pool=pool, metrics=metrics, stopping=stopping
        ) as parts,
    ):
        running = asyncio.create_task(_run_jobs(pool, parts.jobs, settings.concurrency, metrics, stopping))
        watching = asyncio.create_task(parts.overdue.run())
        waiting = asyncio.create_task(stop.wait())
        log.info("worker.started", concurrency=settings.concurrency, dry_run=settings.is_dry_run)
        try:
            # None of them ends by itself. If one does, stop: half a worker would look healthy.
            ended, _ = await asyncio.wait([running, watching, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                raise RuntimeError(f"a part of the worker has ended: {ended}")
        finally:
            stopping.set()
            await cancel_and_wait([waiting])
            # First stop starting attempts, then wait for those in progress.
            await asyncio.wait([running, watching], timeout=STOP_SECONDS)
            log.info("worker.stopped", is_drained=await parts.attempts.wait(STOP_SECONDS))


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """The parts of a worker."""

    jobs: CleanupJobs
    attempts: Attempts
    overdue: Overdue


@asynccontextmanager
async def _open_parts(
    settings: Settings, key: Secret, *, database: Database, pool: ArqRedis, metrics: Metrics, stopping: asyncio.Event
) -> AsyncIterator[WorkerParts]:
    """Connect the job and the safety net to the ledger, the queue, the budget and the API with *key*."""
    budget = Budget(settings.api_rate, pool, key, clock=time.monotonic, stopping=stopping)
    limit = None if settings.is_dry_run else settings.max_deletes_per_day
    actor = f"worker {socket.gethostname()}:{os.getpid()}"
    ledger = WorkerLedger(
        database, limit=limit, is_dry_run=settings.is_dry_run, actor=actor, key_id=key.identify(), now=_now
    )
    with contextlib.suppress(LedgerUnavailableError):  # then the pause stays
        await database.write(partial(key_history.resume_for_key, key_id=ledger.key_id))
    async with _open_cleaner(settings, key, ledger=ledger, budget=budget, pool=pool, metrics=metrics) as cleaner:
        attempts = Attempts(cleaner.clean, limit=_max_jobs(settings.concurrency))
        jobs = CleanupJobs(
            peek=ledger.peek,
            clock=time.monotonic,
            budget=budget,
            claim=GroupCommit(ledger.claim_wanted).submit,
            attempts=attempts,
            stopping=stopping,
        )
        overdue = Overdue(
            ledger=LedgerCalls(ledger.read_outlook, ledger.end_leases, ledger.claim, ledger.beat),
            enqueue=lambda items: enqueue.enqueue_jobs(pool, items, now=_now()),
            budget=budget,
            attempts=attempts,
            beat=partial(beat, settings.data_dir),
            now=_now,
            horizon=settings.queue_horizon,
            metrics=metrics,
            stopping=stopping,
        )
        yield WorkerParts(jobs, attempts, overdue)


@asynccontextmanager
async def _open_cleaner(
    settings: Settings, key: Secret, *, ledger: WorkerLedger, budget: Budget, pool: ArqRedis, metrics: Metrics
) -> AsyncIterator[Cleaner]:
    async with open_sync_api(
        settings.base_url,
        key,
        connections=settings.concurrency,
        metrics=metrics,
        # For existing claims. New claims wait for the pause in the ledger.
        on_throttled=lambda seconds: budget.close_for(min(seconds, LEASE.total_seconds())),
    ) as api:
        call_slot = partial(_call_slot, asyncio.Semaphore(settings.concurrency), budget)
        yield Cleaner(
            api=api,
            copy=GroupCommit(ledger.copy).submit,
            settle=GroupCommit(ledger.settle).submit,
            enqueue_next=partial(_enqueue_next, pool, metrics),
            call_slot=call_slot,
            now=_now,
            give_up_after=settings.give_up_after,
            is_dry_run=settings.is_dry_run,
            metrics=metrics,
            key_proof=KeyProof(api, call_slot=call_slot, acquire=partial(budget.acquire, _PROOF_SECONDS)),
        )


@asynccontextmanager
async def _call_slot(places: asyncio.Semaphore, budget: Budget, until: datetime) -> AsyncIterator[bool]:
    """Wait for a place at the API, and yield whether calls are allowed by *until*."""
    async with places:
        yield await budget.is_open_within((until - _now()).total_seconds())


async def _enqueue_next(pool: ArqRedis, metrics: Metrics, key: Key, attempt: int, at: datetime) -> None:
    """Enqueue the job of the next attempt; if that fails, the safety net finds the record when it is due."""
    try:
        await enqueue.enqueue_job(pool, CleanupJob(key, attempt, at), now=_now())
    except connection.QUEUE_ERRORS as error:
        metrics.enqueue_failures.inc()
        what_now = "the worker will find the record in the ledger when it is due"
        log.warning("enqueue.failed", generation=key.id, error=describe_cause(error), what_now=what_now)


async def _run_jobs(
    pool: ArqRedis, jobs: CleanupJobs, concurrency: int, metrics: Metrics, stopping: asyncio.Event
) -> None:
    """Run the arq worker until *stopping*; restart it when Redis or an unreadable job has ended it."""
    until_stop = asyncio.create_task(stopping.wait())
    try:
        while not stopping.is_set():
            worker = _arq_worker(pool, jobs, concurrency)
            running = asyncio.create_task(worker.async_run())
            await asyncio.wait([running, until_stop], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await _stop_arq(worker, running)
                return
            # Running jobs go on: arq's handle_sig() and close() would cancel them.
            await _after_failure(pool, running.exception())
            metrics.loops_failed.labels("jobs").inc()
            await asyncio.wait([until_stop], timeout=_ARQ_RESTART_SECONDS)
    finally:
        await cancel_and_wait([until_stop])


async def _stop_arq(worker: Worker, running: asyncio.Task[None]) -> None:
    """Stop arq from starting jobs, wait for those that run, and end it."""
    waited = asyncio.Event()
    worker.on_stop = lambda _signal: waited.set()
    worker.handle_sig_wait_for_completion(signal.SIGTERM)
    ended = asyncio.create_task(waited.wait())
    await asyncio.wait([running, ended], return_when=asyncio.FIRST_COMPLETED)
    # arq has cancelled its loop once, which is not reliable: see cancel_and_wait().
    await cancel_and_wait([running, ended])
    if not running.cancelled():
        running.exception()  # Redis failed meanwhile; the ledger still has the records


async def _after_failure(pool: ArqRedis, error: BaseException | None) -> None:
    """Log why arq ended, and remove jobs that it cannot read."""
    if isinstance(error, connection.QUEUE_ERRORS) and not connection.is_wrong_type(error):
        what_now = "the ledger starts deletions meanwhile"
        log.warning("jobs.interrupted", error=describe_cause(error), what_now=what_now)
        return
    what_now = "due jobs are removed from Redis; the safety net enqueues those of records again"
    log.error("jobs.crashed", exc_info=error, what_now=what_now)
    # Otherwise it would end the next arq worker, too, and no later job would start.
    with contextlib.suppress(*connection.QUEUE_ERRORS):
        await enqueue.remove_due_jobs(pool, now=_now())


def _max_jobs(concurrency: int) -> int:
    """Return twice the places at the API: half of the jobs wait for commits or arq's next poll, the others call."""
    return 2 * concurrency


def _arq_worker(pool: ArqRedis, jobs: CleanupJobs, concurrency: int) -> Worker:
    max_jobs = _max_jobs(concurrency)
    return Worker(
        functions=[func(cleanup, name=enqueue.FUNCTION)],
        queue_name=connection.QUEUE,
        redis_pool=pool,
        ctx={"jobs": jobs},
        handle_signals=False,
        job_completion_wait=int(STOP_SECONDS),
        # arq refuses an id while its result exists, and an attempt may have to be enqueued again.
        keep_result=0,
        # Beyond reach: arq drops a job after max_tries without any hook.
        max_tries=10**6,
        # Longer than an attempt. It is also how long arq blocks the id of a job whose worker was killed.
        job_timeout=BUDGET_SECONDS + LEASE.total_seconds() + 5,
        max_jobs=max_jobs,
        # arq reads running jobs, too. A limit below the max_jobs of all workers would hide the jobs after those.
        queue_read_limit=max(1000, 20 * max_jobs),
        poll_delay=_POLL_SECONDS,
        allow_abort_jobs=False,
        log_results=False,
        health_check_interval=15,
        health_check_key=f"{connection.QUEUE}:health:{socket.gethostname()}:{os.getpid()}",
        timezone=UTC,
        job_serializer=pool.job_serializer,
        job_deserializer=pool.job_deserializer,
    )


def _now() -> datetime:
    return datetime.now(UTC)
