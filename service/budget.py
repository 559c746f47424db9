"""The budget of calls to the Sync API: one per key, shared by all workers through Redis.

Without Redis each worker spends a part of it alone, so that all of them together stay within the whole.
"""

import asyncio
import uuid
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final, cast

import structlog
from arq.connections import ArqRedis
from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from service.queue import QUEUE_ERRORS
from service.values import Rate, Secret

log = structlog.get_logger()

# What one attempt at a record takes: a GET and a DELETE. One that ends sooner leaves the rest unused.
CALLS: Final = 2
_PREFIX: Final = "mayfly:rate"
# The least part of the budget by which a worker divides it when it cannot ask the others: it may know of too few.
ALONE_SHARE: Final = 4
# A worker that has not asked for this long is not counted among those that share.
_SHARES_SECONDS: Final = 60
_LONGER_WINDOWS: Final = 10
_ASK_SECONDS: Final = 1.0
_ASK_AGAIN_SECONDS: Final = 5.0
_MAX_SLEEP_SECONDS: Final = 1.0

# By the clock of Redis, which the workers share.
_COUNT_WORKERS: Final = """
local now = redis.call('TIME')[1]
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])
"""


def spread(rate: Rate) -> tuple[int, int]:
    """Return *rate* as attempts in a short window of whole seconds, rounded down as little as windows allow.

    300 calls a minute are 5 attempts in 2 seconds: a minute's budget spent at once would make all others wait for a
    minute.
    """
    shortest = max(1, -(-CALLS * rate.seconds // rate.calls))
    windows = range(shortest, _LONGER_WINDOWS * shortest + 1)
    window = max(windows, key=lambda seconds: (_attempts(rate, seconds) / seconds, -seconds))
    return _attempts(rate, window), window


def _attempts(rate: Rate, seconds: int) -> int:
    return rate.calls * seconds // (CALLS * rate.seconds)


class Budget:
    """Grants attempts, each of CALLS calls, so that no more than *rate* calls are made with *key*.

    They are granted before records are claimed for them, so that no lease runs out while its worker waits for its
    turn: however many workers share the budget, all of it is used.
    """

    def __init__(self, rate: Rate, pool: ArqRedis, key: Secret, *, clock: Callable[[], float]) -> None:
        attempts, self._window_seconds = spread(rate)
        self._rate = rate
        self._whole = RateLimitItemPerSecond(attempts, self._window_seconds)
        # Asking once for a tenth of a window's attempts costs a busy worker a tenth of the round trips.
        self._at_once = max(1, attempts // 10)
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=_PREFIX,
            connection_pool=cast("Any", pool.connection_pool),  # documented, but not in its types
        )
        self._shared = FixedWindowRateLimiter(storage)
        self._own = FixedWindowRateLimiter(MemoryStorage())
        self._name = sha256(key.reveal().encode()).hexdigest()[:16]
        self._count_workers = pool.register_script(_COUNT_WORKERS)
        self._me = uuid.uuid4().hex
        self._workers = 1
        self._clock = clock
        self._left = 0
        self._left_until = 0.0
        self._ask_again_at = 0.0
        self._closed_until = 0.0

    async def grant(self, wanted: int) -> int:
        """Return how many attempts may begin now, up to *wanted*; 0, after a short wait, when none may."""
        if self._clock() >= self._left_until:
            self._left = 0  # kept for long they would be a burst beyond the rate, and missing to the other workers
        while not self._closed_seconds() and self._left < wanted and await self._refill():
            self._left_until = self._clock() + self._window_seconds
        granted = 0 if self._closed_seconds() else min(wanted, self._left)
        if not granted:
            pause = self._closed_seconds() or self._window_seconds / 20
            await asyncio.sleep(min(pause, _MAX_SLEEP_SECONDS))
        self._left -= granted
        return granted

    def put_back(self, attempts: int) -> None:
        """Take back *attempts* that were granted and not begun."""
        self._left += attempts

    def close_for(self, seconds: float) -> None:
        """Make no call for so long."""
        self._left = 0
        self._closed_until = max(self._closed_until, self._clock() + seconds)

    async def is_open_within(self, seconds: float) -> bool:
        """Wait while closed; False at once where that would take more than *seconds*."""
        deadline = self._clock() + seconds
        while wait := self._closed_seconds():
            if self._clock() + wait > deadline:
                return False
            await asyncio.sleep(wait)
        return self._clock() <= deadline

    def _closed_seconds(self) -> float:
        return max(0.0, self._closed_until - self._clock())

    async def _refill(self) -> bool:
        """Ask all workers' budget for more, or our own part of it while Redis does not answer."""
        if self._clock() >= self._ask_again_at:
            try:
                async with asyncio.timeout(_ASK_SECONDS):
                    return await self._ask()
            except QUEUE_ERRORS as error:
                self._ask_again_at = self._clock() + _ASK_AGAIN_SECONDS
                what_now = f"this worker makes one call in {self._share()} of the budget until it answers"
                log.warning("budget.unshared", error=type(error).__name__, what_now=what_now)
        attempts, window = spread(Rate(self._rate.calls, self._rate.seconds * self._share()))
        is_granted = await self._own.hit(RateLimitItemPerSecond(attempts, window), self._name)
        self._left += is_granted
        return is_granted

    async def _ask(self) -> bool:
        key = f"{_PREFIX}:{self._name}:workers"
        self._workers = await self._count_workers(keys=[key], args=[self._me, _SHARES_SECONDS])
        is_granted = await self._shared.hit(self._whole, self._name, cost=self._at_once)
        self._left += self._at_once if is_granted else 0
        return is_granted

    def _share(self) -> int:
        return max(ALONE_SHARE, self._workers)
