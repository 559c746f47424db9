"""The socket: answers, and what a well-behaved framework does not let one do to a connection."""

import asyncio
import contextlib
import ipaddress
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from litestar.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.simulator.answers import Answer

SERVER = b"mayfly-simulator"
_TRANSPORT = "simulator.transport"


class Protocol(HttpToolsProtocol):
    """Uvicorn's protocol that also hands its transport to the application."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (uvicorn's own signature)
        super().__init__(*args, **kwargs)
        self.access_log = False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_TRANSPORT: {"transport": self.transport}}


def transport_of(scope: Scope) -> asyncio.Transport:
    extensions: dict[str, Any] = scope["extensions"] or {}
    transport: asyncio.Transport = extensions[_TRANSPORT]["transport"]
    return transport


async def respond(send: Send, answer: Answer, *, claimed_length: int | None = None) -> None:
    await _start(send, answer, claimed_length=claimed_length)
    await send({"type": "http.response.body", "body": answer.body, "more_body": claimed_length is not None})


async def truncate(scope: Scope, receive: Receive, send: Send, answer: Answer) -> None:
    """Promise twice the body and close the connection after the half of it."""
    half = Answer(answer.status, answer.body[: len(answer.body) // 2], answer.content_type)
    await respond(send, half, claimed_length=len(answer.body) * 2)
    await hang_up(scope, receive)


async def drip(send: Send, answer: Answer, *, interval_seconds: float) -> None:
    await _start(send, answer)
    for byte in answer.body:
        await send({"type": "http.response.body", "body": bytes((byte,)), "more_body": True})
        await asyncio.sleep(interval_seconds)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def flood(send: Send, *, megabytes: int) -> None:
    """Send one JSON string of so many megabytes."""
    await _start(send, Answer(200, b""), claimed_length=megabytes << 20)
    chunk = b"x" * (1 << 20)
    for index in range(megabytes):
        body = b'"' + chunk[1:] if index == 0 else chunk
        await send({"type": "http.response.body", "body": body, "more_body": index < megabytes - 1})


async def hang_up(scope: Scope, receive: Receive, *, reset: bool = False) -> None:
    """Close the connection once what was written is sent, or *reset* it."""
    transport = transport_of(scope)
    if reset:
        # Lingering for no time makes the kernel answer with RST instead of FIN.
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    else:
        transport.close()
    while (await receive())["type"] != "http.disconnect":
        pass  # uvicorn takes an application that ends before the connection for a broken one


async def _start(send: Send, answer: Answer, *, claimed_length: int | None = None) -> None:
    headers = [(b"content-type", answer.content_type), *answer.headers] if answer.status != 204 else []
    if answer.status != 204:
        length = len(answer.body) if claimed_length is None else claimed_length
        headers.append((b"content-length", b"%d" % length))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextlib.asynccontextmanager
async def listen(app: ASGIApp, *, host: str, port: int) -> AsyncIterator[str]:
    """Serve *app* on a socket of the running loop and yield its URL.

    Uvicorn's protocol without its Server: no signal handlers, and the end is at once, connections and all.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        proxy_headers=False,
        timeout_keep_alive=60,
    )
    config.load()
    state = ServerState()
    state.default_headers = [(b"server", SERVER)]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Protocol(config=config, server_state=state, app_state={}), host=host, port=port, backlog=2048
    )
    bound = server.sockets[0].getsockname()[1]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound}"
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        tasks = list(state.tasks)
        await asyncio.sleep(0)  # the connections learn that they are lost before their tasks end
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
