"""Which records are cleaned when: claims what the ledger has due, as many at once as allowed, and sleeps till the next.

A bell, the ledger's next due time, or a tick wakes it, whichever comes first; so it needs no bell to be right.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import datetime, timedelta

import structlog

from service.ledger.claiming import Claim
from service.ledger.database import LedgerUnavailableError
from service.retention import Verdict
from service.telemetry import Metrics

log = structlog.get_logger()

# The longest sleep: how late a change of another process is seen when its bell is not heard.
TICK = timedelta(seconds=5)
_ERROR_PAUSE = timedelta(seconds=1)
_GROWTH = 4


class Dispatcher:
    """Keeps up to *concurrency* cleanups under way and as many claimed beside them, so that claims come in batches.

    *allow(limit)* tells how many records may be begun now, *claim(limit)* claims due ones, *next_wake()* tells when the
    ledger has the next one, *clean* cleans one, *give_back* returns one not begun, *beat* is called in each round.
    """

    def __init__(
        self,
        *,
        allow: Callable[[int], Awaitable[int]],
        claim: Callable[[int], Awaitable[Sequence[Claim]]],
        next_wake: Callable[[], Awaitable[datetime | None]],
        clean: Callable[[Claim], Coroutine[object, object, Verdict | None]],
        give_back: Callable[[Claim], Awaitable[None]],
        beat: Callable[[], None],
        now: Callable[[], datetime],
        concurrency: int,
        metrics: Metrics,
    ) -> None:
        self._allow = allow
        self._claim = claim
        self._next_wake = next_wake
        self._clean = clean
        self._give_back = give_back
        self._beat = beat
        self._now = now
        self._concurrency = concurrency
        self._metrics = metrics
        self._claimed: deque[Claim] = deque()
        self._running: set[asyncio.Task[Verdict | None]] = set()
        self._woken = asyncio.Event()
        self._has_more = False  # the last claim was a full one
        self._appetite = 1  # how many to claim, so that a budget shared with others is not asked for more than is due
        self._is_stopping = False

    def ring(self) -> None:
        """Look at the ledger now. May be called at any time, from the event loop."""
        self._woken.set()

    async def run(self) -> None:
        """Work until stop(), then return once every cleanup under way has ended."""
        while not self._is_stopping:
            try:
                self._beat()
                await self._round()
            except LedgerUnavailableError as error:
                self._metrics.loops_failed.labels("dispatch").inc()
                log.warning("dispatch.failed", error=str(error), what_now="tried again in a second")
                await self._sleep(_ERROR_PAUSE)
            except Exception:  # the loop must outlive whatever it meets
                self._metrics.loops_failed.labels("dispatch").inc()
                log.exception("dispatch.crashed", what_now="tried again in a second")
                await self._sleep(_ERROR_PAUSE)
        await self._hand_back()
        if self._running:
            await asyncio.wait(self._running)

    def stop(self) -> None:
        """Begin nothing more."""
        self._is_stopping = True
        self._woken.set()

    async def _round(self) -> None:
        """Claim and start what is due if there is room, or sleep until there is more to do."""
        self._woken.clear()
        room = 2 * self._concurrency - len(self._running) - len(self._claimed)
        if room <= 0 or not self._is_low():
            await self._sleep(TICK)  # a cleanup that ends makes room and wakes it
            return
        if not self._has_more and (wait := await self._until_next()) > timedelta(0):
            await self._sleep(min(wait, TICK))
            return
        allowed = await self._allow(min(room, self._appetite))
        if not allowed:
            return  # it has waited; what is due then may be another record
        claims = await self._claim(allowed)
        self._has_more = len(claims) == allowed
        self._appetite = _GROWTH * self._appetite if self._has_more else max(1, len(claims))
        self._claimed.extend(claims)
        self._start()
        if not claims:
            # What is due and cannot be claimed is paused, or leased to a worker that died: no reason to spin.
            await self._sleep(_ERROR_PAUSE)

    def _start(self) -> None:
        while self._claimed and len(self._running) < self._concurrency and not self._is_stopping:
            task = asyncio.create_task(self._clean(self._claimed.popleft()))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Verdict | None]) -> None:
        self._running.discard(task)
        self._start()
        if self._is_low():
            self._woken.set()

    def _is_low(self) -> bool:
        """Whether so few claims wait that a new batch is worth its transaction."""
        return 2 * len(self._claimed) <= self._concurrency

    async def _hand_back(self) -> None:
        """Return what was claimed and not begun; where that fails, its lease ends by itself."""
        try:
            while self._claimed:
                await self._give_back(self._claimed.popleft())
        except Exception as error:  # noqa: BLE001 - whatever it is, those under way are still waited for
            log.warning("dispatch.hand_back_failed", error=str(error), what_now="their leases end by themselves")

    async def _until_next(self) -> timedelta:
        wake_at = await self._next_wake()
        return TICK if wake_at is None else wake_at - self._now()

    async def _sleep(self, duration: timedelta) -> None:
        try:
            async with asyncio.timeout(duration.total_seconds()):
                await self._woken.wait()
        except TimeoutError:
            return
