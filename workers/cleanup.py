"""The arq job ``cleanup``: one attempt at one record, from the look at the pauses to the commit of its outcome."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any, Final

import structlog
from arq.worker import Retry

from service.core.attempts import Verdict
from service.core.key import Key
from service.ledger.claiming import Claim, NotYet, Wanted
from service.ledger.database import LedgerUnavailableError
from service.sync.rate_limit import Budget

log = structlog.get_logger()

# How long a job waits for its place in the budget before arq starts it anew.
BUDGET_SECONDS: Final = 20.0
_LEDGER_AGAIN_SECONDS: Final = 1.0
_CHECK_AGAIN_SECONDS: Final = 0.5
# A wait longer than this is left to the ledger: the safety net enqueues what comes near.
_MAX_WAIT: Final = timedelta(hours=48)


async def cleanup(ctx: dict[str, Any], account: str, generation_id: str, attempt: int) -> None:
    """Make the *attempt*, counted from 1, at the record of *account* and *generation_id*.

    Its end is the attempt's end. A duplicate or stale job does nothing.

    Raises: Retry, when nothing was begun and this same attempt has to be started later.
    """
    jobs: CleanupJobs = ctx["jobs"]
    await jobs.run(Wanted(Key(account, generation_id), attempt))


class Attempts:
    """The attempts that are under way in this process, up to *limit*, whether a job began them or the safety net."""

    def __init__(self, clean: Callable[[Claim], Coroutine[object, object, Verdict | None]], *, limit: int) -> None:
        self._clean = clean
        self._limit = limit
        self._tasks: set[asyncio.Task[Verdict | None]] = set()

    @property
    def room(self) -> int:
        """How many more may begin."""
        return max(0, self._limit - len(self._tasks))

    def begin(self, claim: Claim) -> asyncio.Task[Verdict | None]:
        """Begin the attempt at a claimed record. Whoever stops waiting for it does not stop it."""
        # A task of its own: arq cancels its jobs at a stop, and leaves them running when it loses Redis.
        task = asyncio.create_task(self._clean(claim))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self, seconds: float) -> bool:
        """Wait up to *seconds* until none is under way, and return whether that is so."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        return not self._tasks


class CleanupJobs:
    """What the job ``cleanup`` works with.

    *peek* tells how many records the pauses allow, *clock* is monotonic; once *stopping* is set nothing begins.
    """

    def __init__(
        self,
        *,
        peek: Callable[[], Awaitable[int]],
        clock: Callable[[], float],
        budget: Budget,
        claim: Callable[[Wanted], Awaitable[Claim | NotYet | None]],
        attempts: Attempts,
        stopping: asyncio.Event,
    ) -> None:
        self._peek = peek
        self._clock = clock
        self._budget = budget
        self._claim = claim
        self._attempts = attempts
        self._stopping = stopping
        self._is_paused = False
        self._check_again_at = 0.0
        self._checking = asyncio.Lock()

    async def run(self, wanted: Wanted) -> None:
        """See cleanup()."""
        claim = await self._begin(wanted)
        if isinstance(claim, NotYet):
            # The clock that counts is behind ours, or the due time was moved.
            if claim.wait <= _MAX_WAIT:
                raise Retry(defer=claim.wait)
        elif claim is not None:
            await asyncio.shield(self._attempts.begin(claim))

    async def _begin(self, wanted: Wanted) -> Claim | NotYet | None:
        """Claim the record once nothing is in the way of its attempt."""
        if self._stopping.is_set():  # arq starts what it has read already
            raise Retry
        try:
            if await self._are_paused():
                return None  # to try again each second would be work for nothing: the safety net looks for the end
            if not await self._budget.acquire(BUDGET_SECONDS):
                raise Retry
            return await self._claim_granted(wanted)
        except LedgerUnavailableError as error:
            log.warning("cleanup.not_begun", generation=wanted.key.id, error=str(error), what_now="tried again")
            await asyncio.sleep(_LEDGER_AGAIN_SECONDS)
            raise Retry from error

    async def _are_paused(self) -> bool:
        """Whether deletions are paused; a look serves all jobs of half a second, of which a pause may end thousands."""
        async with self._checking:
            if self._clock() >= self._check_again_at:
                self._is_paused = not await self._peek()
                self._check_again_at = self._clock() + _CHECK_AGAIN_SECONDS
            return self._is_paused

    async def _claim_granted(self, wanted: Wanted) -> Claim | NotYet | None:
        """Claim the record, and put the place in the budget back if it is not needed."""
        claim: Claim | NotYet | None = None
        try:
            claim = await self._claim(wanted)
        finally:
            if not isinstance(claim, Claim):
                self._budget.put_back(1)
        return claim
