"""Requests that the server cannot read rightly: they are answered before the application sees them."""

from collections.abc import Callable, Iterable
from typing import Any, Final

# The path and query of a request. Litestar keeps the last thousand paths, for good: at httptools' own 64 KiB, of
# characters that take four bytes each in memory, anyone could fill half a gigabyte. An id has 255 characters.
MAX_TARGET_BYTES: Final = 4096
_NO_UPGRADE: Final = (
    b"This server speaks HTTP/1.1 alone, and cannot read the body of a request that asks for another protocol. "
    b"Nothing was stored. Send it without the Upgrade header."
)


class RequestGuard:
    """Answers 414 to too long a path and query, and 400 to an upgrade with a body; *app* sees all others."""

    def __init__(self, app: Any, count_refusal: Callable[[str], object]) -> None:  # noqa: ANN401 - any ASGI application
        self._app = app
        self._count_refusal = count_refusal

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI's own
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
            self._count_refusal("too_long")
            await _answer_and_close(send, 414, b"The path and query are too long.")
        elif _is_upgrade(scope["headers"]):
            await self._answer_upgrade(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer_upgrade(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI's own
        """Answer as if no upgrade had been asked for, and close: uvicorn reads nothing that follows the headers."""
        if _has_body(scope["headers"]):
            await _answer_and_close(send, 400, _NO_UPGRADE)
            return

        async def send_and_close(message: Any) -> None:  # noqa: ANN401 - ASGI's own
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_and_close)


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


def _is_upgrade(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the parser takes what follows the headers for another protocol."""
    is_offered = is_asked_for = False
    for name, value in headers:
        is_offered |= name == b"upgrade"
        is_asked_for |= name == b"connection" and b"upgrade" in value.lower()
    return is_offered and is_asked_for


async def _answer_and_close(send: Any, status: int, text: bytes) -> None:  # noqa: ANN401 - ASGI's own
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": text})
