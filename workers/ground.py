"""What the parts that work for one account share, and how they enqueue what comes next."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from arq.connections import ArqRedis

from service.config.accounts import Account
from service.config.settings import Settings
from service.core.key import Key
from service.jobs import connection, enqueue
from service.jobs.enqueue import CleanupJob, Job
from service.runtime.causes import describe_cause
from service.runtime.metrics import Metrics
from service.sync.client import SyncApi
from service.sync.rate_limit import Budget
from workers.ledger import WorkerLedger

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Ground:
    """What the parts that work for an account share; *call_slot* waits for a place at the API: see wait_for_slot()."""

    settings: Settings
    account: Account
    pool: ArqRedis
    metrics: Metrics
    stopping: asyncio.Event
    budget: Budget
    ledger: WorkerLedger
    api: SyncApi
    call_slot: Callable[[datetime], AbstractAsyncContextManager[bool]]

    async def enqueue(self, jobs: Sequence[Job]) -> str:
        """Enqueue *jobs* of the account."""
        return await enqueue.enqueue_jobs(self.pool, enqueue.queue_of(self.ledger.account), jobs, now=_now())

    async def enqueue_soon(self, jobs: Sequence[Job]) -> None:
        """Enqueue those of *jobs* that are due within the horizon; the safety nets enqueue the others later."""
        horizon = _now() + self.settings.queue_horizon
        if soon := [job for job in jobs if job.at <= horizon]:
            await self.enqueue(soon)


@asynccontextmanager
async def wait_for_slot(places: asyncio.Semaphore, budget: Budget, until: datetime) -> AsyncIterator[bool]:
    """Wait for a place at the API, and yield whether calls are allowed by *until*."""
    async with places:
        yield await budget.is_open_within((until - _now()).total_seconds())


async def enqueue_next(pool: ArqRedis, metrics: Metrics, key: Key, attempt: int, at: datetime) -> None:
    """Enqueue the job of the next attempt; if that fails, the safety net finds the record when it is due."""
    try:
        await enqueue.enqueue_job(pool, CleanupJob(key, attempt, at), now=_now())
    except connection.QUEUE_ERRORS as error:
        _note_failure(metrics, key, error)


async def enqueue_within(ground: Ground, key: Key, attempt: int, at: datetime) -> None:
    """Enqueue the job of an attempt whose time has changed; beyond the horizon the safety net does it later."""
    try:
        await ground.enqueue_soon([CleanupJob(key, attempt, at)])
    except connection.QUEUE_ERRORS as error:
        _note_failure(ground.metrics, key, error)


def _note_failure(metrics: Metrics, key: Key, error: BaseException) -> None:
    metrics.enqueue_failures.inc()
    what_now = "the worker will find the record in the ledger when it is due"
    log.warning("enqueue.failed", generation=key.id, error=describe_cause(error), what_now=what_now)


def _now() -> datetime:
    return datetime.now(UTC)
