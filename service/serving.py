"""Serving an ASGI application from inside a running event loop, with limits against slow and greedy clients."""

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# From the first byte of a connection or request to its last; a webhook is a few kilobytes.
REQUEST_SECONDS: Final = 10.0
# A connection that rests between two requests; ended at the next look, up to REQUEST_SECONDS later.
IDLE_SECONDS: Final = 75
MAX_HEADER_BYTES: Final = 32 * 1024
# All of a request, with whatever a chunked body has beside its bytes. The application's own limit is far below.
MAX_REQUEST_BYTES: Final = 4 * 1024 * 1024
# Of one connection, sent ahead of the answers to those before.
MAX_PIPELINED: Final = 64
MAX_CONNECTIONS: Final = 4096
# Of every answer, errors too. There is no page, so that nothing may be loaded or framed.
SECURITY_HEADERS: Final = [
    ("x-content-type-options", "nosniff"),
    ("cache-control", "no-store"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ("referrer-policy", "no-referrer"),
]
_STOP_SECONDS = 10
_BACKLOG = 2048
# Open files beside the connections: the ledger, Redis, the API.
_OTHER_FILES = 256


def _last_answer(status: str, title: str, detail: str, *headers: str) -> bytes:
    """Return a whole answer for a connection that ends with it, where no application may be asked."""
    body = json.dumps({"status": int(status[:3]), "title": title, "detail": detail}).encode()
    lines = [
        f"HTTP/1.1 {status}",
        "content-type: application/problem+json",
        "connection: close",
        *(f"{name}: {value}" for name, value in SECURITY_HEADERS),
        *headers,
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


_TOO_SLOW: Final = _last_answer("408 Request Timeout", "Too slow", "the request took longer than 10 s to arrive")
_TOO_MANY: Final = _last_answer(
    "503 Service Unavailable", "Too many connections", "nothing was read, send it again", "retry-after: 5"
)


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
    """Uvicorn's protocol, which by itself waits for ever for the rest of a request and takes one of any size.

    One timer per connection, not per request: it looks every few seconds at how long a request is under way, how long
    there was none, and whether the client takes its answers.
    """

    max_connections = MAX_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection without a request is one that has not arrived yet."""
        super().connection_made(cast("asyncio.Transport", _Joining(transport, self.loop)))
        self._incomplete_since: float | None = self.loop.time()
        self._rests_since = self.loop.time()
        self._request_bytes = 0
        self._unsent_bytes = 0
        self._is_in_headers = True
        self._is_begun = False
        self._watch = self.loop.call_later(REQUEST_SECONDS, self._look)
        if len(self.connections) > self.max_connections:
            self.transport.write(_TOO_MANY)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what there is of the request, and end the connection when it is too much."""
        self._request_bytes += len(data)
        # What began within this piece may be another request, so these are bounds and no exact limits.
        limit = MAX_HEADER_BYTES if self._is_in_headers else MAX_REQUEST_BYTES
        if self._request_bytes > limit + len(data):
            self.transport.abort()
            return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Start the clock of this request."""
        self._is_begun = True
        self._incomplete_since = self.loop.time()
        self._request_bytes = 0
        self._is_in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """From here on it is the body."""
        self._is_in_headers = False
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """Stop the clock of this request."""
        self._is_begun = False
        self._incomplete_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start to rest, or begin with the next request if it is there already.

        In place of uvicorn's own, which sets a timer for each answer and takes it back at each request: measured with
        32 connections, 15 of the 109 µs of processor time that a webhook took.
        """
        self._rests_since = self.loop.time()
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def _look(self) -> None:
        now, since = self.loop.time(), self._incomplete_since
        unsent = self.transport.get_write_buffer_size()
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if unsent and unsent >= self._unsent_bytes > 0:
            self.transport.abort()  # it took nothing of its answer since the last look
        elif since is not None and now - since >= REQUEST_SECONDS:
            self._end_slow_request()
        elif since is None and not is_answering and not unsent and now - self._rests_since >= IDLE_SECONDS:
            self.transport.close()
        else:
            self._unsent_bytes = unsent
            wait = REQUEST_SECONDS if since is None else since + REQUEST_SECONDS - now
            self._watch = self.loop.call_later(wait, self._look)

    def _end_slow_request(self) -> None:
        """End the connection, with a 408 where that cannot get between the parts of another answer."""
        if self._is_in_headers:
            is_answerable = self._is_begun and (self.cycle is None or self.cycle.response_complete)
        else:
            is_answerable = not self.pipeline and not self.cycle.response_started
        if is_answerable and not self.transport.get_write_buffer_size():
            self.transport.write(_TOO_SLOW)
            self.transport.close()
        else:
            self.transport.abort()


def _most_connections() -> int:
    """Return how many connections there may be, after asking for as many open files as that takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_CONNECTIONS, max(1, soft - _OTHER_FILES))


@asynccontextmanager
async def serving(app: Any, host: str, port: int) -> AsyncIterator[int]:  # noqa: ANN401 - any ASGI application
    """Serve *app* and yield the port, chosen by the system for port 0; at the end answer what is under way.

    Raises: OSError when the address cannot be listened on.
    """
    _Protocol.max_connections = _most_connections()
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
