"""The arq job ``batch``: it finds the generations of a finished batch, and gives each one its record.

The job only begins that: it may take minutes, and arq blocks the id of every job of a killed worker for as long as the
longest job may take. Deletions come first, as for the early looks; what is lost, the ledger finds again.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog

from service.core.key import Key
from service.core.lifecycle import State
from service.jobs.connection import QUEUE_ERRORS
from service.jobs.enqueue import CleanupJob, CopyJob, Job
from service.ledger import batches
from service.ledger.batches import Claimed, Resolution
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.inserting import Arrival, Receipt
from service.runtime.metrics import Metrics
from service.runtime.tasks import cancel_and_wait
from workers.batch_look import BatchLook

log = structlog.get_logger()

# Renewed while a worker looks; the batch of one that died waits for its end.
LEASE: Final = timedelta(minutes=2)
_RENEW_SECONDS: Final = 30.0
# Looks in progress in one process; the others wait in the ledger.
AT_ONCE: Final = 2


async def batch(ctx: dict[str, Any], account: str, batch_id: str) -> None:
    """Begin to look at the batch of *account* and *batch_id*, if it still wants that."""
    looks: Batches = ctx["batches"]
    looks.begin(Key(account, batch_id))


class Batches:
    """The job ``batch`` and its dependencies.

    *look* finds and adopts the generations of one batch. *enqueue* enqueues jobs that are due soon. A batch is given up
    after *give_up_after*.
    """

    def __init__(
        self,
        *,
        database: Database,
        look: Callable[[Claimed], BatchLook],
        enqueue: Callable[[Sequence[Job]], Awaitable[object]],
        give_up_after: timedelta,
        now: Callable[[], datetime],
        metrics: Metrics,
        stopping: asyncio.Event,
    ) -> None:
        self._database = database
        self._look = look
        self._enqueue = enqueue
        self._give_up_after = give_up_after
        self._now = now
        self._metrics = metrics
        self._stopping = stopping
        self._running: dict[Key, asyncio.Task[None]] = {}

    def begin(self, key: Key) -> None:
        """Begin to look at a batch, unless that is in progress here; beyond AT_ONCE the ledger brings it again."""
        if self._stopping.is_set() or key in self._running or len(self._running) >= AT_ONCE:
            return
        task = asyncio.create_task(self.run(key))
        self._running[key] = task
        task.add_done_callback(lambda _: self._running.pop(key, None))

    async def close(self) -> None:
        """End the looks in progress; they are begun again by another worker, or after the next start."""
        await cancel_and_wait([*self._running.values()])

    async def run(self, key: Key) -> None:
        """Look at the batch of *key* once. Raises nothing: whatever fails, it is looked at again."""
        claimed: Claimed | None = None
        try:
            claim = partial(batches.claim_batch, key=key, now=self._now(), lease=LEASE)
            claimed = await self._database.write(claim)
            if claimed is not None:
                await self._examine(claimed)
        except LedgerUnavailableError as error:
            log.warning("batch.interrupted", batch=key.id, error=str(error), what_now="it is looked at again")
        except asyncio.CancelledError:
            if claimed is not None:
                await self._release(claimed)
            raise
        except Exception:  # one batch must not end the worker
            self._metrics.loops_failed.labels("batches").inc()
            log.exception("batch.crashed", batch=key.id, what_now="it is looked at again")

    async def _examine(self, claimed: Claimed) -> None:
        renewing = asyncio.create_task(self._renew(claimed))
        try:
            found = await self._look(claimed).resolve(partial(self._adopt, claimed))
        finally:
            await cancel_and_wait([renewing])
        if found is None:  # the budget, or the stop: nothing was learnt
            await self._release(claimed)
            return
        settle = partial(
            batches.settle_batch, claimed=claimed, found=found, now=self._now(), give_up_after=self._give_up_after
        )
        row = await self._database.write(settle)
        if row is not None:
            self._note(claimed, found, row)

    async def _adopt(self, claimed: Claimed, arrivals: Sequence[Arrival]) -> list[Receipt | None]:
        """Commit the records of *arrivals*, then enqueue their jobs.

        Raises: LedgerUnavailableError, RefusedDataError.
        """
        receipts = await self._database.write(partial(batches.adopt_of_batch, claimed=claimed, arrivals=arrivals))
        jobs: list[Job] = []
        for arrival, receipt in zip(arrivals, receipts, strict=True):
            if receipt is not None and arrival.is_partial:
                jobs.append(CopyJob(arrival.key, arrival.received_at))
            if receipt is not None and receipt.state is State.SCHEDULED and receipt.due_at is not None:
                jobs.append(CleanupJob(arrival.key, receipt.attempts + 1, receipt.due_at))
        try:
            await self._enqueue(jobs)
        except QUEUE_ERRORS:
            self._metrics.enqueue_failures.inc(len(jobs))  # the safety nets find them
        return receipts

    async def _renew(self, claimed: Claimed) -> None:
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            with contextlib.suppress(LedgerUnavailableError):
                await self._database.write(partial(batches.move_look, claimed=claimed, at=self._now() + LEASE))

    async def _release(self, claimed: Claimed) -> None:
        with contextlib.suppress(LedgerUnavailableError):  # then at the end of its lease
            await self._database.write(partial(batches.move_look, claimed=claimed, at=self._now()))

    def _note(self, claimed: Claimed, found: Resolution, row: Any) -> None:  # noqa: ANN401 - a row of the table
        self._metrics.batches.labels(row.state).inc()
        names: dict[str, object] = {
            "account": claimed.key.account,
            "batch": claimed.key.id,
            "expected": row.expected,
            "scheduled": row.scheduled,
            "known": row.known,
            "errors": row.errors,
            "source": found.source,
        }
        if row.state == "resolved":
            log.info("batch.resolved", **names)
        elif row.state == "failed":
            what_now = "given up: what has no record stays at sync.so; mayfly batches retry begins again"
            log.error("batch.given_up", **names, unresolved=row.unresolved, error=row.last_error, what_now=what_now)
        else:
            what_now = f"it is looked at again at {row.look_at:%Y-%m-%d %H:%M:%S} UTC"
            log.warning("batch.unresolved", **names, unresolved=row.unresolved, error=row.last_error, what_now=what_now)
