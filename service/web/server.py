"""Serving an ASGI application with uvicorn, inside a running event loop."""

import asyncio
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import structlog
import uvicorn

from service.core.errors import ExplainedError
from service.web.request_guard import RequestGuard

log = structlog.get_logger()

# The most requests in progress, and the most connections; beyond either, uvicorn answers a request 503.
MAX_CONCURRENT: Final = 4096
# Other open files: the ledger, Redis, the API.
_OTHER_FILES: Final = 256
# The keep-alive timeout; longer than a proxy's, so that the proxy closes first.
_IDLE_SECONDS: Final = 75
# Longer than a body (10 s) and a write to the ledger (10 s) may take, so that a stop interrupts no response.
STOP_SECONDS: Final = 22
_BACKLOG: Final = 2048
_START_POLL_SECONDS: Final = 0.005


@asynccontextmanager
async def serving(
    app: Any,  # noqa: ANN401 - any ASGI application
    host: str,
    port: int,
    *,
    max_connections: int = MAX_CONCURRENT,
    stop_seconds: int = STOP_SECONDS,
    count_refusal: Callable[[str], object] = lambda _reason: None,
    note_fault: Callable[[BaseException], object] | None = None,
) -> AsyncIterator[int]:
    """Serve *app* and yield the port, chosen by the system for port 0; at the end finish the requests in progress.

    Those that take longer than *stop_seconds* are interrupted. Beyond *max_connections*, or fewer where the limit of
    open files is too low for them, requests are answered 503.

    *count_refusal* is called with a reason for each request that *app* does not see or that nobody waits for:
    ``not_http``, ``not_served`` (too many connections or requests), ``upgrade``, ``too_long``, ``left``. *note_fault*
    is called with what *app* raises; without it, uvicorn logs that.

    In the main thread uvicorn handles SIGINT and SIGTERM itself: it stops, then raises the signal again. A handler of
    the running loop is called both times.

    Raises: OSError when the address cannot be listened on.
    """
    max_connections = _allow_connections(max_connections)
    with _listen(host, port) as listener, _log_bounded(count_refusal, note_fault):
        server = uvicorn.Server(_configure(RequestGuard(app, count_refusal), max_connections, stop_seconds))
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
            _silence_interrupted(server)


def _silence_interrupted(server: uvicorn.Server) -> None:
    """After a second Ctrl-C log one line instead of a traceback for each request in progress."""
    if server.force_exit and server.server_state.tasks:  # they are cancelled with the loop
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        log.warning("requests.interrupted", what_now="their senders get no answer and may send them again")


def _configure(app: Any, max_connections: int, stop_seconds: int) -> uvicorn.Config:  # noqa: ANN401 - any ASGI application
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
        limit_concurrency=max_connections,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=stop_seconds,
    )


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
    # "::" is every address of the machine, those of IPv4 as well.
    is_both = family is socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=is_both)


def _allow_connections(wanted: int) -> int:
    """Raise the soft limit of open files for *wanted* connections, and return how many fit into the hard limit."""
    files = wanted + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= files:
        return wanted
    # With no file left, a new connection would wait without an answer.
    allowed = max(soft - _OTHER_FILES, soft // 2)
    what_now = f"beyond {allowed} connections requests are answered 503; raise the limit (ulimit -n) to {files}"
    log.warning("files.limited", limit=soft, needed=files, what_now=what_now)
    return allowed
