"""Repair by the ledger, whatever became of workers and bells: leases that ran out, and who is looking at all."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import structlog

from service.ledger.database import LedgerUnavailableError
from service.telemetry import Metrics

log = structlog.get_logger()

EVERY = timedelta(seconds=5)
# A worker that did not complete a round for this long is of no use any more.
ALIVE_WITHIN = timedelta(seconds=60)
_HEARTBEAT = "worker.alive"


async def reconcile(
    *,
    lose_leases: Callable[[], Awaitable[int]],
    ring: Callable[[], None],
    data_dir: Path,
    metrics: Metrics,
    every: timedelta = EVERY,
) -> None:
    """For ever: take records back from workers that died, and ring for whatever is due but was never rung for."""
    while True:
        try:
            # First: a database that is away is no reason to restart this worker.
            _beat(data_dir, metrics)
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


def _beat(data_dir: Path, metrics: Metrics) -> None:
    """Show that this worker lives; a disk that takes no file must not keep it from its work."""
    try:
        (data_dir / _HEARTBEAT).touch()
    except OSError as error:
        metrics.loops_failed.labels("reconcile").inc()
        log.warning("reconcile.heartbeat_failed", error=error.strerror)


def is_alive(data_dir: Path, *, now_seconds: float) -> bool:
    """Whether a worker with this data directory completed a round lately; *now_seconds* since 1970."""
    try:
        seen = (data_dir / _HEARTBEAT).stat().st_mtime
    except OSError:
        return False
    return now_seconds - seen < ALIVE_WITHIN.total_seconds()
