"""Serving an ASGI application with uvicorn, inside a running event loop."""

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
async def serving(app: Any, host: str, port: int) -> AsyncIterator[int]:  # noqa: ANN401 - any ASGI application
    """Serve *app* and yield the port, chosen by the system for port 0; at the end finish the requests in progress.

    In the main thread uvicorn handles SIGINT and SIGTERM itself: it stops, then raises the signal again. A handler of
    the running loop is called both times.

    Raises: OSError when the address cannot be listened on.
    """
    _allow_open_files(MAX_CONCURRENT + _OTHER_FILES)
    with _listen(host, port) as listener:
        config = uvicorn.Config(
            _Guarded(app),
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            # Its warnings are about single requests, and anyone can send many of those.
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            limit_concurrency=MAX_CONCURRENT,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        server = uvicorn.Server(config)
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


class _Guarded:
    """Answers 414 to a request with too long a path and query; *app* sees all others."""

    def __init__(self, app: Any) -> None:  # noqa: ANN401 - any ASGI application
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI's own
        """See the ASGI specification."""
        if scope["type"] == "http" and len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
            text = b"The path and query are too long."
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))]
            await send({"type": "http.response.start", "status": 414, "headers": [*headers, (b"connection", b"close")]})
            await send({"type": "http.response.body", "body": text})
        else:
            await self._app(scope, receive, send)


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
