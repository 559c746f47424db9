"""The server gives slow and greedy clients so much and no more, and answers what is under way when it stops."""

import asyncio
import contextlib
import json
import re
import socket
import time

import pytest
import uvloop

from service import http_guard
from service import serving as serving_module
from service.http_guard import MAX_HEADER_BYTES, MAX_REQUEST_BYTES
from service.http_writing import SECURITY_HEADERS
from service.serving import serving


async def app(scope, receive, send):
    """Answer the length of the body, after a moment for /slow."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    size, has_more = 0, True
    while has_more:
        message = await receive()
        size, has_more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    lengths = {"/large": 8_000_000, "/huge": 30_000_000}
    body = b"x" * lengths[scope["path"]] if scope["path"] in lengths else b"%d" % size
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def exchange(port, *parts: bytes, pause=0.0):
    """Send *parts* with pauses between and return all that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.fixture
def quick(monkeypatch):
    """Shorten the time a request may take to arrive."""
    monkeypatch.setattr(http_guard, "REQUEST_SECONDS", 0.4)


async def test_a_request_is_answered():
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(
            port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
        )

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"\r\n\r\n3")
    assert all(f"{name}: {value}\r\n".encode() in answer for name, value in SECURITY_HEADERS)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("parts", "statuses"),
    [
        ([b""], []),
        ([b"POST / HTTP/1.1\r\nHo"], [b"408"]),
        ([b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"], [b"408"]),
        ([b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", *[b"x"] * 6], [b"408"]),
        ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"], [b"200", b"408"]),
        ([b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"], [b"200"]),
    ],
    ids=["nothing", "half a header", "no body", "a dripping body", "half a second one", "half a second one too soon"],
)
async def test_a_request_that_does_not_arrive_in_time_is_ended_with_408_or_behind_the_answer_due(parts, statuses):
    loop = asyncio.get_running_loop()
    async with serving(app, "127.0.0.1", 0) as port:
        begun = loop.time()
        answer = await exchange(port, *parts, pause=0.05)

    assert re.findall(rb"HTTP/1.1 ([0-9]+) ", answer) == statuses
    if b"408" in statuses:
        head, _, body = answer.rpartition(b"\r\n\r\n")
        assert b"application/problem+json" in head
        assert b"content-length: %d\r\n" % len(body) in head + b"\r\n"
        assert json.loads(body)["status"] == 408
    assert loop.time() - begun < 4


@pytest.mark.usefixtures("quick")
async def test_a_connection_may_rest_between_requests_for_longer_than_a_request_may_take():
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n%s\r\na"
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(port, request % b"", request % b"Connection: close\r\n", pause=0.9)

    assert answer.count(b"200 OK") == 2


@pytest.mark.usefixtures("quick")
async def test_an_answer_may_take_longer_than_a_request():
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(port, b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert b"200 OK" in answer


async def test_headers_without_end_are_ended():
    flood = [b"X-%d: %s\r\n" % (number, b"x" * 4000) for number in range(MAX_HEADER_BYTES // 2000)]
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(port, b"GET / HTTP/1.1\r\nHost: x\r\n", *flood, b"\r\n")

    assert b"200 OK" not in answer


@pytest.mark.parametrize(
    "part", [b"X-T: " + b"x" * 60_000 + b"\r\n", b"x" * 60_000, b"1;" + b"e" * 60_000 + b"\r\na\r\n"],
    ids=["trailers", "one trailer", "extensions of chunks"],
)  # fmt: skip
async def test_what_a_chunked_body_has_beside_its_bytes_is_counted_too(part):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    start = head if part.startswith(b"1;") else head + b"1\r\na\r\n0\r\nX-A: "
    async with serving(app, "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(start)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 4 * MAX_REQUEST_BYTES and not reader.at_eof():
                writer.write(part)
                await writer.drain()
                sent += len(part)
                await asyncio.sleep(0)
        writer.close()

    assert sent < 3 * MAX_REQUEST_BYTES


@pytest.mark.usefixtures("quick")
async def test_bytes_between_two_requests_that_are_none_keep_no_connection_open(monkeypatch):
    monkeypatch.setattr(http_guard, "IDLE_SECONDS", 1)
    async with serving(app, "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"0")
        writer.write(b"\r\n")

        assert await asyncio.wait_for(reader.read(), 5) is not None
        writer.close()


@pytest.mark.usefixtures("quick")
async def test_a_connection_that_rests_is_ended_and_one_that_is_used_is_not(monkeypatch):
    monkeypatch.setattr(http_guard, "IDLE_SECONDS", 2)
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serving(app, "127.0.0.1", 0) as port:
        used, resting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        begun = time.monotonic()
        for _, writer in (used, resting):
            writer.write(request)
        await resting[0].readuntil(b"\r\n\r\n")
        ended = asyncio.create_task(resting[0].read())
        while time.monotonic() - begun < 5:
            await used[0].readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.5)
            assert not (ended.done() and time.monotonic() - begun < 2)
            used[1].write(request)
        await used[0].readuntil(b"\r\n\r\n")

        assert ended.done()
        for _, writer in (used, resting):
            writer.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("path", "at_once"), [("/large", 1), ("/", 1000)], ids=["one large answer", "many small ones"])
async def test_a_client_that_does_not_read_its_answers_is_ended(path, at_once):
    async with serving(app, "127.0.0.1", 0) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.settimeout(0)
            request = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode() * at_once

            async def send() -> None:
                while True:
                    await asyncio.get_running_loop().sock_sendall(client, request)
                    await asyncio.sleep(0.1)

            with pytest.raises(ConnectionError):
                await asyncio.wait_for(send(), 20)


@pytest.mark.usefixtures("quick")
async def test_a_client_that_takes_its_answer_slowly_and_then_no_more_is_ended(monkeypatch):
    monkeypatch.setattr(http_guard, "IDLE_SECONDS", 1)
    loop = asyncio.get_running_loop()
    async with serving(app, "127.0.0.1", 0) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
            client.connect(("127.0.0.1", port))
            client.settimeout(0)
            await loop.sock_sendall(client, b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
            begun = time.monotonic()
            while time.monotonic() - begun < 2.5:
                for _ in range(20):
                    assert await loop.sock_recv(client, 20_000)
                await asyncio.sleep(0.1)

            async def send() -> None:
                while True:
                    await loop.sock_sendall(client, b"\r\n")
                    await asyncio.sleep(0.1)

            with pytest.raises(ConnectionError):
                await asyncio.wait_for(send(), 10)


@pytest.mark.usefixtures("quick")
async def test_a_client_that_takes_one_large_answer_after_the_other_is_let_be():
    loop = asyncio.get_running_loop()
    async with serving(app, "127.0.0.1", 0) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
            client.connect(("127.0.0.1", port))
            client.settimeout(0)
            begun = time.monotonic()
            asked = taken = 0
            while time.monotonic() - begun < 4:
                if 8_000_000 * asked - taken < 4_000_000:
                    await loop.sock_sendall(client, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
                    asked += 1
                for _ in range(60):
                    data = await asyncio.wait_for(loop.sock_recv(client, 20_000), 5)
                    assert data, f"ended after {taken} bytes"
                    taken += len(data)
                await asyncio.sleep(0.02)

            assert asked > 3


async def test_more_connections_than_there_may_be_are_answered_503_and_the_others_served(monkeypatch):
    monkeypatch.setattr(serving_module, "MAX_CONNECTIONS", 2)
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    async with serving(app, "127.0.0.1", 0) as port:
        first, second = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.1)
        refused = await exchange(port)
        second[1].close()
        await asyncio.sleep(0.1)
        served = await exchange(port, request)
        first[1].close()

    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5\r\n" in refused
    assert json.loads(refused.rpartition(b"\r\n\r\n")[2])["status"] == 503
    assert b"200 OK" in served


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\r\n" * 50, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
@pytest.mark.usefixtures("quick")
async def test_what_is_no_http_harms_nobody_else(junk):
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(port, junk)
        after = await exchange(port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert b"200 OK" not in answer
    assert b"200 OK" in after


async def test_what_is_under_way_when_it_stops_is_answered():
    async with serving(app, "127.0.0.1", 0) as port:
        under_way = asyncio.create_task(exchange(port, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"))
        await asyncio.sleep(0.1)

    assert b"200 OK" in await under_way


def test_a_client_that_goes_while_it_is_answered_is_no_fault_of_ours():
    faults: list[object] = []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
        async with serving(app, "127.0.0.1", 0) as port:
            for _ in range(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 30)
                await reader.read(1)
                writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # asyncio's own loop forgives such a write
        runner.run(leave())

    assert faults == []


async def test_a_port_that_is_taken_is_an_error_at_once():
    async with serving(app, "127.0.0.1", 0) as port:
        with pytest.raises(OSError, match="in use"):
            async with serving(app, "127.0.0.1", port):
                pass


async def test_it_listens_on_ipv6_when_told_to():
    async with serving(app, "::1", 0) as port:
        reader, writer = await asyncio.open_connection("::1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()

    assert b"200 OK" in answer
