"""HTTP/1.1 on one connection: uvicorn's protocol, limits against slow and greedy clients, a short way for webhooks."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, Protocol, cast

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
# Where the application finds in the scope what was raised on the short way, to raise it where that is answered.
RAISED: Final = "mayfly.raised"


class ShortWay(Protocol):
    """Answers the ordinary requests to one path without ASGI, whose messages and tasks cost more than all the rest."""

    path: bytes
    max_bytes: int  # of a body; longer ones take the usual way

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raise what is wrong with a request already, before its body is waited for."""

    def take(self, headers: Mapping[bytes, bytes], body: bytes, done: Callable[[bytes | Exception], None]) -> None:
        """Answer a POST request: call *done*, now or later, with the JSON of a 202.

        An error that *done* is called with, or that is raised in its place, goes to the application to answer it.
        """


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

    def write_whole(self, data: bytes) -> None:
        """Send *data*, of which nothing is to follow, at once; behind what is kept if there is any."""
        if self._parts:
            self._parts.append(data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Send what there is, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():  # the client may have gone within this turn
            self._transport.write(b"".join(parts))


class _ShortCycle:
    """What uvicorn asks of the request that a connection answers, for one on the short way."""

    def __init__(self) -> None:
        self.response_started = False
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = True
        self.message_event = asyncio.Event()


class HttpProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which by itself waits for ever for the rest of a request and takes one of any size.

    One timer per connection, not per request: it looks every few seconds at how long a request is under way, how long
    there was none, and whether the client takes its answers.

    The short way is for one request at a time: what a client sends ahead waits until that is answered.
    """

    _head: ClassVar[tuple[list[tuple[bytes, bytes]], bytes]] = ([], b"")

    def __init__(self, *arguments: Any, short_way: ShortWay | None, max_connections: int, **options: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*arguments, **options)
        self._short_way = short_way
        self._max_connections = max_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection without a request is one that has not arrived yet."""
        self._wire, self._joining = transport, _Joining(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self._joining))
        self._incomplete_since: float | None = self.loop.time()
        self._rests_since = self.loop.time()
        self._request_bytes = 0
        self._unsent_bytes = 0
        self._is_in_headers = True
        self._is_begun = False
        self._is_short = False  # the request that arrives takes the short way
        self._is_taken = False  # one is under way there
        self._given: dict[bytes, bytes] = {}
        self._body = self._held = b""
        self._watch = self.loop.call_later(REQUEST_SECONDS, self._look)
        if len(self.connections) > self._max_connections:
            self.transport.write(_TOO_MANY)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._watch.cancel()
        if self._is_short:
            self._give()  # half a request: the application notes that it broke off
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what there is of the request, and end the connection when it is too much."""
        if self._is_taken:
            self._held += data
            self.flow.pause_reading()
            return
        self._request_bytes += len(data)
        # What began within this piece may be another request, so these are bounds and no exact limits.
        limit = MAX_HEADER_BYTES if self._is_in_headers else MAX_REQUEST_BYTES
        if self._request_bytes > limit + len(data):
            self.transport.abort()
            return
        super().data_received(data)
        if self._is_begun:
            if self._incomplete_since is None:
                self._incomplete_since = self.loop.time()
            if self._is_short:
                self._check()
        elif self._is_short:
            self._take()

    def on_message_begin(self) -> None:
        """Begin another request."""
        if self._is_short:
            self._give()  # with another one behind it in the same piece
        self._is_begun = self._is_in_headers = True
        self._incomplete_since = None
        self._request_bytes = 0
        self.url, self.headers = b"", []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """From here on it is the body."""
        self._is_in_headers = False
        self._is_short = self._short_way is not None and self._is_ordinary(self._short_way)
        if not self._is_short:
            self._begin()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        if self._is_short:
            self._body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock of this request."""
        self._is_begun = False
        self._incomplete_since = None
        if not self._is_short:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start to rest, or begin with the next request if it is there already.

        In place of uvicorn's own, which sets a timer for each answer and takes it back at each request: measured with
        32 connections, 15 of the 109 µs of processor time that a webhook took.
        """
        self._rests_since = self.loop.time()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def _begin(self) -> None:
        """Have the application answer the request, whose headers are there."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()

    def _is_ordinary(self, way: ShortWay) -> bool:
        """Whether the request may take the short way: a small POST as senders of webhooks write it, and alone."""
        if self.url != way.path and not self.url.startswith(way.path + b"?"):
            return False
        given = self._given = dict(self.headers)
        parser, before = self.parser, self.cycle
        return (
            parser.get_method() == b"POST"
            and len(given) == len(self.headers)  # none stands twice
            and 0 <= int(given.get(b"content-length", -1)) <= way.max_bytes
            and b"expect" not in given
            and b"upgrade" not in given
            and parser.should_keep_alive()
            and (b"connection" not in given or parser.get_http_version() == "1.1")
            and (before is None or before.response_complete)
            and not self.flow.write_paused
        )

    def _check(self) -> None:
        """Go on with a request that is to take the short way once all of it is there, if that is worth waiting for."""
        try:
            cast("ShortWay", self._short_way).check(self._given)
        except Exception as error:  # noqa: BLE001 - the application knows what each means
            self._give(error)

    def _take(self) -> None:
        """Answer the request, all of which is there, on the short way."""
        self._is_short, self._is_taken = False, True
        if not isinstance(self.cycle, _ShortCycle):
            self.cycle = cast("Any", _ShortCycle())
        self.cycle.response_complete = False
        try:
            cast("ShortWay", self._short_way).take(self._given, self._body, self._answer)
        except Exception as error:  # noqa: BLE001 - the application knows what each means
            self._answer(error)

    def _answer(self, outcome: bytes | Exception) -> None:
        """Send *outcome* as a 202, or have the application answer it; go on with what the client sent ahead."""
        self._is_taken = False
        self.cycle.response_complete = True
        if self._wire.is_closing():
            return
        if isinstance(outcome, Exception):
            self._give(outcome)
        else:
            self._body = b""
            headers, head = HttpProtocol._head
            if headers is not self.server_state.default_headers:
                head = self._new_head()
            self._joining.write_whole(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(outcome), outcome))
            self._rests_since = self.loop.time()
            if not self.cycle.keep_alive:
                self._joining.close()
        if self._held:
            held, self._held = self._held, b""
            self.flow.resume_reading()
            self.data_received(held)

    def _new_head(self) -> bytes:
        """Return the head of a 202 that says the time of now."""
        headers = self.server_state.default_headers
        lines = [*headers, (b"content-type", b"application/json")]
        head = b"HTTP/1.1 202 Accepted\r\n" + b"".join(b"%b: %b\r\n" % line for line in lines)
        HttpProtocol._head = (headers, head)
        return head

    def _give(self, error: Exception | None = None) -> None:
        """Have the application answer what was to take the short way, or the *error* that came of it there."""
        self._is_short = False
        body, self._body = self._body, b""
        self._begin()
        if error is not None:
            cast("dict[str, Any]", self.scope)[RAISED] = error
        super().on_body(body)
        if not self._is_begun:
            super().on_message_complete()

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
            is_answerable = self._is_short or (not self.pipeline and not self.cycle.response_started)
        if is_answerable and not self.transport.get_write_buffer_size():
            self.transport.write(_TOO_SLOW)
            self.transport.close()
        else:
            self.transport.abort()
