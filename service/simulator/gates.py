"""Gates at which scripted calls wait until they are released."""

import asyncio
from collections import defaultdict


class Gates:
    def __init__(self) -> None:
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._reached: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    @property
    def waiting(self) -> dict[str, int]:
        """The number of waiting calls, by generation id."""
        return {generation_id: len(calls) for generation_id, calls in self._waiting.items()}

    async def wait(self, generation_id: str) -> None:
        released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(generation_id, []).append(released)
        self._reached[generation_id].set()
        await released

    async def reached(self, generation_id: str) -> None:
        """Return once a call about the generation waits at its gate."""
        await self._reached[generation_id].wait()

    def release(self, generation_id: str) -> int:
        """Let the waiting calls continue; return how many."""
        waiting = self._waiting.pop(generation_id, [])
        self._reached.pop(generation_id, None)
        for released in waiting:
            if not released.done():
                released.set_result(None)
        return len(waiting)
