"""What works for one account: its jobs, its safety net, its budget and its calls to the API with its key."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

import structlog
from arq.connections import ArqRedis

from service.config.accounts import Account
from service.config.settings import Settings
from service.core.key import Key
from service.core.secret import Secret
from service.jobs import connection, enqueue
from service.jobs.enqueue import CleanupJob
from service.ledger import key_history
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.group_commit import GroupCommit
from service.ledger.key_history import KeyOfAccount
from service.runtime.causes import describe_cause
from service.runtime.metrics import Metrics
from service.sync.client import SyncApi, open_sync_api
from service.sync.rate_limit import Budget, SpareCalls
from workers.attempt import Cleaner
from workers.cleanup import Attempts, CleanupJobs
from workers.copy import LookLedger, LookNet, Looks
from workers.heartbeat import beat
from workers.key_proof import KeyProof
from workers.ledger import LEASE, WorkerLedger
from workers.overdue import LedgerCalls, Overdue
from workers.runner import max_jobs

log = structlog.get_logger()

CallSlot = Callable[[datetime], AbstractAsyncContextManager[bool]]

# How long a proof of the key waits for the budget; the attempt's GET and DELETE are used up.
_PROOF_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """The parts that work for one account."""

    jobs: CleanupJobs
    attempts: Attempts
    overdue: Overdue
    looks: Looks
    look_net: LookNet


@asynccontextmanager
async def open_parts(
    settings: Settings,
    account: Account,
    key: Secret,
    *,
    database: Database,
    pool: ArqRedis,
    metrics: Metrics,
    stopping: asyncio.Event,
) -> AsyncIterator[WorkerParts]:
    """Connect the job and the safety net of *account* to the ledger, the queue, the budget and the API with *key*."""
    budget = Budget(account.rate, pool, key, clock=time.monotonic, stopping=stopping)
    used = KeyOfAccount(account.id, key.identify())
    ledger = _ledger_of(used, settings, database)
    with contextlib.suppress(LedgerUnavailableError):  # then the pause stays
        await database.write(partial(key_history.resume_for_key, key=used))
    call_slot = partial(_call_slot, asyncio.Semaphore(settings.concurrency), budget)
    async with _open_api(settings, key, budget, metrics) as api:
        cleaner = _make_cleaner(settings, api, call_slot, ledger=ledger, budget=budget, pool=pool, metrics=metrics)
        attempts = Attempts(cleaner.clean, limit=max_jobs(settings.concurrency))
        jobs = CleanupJobs(
            peek=ledger.peek,
            clock=time.monotonic,
            budget=budget,
            claim=GroupCommit(ledger.claim_wanted).submit,
            attempts=attempts,
            stopping=stopping,
        )
        overdue = Overdue(
            account=account.id,
            ledger=LedgerCalls(ledger.read_outlook, ledger.end_leases, ledger.claim, ledger.beat),
            enqueue=lambda items: enqueue.enqueue_jobs(pool, account.id, items, now=_now()),
            budget=budget,
            attempts=attempts,
            beat=partial(beat, settings.data_dir),
            now=_now,
            horizon=settings.queue_horizon,
            metrics=metrics,
            stopping=stopping,
        )
        looks, look_net = _make_looks(
            settings, api, call_slot, ledger=ledger, budget=budget, pool=pool, metrics=metrics, stopping=stopping
        )
        yield WorkerParts(jobs, attempts, overdue, looks, look_net)


def _ledger_of(used: KeyOfAccount, settings: Settings, database: Database) -> WorkerLedger:
    limit = None if settings.is_dry_run else settings.max_deletes_per_day
    actor = f"worker {socket.gethostname()}:{os.getpid()}"
    return WorkerLedger(database, limit=limit, is_dry_run=settings.is_dry_run, actor=actor, key=used, now=_now)


def _open_api(
    settings: Settings, key: Secret, budget: Budget, metrics: Metrics
) -> AbstractAsyncContextManager[SyncApi]:
    return open_sync_api(
        settings.base_url,
        key,
        connections=settings.concurrency,
        metrics=metrics,
        # For existing claims. New claims wait for the pause in the ledger.
        on_throttled=lambda seconds: budget.close_for(min(seconds, LEASE.total_seconds())),
    )


def _make_cleaner(
    settings: Settings,
    api: SyncApi,
    call_slot: CallSlot,
    *,
    ledger: WorkerLedger,
    budget: Budget,
    pool: ArqRedis,
    metrics: Metrics,
) -> Cleaner:
    return Cleaner(
        api=api,
        copy=GroupCommit(ledger.copy).submit,
        settle=GroupCommit(ledger.settle).submit,
        enqueue_next=partial(_enqueue_next, pool, metrics),
        call_slot=call_slot,
        now=_now,
        give_up_after=settings.give_up_after,
        policy=settings.policy,
        is_dry_run=settings.is_dry_run,
        metrics=metrics,
        key_proof=KeyProof(api, call_slot=call_slot, acquire=partial(budget.acquire, _PROOF_SECONDS)),
    )


def _make_looks(
    settings: Settings,
    api: SyncApi,
    call_slot: CallSlot,
    *,
    ledger: WorkerLedger,
    budget: Budget,
    pool: ArqRedis,
    metrics: Metrics,
    stopping: asyncio.Event,
) -> tuple[Looks, LookNet]:
    looks = Looks(
        ledger=LookLedger(ledger.is_look_wanted, ledger.store_look, ledger.put_off_look, ledger.end_look),
        get=api.get,
        call_slot=call_slot,
        take_call=SpareCalls(budget, time.monotonic).take,
        enqueue_cleanup=partial(_enqueue_within, pool, metrics, settings.queue_horizon),
        policy=settings.policy,
        now=_now,
        metrics=metrics,
        stopping=stopping,
    )
    look_net = LookNet(
        find_due=ledger.find_due_looks,
        enqueue=lambda items: enqueue.enqueue_jobs(pool, ledger.account, items, now=_now()),
        now=_now,
        metrics=metrics,
        stopping=stopping,
    )
    return looks, look_net


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
        _note_failure(metrics, key, error)


async def _enqueue_within(  # noqa: PLR0917 - of which the first three are bound
    pool: ArqRedis, metrics: Metrics, horizon: timedelta, key: Key, attempt: int, at: datetime
) -> None:
    """Enqueue the job of an attempt whose time has changed; beyond the horizon the safety net does it later."""
    if at > _now() + horizon:
        return
    try:
        await enqueue.enqueue_jobs(pool, key.account, [CleanupJob(key, attempt, at)], now=_now())
    except connection.QUEUE_ERRORS as error:
        _note_failure(metrics, key, error)


def _note_failure(metrics: Metrics, key: Key, error: BaseException) -> None:
    metrics.enqueue_failures.inc()
    what_now = "the worker will find the record in the ledger when it is due"
    log.warning("enqueue.failed", generation=key.id, error=describe_cause(error), what_now=what_now)


def _now() -> datetime:
    return datetime.now(UTC)
