"""Enqueueing on the web side: one delayed job for each stored record, after the commit and after the response."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import structlog
from arq.connections import ArqRedis

from service import queue
from service.ledger.receiving import Arrival, Receipt
from service.lifecycle import State
from service.queue import CleanupJob
from service.telemetry import Metrics

log = structlog.get_logger()

# Jobs that wait for a slow Redis; what is beyond them is left to the worker's safety net.
_MAX_WAITING = 10_000
_GATHER_SECONDS = 0.05


class Enqueuer:
    """Enqueues jobs in the background, after the response: a slow or unreachable Redis never delays one."""

    def __init__(self, pool: ArqRedis, *, horizon: timedelta, now: Callable[[], datetime], metrics: Metrics) -> None:
        self._pool = pool
        self._horizon = horizon
        self._now = now
        self._metrics = metrics
        self._waiting: list[CleanupJob] = []
        self._runner: asyncio.Task[None] | None = None

    def enqueue(self, receipts: Sequence[Receipt], arrivals: Sequence[Arrival]) -> None:
        """Enqueue a job for each record that is due within the horizon; the ledger alone keeps the others."""
        horizon = self._now() + self._horizon
        self._waiting += [
            CleanupJob(arrival.key, receipt.attempts + 1, receipt.due_at)
            for receipt, arrival in zip(receipts, arrivals, strict=True)
            if receipt.is_moved and receipt.state is State.SCHEDULED and receipt.due_at and receipt.due_at <= horizon
        ]
        if self._waiting and self._runner is None:
            self._runner = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Enqueue what waits, for as long as one round trip may take."""
        if self._runner is not None:
            await asyncio.wait([self._runner], timeout=queue.ENQUEUE_TIMEOUT_SECONDS)

    async def _run(self) -> None:
        try:
            while self._waiting:
                # No job is urgent, the soonest due time is seconds away: many in one round trip cost less.
                await asyncio.sleep(_GATHER_SECONDS)
                jobs, left_out = self._waiting[:_MAX_WAITING], max(0, len(self._waiting) - _MAX_WAITING)
                self._waiting = []
                self._metrics.enqueue_failures.inc(left_out)
                try:
                    await queue.enqueue_jobs(self._pool, jobs, now=self._now())
                except queue.QUEUE_ERRORS as error:
                    self._metrics.enqueue_failures.inc(len(jobs))
                    what_now = "the worker finds these records in the ledger"
                    log.warning("enqueue.failed", records=len(jobs), error=type(error).__name__, what_now=what_now)
        finally:
            self._runner = None
