"""The budget of calls to the Sync API: one per key, shared by all workers through Redis.

Without Redis each worker spends a part of it alone, so that all of them together stay within the whole.
"""

import asyncio
import math
import uuid
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final, cast

import structlog
from arq.connections import ArqRedis
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from service.queue import QUEUE_ERRORS
from service.retention import MAX_RETRY_AFTER
from service.settings import Rate, Secret

log = structlog.get_logger()

_PREFIX: Final = "mayfly:rate"
# The least part of the budget by which a worker divides it when it cannot ask the others: it may know of too few.
ALONE_SHARE: Final = 4
# A worker that has not asked for this long is not counted among those that share.
_SHARES_SECONDS: Final = 60
_ASK_SECONDS: Final = 1.0
_ASK_AGAIN_SECONDS: Final = 5.0
_MAX_SLEEP_SECONDS: Final = 1.0

# By the clock of Redis, which the workers share.
_HEED: Final = """
local now = redis.call('TIME')[1]
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return {redis.call('PTTL', KEYS[1]), redis.call('ZCARD', KEYS[2])}
"""


def spread(rate: Rate) -> tuple[int, int]:
    """Return *rate* as calls per the shortest window of whole seconds that has one, rounded down.

    300 a minute is 5 a second: a minute's budget spent at once would make all others wait for a minute.
    """
    window = max(1, math.ceil(rate.seconds / rate.calls))
    return max(1, rate.calls * window // rate.seconds), window


class Budget:
    """Grants calls, at most *rate* of them; *key* is the API key whose budget it is.

    Calls are granted before records are claimed for them, so that no lease runs out while its worker waits for its
    turn: however many workers share the budget, all of it is used.
    """

    def __init__(self, rate: Rate, pool: ArqRedis, key: Secret, *, clock: Callable[[], float]) -> None:
        calls, self._window_seconds = spread(rate)
        self._rate = rate
        self._whole: RateLimitItem = RateLimitItemPerSecond(calls, self._window_seconds)
        # Asking once for a tenth of a window's calls costs a busy worker a tenth of the round trips.
        self._at_once = max(1, calls // 10)
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=_PREFIX,
            connection_pool=cast("Any", pool.connection_pool),  # documented, but not in its types
        )
        self._pool = pool
        self._shared = FixedWindowRateLimiter(storage)
        self._own = FixedWindowRateLimiter(MemoryStorage())
        self._name = sha256(key.reveal().encode()).hexdigest()[:16]
        self._me = uuid.uuid4().hex
        self._workers = 1
        self._clock = clock
        self._left = 0
        self._ask_again_at = 0.0
        self._closed_until = 0.0

    @property
    def closed_seconds(self) -> float:
        """For how long no call may be made, whatever is left; 0 when calls may be made."""
        return max(0.0, self._closed_until - self._clock())

    async def grant(self, wanted: int) -> int:
        """Return how many calls may be made now, up to *wanted*; 0, after a short wait, when there are none."""
        while not self.closed_seconds and self._left < wanted and await self._refill():
            pass
        if self.closed_seconds or not self._left:
            pause = self.closed_seconds or self._window_seconds / 20
            await asyncio.sleep(min(pause, _MAX_SLEEP_SECONDS))
            return 0
        granted = min(wanted, self._left)
        self._left -= granted
        return granted

    def put_back(self, calls: int) -> None:
        """Take back *calls* that were granted and not made."""
        self._left += calls

    async def is_open_within(self, seconds: float) -> bool:
        """Wait while a 429 keeps all calls waiting; False at once where that would take more than *seconds*."""
        deadline = self._clock() + seconds
        while wait := self.closed_seconds:
            if self._clock() + wait > deadline:
                return False
            await asyncio.sleep(wait)
        return self._clock() <= deadline

    async def close_for(self, seconds: float) -> None:
        """Have no worker make a call for so long: the API said that it has had too many, whoever made them."""
        seconds = min(seconds, MAX_RETRY_AFTER.total_seconds())
        if seconds <= self.closed_seconds:
            return
        self._close(seconds)
        if self._clock() < self._ask_again_at:
            return
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                await self._pool.set(self._key("closed"), 1, px=max(1, round(seconds * 1000)))
        except QUEUE_ERRORS as error:
            self._note_alone(error)

    def _close(self, seconds: float) -> None:
        self._left = 0
        self._closed_until = max(self._closed_until, self._clock() + seconds)

    async def _refill(self) -> bool:
        """Ask all workers' budget for more, or our own part of it while Redis does not answer."""
        if self._clock() >= self._ask_again_at:
            try:
                async with asyncio.timeout(_ASK_SECONDS):
                    return await self._ask()
            except QUEUE_ERRORS as error:
                self._note_alone(error)
        calls, window = spread(Rate(self._rate.calls, self._rate.seconds * max(ALONE_SHARE, self._workers)))
        is_granted = await self._own.hit(RateLimitItemPerSecond(calls, window), self._name)
        self._left += is_granted
        return is_granted

    async def _ask(self) -> bool:
        await self._heed_others()
        if self.closed_seconds:
            return False
        is_granted = await self._shared.hit(self._whole, self._name, cost=self._at_once)
        self._left += self._at_once if is_granted else 0
        return is_granted

    async def _heed_others(self) -> None:
        """Close when another worker was told to wait, and see how many there are."""
        keys = [self._key("closed"), self._key("workers")]
        heed = self._pool.register_script(_HEED)
        milliseconds, self._workers = await heed(keys=keys, args=[self._me, _SHARES_SECONDS])
        if milliseconds > 0:
            self._close(milliseconds / 1000)

    def _key(self, name: str) -> str:
        return f"{_PREFIX}:{self._name}:{name}"

    def _note_alone(self, error: Exception) -> None:
        self._ask_again_at = self._clock() + _ASK_AGAIN_SECONDS
        share = max(ALONE_SHARE, self._workers)
        what_now = f"this worker makes one call in {share} of the budget until it answers"
        log.warning("budget.unshared", error=type(error).__name__, what_now=what_now)
