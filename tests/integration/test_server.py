"""The web server: where it listens, what it refuses, how it stops, and what it leaves to a proxy."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import time

import pytest
import uvloop

from service.commands.running import on_stop
from service.web import server as serving_module
from service.web.server import serving
from tests.support.webhooks import webhook

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


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
    body = b"x" * 30_000_000 if scope["path"] == "/huge" else b"%d" % size
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def exchange(port, *parts: bytes, pause=0.0, host="127.0.0.1"):
    """Send *parts* with pauses between and return all that comes back until the server closes."""
    reader, writer = await asyncio.open_connection(host, port)
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


def statuses(answers: bytes):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answers)]


# Where it listens


async def test_a_request_is_answered():
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(
            port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
        )

    assert statuses(answer) == [200]
    assert answer.endswith(b"\r\n\r\n3")
    assert b"server:" not in answer


async def test_a_port_in_use_is_an_error_at_once():
    async with serving(app, "127.0.0.1", 0) as port:
        with pytest.raises(OSError, match="in use"):
            async with serving(app, "127.0.0.1", port):
                pass


async def test_the_server_can_listen_on_ipv6():
    async with serving(app, "::1", 0) as port:
        assert statuses(await exchange(port, LAST, host="::1")) == [200]


async def test_the_address_of_all_listens_on_both_families():
    async with serving(app, "::", 0) as port:
        answers = [await exchange(port, LAST, host=host) for host in ("::1", "127.0.0.1")]

    assert [statuses(answer) for answer in answers] == [[200], [200]]


async def test_an_ipv4_address_and_one_of_ipv6_may_share_a_port():
    async with serving(app, "::1", 0) as port, serving(app, "127.0.0.1", port):
        answers = [await exchange(port, LAST, host=host) for host in ("::1", "127.0.0.1")]

    assert [statuses(answer) for answer in answers] == [[200], [200]]


# What it refuses


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["TLS", "no version", "HTTP/2", "a URL without a host", "a URL of 70 kB", "CONNECT"],
)
async def test_bytes_that_are_not_http_are_refused_without_a_log_line(junk, caplog):
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(port, junk)
        after = await exchange(port, LAST)

    assert statuses(answer) == [400]
    assert statuses(after) == [200]
    assert caplog.records == []  # anyone can send it, as often as they like


H2C = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("offer", [H2C, H2C.replace(b"h2c", b"websocket"), H2C + b"Content-Length: 0\r\n"])
async def test_an_offer_of_another_protocol_is_answered_in_http_1_1(offer, caplog):
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(port, b"GET / HTTP/1.1\r\n" + offer + b"\r\n")

    assert statuses(answer) == [200]
    assert b"connection: close" in answer  # the server would read nothing that follows
    assert caplog.records == []


async def test_an_upgrade_that_the_connection_does_not_offer_keeps_its_body():
    head = b"POST / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(port, head + b"abc")

    assert (statuses(answer), answer[-1:]) == ([200], b"3")


@pytest.mark.parametrize(
    "body",
    [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    ids=["length", "chunks"],
)
async def test_a_body_that_an_upgrade_loses_is_refused_and_said(body):
    async with serving(app, "127.0.0.1", 0) as port:
        answer = await exchange(port, b"POST / HTTP/1.1\r\n" + H2C + body)

    assert statuses(answer) == [400]
    assert b"connection: close" in answer
    assert b"Nothing was stored. Send it without the Upgrade header." in answer


async def test_what_follows_a_refused_upgrade_is_read_as_no_request():
    hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST / HTTP/1.1\r\n" + H2C + b"Content-Length: %d\r\n\r\n" % len(hidden)
    async with serving(app, "127.0.0.1", 0) as port:
        at_once, later = await exchange(port, head + hidden), await exchange(port, head, hidden, pause=0.1)

    assert statuses(at_once) == [400]
    assert statuses(later) in ([400], [])  # the connection may be reset by then


async def test_beyond_the_connection_limit_a_request_is_answered_503_without_a_log_line(caplog):
    async with serving(app, "127.0.0.1", 0, max_connections=3) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.1)
        refused = await exchange(port, LAST)
        idle[0][1].close()
        await asyncio.sleep(0.1)
        served = await exchange(port, LAST)
        idle[1][1].close()

    assert (statuses(refused), statuses(served)) == ([503], [200])
    assert caplog.records == []


async def test_an_idle_connection_is_closed_and_a_used_one_is_not(monkeypatch):
    monkeypatch.setattr(serving_module, "_IDLE_SECONDS", 1)
    async with serving(app, "127.0.0.1", 0) as port:
        begun = time.monotonic()
        rested = await exchange(port, GET)
        took = time.monotonic() - begun
        used = await exchange(port, GET, GET, GET, LAST, pause=0.6)

    assert statuses(rested) == [200]
    assert 0.9 < took < 5
    assert statuses(used) == [200] * 4


async def test_a_client_that_does_not_read_its_answers_delays_no_other():
    async with serving(app, "127.0.0.1", 0) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n" + GET * 1000)
        await asyncio.sleep(0.2)
        served = await exchange(port, LAST)
        writer.transport.abort()

    assert statuses(served) == [200]


# How it stops


async def test_a_stop_answers_requests_in_progress_with_connection_close():
    async with serving(app, "127.0.0.1", 0) as port:
        in_work = asyncio.create_task(exchange(port, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"))
        resting = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.1)
        begun = time.monotonic()
    took = time.monotonic() - begun
    resting[1].close()

    answer = await in_work
    assert statuses(answer) == [200]
    assert b"connection: close" in answer
    assert took < 3


async def test_a_client_that_stops_sending_its_body_cannot_delay_a_stop(caplog):
    async with serving(app, "127.0.0.1", 0, stop_seconds=1) as port:
        stuck = await asyncio.open_connection("127.0.0.1", port)
        stuck[1].write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na")
        await asyncio.sleep(0.1)
        begun = time.monotonic()
    took = time.monotonic() - begun
    stuck[1].close()

    assert took < 4
    assert {record.levelno for record in caplog.records} <= {logging.ERROR}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_and_calls_the_handler_of_the_loop_once(number):
    calls: list[str] = []

    async def serve() -> None:
        stop = asyncio.Event()

        def act() -> None:
            calls.append("stop")
            stop.set()

        on_stop(act)
        async with serving(app, "127.0.0.1", 0):
            os.kill(os.getpid(), number)
            await asyncio.wait_for(stop.wait(), 5)
        await asyncio.sleep(0.1)  # uvicorn has raised it again by now

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())

    assert calls == ["stop"]


def test_a_client_that_disconnects_during_the_answer_causes_no_error_log():
    faults: list[object] = []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
        async with serving(app, "127.0.0.1", 0) as port:
            for _ in range(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(GET * 30)
                with contextlib.suppress(ConnectionError):
                    await reader.read(1)
                writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # asyncio's own loop forgives such a write
        runner.run(leave())

    assert faults == []


# What it leaves to a proxy: see "A reverse proxy" in deploy/README.md


async def test_the_server_itself_does_not_end_an_endless_head():
    async with serving(app, "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 500_000)
        await writer.drain()
        await asyncio.sleep(0.2)

        assert not reader.at_eof()
        writer.close()


# Its limits, and its end, as a process


@pytest.mark.parametrize(("hard", "is_low"), [(256, True), (5000, False)])
async def test_too_few_open_files_are_named_at_the_start_and_answered_503(mayfly, hard, is_low):
    api = mayfly("api", SYNC_API_KEY="")
    api.prefix = ["sh", "-c", f'ulimit -n {hard}; exec "$@"', "sh"]
    await api.start()
    host, port = api.url.removeprefix("http://").split(":")
    idle = [await asyncio.open_connection(host, port) for _ in range(140)]
    await asyncio.sleep(0.3)
    answer = await exchange(int(port), LAST)
    for _, writer in idle:
        writer.close()

    assert statuses(answer) == [503 if is_low else 404]
    warnings = [(line["limit"], line["needed"], line["what_now"]) for line in api.logs("files.limited")]
    advice = "beyond 128 connections requests are answered 503; raise the limit (ulimit -n) to 4352"
    assert warnings == ([(256, 4352, advice)] if is_low else [])


async def test_a_second_ctrl_c_ends_it_at_once_without_a_traceback(mayfly):
    api = await mayfly("api", SYNC_API_KEY="").start()
    host, port = api.url.removeprefix("http://").split(":")
    sent = webhook()
    _, writer = await asyncio.open_connection(host, port)
    head = [b"POST /webhooks/sync HTTP/1.1", b"Host: x", b"Content-Length: 99"]
    head += [f"{name}: {value}".encode() for name, value in sent.headers.items()]
    writer.write(b"\r\n".join(head) + b"\r\n\r\nhalf a body")
    await asyncio.sleep(0.5)
    begun = time.monotonic()
    os.kill(api.pid, signal.SIGINT)
    await asyncio.sleep(0.3)
    os.kill(api.pid, signal.SIGINT)
    await api.wait()
    took = time.monotonic() - begun
    writer.close()

    assert took < 5
    assert "Traceback" not in api.output()
    assert [line["level"] for line in api.logs("requests.interrupted")] == ["warning"]
