"""A safety net: one loop over the ledger, which enqueues what is due and no job has done."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, Generic, TypeVar

import structlog

from service.jobs.connection import QUEUE_ERRORS
from service.jobs.enqueue import Job
from service.ledger.database import LedgerUnavailableError
from service.runtime.causes import describe_cause
from service.runtime.metrics import Metrics

log = structlog.get_logger()

T = TypeVar("T")

# Each round makes the looks that the budget has room for, so that this is also how soon its spare half is used.
EVERY: Final = timedelta(seconds=1)
# What is due for longer has no job.
LATE: Final = timedelta(seconds=5)
_AT_ONCE: Final = 20


class Net(Generic[T]):
    """Looks each second for what is due for longer than *late*, up to *at_once*, and enqueues the job of each.

    *name* is what they are, for log and metrics. *without_queue* does some of them where Redis cannot be used, and
    *take_over* what has a job that does not start; without either, both wait.
    """

    def __init__(
        self,
        *,
        name: str,
        find_due: Callable[[timedelta, int], Awaitable[Sequence[T]]],
        make_job: Callable[[T, datetime], Job],
        enqueue: Callable[[Sequence[Job]], Awaitable[object]],
        now: Callable[[], datetime],
        metrics: Metrics,
        stopping: asyncio.Event,
        late: timedelta = LATE,
        at_once: int = _AT_ONCE,
        without_queue: Callable[[Sequence[T]], Awaitable[object]] | None = None,
        take_over: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._name = name
        self._find_due = find_due
        self._make_job = make_job
        self._enqueue = enqueue
        self._now = now
        self._metrics = metrics
        self._stopping = stopping
        self._late = late
        self._at_once = at_once
        self._without_queue = without_queue
        self._take_over = take_over

    async def run(self) -> None:
        """Check the ledger every second until the worker stops."""
        what_now = "retrying in a second"
        while not self._stopping.is_set():
            try:
                await self._round()
            except (LedgerUnavailableError, *QUEUE_ERRORS) as error:
                self._metrics.loops_failed.labels(self._name).inc()
                log.warning("net.failed", of=self._name, error=describe_cause(error), what_now=what_now)
            except Exception:  # the loop must survive every error
                self._metrics.loops_failed.labels(self._name).inc()
                log.exception("net.crashed", of=self._name, what_now=what_now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY.total_seconds()):
                    await self._stopping.wait()

    async def _round(self) -> None:
        due = await self._find_due(self._late, self._at_once)
        if not due:
            return
        try:
            await self._enqueue([self._make_job(one, self._now()) for one in due])
        except QUEUE_ERRORS:
            if self._without_queue is not None:
                await self._without_queue(due)
            raise
        if self._take_over is not None:
            await self._take_over()
