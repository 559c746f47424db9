"""An arq cron job: it forgets what is old.

That are records whose generations have been gone for MAYFLY_RECORD_TTL, or as their rule says, and deliveries to
targets that ended a month ago.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog
from arq.cron import CronJob, cron

from service.core.record_ttls import RecordTtls
from service.ledger import batches, delivery_forgetting, forgetting
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.forgetting import Forgotten
from service.runtime.metrics import Metrics

log = structlog.get_logger()

NAME: Final = "forget_records"
# Who forgets, in a record's history: the setting decided it, or else the rule is named.
ACTOR: Final = "MAYFLY_RECORD_TTL"
# Every ten minutes; what one run leaves, the next one takes.
MINUTES: Final = frozenset(range(5, 60, 10))
# How long a delivery stays once it has ended: its body is personal, and after a month nobody asks any more what an app
# has got, or wants it sent again.
KEEP_DELIVERIES: Final = timedelta(days=30)
# Records in one transaction, which no webhook of SQLite can enter meanwhile.
BATCH: Final = 200
_MAX_BATCHES: Final = 200
# Between two batches webhooks and attempts have the database to themselves.
_PAUSE_SECONDS: Final = 0.2
# Not longer than a cleanup job may take: arq blocks ids of a killed worker for the longest timeout of all functions.
_TIMEOUT_SECONDS: Final = 85


class Hygiene:
    """Forgets old records and deliveries in batches.

    Several workers may do it at once: none takes what another has locked.
    """

    def __init__(
        self,
        database: Database,
        ttls: RecordTtls,
        *,
        metrics: Metrics,
        stopping: asyncio.Event,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._ttls = ttls
        self._now = now
        self._metrics = metrics
        self._stopping = stopping

    async def run(self) -> int:
        """Forget what is old enough, until nothing is left or the worker stops; return how many records.

        Raises nothing: the next run continues.
        """
        number = 0
        try:
            async for batch in self._forget_all():
                number += batch.number
            await self._forget_deliveries()
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

    async def _forget_all(self) -> AsyncIterator[Forgotten]:
        """Forget batch by batch, the records of one rule after those of another, and yield each batch."""
        left = _MAX_BATCHES
        for rule in [] if self._ttls.is_forever else await self._database.read(forgetting.find_rules):
            after: datetime | None = None
            while (ttl := self._ttls.of_rule(rule)) is not None:
                batch = await self._forget(rule, ttl, after)
                yield batch
                after, left = batch.last_deleted_at, left - (batch.number > 0)
                if batch.number and (left == 0 or await self._is_stopping()):
                    return
                if batch.number < BATCH:
                    break

    async def _forget(self, rule: str, ttl: timedelta, after: datetime | None) -> Forgotten:
        actor = rule if rule in self._ttls.by_rule else ACTOR
        forget = partial(
            forgetting.forget_deleted, rule=rule, ttl=ttl, after=after, now=self._now(), limit=BATCH, actor=actor
        )
        return await self._database.write(forget)

    async def _forget_deliveries(self) -> None:
        """Remove deliveries that ended long ago, also where no target is configured any more."""
        number = 0
        for _ in range(_MAX_BATCHES):
            forget = partial(delivery_forgetting.forget_finished, after=KEEP_DELIVERIES, now=self._now(), limit=BATCH)
            found = await self._database.write(forget)
            number += found
            if found < BATCH or await self._is_stopping():
                break
        if number:
            log.info("deliveries.forgotten", deliveries=number, what_now="they cannot be sent again")

    async def _forget_batches(self) -> None:
        """Remove batches that were resolved long ago: their notifications have a URL that opens the results."""
        if self._ttls.default is None:
            return
        before = self._now() - self._ttls.default
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
