"""A small HTTP/1.1 server for one ASGI application, which can also close or reset its connections.

httptools parses the requests, and asyncio's streams carry them. A web server such as uvicorn gives an application no
public access to the connection, which the simulator has to close and reset.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote

import httptools
from litestar.types import ASGIApp, HTTPScope, Message, Scope

SERVER = b"mayfly-simulator"
_EXTENSION = "simulator.connection"
_BACKLOG = 2048
_READ_BYTES = 1 << 16
_BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


@contextlib.asynccontextmanager
async def listen(app: ASGIApp, *, host: str, port: int) -> AsyncIterator[str]:
    """Serve *app* on a socket of the running loop and yield its URL; at the end close all connections at once."""
    connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_serve(app, reader, writer))
        connections[task] = writer
        task.add_done_callback(connections.pop)

    server = await asyncio.start_server(connected, host=host, port=port, backlog=_BACKLOG)
    bound = server.sockets[0].getsockname()[1]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound}"
    finally:
        server.close()
        tasks = list(connections)
        for task, writer in connections.items():
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def hang_up(scope: Scope, *, reset: bool = False) -> None:
    """Close the client's connection after sending what was written, or *reset* it at once."""
    extensions: dict[str, Any] = scope["extensions"] or {}
    writer: asyncio.StreamWriter = extensions[_EXTENSION]["writer"]
    if reset and not writer.is_closing():
        # With a linger time of 0 the kernel sends RST instead of FIN.
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    else:
        writer.close()


async def _serve(app: ASGIApp, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection in turn, until either side closes it."""
    parser = _Parser()
    try:
        while data := await reader.read(_READ_BYTES):
            for request in parser.feed(data):
                if not await _answer(app, request, writer):
                    return
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        writer.write(_BAD_REQUEST)
    except ConnectionError:
        pass  # the client closed it
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _answer(app: ASGIApp, request: "_Request", writer: asyncio.StreamWriter) -> bool:
    """Call *app*; return False if the connection cannot serve another request.

    An incomplete answer ends the connection.
    """
    peer = writer.get_extra_info("peername")
    scope = request.scope | {
        "client": peer and peer[:2],
        "server": None,
        "extensions": {_EXTENSION: {"writer": writer}},
    }
    messages = iter([{"type": "http.request", "body": request.body, "more_body": False}])
    head = b""
    is_complete = False

    async def receive() -> Any:  # noqa: ANN401 - a message of ASGI
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Message) -> None:
        nonlocal head, is_complete
        if message["type"] == "http.response.start":
            head = _head(message["status"], message["headers"], keep_alive=request.keep_alive)
        elif message["type"] == "http.response.body" and not writer.is_closing():
            writer.write(head if request.scope["method"] == "HEAD" else head + message["body"])
            head = b""
            is_complete = not message["more_body"]
            with contextlib.suppress(ConnectionError):  # as in uvicorn, sending to a closed connection does nothing
                await writer.drain()

    await app(cast("HTTPScope", scope), receive, send)
    return is_complete and request.keep_alive


def _head(status: int, headers: Any, *, keep_alive: bool) -> bytes:  # noqa: ANN401 - pairs of bytes
    lines = [b"HTTP/1.1 %d %b" % (status, _PHRASES.get(status, b"")), b"date: " + _date(int(time.time()))]
    lines.append(b"server: " + SERVER)
    lines += [b"%b: %b" % pair for pair in headers]
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b"", b""])


@lru_cache(maxsize=1)
def _date(now: int) -> bytes:
    """Return the value of a Date header, once a second."""
    return formatdate(now, usegmt=True).encode()


@dataclass(frozen=True, slots=True)
class _Request:
    scope: dict[str, Any]
    body: bytes
    keep_alive: bool


class _Parser:
    """Collects requests and their bodies; httptools calls the ``on_…`` methods."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._requests: list[_Request] = []

    def feed(self, data: bytes) -> list[_Request]:
        """Return the requests that *data* completes.

        Raises: httptools.HttpParserError, httptools.HttpParserUpgrade.
        """
        self._parser.feed_data(data)
        requests, self._requests = self._requests, []
        return requests

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        url = httptools.parse_url(self._url)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self._parser.get_http_version(),
            "method": self._parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": unquote(url.path.decode("ascii")),
            "raw_path": url.path,
            "query_string": url.query or b"",
            "root_path": "",
            "headers": self._headers,
        }
        self._requests.append(_Request(scope, bytes(self._body), self._parser.should_keep_alive()))
