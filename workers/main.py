"""The worker: an arq worker that hears the bells, and the dispatcher that cleans what the ledger has due."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog
from arq.connections import ArqRedis
from arq.worker import Worker, func

from service import queue
from service.budget import Budget
from service.grouping import GroupCommit
from service.ledger import claiming, cleaning, reading
from service.ledger.claiming import Claim
from service.ledger.cleaning import Copied
from service.ledger.database import Database
from service.resources import Resources, open_queue
from service.settings import NO_API_KEY, Settings, SettingsError
from service.sync_api import open_sync_api
from service.tasks import end
from service.telemetry import Metrics
from service.values import Secret
from workers.cleanup import Cleaner
from workers.dispatch import Dispatcher
from workers.heartbeat import beat
from workers.reconcile import reconcile

log = structlog.get_logger()

# Longer than the longest attempt (a GET of 10 s, a DELETE of 30 s, three commits), shorter than anyone wants to wait
# for the record of a worker that died.
LEASE: Final = timedelta(seconds=60)
STOP_SECONDS: Final = LEASE.total_seconds() + 5
_LEASES_AT_ONCE: Final = 500
_ARQ_RESTART_SECONDS: Final = 2.0


async def ring(ctx: dict[str, Any], *_: object) -> None:
    """The arq job: tell the dispatcher that something is due; whatever else an older release sent means nothing."""
    dispatcher: Dispatcher = ctx["dispatcher"]
    dispatcher.ring()


async def run_worker(settings: Settings, resources: Resources, metrics: Metrics, stop: asyncio.Event) -> None:
    """Work until *stop* is set, then finish what is under way and return.

    Raises: SettingsError without an API key; QueueError for a Redis that would drop jobs.
    """
    if settings.api_key is None:
        raise SettingsError([NO_API_KEY])
    actor = f"worker {socket.gethostname()}:{os.getpid()}"
    async with (
        open_queue(resources.redis_url, retries=2) as pool,
        _dispatcher(
            settings, settings.api_key, database=resources.database, pool=pool, metrics=metrics, actor=actor
        ) as dispatcher,
    ):
        helpers = [
            asyncio.create_task(_hear_bells(pool, dispatcher, metrics)),
            asyncio.create_task(
                reconcile(
                    lose_leases=partial(_lose_leases, resources.database, actor), ring=dispatcher.ring, metrics=metrics
                )
            ),
            asyncio.create_task(_until(stop)),
        ]
        work = asyncio.create_task(dispatcher.run())
        log.info("worker.started", concurrency=settings.concurrency, dry_run=settings.is_dry_run)
        try:
            # None of them ends by itself; should one, then half a worker would look like a whole one.
            ended, _ = await asyncio.wait([work, *helpers], return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                raise RuntimeError(f"a part of the worker has ended: {ended}")
        finally:
            dispatcher.stop()
            await end(helpers)
            await asyncio.wait([work], timeout=STOP_SECONDS)
            log.info("worker.stopped", is_drained=work.done())


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


@asynccontextmanager
async def _dispatcher(
    settings: Settings, key: Secret, *, database: Database, pool: ArqRedis, metrics: Metrics, actor: str
) -> AsyncIterator[Dispatcher]:
    """Join the cleanup to the ledger, the budget and the API, which *key* opens."""
    budget = Budget(settings.api_rate, pool, key, clock=time.monotonic)
    limit = None if settings.is_dry_run else settings.max_deletes_per_day
    work = _Work(database, pool, budget, asyncio.Semaphore(settings.concurrency), limit, actor)
    async with open_sync_api(
        settings.base_url, key, connections=settings.concurrency, metrics=metrics, on_throttled=work.throttle
    ) as api:
        cleaner = Cleaner(
            api=api,
            copy=GroupCommit(work.copy).submit,
            settle=GroupCommit(work.settle).submit,
            turn=work.turn,
            now=_now,
            give_up_after=settings.give_up_after,
            is_dry_run=settings.is_dry_run,
            metrics=metrics,
        )
        yield Dispatcher(
            allow=budget.grant,
            claim=work.claim,
            next_wake=work.next_wake,
            clean=cleaner.clean,
            give_back=cleaner.give_back,
            beat=partial(beat, settings.data_dir),
            now=_now,
            # Twice as many as there are places at the API: one half waits for its commit while the other calls.
            concurrency=2 * settings.concurrency,
            metrics=metrics,
        )


@dataclass(frozen=True, slots=True)
class _Work:
    """The ledger, the bells and the budget as the cleanup and its dispatcher ask for them."""

    database: Database
    pool: ArqRedis
    budget: Budget
    places: asyncio.Semaphore
    limit: int | None
    actor: str
    silencing: set[asyncio.Task[None]] = field(default_factory=set)

    async def claim(self, room: int) -> Sequence[Claim]:
        """Claim up to *room* records; what of the budget is not needed for them goes back."""
        write = partial(claiming.claim, now=_now(), lease=LEASE, limit=room, actor=self.actor)
        claims = await self.database.write(write)
        self.budget.put_back(room - len(claims))
        if claims:
            # Behind the deletions' backs: they do not wait for Redis.
            task = asyncio.create_task(_silence(self.pool, claims))
            self.silencing.add(task)
            task.add_done_callback(self.silencing.discard)
        return claims

    async def next_wake(self) -> datetime | None:
        """Return when the ledger has something to do."""
        return await self.database.read(reading.next_wake)

    async def copy(self, items: Sequence[cleaning.Copy]) -> Sequence[Copied]:
        """Commit copies."""
        write = partial(cleaning.copy, copies=items, now=_now(), limit=self.limit, actor=self.actor)
        return await self.database.write(write)

    async def settle(self, items: Sequence[cleaning.Settlement]) -> Sequence[bool]:
        """Commit how attempts ended."""
        write = partial(cleaning.settle, settlements=items, now=_now(), actor=self.actor)
        return await self.database.write(write)

    @asynccontextmanager
    async def turn(self, until: datetime) -> AsyncIterator[bool]:
        """Wait for a place at the API and yield whether there is one by *until*."""
        async with self.places:
            yield await self.budget.is_open_within((until - _now()).total_seconds())

    def throttle(self, seconds: float) -> None:
        """Make no call for as long as claims of before last; then, and for all others, the ledger's pause decides."""
        self.budget.close_for(min(seconds, LEASE.total_seconds()))


async def _silence(pool: ArqRedis, claims: Sequence[Claim]) -> None:
    """Spare arq the bells of records that are being cleaned already; one that rings all the same changes nothing."""
    bells = [queue.Bell(claim.key, claim.attempt - 1, claim.due_at) for claim in claims]
    with contextlib.suppress(*queue.QUEUE_ERRORS):
        await queue.silence(pool, bells)


async def _hear_bells(pool: ArqRedis, dispatcher: Dispatcher, metrics: Metrics) -> None:
    """Run the arq worker, again whenever Redis or an odd job ended it."""
    while True:
        worker = _arq_worker(pool, dispatcher)
        try:
            await worker.async_run()
        except Exception as error:
            if isinstance(error, queue.QUEUE_ERRORS) and not queue.is_of_odd_key(error):
                what_now = "deletions start from the ledger meanwhile"
                log.warning("bells.unheard", error=type(error).__name__, what_now=what_now)
            else:
                log.exception("bells.crashed", what_now="what rings now is thrown away, the ledger is looked at")
                # Left where it is, it would end the next arq worker as well, and no bell behind it would be heard.
                with contextlib.suppress(*queue.QUEUE_ERRORS):
                    await queue.throw_away_what_rings(pool, now=_now())
                dispatcher.ring()
        finally:
            # Not its close(), which would close the pool as well.
            worker.handle_sig(signal.SIGTERM)
        metrics.loops_failed.labels("bells").inc()
        await asyncio.sleep(_ARQ_RESTART_SECONDS)


def _arq_worker(pool: ArqRedis, dispatcher: Dispatcher) -> Worker:
    return Worker(
        functions=[func(ring, name=queue.FUNCTION)],
        queue_name=queue.QUEUE,
        redis_pool=pool,
        ctx={"dispatcher": dispatcher},
        handle_signals=False,
        # arq refuses an id while its result lives, and the same attempt may have to be rung for again.
        keep_result=0,
        # A drop after some tries has no hook to tell of it.
        max_tries=10**6,
        job_timeout=10,
        # One bell is enough to look at the ledger; each costs arq seven commands, and those of records that are then
        # claimed are silenced by one.
        max_jobs=4,
        queue_read_limit=16,
        poll_delay=0.2,
        allow_abort_jobs=False,
        log_results=False,
        health_check_interval=15,
        health_check_key=f"{queue.QUEUE}:health:{socket.gethostname()}:{os.getpid()}",
        timezone=UTC,
        job_serializer=pool.job_serializer,
        job_deserializer=pool.job_deserializer,
    )


async def _lose_leases(database: Database, actor: str) -> int:
    return await database.write(partial(claiming.lose_leases, now=_now(), limit=_LEASES_AT_ONCE, actor=actor))


def _now() -> datetime:
    return datetime.now(UTC)
