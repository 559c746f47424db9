"""The check of readiness that the ledger commits, shared by all who ask."""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Final

from service.ledger import migrating
from service.ledger.database import Database, LedgerMovedError, LedgerUnavailableError, RowLockedError
from service.ledger.migrating import SchemaError
from service.runtime.tasks import run_within

_CHECK_SECONDS: Final = 0.9
# At most one row is written in so many seconds, however often it is asked.
_WRITE_EVERY_SECONDS: Final = 1.0
# For so long the failure of a webhook's commit counts: the check's small row may still have found room on a full disk.
_REMEMBERED_SECONDS: Final = 2.0
_NO_WRITES: Final = "the database accepts no writes: webhooks are answered 503, and nothing is deleted, until it does"


class LedgerCheck:
    """Checks that the ledger commits; one check at a time, whose answer all waiting callers share."""

    def __init__(
        self, database: Database, *, now: Callable[[], datetime], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._now = now
        self._clock = clock
        self._running: asyncio.Task[str | None] | None = None
        self._write_again_at = float("-inf")
        self._failure: str | None = None  # of the last write, until the next one
        self._failed_until = float("-inf")  # of a webhook's commit

    async def find_failure(self) -> str | None:
        """Return why webhooks cannot be stored, None if they can."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._check())
        return await asyncio.shield(self._running)

    def note_commit(self, *, has_failed: bool) -> None:
        """Remember how the last commit of webhooks ended."""
        self._failed_until = self._clock() + _REMEMBERED_SECONDS if has_failed else float("-inf")

    async def _check(self) -> str | None:
        if self._clock() < self._write_again_at:
            # Not the last answer: the database may have stopped answering since.
            return self._failure or await self._try(migrating.check_writable) or self._remembered()
        self._write_again_at = self._clock() + _WRITE_EVERY_SECONDS
        self._failure = await self._try(partial(migrating.check_commits, now=self._now()))
        return self._failure or self._remembered()

    async def _try(self, write: Callable[..., None]) -> str | None:
        try:
            await run_within(_CHECK_SECONDS, self._database.write(write))
        except (SchemaError, LedgerMovedError) as error:
            return str(error)
        except RowLockedError:
            return None  # another process froze in its own check; other rows can be written
        except (LedgerUnavailableError, TimeoutError):
            return _NO_WRITES
        return None

    def _remembered(self) -> str | None:
        return "the last commit of a webhook failed" if self._clock() < self._failed_until else None
