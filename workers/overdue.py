"""The safety net: it enqueues due records that no job has started, and cleans them without Redis if it must."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import structlog

from service.jobs.connection import QUEUE_ERRORS
from service.jobs.enqueue import CleanupJob
from service.ledger.claiming import Claim
from service.ledger.database import LedgerUnavailableError
from service.ledger.outlook import Outlook
from service.runtime.causes import describe_cause
from service.runtime.metrics import Metrics
from service.sync.rate_limit import Budget
from workers.cleanup import Attempts

log = structlog.get_logger()

EVERY: Final = timedelta(seconds=2)
# A record overdue for longer than this has no job, or a late one.
LATE: Final = timedelta(seconds=2)
# Its job was enqueued several times and does not start: arq blocks the id for a worker that was killed.
STUCK: Final = timedelta(seconds=10)
# How many records get a job in one round.
AT_ONCE: Final = 2000
_FALLBACK_AGAIN: Final = timedelta(seconds=0.1)


@dataclass(frozen=True, slots=True)
class LedgerCalls:
    """The ledger's calls that the safety net needs."""

    read_outlook: Callable[[datetime | None, datetime], Awaitable[Outlook]]  # from and to which due time
    end_leases: Callable[[], Awaitable[int]]  # of workers that died
    end_holds: Callable[[], Awaitable[int]]  # that have reached their end
    claim: Callable[[int], Awaitable[Sequence[Claim]]]
    beat: Callable[[], Awaitable[None]]  # a worker was seen


class Overdue:
    """One loop over the ledger; *enqueue* returns the mark of Redis, another one once Redis was emptied."""

    def __init__(
        self,
        *,
        account: str,
        ledger: LedgerCalls,
        enqueue: Callable[[Sequence[CleanupJob]], Awaitable[str]],
        budget: Budget,
        attempts: Attempts[Claim],
        beat: Callable[[], None],
        now: Callable[[], datetime],
        horizon: timedelta,
        metrics: Metrics,
        stopping: asyncio.Event,
    ) -> None:
        self._account = account
        self._ledger = ledger
        self._enqueue = enqueue
        self._budget = budget
        self._attempts = attempts
        self._beat = beat
        self._now = now
        self._horizon = horizon
        self._metrics = metrics
        self._stopping = stopping
        self._enqueued_until: datetime | None = None  # all that is due up to here had a job once
        self._mark: str | None = None

    async def run(self) -> None:
        """Check the ledger every two seconds until the worker stops."""
        self._metrics.running.labels("worker").set(1)
        self._metrics.budget_waiting.labels(self._account).set_function(lambda: self._budget.waiting)
        self._metrics.attempts_running.labels(self._account).set_function(lambda: self._attempts.running)
        begun = self._metrics.worker_round_seconds.labels(self._account)
        while not self._stopping.is_set():
            try:
                self._beat()
                begun.set(self._now().timestamp())
                await self._round()
            except LedgerUnavailableError as error:
                self._metrics.loops_failed.labels("overdue").inc()
                log.warning("overdue.failed", error=str(error), what_now="retrying in two seconds")
            except Exception:  # the loop must survive every error
                self._metrics.loops_failed.labels("overdue").inc()
                log.exception("overdue.crashed", what_now="retrying in two seconds")
            await self._sleep(EVERY)

    async def _round(self) -> None:
        await self._ledger.beat()
        if ended := await self._ledger.end_holds():
            log.info("holds.ended", records=ended, what_now="they are deleted when due, after MAYFLY_MIN_TTL at least")
        now = self._now()
        horizon = now + self._horizon
        outlook = await self._ledger.read_outlook(self._enqueued_until, horizon)
        if outlook.has_expired_leases and (ended := await self._ledger.end_leases()):
            log.warning("overdue.leases_ended", records=ended, what_now="their records are retried")
        if not outlook.allowed:
            return
        is_usable = await self._enqueue_waiting(outlook, horizon)
        is_stuck = bool(outlook.late) and now - outlook.late[0][1] > STUCK and not self._budget.waiting
        if not is_usable or is_stuck:
            await self._clean_from_ledger(outlook.allowed)

    async def _enqueue_waiting(self, outlook: Outlook, horizon: datetime) -> bool:
        """Enqueue the late records and those due within the horizon; return whether Redis accepts jobs."""
        near = outlook.near
        jobs = [CleanupJob(wanted.key, wanted.attempt, at) for wanted, at in (*outlook.late, *near)]
        try:
            mark = await self._enqueue(jobs)
        except QUEUE_ERRORS as error:
            self._enqueued_until = None
            self._metrics.loops_failed.labels("enqueue").inc()
            what_now = "the ledger starts deletions until Redis accepts jobs"
            log.warning("overdue.not_enqueued", records=len(jobs), error=describe_cause(error), what_now=what_now)
            return False
        is_emptied, self._mark = mark != self._mark, mark
        if is_emptied and self._enqueued_until is not None:
            self._enqueued_until = None  # Redis was emptied: from the beginning, in the next round
        else:
            self._enqueued_until = near[-1][1] if len(near) == AT_ONCE else horizon
        return True

    async def _clean_from_ledger(self, allowed: int) -> None:
        """Start attempts at due records, within the same budget and limits, until the next round."""
        for _ in range(int(EVERY / _FALLBACK_AGAIN)):
            if self._stopping.is_set():
                return
            room = min(self._attempts.room, allowed)
            granted = await self._budget.grant(room)
            claims: Sequence[Claim] = ()
            try:
                claims = await self._ledger.claim(granted) if granted else ()
            finally:
                self._budget.put_back(granted - len(claims))
            for claim in claims:
                self._attempts.begin(claim)
            if granted and len(claims) < granted:
                return  # nothing else is due
            await self._sleep(_FALLBACK_AGAIN)

    async def _sleep(self, duration: timedelta) -> None:
        """Wait for *duration*, or until the worker stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(duration.total_seconds()):
                await self._stopping.wait()
