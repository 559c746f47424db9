"""What works for one account: its jobs, its safety net, its budget and its calls to the API with its key."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final

import structlog
from arq.connections import ArqRedis

from service.config.accounts import Account
from service.config.settings import Settings
from service.core.key import Key
from service.core.secret import Secret
from service.jobs.enqueue import BatchJob, CopyJob
from service.ledger import key_history
from service.ledger.claiming import Claim
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.group_commit import GroupCommit
from service.ledger.key_history import KeyOfAccount
from service.runtime.metrics import Metrics
from service.sync.client import SyncApi, open_sync_api
from service.sync.rate_limit import Budget, SpareCalls
from service.sync.results import make_results_reader
from workers.attempt import Cleaner
from workers.batch import Batches
from workers.batch_look import BatchLook
from workers.cleanup import Attempts, CleanupJobs
from workers.copy import LookLedger, Looks
from workers.ground import Ground, enqueue_next, enqueue_within, wait_for_slot
from workers.heartbeat import beat
from workers.key_proof import KeyProof
from workers.ledger import LEASE, WorkerLedger
from workers.net import Net
from workers.overdue import LedgerCalls, Overdue
from workers.runner import max_jobs
from workers.sweep import Sweep, Sweeper

log = structlog.get_logger()

# How long a proof of the key waits for the budget; the attempt's GET and DELETE are used up.
_PROOF_SECONDS: Final = 5.0
# How long one call of a sweep or of a look at a batch waits for deletions that need the whole budget.
_SWEEP_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """The parts that work for one account."""

    jobs: CleanupJobs
    attempts: Attempts[Claim]
    overdue: Overdue
    looks: Looks
    look_net: Net[Key]
    batches: Batches
    batch_net: Net[Key]
    sweep: Sweep | None  # None where no sweep is asked for


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
    """Connect what works for *account* to the ledger, the queue, the budget and the API with *key*."""
    budget = Budget(account.rate, pool, key, clock=time.monotonic, stopping=stopping)
    used = KeyOfAccount(account.id, key.identify())
    with contextlib.suppress(LedgerUnavailableError):  # then the pause stays
        await database.write(partial(key_history.resume_for_key, key=used))
    call_slot = partial(wait_for_slot, asyncio.Semaphore(settings.concurrency), budget)
    async with _open_api(settings, key, budget, metrics, connections=settings.concurrency) as api:
        ledger = _make_ledger(used, settings, database)
        ground = Ground(settings, account, pool, metrics, stopping, budget, ledger, api, call_slot)
        attempts = Attempts(_make_cleaner(ground).clean, limit=max_jobs(settings.concurrency))
        jobs, overdue = _make_deletions(ground, attempts)
        looks, look_net = _make_looks(ground)
        sweep = _make_sweep(ground, key, database)
        batches, batch_net = _make_batches(ground, key, database)
        try:
            yield WorkerParts(jobs, attempts, overdue, looks, look_net, batches, batch_net, sweep)
        finally:
            await batches.close()
            if sweep is not None:
                await sweep.wait()


def _make_ledger(used: KeyOfAccount, settings: Settings, database: Database) -> WorkerLedger:
    limit = None if settings.is_dry_run else settings.max_deletes_per_day
    actor = f"worker {socket.gethostname()}:{os.getpid()}"
    return WorkerLedger(
        database,
        limit=limit,
        is_dry_run=settings.is_dry_run,
        actor=actor,
        key=used,
        min_ttl=settings.policy.bounds_of(used.account).min_ttl,
        now=_now,
    )


def _open_api(
    settings: Settings, key: Secret, budget: Budget, metrics: Metrics, *, connections: int
) -> AbstractAsyncContextManager[SyncApi]:
    return open_sync_api(
        settings.base_url,
        key,
        connections=connections,
        metrics=metrics,
        # For existing claims. New claims wait for the pause in the ledger.
        on_throttled=lambda seconds: budget.close_for(min(seconds, LEASE.total_seconds())),
    )


def _make_cleaner(ground: Ground) -> Cleaner:
    acquire = partial(ground.budget.acquire, _PROOF_SECONDS)
    return Cleaner(
        api=ground.api,
        copy=GroupCommit(ground.ledger.copy).submit,
        settle=GroupCommit(ground.ledger.settle).submit,
        enqueue_next=partial(enqueue_next, ground.pool, ground.metrics),
        call_slot=ground.call_slot,
        now=_now,
        give_up_after=ground.settings.give_up_after,
        policy=ground.settings.policy,
        is_dry_run=ground.settings.is_dry_run,
        metrics=ground.metrics,
        key_proof=KeyProof(ground.api, call_slot=ground.call_slot, acquire=acquire),
        key_name=ground.account.key_name,
    )


def _make_sweep(ground: Ground, key: Secret, database: Database) -> Sweep | None:
    scope = ground.settings.scopes.get(ground.ledger.account)
    if scope is None:
        return None
    sweeper = Sweeper(
        scope=scope,
        policy=ground.settings.policy,
        database=database,
        # A client of its own: its calls wait for no place of a deletion, and take none.
        open_api=partial(_open_api, ground.settings, key, ground.budget, ground.metrics, connections=1),
        acquire=partial(SpareCalls(ground.budget, time.monotonic).wait, _SWEEP_SECONDS, ground.stopping),
        now=_now,
        metrics=ground.metrics,
    )

    return Sweep(sweeper, enqueue=ground.enqueue_soon, stopping=ground.stopping)


def _make_batches(ground: Ground, key: Secret, database: Database) -> tuple[Batches, Net[Key]]:
    """Return the job that finds the generations of finished batches, and its safety net."""
    look = partial(
        BatchLook,
        policy=ground.settings.policy,
        database=database,
        open_api=partial(_open_api, ground.settings, key, ground.budget, ground.metrics, connections=1),
        reader=make_results_reader(ground.settings.base_url),
        acquire=partial(SpareCalls(ground.budget, time.monotonic).wait, _SWEEP_SECONDS, ground.stopping),
        now=_now,
    )
    found = Batches(
        database=database,
        look=lambda claimed: look(claimed=claimed),
        enqueue=ground.enqueue_soon,
        give_up_after=ground.settings.give_up_after,
        now=_now,
        metrics=ground.metrics,
        stopping=ground.stopping,
    )
    net = Net(
        find_due=ground.ledger.find_due_batches,
        enqueue=ground.enqueue,
        now=_now,
        metrics=ground.metrics,
        stopping=ground.stopping,
        make_job=BatchJob,
        name="batches",
    )
    return found, net


def _make_deletions(ground: Ground, attempts: Attempts[Claim]) -> tuple[CleanupJobs, Overdue]:
    """Return the job that deletes, and its safety net."""
    ledger = ground.ledger
    jobs = CleanupJobs(
        peek=ledger.peek,
        clock=time.monotonic,
        budget=ground.budget,
        claim=GroupCommit(ledger.claim_wanted).submit,
        attempts=attempts,
        stopping=ground.stopping,
    )
    overdue = Overdue(
        account=ledger.account,
        ledger=LedgerCalls(ledger.read_outlook, ledger.end_leases, ledger.end_holds, ledger.claim, ledger.beat),
        enqueue=ground.enqueue,
        budget=ground.budget,
        attempts=attempts,
        beat=partial(beat, ground.settings.data_dir),
        now=_now,
        horizon=ground.settings.queue_horizon,
        metrics=ground.metrics,
        stopping=ground.stopping,
    )
    return jobs, overdue


def _make_looks(ground: Ground) -> tuple[Looks, Net[Key]]:
    """Return the job that looks early, and its safety net."""
    ledger = ground.ledger
    looks = Looks(
        ledger=LookLedger(ledger.is_look_wanted, ledger.store_look, ledger.put_off_look, ledger.end_look),
        get=ground.api.get,
        call_slot=ground.call_slot,
        calls=SpareCalls(ground.budget, time.monotonic),
        enqueue_cleanup=partial(enqueue_within, ground),
        policy=ground.settings.policy,
        now=_now,
        metrics=ground.metrics,
        stopping=ground.stopping,
    )
    look_net = Net(
        find_due=ledger.find_due_looks,
        enqueue=ground.enqueue,
        now=_now,
        metrics=ground.metrics,
        stopping=ground.stopping,
        make_job=CopyJob,
        name="looks",
    )
    return looks, look_net


def _now() -> datetime:
    return datetime.now(UTC)
