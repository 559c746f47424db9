"""Whatever clients send, in whatever pieces, and however they go: answers in their order, nothing left behind."""

import asyncio
import contextlib
import random
import re
import time

import pytest
import uvloop

from service.serving import serving
from tests.support.short_way import HEAD, App, Way

ROUNDS = 6


class Moody(Way):
    """Answers at once or a little later, with the body or with an error."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance

    def take(self, headers, body, done):
        if self._chance.random() < 0.5:
            super().take(headers, body, done)
            return
        outcome = ValueError(body.decode()) if body in (b"bad", b"odd") else b'"%b"' % body
        asyncio.get_running_loop().call_later(self._chance.random() * 0.01, done, outcome)


class MoodyApp(App):
    """Takes its time now and then."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.short_way = Moody(chance)
        self._chance = chance

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and self._chance.random() < 0.4:
            await asyncio.sleep(self._chance.random() * 0.01)
        await super().__call__(scope, receive, send)


def cut(chance: random.Random, data: bytes):
    """Return *data* in pieces."""
    cuts = sorted(chance.randrange(len(data)) for _ in range(chance.choice([0, 1, 3, 20, 100])))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def request_of(chance: random.Random, body: bytes) -> bytes:
    """Return a request with *body* that takes one way or the other."""
    chunked = (
        HEAD.replace(b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"1\r\n%b\r\n2\r\n%b\r\n0\r\nX-T: a\r\n\r\n"
    )
    return chance.choice(
        [
            HEAD + body,
            HEAD.replace(b"/hook", b"/hook?a=1") + body,
            HEAD.replace(b"/hook", b"/other") + body,
            HEAD.replace(b"Host: x", b"Host: x\r\nX-A: 1\r\nX-A: 2") + body,
            HEAD.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue") + body,
            chunked % (body[:1], body[1:]),
        ]
    )


async def answers_of(reader, count: int):
    """Return the bodies of the next *count* answers, without what tells who answered."""
    bodies: list[bytes] = []
    while len(bodies) < count:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        if not head.startswith(b"HTTP/1.1 100 "):
            body = await reader.readexactly(int(re.findall(rb"content-length: ([0-9]+)", head)[0]))
            bodies.append(body.strip(b'"').removeprefix(b"app:"))
    return bodies


async def order(chance: random.Random) -> None:
    async with serving(MoodyApp(chance), "127.0.0.1", 0) as port:
        for _ in range(15):
            sent = [chance.choice([b"%03d" % number, b"bad", b"odd"]) for number in range(chance.randint(1, 25))]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            given = asyncio.create_task(answers_of(reader, len(sent)))
            for piece in cut(chance, b"".join(request_of(chance, body) for body in sent)):
                writer.write(piece)
                await asyncio.sleep(chance.choice([0, 0.002]))
            # An error is answered with its text, which is the body's.
            assert await given == sent
            writer.close()


async def leave(chance: random.Random) -> None:
    junk = [b"\0junk\r\n\r\n", HEAD.replace(b"Host: x", b"Host: x\r\nConnection: upgrade\r\nUpgrade: a") + b"abc"]

    async def client(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError, RuntimeError):  # uvloop's for a write when the server has ended it
            parts = [request_of(chance, chance.choice([b"abc", b"bad", b"odd"])) for _ in range(chance.randint(1, 12))]
            pieces = cut(chance, b"".join(parts + (junk[: chance.randint(0, 2)] if chance.random() < 0.3 else [])))
            for piece in pieces[: chance.randint(1, len(pieces))]:
                writer.write(piece)
                await asyncio.sleep(chance.random() * 0.005)
            match chance.choice(["abort", "close", "no more", "stay"]):
                case "abort":
                    writer.transport.abort()
                case "no more":
                    writer.write_eof()
                    await asyncio.wait_for(reader.read(), 5)  # the server ends it
                case "stay":
                    await asyncio.sleep(0.05)
        writer.close()

    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    async with serving(MoodyApp(chance), "127.0.0.1", 0) as port:
        await asyncio.gather(*(client(port) for _ in range(40)))
        late = [asyncio.create_task(client(port)) for _ in range(15)]
        await asyncio.sleep(0.015)
        begun = time.monotonic()
    took = time.monotonic() - begun
    await asyncio.gather(*late, return_exceptions=True)

    assert faults == []
    assert took < 5, "a connection was left that the stop waited for"


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("scenario", [order, leave])
def test_at_random(scenario, seed, caplog):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario(random.Random(seed)))  # noqa: S311 - it is to be the same each time

    assert caplog.records == []
