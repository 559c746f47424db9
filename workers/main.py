"""The worker process: for each account arq runs the cleanup jobs, and a safety net finds due records without a job."""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog
from arq.connections import ArqRedis
from arq.cron import CronJob

from service.config.settings import Settings, require_api_key
from service.core.secret import Secret
from service.forwarding.posting import make_tls
from service.jobs.enqueue import Enqueuer
from service.ledger.database import Database
from service.resources import Resources, open_queue
from service.runtime.metrics import Metrics
from service.runtime.tasks import cancel_and_wait
from workers.account import WorkerParts, open_parts
from workers.hygiene import Hygiene
from workers.runner import STOP_SECONDS, jobs_of_account, jobs_of_target, run_jobs
from workers.target import RemovedTargets, TargetParts, open_target, reserve_threads

log = structlog.get_logger()


async def run_worker(settings: Settings, resources: Resources, metrics: Metrics, stop: asyncio.Event) -> None:
    """Work until *stop* is set, then finish the attempts in progress and return.

    Raises: SettingsError without an API key; QueueError for a Redis that would drop jobs.
    """
    require_api_key(settings)
    accounts = [(account, account.keys.api_key) for account in settings.accounts if account.keys.api_key is not None]
    stopping = asyncio.Event()
    async with open_queue(resources.redis_url, retries=2) as pool, AsyncExitStack() as stack:
        open_account = partial(
            open_parts, settings, database=resources.database, pool=pool, metrics=metrics, stopping=stopping
        )
        parts = {account.id: await stack.enter_async_context(open_account(account, key)) for account, key in accounts}
        targets = await _open_targets(settings, resources.database, pool, stack, metrics, stopping)
        work = [net.run() for part in parts.values() for net in (part.overdue, part.look_net, part.batch_net)]
        removed = RemovedTargets(resources.database, settings.targets, metrics=metrics, stopping=stopping)
        work += [removed.run(), *(target.net.run() for target in targets)]
        ttls = settings.record_ttls
        # One for all accounts, and for those that are no longer here: it runs in the queue of the first.
        hygiene: Hygiene | None = Hygiene(resources.database, ttls, metrics=metrics, stopping=stopping)
        queues = [jobs_of_target(target.forwards) for target in targets]
        for account, key in accounts:
            part = parts[account.id]
            crons = _crons(part, key)
            of_account = (account.id, part.jobs, part.looks, part.batches, settings.concurrency)
            queues.append(jobs_of_account(*of_account, crons, hygiene))
            hygiene = None
        work += [run_jobs(pool, jobs, metrics, stopping) for jobs in queues]
        _log_without_sweep([name for name, part in parts.items() if part.sweep is None])
        log.info("worker.started", accounts=[*parts], concurrency=settings.concurrency, dry_run=settings.is_dry_run)
        waits = [part.attempts.wait for part in parts.values()] + [one.forwards.attempts.wait for one in targets]
        try:
            await _run_until(stop, work, stopping)
        finally:
            drained = await asyncio.gather(*(wait(STOP_SECONDS) for wait in waits))
            log.info("worker.stopped", is_drained=all(drained))


async def _open_targets(  # noqa: PLR0917 - what all targets share
    settings: Settings,
    database: Database,
    pool: ArqRedis,
    stack: AsyncExitStack,
    metrics: Metrics,
    stopping: asyncio.Event,
) -> list[TargetParts]:
    if not settings.targets:
        return []
    reserve_threads(settings.targets)
    enqueuer = Enqueuer(pool, horizon=settings.queue_horizon, now=lambda: datetime.now(UTC), metrics=metrics)
    stack.push_async_callback(enqueuer.close)
    open_one = partial(
        open_target,
        tls=make_tls(),
        database=database,
        pool=pool,
        enqueue=enqueuer.enqueue,
        metrics=metrics,
        stopping=stopping,
    )
    return [await stack.enter_async_context(open_one(target)) for target in settings.targets]


def _crons(part: WorkerParts, key: Secret) -> list[CronJob]:
    """Return the cron jobs of an account; the sweep's minute is spread by its key."""
    return [] if part.sweep is None else [part.sweep.cron_job(minute=int(key.identify(), 16) % 60)]


def _log_without_sweep(names: Sequence[str]) -> None:
    if names:
        what_now = "generations whose webhook does not arrive are not deleted; set MAYFLY_PUBLIC_URL to find them"
        log.info("sweep.off", accounts=[*names], what_now=what_now)


async def _run_until(stop: asyncio.Event, work: Sequence[Coroutine[Any, Any, None]], stopping: asyncio.Event) -> None:
    """Do all *work* until *stop* is set or one of it ends; then let the others end."""
    running = [asyncio.create_task(one) for one in work]
    waiting = asyncio.create_task(stop.wait())
    try:
        # None of them ends by itself. If one does, stop: half a worker would look healthy.
        ended, _ = await asyncio.wait([*running, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            raise RuntimeError(f"a part of the worker has ended: {ended}")
    finally:
        stopping.set()
        await cancel_and_wait([waiting])
        # First stop starting attempts, then wait for those in progress.
        await asyncio.wait(running, timeout=STOP_SECONDS)
