"""The short way for webhooks: ordinary requests go from the HTTP parser straight to the intake, past ASGI."""

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Protocol, cast

from service.grouping import Done
from service.http_guard import GuardedProtocol

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
        self.response_started = False
        self.response_complete = False
        self.keep_alive = True
        self.message_event = asyncio.Event()


class HttpProtocol(GuardedProtocol):
    """The guarded protocol with a short way beside the application.

    The short way is for one request at a time: what a client sends ahead waits until that is answered.
    """

    _head: ClassVar[tuple[list[tuple[bytes, bytes]], bytes]] = ([], b"")

    def __init__(self, *arguments: Any, short_way: ShortWay | None, **options: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(*arguments, **options)
        self._short_way = short_way
        self._short: dict[bytes, bytes] | None = None  # headers of the request that arrives, if it takes the short way
        self._is_taken = False  # one is under way there
        self._body = self._held = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """Have the application note that half a request broke off."""
        try:
            if self._short is not None:
                self._give()
        finally:
            super().connection_lost(exc)

    def _read(self, data: bytes) -> None:
        """Read a piece, or hold it while a request is under way on the short way."""
        if self._is_taken:
            self._held += data
            self.flow.pause_reading()
            return
        before = self._short
        super()._read(data)
        if self._short is None or self._is_refused:
            return
        if not self._is_begun:
            self._take(self._short)
        elif self._short is not before:
            self._check(self._short)

    def on_message_begin(self) -> None:
        """Begin another request."""
        if self._short is not None:
            self._give()  # with another one behind it in the same piece
        super().on_message_begin()

    def _take_head(self) -> None:
        self._short = self._ordinary_headers()
        if self._short is None:
            self._begin()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        if self._short is not None:
            self._body += body
            self._useful_bytes = self._request_bytes
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock of this request."""
        if self._short is not None:
            self._is_begun = False
            self._incomplete_since = None
        else:
            super().on_message_complete()

    def shutdown(self) -> None:
        """See GuardedProtocol."""
        if self._short is not None:
            self._give()
        super().shutdown()

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
        is_last = not self.cycle.keep_alive
        self._is_taken = False
        self.cycle.response_complete = True
        if self._joining.is_closing():
            return
        if isinstance(outcome, Exception):
            self._give(outcome)
            self.cycle.keep_alive &= not is_last
        else:
            self._send(outcome, is_last=is_last)
        if self._held and not is_last:
            held, self._held = self._held, b""
            self.flow.resume_reading()
            self.data_received(held)

    def _send(self, content: bytes, *, is_last: bool) -> None:
        self._body = b""
        headers, head = HttpProtocol._head
        if headers is not self.server_state.default_headers:
            head = self._new_head()
        close = b"connection: close\r\n" if is_last else b""
        self._joining.write_whole(b"%b%bcontent-length: %d\r\n\r\n%b" % (head, close, len(content), content))
        self._rests_since = self.loop.time()
        if is_last:
            self._joining.close()

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
        self.cycle.body += body
        self.cycle.message_event.set()
        if not self._is_begun:
            super().on_message_complete()

    def _is_own(self) -> bool:
        return self._short is None and super()._is_own()

    def _refuse(self, answer: bytes) -> None:
        if self._short is not None and not self._is_begun:
            self._take(self._short)  # all of it was there
        super()._refuse(answer)
