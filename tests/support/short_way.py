"""An application with a short way, and how to talk to it byte by byte."""

import asyncio
import re
from collections.abc import Callable

from service.http_protocol import RAISED

HEAD = b"POST /hook HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"


class Way:
    """Answers with the body, at once or when told to; a body of ``bad`` or ``odd`` is an error, now or later."""

    path = b"/hook"
    max_bytes = 1000

    def __init__(self) -> None:
        self.taken: list[tuple[dict[bytes, bytes], bytes]] = []
        self.waiting: list[Callable[[], None]] = []
        self.is_patient = False
        self.repeat = 1

    def check(self, headers):
        if b"x-wrong" in headers:
            raise ValueError("wrong")

    def take(self, headers, body, done):
        self.taken.append((headers, body))
        if body == b"bad":
            raise ValueError("bad")
        outcome = ValueError("odd") if body == b"odd" else b'"%b"' % (body * self.repeat)
        if self.is_patient:
            self.waiting.append(lambda: done(outcome))
        else:
            done(outcome)


class App:
    """Answers 200 with the body, or 400 with the error that was raised on the short way."""

    def __init__(self) -> None:
        self.short_way = Way()
        self.headers: list[tuple[bytes, bytes]] = []  # of the last request, as they are once it is all there

    async def __call__(self, scope, receive, send) -> None:
        while scope["type"] == "lifespan":
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
        body, has_more = b"", RAISED not in scope
        while has_more:
            message = await receive()
            body, has_more = body + message.get("body", b""), message.get("more_body", False)
        self.headers = list(scope["headers"])
        status, body = (400, str(scope[RAISED]).encode()) if RAISED in scope else (200, b"app:" + body)
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]}
        )
        await send({"type": "http.response.body", "body": body})


async def answer_of(reader):
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    return int(head[9:12]), await reader.readexactly(int(re.findall(rb"content-length: ([0-9]+)", head)[0]))
