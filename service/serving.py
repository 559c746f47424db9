"""Serving an ASGI application from inside a running event loop, with limits against slow and greedy clients."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# From the first byte of a connection or request to its last; a webhook is a few kilobytes.
REQUEST_SECONDS: Final = 10.0
MAX_HEADER_BYTES: Final = 32 * 1024
MAX_CONNECTIONS: Final = 4096
# Of every answer, errors too. There is no page, so that nothing may be loaded or framed.
SECURITY_HEADERS: Final = [
    ("x-content-type-options", "nosniff"),
    ("cache-control", "no-store"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ("referrer-policy", "no-referrer"),
]
_TOO_SLOW_BODY: Final = b'{"status":408,"title":"Too slow","detail":"the request took longer than 10 s to arrive"}'
_TOO_SLOW: Final = b"".join(
    (
        b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/problem+json\r\nconnection: close\r\n",
        *(f"{name}: {value}\r\n".encode() for name, value in SECURITY_HEADERS),
        b"content-length: %d\r\n\r\n" % len(_TOO_SLOW_BODY),
        _TOO_SLOW_BODY,
    )
)
_STOP_SECONDS = 10
_BACKLOG = 2048


class _Server(uvicorn.Server):
    """A server that leaves the signals to whoever runs the loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


class _Joining:
    """A transport that sends what one turn of the loop writes in one call: uvicorn writes head and body apart.

    Measured with 256 connections: 375 µs of processor time per webhook without it, 308 µs with it.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._call_soon = loop.call_soon
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a transport has
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Keep *data* until the end of this turn."""
        if not self._parts:
            self._call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Send what there is, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():  # the client may have gone within this turn
            self._transport.write(b"".join(parts))


class _Protocol(HttpToolsProtocol):
    """Uvicorn's protocol, which by itself waits for ever for the rest of a request and takes headers of any size.

    One timer per connection, not per request: it looks every few seconds at how long a request is under way.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection without a request is one that has not arrived yet."""
        super().connection_made(cast("asyncio.Transport", _Joining(transport, self.loop)))
        self._incomplete_since: float | None = self.loop.time()
        self._header_bytes = 0
        self._is_in_headers = True
        self._is_begun = False
        self._watch = self.loop.call_later(REQUEST_SECONDS, self._close_if_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what headers there are, and end the connection when they are too many."""
        if self._is_in_headers:
            self._header_bytes += len(data)
            # A body's first part may come in the same piece, so this is a bound and no exact limit.
            if self._header_bytes > MAX_HEADER_BYTES + len(data):
                self.transport.abort()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Start the clock of this request."""
        self._is_begun = True
        self._incomplete_since = self.loop.time()
        self._header_bytes = 0
        self._is_in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Stop counting."""
        self._is_in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock of this request."""
        self._is_begun = False
        self._incomplete_since = None
        super().on_message_complete()

    def _close_if_slow(self) -> None:
        since = self._incomplete_since
        waited = 0.0 if since is None else self.loop.time() - since
        if waited >= REQUEST_SECONDS:
            self._end_slow_request()
        else:
            self._watch = self.loop.call_later(REQUEST_SECONDS - waited, self._close_if_slow)

    def _end_slow_request(self) -> None:
        """End the connection, with a 408 where that cannot get between the parts of another answer."""
        if self._is_in_headers:
            is_answerable = self._is_begun and (self.cycle is None or self.cycle.response_complete)
        else:
            is_answerable = not self.pipeline and not self.cycle.response_started
        if is_answerable:
            self.transport.write(_TOO_SLOW)
            self.transport.close()
        else:
            self.transport.abort()


@asynccontextmanager
async def serving(app: Any, host: str, port: int) -> AsyncIterator[int]:  # noqa: ANN401 - any ASGI application
    """Serve *app* and yield the port, chosen by the system for port 0; at the end answer what is under way.

    Raises: OSError when the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=_BACKLOG) as listener:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=SECURITY_HEADERS,
            backlog=_BACKLOG,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.005)
            if task.done():
                raise OSError("the web server did not start; its log tells why")
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            await task
