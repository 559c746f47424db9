"""HTTP/1.1 on one connection: uvicorn's protocol with limits against slow, greedy and garbled clients."""

import asyncio
from typing import Any, Final, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http_writing import (
    NO_SWITCH,
    NOT_HTTP,
    TOO_LARGE,
    TOO_LARGE_HEAD,
    TOO_LONG_URL,
    TOO_MANY,
    TOO_SLOW,
    Joining,
)

# From the first byte of a connection or request to its last; a webhook is a few kilobytes.
REQUEST_SECONDS: Final = 10.0
# A connection that rests between two requests; ended at the next look, up to REQUEST_SECONDS later.
IDLE_SECONDS: Final = 75
MAX_HEADER_BYTES: Final = 32 * 1024
# Each costs as much memory beside its bytes as a hundred of them.
MAX_HEADERS: Final = 100
# Of longer ones, from 64 KiB on, the parser says nothing wrong and cannot take them apart.
MAX_URL_BYTES: Final = 8 * 1024
# All of a request, with whatever a chunked body has beside its bytes. The application's own limit is far below.
MAX_REQUEST_BYTES: Final = 4 * 1024 * 1024
# Of what is no body, between two parts of one or behind it; the parser keeps it until there is an end to it.
_MOST_BESIDE: Final = MAX_HEADER_BYTES
# Of one connection, sent ahead of the answers to those before.
MAX_PIPELINED: Final = 64
MAX_CONNECTIONS: Final = 4096
# What is looked at in one go: a limit that is passed is noticed so many bytes later at most.
_PIECE_BYTES: Final = 16 * 1024


class _RefusedError(Exception):
    """A request that is answered with *answer* and not read any further."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(answer[9:12].decode())
        self.answer = answer


class GuardedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which by itself waits for ever for the rest of a request and takes one of any size.

    One timer per connection, not per request: it looks every few seconds at how long a request is under way, how long
    there was none, and whether the client takes its answers.
    """

    def __init__(self, *arguments: Any, max_connections: int, **options: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*arguments, **options)
        self._max_connections = max_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection without a request is one that has not arrived yet."""
        self._joining = Joining(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self._joining))
        self._incomplete_since: float | None = self.loop.time()
        self._rests_since = self.loop.time()
        self._piece_bytes = self._request_bytes = self._unread_bytes = 0
        self._useful_bytes = 0  # how far the request goes up to the last part of its body
        self._taken_bytes = 0
        self._is_in_headers = True
        self._is_begun = False
        self._is_refused = False
        self._watch = self.loop.call_later(REQUEST_SECONDS, self._look)
        if len(self.connections) > self._max_connections:
            self.transport.write(TOO_MANY)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._watch.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what is under way to a client that sends no more and may still read."""
        if self._is_due():
            self.cycle.keep_alive = False
            return True
        self.transport.close()  # with what was answered in this very turn
        return False

    def data_received(self, data: bytes) -> None:
        """Read *data* in pieces of a bounded size."""
        if len(data) <= _PIECE_BYTES and not self._is_refused:
            self._read(data)
            return
        for start in range(0, len(data), _PIECE_BYTES):
            if not self._is_refused and not self.transport.is_closing():
                self._read(data[start : start + _PIECE_BYTES])
        if self._is_refused:
            self._unread_bytes += len(data)
            if self._unread_bytes > MAX_REQUEST_BYTES:
                self.transport.abort()

    def _read(self, data: bytes) -> None:
        """Read a piece; a client that sends too much, or what is no HTTP, is refused.

        In place of uvicorn's data_received(), which logs a line or two for each of those.
        """
        self._piece_bytes = len(data)
        self._request_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            if not isinstance(cause, _RefusedError | httptools.HttpParserError | None):
                self.logger.exception("A request could not be read; it is answered 400.", exc_info=cause)
            self._refuse(cause.answer if isinstance(cause, _RefusedError) else NOT_HTTP)
            return
        if self._is_begun:
            if self._incomplete_since is None:
                self._incomplete_since = self.loop.time()
            self._check_size()

    def _check_size(self) -> None:
        """Refuse a request that is not all there yet and has too many bytes already."""
        if self._is_in_headers:
            if self._request_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
                self._refuse(TOO_LARGE_HEAD)
        elif self._request_bytes > MAX_REQUEST_BYTES or self._request_bytes - self._useful_bytes > _MOST_BESIDE:
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin another request."""
        self._is_begun = self._is_in_headers = True
        self._incomplete_since = None
        # The piece may have the end of another before it: this counts too much at first, and never too little.
        self._request_bytes = self._piece_bytes
        self.url, self.headers = b"", []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header. A trailer, behind a body in chunks, is none: it would get past proxies that filter headers."""
        if self._is_in_headers:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Check the head as a whole, then begin to answer; from here on it is the body."""
        if len(self.headers) > MAX_HEADERS:
            raise _RefusedError(TOO_LARGE_HEAD)
        if len(self.url) > MAX_URL_BYTES:
            raise _RefusedError(TOO_LONG_URL)
        if self.parser.should_upgrade():
            # The parser would take the body for another request: it knows no way to stay with HTTP/1.1.
            raise _RefusedError(NO_SWITCH)
        self._take_head()
        self._is_in_headers = False
        self._useful_bytes = self._request_bytes

    def _take_head(self) -> None:
        """Do what there is to do once the headers are there."""
        self._begin()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        self._useful_bytes = self._request_bytes
        super().on_body(body)

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

    def _is_own(self) -> bool:
        """Whether self.cycle is that of a request that has not all arrived yet."""
        return self._is_begun and not self._is_in_headers

    def _is_due(self) -> bool:
        """Whether a request that is all there is still to be answered."""
        return self.cycle is not None and not self.cycle.response_complete and not self._is_own()

    def _refuse(self, answer: bytes) -> None:
        """Read no more of this client: answer what is due, then close; where nothing is due, with *answer*."""
        self._is_refused = True
        self._incomplete_since = None
        if self._is_due():
            self.cycle.keep_alive = False
        elif not self._is_own() or not (self.pipeline or self.cycle.response_started):
            self._end(answer)
        elif self.cycle.response_complete:
            self._end(b"")
        else:
            self.transport.abort()  # nothing can get between the parts of another answer

    def _end(self, answer: bytes) -> None:
        """End the connection with *answer*; what the client sends meanwhile is thrown away.

        To close at once, with something unread, would reset the connection and so take the answer back.
        """
        if self._is_own():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif self._is_in_headers:
            self.headers = []  # there may be thousands
        self._joining.write_last(answer)
        self._watch.cancel()
        self._watch = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def shutdown(self) -> None:
        """Take no more requests; one that is under way, or arrives, is answered first."""
        if self._is_refused and not self._is_due():
            self.transport.close()
        else:
            super().shutdown()

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
        if not self._is_begun:
            self.transport.abort()  # not a byte of one
            return
        self._watch = self.loop.call_later(REQUEST_SECONDS, self._look)
        self._refuse(TOO_SLOW)
