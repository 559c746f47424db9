"""The arq worker of one queue: it runs the jobs of an account or of a target, and outlives failures of Redis."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from arq.connections import ArqRedis
from arq.cron import CronJob
from arq.worker import Function, Worker, func

from service.jobs import connection, enqueue
from service.runtime.causes import describe_cause
from service.runtime.metrics import Metrics
from service.runtime.tasks import cancel_and_wait
from workers.batch import Batches, batch
from workers.cleanup import BUDGET_SECONDS, CleanupJobs, cleanup
from workers.copy import Looks, copy
from workers.forward import Forwards, forward, lease_of
from workers.hygiene import Hygiene, hygiene_cron
from workers.ledger import LEASE

log = structlog.get_logger()

STOP_SECONDS: Final = LEASE.total_seconds() + 5
_ARQ_RESTART_SECONDS: Final = 2.0
# The longest lag of a job while there is room; arq starts at most max_jobs jobs per poll. With 0.5, arq's default, the
# median lag was 310 ms, with 0.1 it is 88 ms; an idle worker takes 0.6 % of a core.
_POLL_SECONDS: Final = 0.1


def max_jobs(concurrency: int) -> int:
    """Return twice the places at the API: half of the jobs wait for commits or arq's next poll, the others call."""
    return 2 * concurrency


@dataclass(frozen=True, slots=True)
class Jobs:
    """What arq runs in one queue.

    *ctx* is what the *functions* and *crons* find in their context, *at_once* how many run at a time, and *seconds*
    how long one may take: beyond reach, as it is also how long arq blocks the id of a job whose worker was killed.
    """

    queue: str
    functions: Sequence[Function]
    ctx: Mapping[str, Any]
    at_once: int
    seconds: float
    crons: Sequence[CronJob] = ()


def jobs_of_account(  # noqa: PLR0917 - the parts of one account
    account: str,
    cleanup_jobs: CleanupJobs,
    looks: Looks,
    batches: Batches,
    concurrency: int,
    crons: Sequence[CronJob],
    hygiene: Hygiene | None,
) -> Jobs:
    """Return the jobs of *account*; with *hygiene*, also that of all records."""
    return Jobs(
        enqueue.queue_of(account),
        [
            func(cleanup, name=enqueue.CLEANUP),
            func(copy, name=enqueue.COPY),
            func(batch, name=enqueue.BATCH),
        ],
        {"jobs": cleanup_jobs, "looks": looks, "batches": batches, "hygiene": hygiene},
        at_once=max_jobs(concurrency),
        seconds=BUDGET_SECONDS + LEASE.total_seconds() + 5,
        crons=[*crons, *([] if hygiene is None else [hygiene_cron()])],
    )


def jobs_of_target(forwards: Forwards) -> Jobs:
    """Return the jobs of a target: as many at once as it may be asked at once."""
    return Jobs(
        enqueue.queue_of_target(forwards.target.id),
        [func(forward, name=enqueue.FORWARD)],
        {"forwards": forwards},
        at_once=forwards.target.concurrency,
        seconds=lease_of(forwards.target).total_seconds() + 5,
    )


async def run_jobs(pool: ArqRedis, jobs: Jobs, metrics: Metrics, stopping: asyncio.Event) -> None:
    """Run the arq worker of *jobs* until *stopping*; restart it when Redis or an unreadable job has ended it."""
    until_stop = asyncio.create_task(stopping.wait())
    try:
        while not stopping.is_set():
            worker = _arq_worker(pool, jobs)
            running = asyncio.create_task(worker.async_run())
            await asyncio.wait([running, until_stop], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await _stop_arq(worker, running)
                return
            # Running jobs go on: arq's handle_sig() and close() would cancel them.
            await _after_failure(pool, jobs.queue, running.exception())
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


async def _after_failure(pool: ArqRedis, queue: str, error: BaseException | None) -> None:
    """Log why arq ended, and remove jobs that it cannot read."""
    if isinstance(error, connection.QUEUE_ERRORS) and not connection.is_wrong_type(error):
        what_now = "the ledger starts deletions meanwhile"
        log.warning("jobs.interrupted", error=describe_cause(error), what_now=what_now)
        return
    what_now = "due jobs are removed from Redis; the safety net enqueues those of records again"
    log.error("jobs.crashed", exc_info=error, what_now=what_now)
    # Otherwise it would end the next arq worker, too, and no later job would start.
    with contextlib.suppress(*connection.QUEUE_ERRORS):
        await enqueue.remove_due_jobs(pool, queue, now=datetime.now(UTC))


def _arq_worker(pool: ArqRedis, jobs: Jobs) -> Worker:
    return Worker(
        functions=jobs.functions,
        queue_name=jobs.queue,
        redis_pool=pool,
        cron_jobs=jobs.crons,
        ctx=dict(jobs.ctx),
        handle_signals=False,
        job_completion_wait=int(STOP_SECONDS),
        # arq refuses an id while its result exists, and an attempt may have to be enqueued again.
        keep_result=0,
        # Beyond reach: arq drops a job after max_tries without any hook.
        max_tries=10**6,
        job_timeout=jobs.seconds,
        max_jobs=jobs.at_once,
        # arq reads running jobs, too. A limit below the max_jobs of all workers would hide the jobs after those.
        queue_read_limit=max(1000, 20 * jobs.at_once),
        poll_delay=_POLL_SECONDS,
        allow_abort_jobs=False,
        log_results=False,
        health_check_interval=15,
        health_check_key=f"{jobs.queue}:health:{socket.gethostname()}:{os.getpid()}",
        timezone=UTC,
        job_serializer=pool.job_serializer,
        job_deserializer=pool.job_deserializer,
    )
