"""The sign of life of a worker: a file that its dispatcher touches, for those who watch the process."""

from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

# A worker that completed no round for this long is of no use any more; a round may wait for the ledger and the budget.
ALIVE_WITHIN_SECONDS: Final = 60.0
_FILE: Final = "worker.alive"


def beat(data_dir: Path) -> None:
    """Show that the worker lives; a disk that takes no file must not keep it from its work."""
    try:
        (data_dir / _FILE).touch()
    except OSError as error:
        log.warning("heartbeat.failed", error=error.strerror)


def is_alive(data_dir: Path, *, now_seconds: float) -> bool:
    """Whether a worker with this data directory completed a round lately; *now_seconds* since 1970."""
    try:
        seen = (data_dir / _FILE).stat().st_mtime
    except OSError:
        return False
    return now_seconds - seen < ALIVE_WITHIN_SECONDS
