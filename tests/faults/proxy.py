"""A TCP proxy that stalls, cuts or loses data at bytes that the test names (gate G2)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

# stall: the request waits; cut: it is dropped with its connection; lose: it is done, its answer is lost.
Trouble = Literal["stall", "cut", "lose"]


class Proxy:
    """Forwards connections; trouble begins with the first request that holds *needle*, for all connections."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._trouble: Trouble | None = None
        self._needle = b""
        self._after = b""
        self._is_once = False
        self._released = asyncio.Event()
        self.reached = asyncio.Event()
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def trouble(self, kind: Trouble, needle: bytes, *, after: bytes = b"", once: bool = False) -> None:
        """Disturb requests that contain *needle* from now on, or *once*; on a connection only after *after*."""
        self._trouble, self._needle, self._after, self._is_once = kind, needle, after, once
        self._released.clear()
        self.reached.clear()

    def heal(self) -> None:
        """Let everything pass, what waits first."""
        self._trouble = None
        self._released.set()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator["Proxy"]:
        """Listen on a loopback port until the block ends."""
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self.heal()
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # Cancelled at the end: asyncio would log that as a fault of the handler.
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._forward(reader, writer)
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await self._connect()
        is_losing = asyncio.Event()
        directions = [
            asyncio.create_task(self._requests(reader, upstream_writer, is_losing)),
            asyncio.create_task(_answers(upstream_reader, writer, is_losing)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            upstream_writer.close()

    async def _requests(
        self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, is_losing: asyncio.Event
    ) -> None:
        is_after = False
        while data := await reader.read(65536):
            is_after = is_after or (self._trouble is not None and self._after in data)
            if self._trouble is not None and is_after and self._needle in data:
                trouble = self._trouble
                self.reached.set()
                if self._is_once:
                    self._trouble = None
                if trouble == "cut":
                    return
                if trouble == "lose":
                    is_losing.set()
                else:
                    await self._released.wait()
            upstream.write(data)
            await upstream.drain()


async def _answers(upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, is_losing: asyncio.Event) -> None:
    while data := await upstream.read(65536):
        if is_losing.is_set():
            return
        writer.write(data)
        await writer.drain()
