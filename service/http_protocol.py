"""HTTP/1.1 on one connection: uvicorn's protocol, limits against slow and greedy clients, a short way for webhooks."""

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Protocol, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.grouping import Done
from service.http_writing import TOO_MANY, TOO_SLOW, Joining

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
# Where the application finds in the scope what was raised on the short way, to raise it where that is answered.
RAISED: Final = "mayfly.raised"


class ShortWay(Protocol):
    """Answers the ordinary requests to one path without ASGI: its messages and tasks took a quarter of a webhook."""

    path: bytes
    max_bytes: int  # of a body; longer ones take the usual way

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raise what is wrong with a request already, before its body is waited for."""

    def take(self, headers: Mapping[bytes, bytes], body: bytes, done: Done[bytes]) -> None:
        """Answer a POST request: call *done*, now or later, with the JSON of a 202.

        An error that *done* is called with, or that is raised in its place, goes to the application to answer it.
        """


class _ShortCycle:
    """What uvicorn asks of the request that a connection answers, for one on the short way."""

    def __init__(self) -> None:
        self.response_complete = False
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
        self._joining = Joining(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self._joining))
        self._incomplete_since: float | None = self.loop.time()
        self._rests_since = self.loop.time()
        self._request_bytes = 0
        self._taken_bytes = 0
        self._is_in_headers = True
        self._is_begun = False
        self._short: dict[bytes, bytes] | None = None  # headers of the request that arrives, if it takes the short way
        self._is_taken = False  # one is under way there
        self._body = self._held = b""
        self._watch = self.loop.call_later(REQUEST_SECONDS, self._look)
        if len(self.connections) > self._max_connections:
            self.transport.write(TOO_MANY)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._watch.cancel()
        if self._short is not None:
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
        before = self._short
        super().data_received(data)
        if self._is_begun:
            if self._incomplete_since is None:
                self._incomplete_since = self.loop.time()
            if self._short is not None and self._short is not before:
                self._check(self._short)
        elif self._short is not None:
            self._take(self._short)

    def on_message_begin(self) -> None:
        """Begin another request."""
        if self._short is not None:
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
        self._short = self._ordinary_headers()
        if self._short is None:
            self._begin()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        if self._short is not None:
            self._body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock of this request."""
        self._is_begun = False
        self._incomplete_since = None
        if self._short is None:
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

    def shutdown(self) -> None:
        """Take no more requests; one that is under way, or arrives, is answered first."""
        if self._short is not None:
            self._give()
        super().shutdown()

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

    def _ordinary_headers(self) -> dict[bytes, bytes] | None:
        """Return the headers of a request for the short way, a small POST as senders write webhooks, else None."""
        way, parser, before = self._short_way, self.parser, self.cycle
        if way is None or (self.url != way.path and not self.url.startswith(way.path + b"?")):
            return None
        headers = dict(self.headers)
        is_ordinary = (
            parser.get_method() == b"POST"
            and len(headers) == len(self.headers)  # none stands twice
            and 0 <= int(headers.get(b"content-length", -1)) <= way.max_bytes
            and b"expect" not in headers
            and b"upgrade" not in headers
            and parser.should_keep_alive()
            and (b"connection" not in headers or parser.get_http_version() == "1.1")
            and (before is None or before.response_complete)
            and not self.flow.write_paused
        )
        return headers if is_ordinary else None

    def _check(self, headers: dict[bytes, bytes]) -> None:
        """Go on with a request that is to take the short way once all of it is there, if that is worth waiting for."""
        try:
            cast("ShortWay", self._short_way).check(headers)
        except Exception as error:  # noqa: BLE001 - the application knows what each means
            self._give(error)

    def _take(self, headers: dict[bytes, bytes]) -> None:
        """Answer the request, all of which is there, on the short way."""
        self._short, self._is_taken = None, True
        if not isinstance(self.cycle, _ShortCycle):
            self.cycle = cast("Any", _ShortCycle())
        self.cycle.response_complete = False
        try:
            cast("ShortWay", self._short_way).take(headers, self._body, self._answer)
        except Exception as error:  # noqa: BLE001 - the application knows what each means
            self._answer(error)

    def _answer(self, outcome: bytes | Exception) -> None:
        """Send *outcome* as a 202, or have the application answer it; go on with what the client sent ahead."""
        self._is_taken = False
        self.cycle.response_complete = True
        if self._joining.is_closing():
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
                return
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
        self._short = None
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
        taken = self._joining.sent_bytes - unsent
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if unsent and taken == self._taken_bytes:
            self.transport.abort()  # it took nothing of its answers since the last look
        elif since is not None and now - since >= REQUEST_SECONDS:
            self._end_slow_request()
        elif since is None and not is_answering and not unsent and now - self._rests_since >= IDLE_SECONDS:
            self.transport.close()
        else:
            self._taken_bytes = taken
            wait = REQUEST_SECONDS if since is None else since + REQUEST_SECONDS - now
            self._watch = self.loop.call_later(wait, self._look)

    def _end_slow_request(self) -> None:
        """End the connection, with a 408 where that cannot get between the parts of another answer."""
        if self._is_in_headers:
            is_answerable = self._is_begun and (self.cycle is None or self.cycle.response_complete)
        else:
            is_answerable = self._short is not None or (not self.pipeline and not self.cycle.response_started)
        if is_answerable and not self.transport.get_write_buffer_size():
            self.transport.write(TOO_SLOW)
            self.transport.close()
            self._watch = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)  # if it does not take even that
        else:
            self.transport.abort()
