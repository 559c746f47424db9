"""Several organisations at one SYNC_BASE_URL, as sync.so has them: the API key of a connection says whose it is."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

_KEY = b"\r\nx-api-key: "


class Organisations:
    """Forwards each connection to the simulator of the key in its first request; *urls* has them by key.

    A client of Mayfly has one key, so all requests of a connection have the same. With another key it
    is closed.
    """

    def __init__(self, urls: Mapping[str, str]) -> None:
        self._urls = urls
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator["Organisations"]:
        """Listen on a loopback port until the block ends."""
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
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
        head = await reader.readuntil(b"\r\n\r\n")
        key = head.lower().partition(_KEY)[2].partition(b"\r\n")[0].decode()
        if key not in self._urls:
            return
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", urlsplit(self._urls[key]).port)
        upstream_writer.write(head)
        both = [
            asyncio.create_task(_pump(reader, upstream_writer)),
            asyncio.create_task(_pump(upstream_reader, writer)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            upstream_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
