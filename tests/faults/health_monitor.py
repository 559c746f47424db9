"""The health monitor polls every web side: each answer must be correct and come within a second (I7)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.faults.processes import Process, Reach

EVERY_SECONDS = 1.0
# A second, and a half for a machine that others use.
LIMIT_SECONDS = 1.5
_PATIENCE_SECONDS = 5.0
# A server that stopped just before may still have answered.
_SETTLED_SECONDS = 0.3
_PATHS = ("/health/ready", "/metrics", "/health/live")
_TICK_SECONDS = 0.05


@dataclass(slots=True)
class HealthMonitor:
    """The number of requests, and the wrong answers; *redis* and *database* are what the tests make unreachable."""

    client: httpx.AsyncClient
    redis: Reach
    database: Reach | None
    asked: int = 0
    breaches: list[str] = field(default_factory=list)
    _stalled: float = 0.0  # seconds for which this event loop, not a web side, delayed answers
    _ticked_at: float = field(default_factory=time.monotonic)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["HealthMonitor"]:
        """Measure stalls of the event loop, and poll the followed web sides, until the block ends."""
        self._tasks.append(asyncio.create_task(self._measure_own_stalls()))
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def follow(self, process: Process, port: int) -> None:
        """Poll the web side at *port* for as long as *process* runs."""
        self._tasks.append(asyncio.create_task(self._ask_on(process, port)))

    async def _ask_on(self, process: Process, port: int) -> None:
        while process.exit_code is None:
            for path in _PATHS:
                await asyncio.sleep(EVERY_SECONDS / len(_PATHS))
                if process.is_left_alone:
                    await self._ask(process, f"http://127.0.0.1:{port}{path}")

    async def _ask(self, process: Process, url: str) -> None:
        begun, stalled, waited = time.monotonic(), self._own_stalls, process.seconds_without_a_core
        try:
            answer = await self.client.get(url, timeout=_PATIENCE_SECONDS)
        except httpx.HTTPError as error:
            found = [f"I7 {url} gave no answer: {type(error).__name__}"]
        else:
            seconds = time.monotonic() - begun - (self._own_stalls - stalled)
            waited = process.seconds_without_a_core - waited
            late = f"I7 {url} answered after {seconds:.2f} s, in {waited:.2f} s of which it had no core"
            found = [late] if seconds > LIMIT_SECONDS else []
            found += [f"I7 {url} {error}" for error in self._errors_in(url, answer, begun)]
        if process.is_left_alone and process.signalled_at < begun:
            self.asked += 1
            self.breaches += found

    def _errors_in(self, url: str, answer: httpx.Response, begun: float) -> list[str]:
        """Return what is wrong in *answer*, requested at *begun*."""
        settled = begun - _SETTLED_SECONDS
        is_redis_unreachable = self.redis.is_away_since(settled)
        is_database_unreachable = self.database is not None and self.database.is_away_since(settled)
        if url.endswith("/live"):
            return [] if answer.status_code == 200 else [f"says {answer.status_code} of a process that lives"]
        if url.endswith("/metrics"):
            is_up = "\nmayfly_ledger_up 1.0" in answer.text
            return ["reports a ledger that does not answer as up"] if is_database_unreachable and is_up else []
        parts: dict[str, Any] = answer.json()["parts"]
        errors = []
        if is_redis_unreachable and parts["redis"]["status"] != "failing":
            errors.append("reports a Redis that does not answer as ok")
        if is_database_unreachable and (answer.status_code != 503 or parts["ledger"]["status"] != "failing"):
            errors.append("reports a ledger that does not answer as ok")
        return errors

    async def _measure_own_stalls(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._stalled, self._ticked_at = self._own_stalls, time.monotonic()

    @property
    def _own_stalls(self) -> float:
        """Seconds of stalls so far, with one of which the tick has not woken up yet: the answer may wake up first."""
        return self._stalled + max(0.0, time.monotonic() - self._ticked_at - _TICK_SECONDS - 0.02)
