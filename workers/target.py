"""What works for one target: its jobs, its safety net and its client."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

import structlog
from arq.connections import ArqRedis

from service.core.forwarding import Target
from service.forwarding.posting import open_poster
from service.jobs.enqueue import CleanupJob, ForwardJob, Job, enqueue_jobs, queue_of_target
from service.ledger import delivering
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.delivering import ClaimedDelivery, Due, Ended, Settlement
from service.ledger.group_commit import GroupCommit
from service.runtime.metrics import Metrics
from workers.forward import AT_ONCE, Forwards, lease_of
from workers.net import Net

log = structlog.get_logger()

# The jobs of new webhooks come from the web side, at once.
_LATE: Final = timedelta(seconds=2)
_GIVE_UP_EVERY_SECONDS: Final = 10.0
# In one transaction: for each of them all records of a batch may wait, a thousand.
_GIVE_UP_AT_ONCE: Final = 5
_GIVE_UP_TIMES: Final = 100
_REMOVED_EVERY_SECONDS: Final = 60.0
_THREADS_OF_OTHERS: Final = 32


@dataclass(frozen=True, slots=True)
class TargetParts:
    """The parts that work for one target."""

    forwards: Forwards
    net: Net[Due]


class DeliveryLedger:
    """See DeliveryCalls. Attempts that end together share a commit."""

    def __init__(self, database: Database, target: Target, *, now: Callable[[], datetime]) -> None:
        self._database = database
        self._target = target
        self._now = now
        self._give_up_again_at = float("-inf")
        self.claim = GroupCommit(self._claim).submit
        self.settle = GroupCommit(self._settle).submit

    async def find_due(self, late: timedelta, limit: int) -> Sequence[Due]:
        """Return up to *limit* deliveries that have been due for longer than *late*."""
        read = partial(delivering.find_due_deliveries, target=self._target.id, now=self._now() - late, limit=limit)
        return await self._database.read(read)

    async def give_up(self) -> None:
        """End what has waited for days."""
        if time.monotonic() >= self._give_up_again_at:
            # First: while it fails, the target must still be tried in the rounds between.
            self._give_up_again_at = time.monotonic() + _GIVE_UP_EVERY_SECONDS
            await _give_up(self._database, self._target.id, (), self._now())

    async def _claim(self, wanted: Sequence[Due]) -> Sequence[ClaimedDelivery | None]:
        lease = lease_of(self._target)
        write = partial(delivering.claim_deliveries, wanted=wanted, now=self._now(), lease=lease)
        return await self._database.write(write)

    async def _settle(self, ended: Sequence[Ended]) -> Sequence[Sequence[Job]]:
        settled = await self._database.write(partial(delivering.settle_deliveries, ended=ended, now=self._now()))
        return [_jobs_after(one) for one in settled]


class RemovedTargets:
    """Ends what was for other than *targets*, the present ones: nobody makes attempts at it."""

    def __init__(
        self,
        database: Database,
        targets: Sequence[Target],
        *,
        metrics: Metrics,
        stopping: asyncio.Event,
    ) -> None:
        self._database = database
        self._known = [target.id for target in targets]
        self._metrics = metrics
        self._stopping = stopping

    async def run(self) -> None:
        """Check the ledger each minute until the worker stops."""
        while not self._stopping.is_set():
            try:
                await _give_up(self._database, None, self._known, _now())
            except LedgerUnavailableError as error:
                self._metrics.loops_failed.labels("forwards").inc()
                log.warning("removed_targets.failed", error=str(error), what_now="retrying in a minute")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REMOVED_EVERY_SECONDS):
                    await self._stopping.wait()


async def _give_up(database: Database, target: str | None, known: Sequence[str], now: datetime) -> None:
    """End what has waited for days for *target*, or for those that are not *known*. Raises: LedgerUnavailableError."""
    is_any = partial(delivering.has_given_up, target=target, known=known, now=now)
    write = partial(delivering.give_up, limit=_GIVE_UP_AT_ONCE, target=target, known=known, now=now)
    number = 0
    for _ in range(_GIVE_UP_TIMES):
        # Mostly there is nothing, and a read locks out no one.
        ended = await database.write(write) if await database.read(is_any) else []
        number += len(ended)
        if not ended:
            break
    if number:
        names = {"target": target or "one that was removed from MAYFLY_CONFIG", "deliveries": number}
        log.error("forward.given_up", **names, what_now="not sent again, unless you say: mayfly forwards replay")


def reserve_threads(targets: Sequence[Target]) -> None:
    """Give each attempt a thread to look up its host in: a name server that hangs must keep no other one waiting.

    asyncio looks up names in its default threads. It has few, six on two cores, and the calls to sync.so use them, too.
    """
    count = _THREADS_OF_OTHERS + sum(target.concurrency for target in targets)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(count, "lookups"))


@asynccontextmanager
async def open_target(
    target: Target,
    tls: ssl.SSLContext,
    *,
    database: Database,
    pool: ArqRedis,
    enqueue: Callable[[Sequence[Job]], None],
    metrics: Metrics,
    stopping: asyncio.Event,
) -> AsyncIterator[TargetParts]:
    """Connect what works for *target* to the ledger, the queue and the target; *enqueue* works in the background."""

    async def enqueue_due(jobs: Sequence[Job]) -> None:
        await enqueue_jobs(pool, queue_of_target(target.id), jobs, now=_now())

    async with open_poster(target, tls) as poster:
        forwards = Forwards(
            target,
            ledger=DeliveryLedger(database, target, now=_now),
            post=poster.post,
            enqueue=enqueue,
            now=_now,
            metrics=metrics,
            stopping=stopping,
        )
        net = Net(
            name="forwards",
            find_due=forwards.find_due,
            make_job=_make_job,
            enqueue=enqueue_due,
            now=_now,
            metrics=metrics,
            stopping=stopping,
            late=_LATE,
            at_once=AT_ONCE,
            without_queue=forwards.run_without_queue,
            take_over=forwards.take_over,
        )
        yield TargetParts(forwards, net)


def _jobs_after(settled: Settlement) -> list[Job]:
    """Return the next attempts at deliveries, and those at the records that waited for one."""
    next_ones: list[Job] = [_make_job(due, at) for due, at in settled.due]
    return next_ones + [CleanupJob(one.key, one.attempt, one.at) for one in settled.ready]


def _make_job(due: Due, at: datetime) -> ForwardJob:
    return ForwardJob(due.target, due.id, due.attempt, at)


def _now() -> datetime:
    return datetime.now(UTC)
