"""The budget of calls to the Sync API: one per key, shared by all workers through Redis.

Without Redis each worker spends a part of it alone, so that a few of them together stay within the whole.
"""

import asyncio
import math
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final, cast

import structlog
from arq.connections import ArqRedis
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from service.queue import QUEUE_ERRORS
from service.settings import Rate, Secret

log = structlog.get_logger()

# The part of the budget that a worker takes alone when it cannot ask the others.
ALONE_SHARE: Final = 4
# However long one record is told to wait, the others try after this.
MAX_CLOSED_SECONDS: Final = 300.0
_ASK_SECONDS: Final = 1.0
_ASK_AGAIN_SECONDS: Final = 5.0
_MAX_SLEEP_SECONDS: Final = 1.0


def spread(rate: Rate) -> tuple[int, int]:
    """Return *rate* as calls per the shortest window of whole seconds that has one, rounded down.

    300 a minute is 5 a second: a minute's budget spent at once would make all others wait for a minute.
    """
    window = max(1, math.ceil(rate.seconds / rate.calls))
    return max(1, rate.calls * window // rate.seconds), window


class Budget:
    """Hands out calls, at most *rate* of them; *key* is the API key whose budget it is."""

    def __init__(self, rate: Rate, pool: ArqRedis, key: Secret, *, clock: Callable[[], float]) -> None:
        calls, window = spread(rate)
        self._calls, self._window_seconds = calls, window
        self._whole: RateLimitItem = RateLimitItemPerSecond(calls, window)
        alone, alone_window = spread(Rate(rate.calls, rate.seconds * ALONE_SHARE))
        self._alone: RateLimitItem = RateLimitItemPerSecond(alone, alone_window)
        # Asking once for a tenth of a window's calls costs a busy worker a tenth of the round trips.
        self._at_once = max(1, calls // 10)
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix="mayfly:rate",
            connection_pool=cast("Any", pool.connection_pool),  # documented, but not in its types
        )
        self._shared = FixedWindowRateLimiter(storage)
        self._own = FixedWindowRateLimiter(MemoryStorage())
        self._name = sha256(key.reveal().encode()).hexdigest()[:16]
        self._clock = clock
        self._left = 0
        self._ask_again_at = 0.0
        self._closed_until = 0.0
        self._turn = asyncio.Lock()

    @property
    def seconds_per_call(self) -> float:
        """How long one call's share of the budget lasts."""
        return self._window_seconds / self._calls

    async def take(self) -> None:
        """Wait until one call may be made."""
        if self._left > 0 and self._clock() >= self._closed_until:
            self._left -= 1
            return
        async with self._turn:
            while self._left == 0 or self._clock() < self._closed_until:
                await self._refill()
            self._left -= 1

    def is_closed(self) -> bool:
        """Whether no call may be made for now, whatever is left."""
        return self._clock() < self._closed_until

    def close_for(self, seconds: float) -> None:
        """Make no call for so long: the API said that it has had too many, whoever made them."""
        self._left = 0
        self._closed_until = max(self._closed_until, self._clock() + min(seconds, MAX_CLOSED_SECONDS))

    async def _refill(self) -> None:
        wait = self._closed_until - self._clock()
        if wait <= 0 and await self._granted():
            return
        pause = wait if wait > 0 else self._window_seconds / 20
        await asyncio.sleep(min(max(pause, 0.01), _MAX_SLEEP_SECONDS))

    async def _granted(self) -> bool:
        """Ask all workers' budget, or our own part of it while Redis does not answer."""
        if self._clock() >= self._ask_again_at:
            try:
                async with asyncio.timeout(_ASK_SECONDS):
                    is_granted = await self._shared.hit(self._whole, self._name, cost=self._at_once)
            except QUEUE_ERRORS as error:
                self._ask_again_at = self._clock() + _ASK_AGAIN_SECONDS
                what_now = f"this worker makes a {ALONE_SHARE}th of the calls until it does"
                log.warning("budget.unshared", error=type(error).__name__, what_now=what_now)
            else:
                self._left = self._at_once if is_granted else 0
                return is_granted
        is_granted = await self._own.hit(self._alone, self._name)
        self._left = 1 if is_granted else 0
        return is_granted
