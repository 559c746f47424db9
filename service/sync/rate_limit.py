"""The budget of calls to the Sync API: one per key, shared by all workers through Redis.

Without Redis each worker uses a fixed share.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final, cast

import structlog
from arq.connections import ArqRedis
from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import RateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from service.core.rate import Rate
from service.core.secret import Secret
from service.runtime.causes import describe_cause

log = structlog.get_logger()

# The calls of one attempt: a GET and a DELETE. An attempt that ends earlier leaves the rest unused.
CALLS: Final = 2
_PREFIX: Final = "mayfly:rate"
# Without Redis a worker uses one part in so many, so that up to four workers stay within the rate.
ALONE_SHARE: Final = 4
_LONGER_WINDOWS: Final = 10
_ASK_SECONDS: Final = 1.0
_ASK_AGAIN_SECONDS: Final = 5.0
# Of a longer window with a single attempt nothing is spare: it is left to deletions.
_SPARE_WINDOW_SECONDS: Final = 60
# How long a granted attempt that was put back stays available, at least. At a slow rate it is a tenth of the time per
# attempt: for longer it could come too soon before the next one, and the limiter takes nothing back.
_LEFT_SECONDS: Final = 1.0
# How long calls that can wait are not asked for again.
_SPENT_SECONDS: Final = 0.2
_MIN_PAUSE_SECONDS: Final = 0.01
# It asks Redis.
_SPARE_AGAIN_SECONDS: Final = 0.1
_MAX_PAUSE_SECONDS: Final = 1.0


def spread_rate(rate: Rate) -> tuple[int, int]:
    """Return *rate* as attempts in a short window of whole seconds, with the window that rounds down least.

    300 calls a minute are 5 attempts in 2 seconds. With a window of a minute, one burst would make all others wait for
    a minute.
    """
    shortest = _window(rate, 1)
    longest = _LONGER_WINDOWS * shortest
    # Of windows for the same number of attempts the shortest rounds down least: 20 candidates instead of 65 000.
    of_few = [_window(rate, attempts) for attempts in range(1, 2 * _LONGER_WINDOWS + 1)] if shortest > 1 else []
    windows = [seconds for seconds in of_few or range(1, longest + 1) if seconds <= longest]
    window = max(windows, key=lambda seconds: (_attempts(rate, seconds) / seconds, -seconds))
    return _attempts(rate, window), window


def _window(rate: Rate, attempts: int) -> int:
    """Return the shortest window, in whole seconds, in which *rate* allows *attempts*."""
    return max(1, -(-CALLS * attempts * rate.seconds // rate.calls))


def _attempts(rate: Rate, seconds: int) -> int:
    return rate.calls * seconds // (CALLS * rate.seconds)


class Budget:
    """Grants attempts of CALLS calls each, so that no more than *rate* calls are made with *key*.

    An attempt is granted before its record is claimed, so that no lease runs out during the wait. When *stopping* is
    set, all waits end.
    """

    def __init__(
        self, rate: Rate, pool: ArqRedis, key: Secret, *, clock: Callable[[], float], stopping: asyncio.Event
    ) -> None:
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=_PREFIX,
            wrap_exceptions=True,
            connection_pool=cast("Any", pool.connection_pool),  # documented, but not in its types
        )
        # By Redis's clock, which the workers share. Fixed windows would allow twice the rate at their edges.
        self._shared = _Limit(SlidingWindowCounterRateLimiter(storage), rate)
        alone = Rate(rate.calls, rate.seconds * ALONE_SHARE)
        self._alone = _Limit(SlidingWindowCounterRateLimiter(MemoryStorage()), alone)
        self._name = key.identify()
        self._clock = clock
        self._left = 0
        self._left_until = 0.0
        self._ask_again_at = 0.0
        self._closed_until = 0.0
        self._queue = asyncio.Lock()
        self._stopping = stopping
        self.waiting = 0

    async def acquire(self, seconds: float) -> bool:
        """Wait up to *seconds* for one attempt, in order of arrival; False at the timeout or at a stop."""
        self.waiting += 1
        try:
            async with asyncio.timeout(seconds), self._queue:
                # One at a time: fifty that poll would run hundreds of scripts a second.
                while not self._stopping.is_set():
                    if await self.grant(1):
                        return True
                    await self._wait_to_ask()
        except TimeoutError:
            pass
        finally:
            self.waiting -= 1
        return False

    async def grant(self, wanted: int) -> int:
        """Return how many attempts may start now, up to *wanted*, without waiting."""
        if self._clock() >= self._left_until:
            self._left = 0
        while not self._closed_seconds() and self._left < wanted and await self._refill():
            self._left_until = self._clock() + max(_LEFT_SECONDS, self._seconds_per_attempt() / 10)
        granted = 0 if self._closed_seconds() else min(wanted, self._left)
        self._left -= granted
        return granted

    async def grant_spare(self) -> bool:
        """Grant one attempt for what can wait: while nothing waits, and more than half of the window is left.

        Of a window with a single attempt, all of it, unless the next deletion would then wait for over a minute.
        """
        if self.waiting or self._closed_seconds():
            return False
        limit = self._shared if self._clock() >= self._ask_again_at else self._alone
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                left = (await limit.limiter.get_window_stats(limit.item, self._name)).remaining
        except (StorageError, OSError, TimeoutError) as error:
            self._note_unshared(error)
            return False
        is_spare = limit.is_refilled_soon and left >= min(limit.attempts, limit.attempts / 2 + 1)
        return is_spare and await self.grant(1) == 1

    def put_back(self, attempts: int) -> None:
        """Return *attempts* that were granted and not started to the budget, which keeps them for a while."""
        self._left += attempts

    def close_for(self, seconds: float) -> None:
        """Grant nothing for *seconds*."""
        self._left = 0
        self._closed_until = max(self._closed_until, self._clock() + seconds)

    async def is_open_within(self, seconds: float) -> bool:
        """Wait while closed; False at once if that would take more than *seconds*."""
        deadline = self._clock() + seconds
        while wait := self._closed_seconds():
            if self._clock() + wait > deadline:
                return False
            await asyncio.sleep(wait)
        return self._clock() <= deadline

    def _closed_seconds(self) -> float:
        return max(0.0, self._closed_until - self._clock())

    async def _wait_to_ask(self) -> None:
        """Wait a tenth of the time per attempt, or until the budget is open again."""
        seconds = self._closed_seconds() or self._seconds_per_attempt() / 10
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(max(seconds, _MIN_PAUSE_SECONDS), _MAX_PAUSE_SECONDS)):
                await self._stopping.wait()

    def _seconds_per_attempt(self) -> float:
        limit = self._shared if self._clock() >= self._ask_again_at else self._alone
        return limit.window_seconds / limit.attempts

    async def _refill(self) -> bool:
        """Ask for more of the shared budget, or of this worker's own share while Redis does not answer."""
        if self._clock() >= self._ask_again_at:
            try:
                async with asyncio.timeout(_ASK_SECONDS):
                    return await self._ask_limiter(self._shared)
            except (StorageError, OSError, TimeoutError) as error:
                self._note_unshared(error)
        return await self._ask_limiter(self._alone)

    def _note_unshared(self, error: BaseException) -> None:
        self._ask_again_at = self._clock() + _ASK_AGAIN_SECONDS
        what_now = f"this worker uses a 1/{ALONE_SHARE} share of MAYFLY_API_RATE until Redis answers"
        log.warning("budget.unshared", error=describe_cause(error), what_now=what_now)

    async def _ask_limiter(self, limit: "_Limit") -> bool:
        is_granted = await limit.limiter.hit(limit.item, self._name, cost=limit.at_once)
        self._left += limit.at_once if is_granted else 0
        return is_granted


class _Limit:
    """A rate of attempts and the limiter that counts them."""

    def __init__(self, limiter: RateLimiter, rate: Rate) -> None:
        self.limiter = limiter
        self.attempts, self.window_seconds = spread_rate(rate)
        self.item = RateLimitItemPerSecond(self.attempts, self.window_seconds)
        # Asking for a tenth of a window's attempts at once saves a busy worker nine in ten round trips.
        self.at_once = max(1, self.attempts // 10)
        self.is_refilled_soon = self.attempts > 1 or self.window_seconds <= _SPARE_WINDOW_SECONDS


class SpareCalls:
    """Single calls out of what deletions leave of *budget*; *clock* is monotonic."""

    def __init__(self, budget: Budget, clock: Callable[[], float]) -> None:
        self._budget = budget
        self._clock = clock
        self._left = 0
        self._left_until = 0.0
        self._spent_until = 0.0

    @property
    def is_spent(self) -> bool:
        """Whether nothing was left a moment ago; asking again for each of a thousand jobs would keep Redis busy."""
        return self._clock() < self._spent_until

    async def take(self) -> bool:
        """Return whether one call may be made now, without waiting."""
        if self._left and self._clock() < self._left_until:
            self._left -= 1
            return True
        if self.is_spent:
            return False
        if not await self._budget.grant_spare():
            self._spent_until = self._clock() + _SPENT_SECONDS
            return False
        self._left, self._left_until = CALLS - 1, self._clock() + _LEFT_SECONDS
        return True

    async def wait(self, seconds: float, stopping: asyncio.Event) -> bool:
        """Wait up to *seconds* until one call may be made; False at the timeout or when *stopping* is set."""
        deadline = self._clock() + seconds
        while not stopping.is_set():
            if await self.take():
                return True
            if self._clock() >= deadline:
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SPARE_AGAIN_SECONDS):
                    await stopping.wait()
        return False
