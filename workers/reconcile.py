"""Repair by the ledger: records whose worker died are taken back once their leases have run out."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import structlog

from service.ledger.database import LedgerUnavailableError
from service.telemetry import Metrics

log = structlog.get_logger()

EVERY = timedelta(seconds=5)


async def reconcile(
    *, lose_leases: Callable[[], Awaitable[int]], ring: Callable[[], None], metrics: Metrics, every: timedelta = EVERY
) -> None:
    """For ever: take records back from workers that died, and ring for them."""
    while True:
        try:
            if lost := await lose_leases():
                log.warning("reconcile.leases_lost", records=lost, what_now="they are tried again")
                ring()
        except LedgerUnavailableError as error:
            metrics.loops_failed.labels("reconcile").inc()
            log.warning("reconcile.failed", error=str(error), what_now="tried again")
        except Exception:  # the loop must outlive whatever it meets
            metrics.loops_failed.labels("reconcile").inc()
            log.exception("reconcile.crashed", what_now="tried again")
        await asyncio.sleep(every.total_seconds())
