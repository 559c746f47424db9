"""Serving an ASGI application from inside a running event loop."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import uvicorn

from service.http_guard import MAX_CONNECTIONS
from service.http_protocol import HttpProtocol
from service.http_writing import SECURITY_HEADERS

_STOP_SECONDS = 10
_BACKLOG = 2048
# Open files beside the connections: the ledger, Redis, the API.
_OTHER_FILES = 256


class _Server(uvicorn.Server):
    """A server that leaves the signals to whoever runs the loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


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

    An application that has a ``short_way`` (see ShortWay) is asked there first.

    Raises: OSError when the address cannot be listened on.
    """
    protocol = partial(HttpProtocol, short_way=getattr(app, "short_way", None), max_connections=_most_connections())
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=_BACKLOG) as listener:
        config = uvicorn.Config(
            app,
            http=cast("type[asyncio.Protocol]", protocol),
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
