"""An arq cron job: it forgets records whose generations have been gone for MAYFLY_RECORD_TTL."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog
from arq.cron import CronJob, cron

from service.ledger import batches, forgetting
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.forgetting import Forgotten
from service.runtime.metrics import Metrics

log = structlog.get_logger()

NAME: Final = "forget_records"
# Who forgets, in a record's history: the setting decided it.
ACTOR: Final = "MAYFLY_RECORD_TTL"
# Every ten minutes; what one run leaves, the next one takes.
MINUTES: Final = frozenset(range(5, 60, 10))
# Records in one transaction, which no webhook of SQLite can enter meanwhile.
BATCH: Final = 200
_MAX_BATCHES: Final = 500
# Between two batches webhooks and attempts have the database to themselves.
_PAUSE_SECONDS: Final = 0.2
_TIMEOUT_SECONDS: Final = 9 * 60


class Hygiene:
    """Forgets old records in batches. Several workers may do it at once: none takes what another has locked."""

    def __init__(
        self,
        database: Database,
        ttl: timedelta,
        *,
        metrics: Metrics,
        stopping: asyncio.Event,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._ttl = ttl
        self._now = now
        self._metrics = metrics
        self._stopping = stopping

    async def run(self) -> int:
        """Forget what is old enough, until nothing is left or the worker stops; return how many records.

        Raises nothing: the next run continues.
        """
        number = 0
        try:
            after: datetime | None = None
            for _ in range(_MAX_BATCHES):
                batch = await self._forget(after)
                number, after = number + batch.number, batch.last_deleted_at
                if batch.number < BATCH or await self._is_stopping():
                    break
        except LedgerUnavailableError as error:
            self._metrics.loops_failed.labels("hygiene").inc()
            log.warning("records.not_forgotten", error=str(error), what_now="tried again within ten minutes")
        except Exception:  # arq would report it without what follows
            self._metrics.loops_failed.labels("hygiene").inc()
            log.exception("records.not_forgotten", what_now="tried again within ten minutes")
        await self._forget_batches()
        if number:
            log.info("records.forgotten", records=number, what_now="their proof of deletion stays")
        return number

    async def _forget(self, after: datetime | None) -> Forgotten:
        forget = partial(
            forgetting.forget_deleted, ttl=self._ttl, after=after, now=self._now(), limit=BATCH, actor=ACTOR
        )
        return await self._database.write(forget)

    async def _forget_batches(self) -> None:
        """Remove batches that were resolved long ago: their notifications have a URL that opens the results."""
        before = self._now() - self._ttl
        forget = partial(batches.forget_batches, before=before, limit=BATCH)
        with contextlib.suppress(LedgerUnavailableError):  # the next run
            await self._database.write(forget)

    async def _is_stopping(self) -> bool:
        """Wait a little between two batches, and return whether the worker stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PAUSE_SECONDS):
                await self._stopping.wait()
        return self._stopping.is_set()


async def forget_records(ctx: dict[str, Any]) -> None:
    """Run the hygiene of this worker; the function of the cron job."""
    hygiene: Hygiene = ctx["hygiene"]
    await hygiene.run()


def hygiene_cron() -> CronJob:
    """Return the cron job. A run that is missed, while Redis or all workers are down, costs time alone."""
    return cron(forget_records, name=NAME, minute=set(MINUTES), timeout=_TIMEOUT_SECONDS, run_at_startup=True)
