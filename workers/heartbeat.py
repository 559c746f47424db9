"""The heartbeat of a worker: a file that it touches, for health checks."""

from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

# A worker without a round for so long does not work any more; a round may wait for the ledger and the budget.
ALIVE_WITHIN_SECONDS: Final = 60.0
_FILE: Final = "worker.alive"


def beat(data_dir: Path) -> None:
    """Touch the file; a full disk must not stop the worker."""
    try:
        (data_dir / _FILE).touch()
    except OSError as error:
        log.warning("heartbeat.failed", error=error.strerror)


def is_alive(data_dir: Path, *, now_seconds: float) -> bool:
    """Whether the worker with this data directory touched the file recently; *now_seconds* since 1970."""
    try:
        seen = (data_dir / _FILE).stat().st_mtime
    except OSError:
        return False
    return now_seconds - seen < ALIVE_WITHIN_SECONDS
