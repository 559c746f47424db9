"""The arq job ``cleanup``: one attempt at one record, from the check of the pauses to the commit of the outcome."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar

import structlog
from arq.worker import Retry

from service.core.key import Key
from service.ledger.claiming import Claim, NotYet, Wanted
from service.ledger.database import LedgerUnavailableError
from service.sync.rate_limit import Budget

log = structlog.get_logger()

Claimed = TypeVar("Claimed")

# How long a job waits for the budget before it raises Retry.
BUDGET_SECONDS: Final = 20.0
_LEDGER_AGAIN_SECONDS: Final = 1.0
_CHECK_AGAIN_SECONDS: Final = 0.5
# A record that is due later is left to the safety net, which enqueues it within the horizon.
_MAX_WAIT: Final = timedelta(hours=48)


async def cleanup(ctx: dict[str, Any], account: str, generation_id: str, attempt: int) -> None:
    """Make attempt number *attempt*, from 1, at the record of *account* and *generation_id*.

    The job ends with the attempt. A duplicate or stale job does nothing.

    Raises: Retry, if nothing was started and the same attempt must start later.
    """
    jobs: CleanupJobs = ctx["jobs"]
    await jobs.run(Wanted(Key(account, generation_id), attempt))


class Attempts(Generic[Claimed]):
    """The attempts in progress in this process, at most *limit*, started by jobs or by the safety net."""

    def __init__(self, attempt: Callable[[Claimed], Coroutine[object, object, object]], *, limit: int) -> None:
        self._attempt = attempt
        self._limit = limit
        self._tasks: set[asyncio.Task[object]] = set()

    @property
    def room(self) -> int:
        """How many more may start."""
        return max(0, self._limit - self.running)

    @property
    def running(self) -> int:
        """How many are in progress."""
        return len(self._tasks)

    def begin(self, claim: Claimed) -> asyncio.Task[object]:
        """Start the attempt at what was claimed. Cancelling its caller does not cancel it."""
        # A task of its own: arq cancels its jobs at a stop, and loses track of them when it loses Redis.
        task = asyncio.create_task(self._attempt(claim))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self, seconds: float) -> bool:
        """Wait up to *seconds* for all attempts in progress, and return whether all have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        return not self._tasks


class CleanupJobs:
    """The job ``cleanup`` and its dependencies.

    *peek* returns how many records the pauses allow. *clock* is monotonic. When *stopping* is set nothing starts.
    """

    def __init__(
        self,
        *,
        peek: Callable[[], Awaitable[int]],
        clock: Callable[[], float],
        budget: Budget,
        claim: Callable[[Wanted], Awaitable[Claim | NotYet | None]],
        attempts: Attempts[Claim],
        stopping: asyncio.Event,
    ) -> None:
        self._peek = peek
        self._clock = clock
        self._budget = budget
        self._claim = claim
        self._attempts = attempts
        self._stopping = stopping
        self._is_paused = False
        self._fault: str | None = None
        self._check_again_at = 0.0
        self._checking = asyncio.Lock()

    async def run(self, wanted: Wanted) -> None:
        """See cleanup()."""
        claim = await self._begin(wanted)
        if isinstance(claim, NotYet):
            # The database's clock is slower than the worker's, or the due time has changed.
            if claim.wait <= _MAX_WAIT:
                raise Retry(defer=claim.wait)
        elif claim is not None:
            await asyncio.shield(self._attempts.begin(claim))

    async def _begin(self, wanted: Wanted) -> Claim | NotYet | None:
        """Claim the record if deletions are not paused and the budget allows an attempt."""
        if self._stopping.is_set():  # after a stop arq still starts the jobs that it has read
            raise Retry
        try:
            if await self._are_paused():
                return None  # no Retry: the safety net enqueues the job again after the pause
            if not await self._budget.acquire(BUDGET_SECONDS):
                raise Retry
            return await self._claim_granted(wanted)
        except LedgerUnavailableError as error:
            log.warning("cleanup.not_started", generation=wanted.key.id, error=str(error), what_now="retrying")
            await asyncio.sleep(_LEDGER_AGAIN_SECONDS)
            raise Retry from error

    async def _are_paused(self) -> bool:
        """Whether deletions are paused; one read serves all jobs within half a second.

        Raises: LedgerUnavailableError.
        """
        async with self._checking:
            if self._clock() >= self._check_again_at:
                await self._check_pauses()
            if self._fault is not None:
                raise LedgerUnavailableError(self._fault)
            return self._is_paused

    async def _check_pauses(self) -> None:
        self._fault = None
        try:
            self._is_paused = not await self._peek()
        except LedgerUnavailableError as error:
            # For all who wait: one by one they would wait for a ledger that hangs, ten seconds each, a stop with them.
            self._fault = str(error)
        self._check_again_at = self._clock() + _CHECK_AGAIN_SECONDS

    async def _claim_granted(self, wanted: Wanted) -> Claim | NotYet | None:
        """Claim the record, and return the attempt to the budget if there is no claim."""
        claim: Claim | NotYet | None = None
        try:
            claim = await self._claim(wanted)
        finally:
            if not isinstance(claim, Claim):
                self._budget.put_back(1)
        return claim
