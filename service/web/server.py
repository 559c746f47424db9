"""Serving an ASGI application with uvicorn, inside a running event loop."""

import asyncio
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import uvicorn

from service.core.errors import ExplainedError

# The most requests in progress, and the most connections; beyond either, uvicorn answers a request 503.
MAX_CONCURRENT: Final = 4096
# Other open files: the ledger, Redis, the API.
_OTHER_FILES: Final = 256
# The keep-alive timeout; longer than a proxy's, so that the proxy closes first.
_IDLE_SECONDS: Final = 75
# Longer than a body (10 s) and a write to the ledger (10 s) may take, so that a stop interrupts no response.
_STOP_SECONDS: Final = 22
_BACKLOG: Final = 2048
# The path and query of a request. Litestar keeps the last thousand paths, for good: at httptools' own 64 KiB, of
# characters that take four bytes each in memory, anyone could fill half a gigabyte. An id has 255 characters.
MAX_TARGET_BYTES: Final = 4096
_START_POLL_SECONDS: Final = 0.005


@asynccontextmanager
async def serving(
    app: Any,  # noqa: ANN401 - any ASGI application
    host: str,
    port: int,
    *,
    count_refusal: Callable[[str], object] = lambda _reason: None,
    note_fault: Callable[[BaseException], object] | None = None,
) -> AsyncIterator[int]:
    """Serve *app* and yield the port, chosen by the system for port 0; at the end finish the requests in progress.

    *count_refusal* is called with a reason for each request that *app* does not see or that nobody waits for:
    ``not_http``, ``not_served`` (too many connections or requests), ``upgrade``, ``too_long``, ``left``. *note_fault*
    is called with what *app* raises; without it, uvicorn logs that.

    In the main thread uvicorn handles SIGINT and SIGTERM itself: it stops, then raises the signal again. A handler of
    the running loop is called both times.

    Raises: OSError when the address cannot be listened on.
    """
    _allow_open_files(MAX_CONCURRENT + _OTHER_FILES)
    with _listen(host, port) as listener, _log_bounded(count_refusal, note_fault):
        server = uvicorn.Server(_configure(_Guarded(app, count_refusal)))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(_START_POLL_SECONDS)
            if task.done():
                raise OSError("the web server did not start; see its log")
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            await task


def _configure(app: Any) -> uvicorn.Config:  # noqa: ANN401 - any ASGI application
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=MAX_CONCURRENT,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )


class _Guarded:
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
        if any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]):
            await _answer_and_close(send, 400, b"Send it without the Upgrade header: its body cannot be read.")
            return

        async def send_and_close(message: Any) -> None:  # noqa: ANN401 - ASGI's own
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_and_close)


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


@contextmanager
def _log_bounded(
    count_refusal: Callable[[str], object], note_fault: Callable[[BaseException], object] | None
) -> Iterator[None]:
    """Count what uvicorn logs about single requests instead of logging it: anyone can send many of those."""
    reasons = {
        "Invalid HTTP request received.": "not_http",
        "Exceeded concurrency limit.": "not_served",
        "Unsupported upgrade request.": "upgrade",
    }

    def is_logged(record: logging.LogRecord) -> bool:
        message, error = record.getMessage().strip(), record.exc_info and record.exc_info[1]
        if record.levelno < logging.ERROR:
            if message in reasons:  # others only explain these
                count_refusal(reasons[message])
            return False
        if error is None or message != "Exception in ASGI application":
            return True
        if _is_gone(error):
            count_refusal("left")
            return False
        if note_fault is not None:
            note_fault(error)
        return note_fault is None

    logger = logging.getLogger("uvicorn.error")
    logger.addFilter(is_logged)
    try:
        yield
    finally:
        logger.removeFilter(is_logged)


def _is_gone(error: BaseException) -> bool:
    """Whether uvloop refused to write to a closed connection: pipelined requests outlive their client."""
    cause = error.__cause__ or error  # Litestar wraps it
    return isinstance(cause, RuntimeError) and "the handler is closed" in str(cause)


class AddressError(ExplainedError):
    """The address cannot be listened on."""


def check_address(host: str, port: int) -> None:
    """Return if *host* and *port* can be listened on; call it before anything starts.

    Raises: AddressError.
    """
    try:
        _listen(host, port).close()
    except OSError as error:
        where = f"{host} port {port}: {os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror}"
        raise AddressError(f"cannot listen on {where}; check MAYFLY_HOST and MAYFLY_PORT") from error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def _allow_open_files(wanted: int) -> None:
    """Raise the soft limit of open files to *wanted*, or to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
