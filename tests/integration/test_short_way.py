"""Ordinary requests take the short way, all others the application's, and nobody outside can tell which it was."""

import asyncio
import re
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import uvloop

from service import http_guard
from service.serving import serving
from tests.support.short_way import HEAD, App, answer_of
from tests.support.waiting import eventually
from tests.support.webhooks import webhook


@pytest.fixture
async def site():
    """Serve an App and give it, its way, and a means to talk to it."""
    app = App()
    async with serving(app, "127.0.0.1", 0) as port:

        async def talk(*parts: bytes, answers, pause=0.02):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(pause)
                return [await answer_of(reader) for _ in range(answers)]
            finally:
                writer.close()

        yield SimpleNamespace(app=app, way=app.short_way, port=port, talk=talk)


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD + b"abc"],
        [HEAD, b"abc"],
        [(HEAD + b"abc")[index : index + 1] for index in range(len(HEAD) + 3)],
        [HEAD.replace(b"/hook", b"/hook?ttl=7d") + b"abc"],
        [HEAD.replace(b"Host: x", b"Host: x\r\nConnection: keep-alive") + b"abc"],
        [HEAD.replace(b"Host: x", b"Host: x\r\nUpgrade: h2c") + b"abc"],
    ],
    ids=["whole", "head and body", "byte by byte", "with a query", "keep-alive", "an upgrade that is not asked for"],
)
async def test_an_ordinary_request_takes_the_short_way(site, parts):
    assert await site.talk(*parts, answers=1, pause=0.002) == [(202, b'"abc"')]
    [(headers, body)] = site.way.taken
    assert (headers[b"host"], body) == (b"x", b"abc")


@pytest.mark.parametrize(
    "request_",
    [
        HEAD.replace(b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n",
        HEAD.replace(b"Host: x", b"Host: x\r\nX-A: 1\r\nX-A: 2") + b"abc",
        HEAD.replace(b"Host: x", b"Host: x\r\nConnection: close") + b"abc",
        HEAD.replace(b"Host: x", b"Host: x\r\nConnection: keep-alive").replace(b"1.1", b"1.0") + b"abc",
        HEAD.replace(b"POST", b"PUT") + b"abc",
        HEAD.replace(b"/hook", b"/hooks") + b"abc",
        HEAD.replace(b"/hook", b"/") + b"abc",
    ],
    ids=["chunked", "a header twice", "close", "HTTP/1.0", "another method", "longer path", "another path"],
)
async def test_any_other_request_is_the_applications(site, request_):
    assert await site.talk(request_, answers=1) == [(200, b"app:abc")]
    assert site.way.taken == []


async def test_a_long_body_is_the_applications(site):
    long = b"x" * (site.way.max_bytes + 1)
    [(status, body)] = await site.talk(HEAD.replace(b"3", b"%d" % len(long)) + long, answers=1)

    assert (status, body, site.way.taken) == (200, b"app:" + long, [])


async def test_a_sender_that_waits_for_100_continue_is_told_to_go_on(site):
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(HEAD.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue"))
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 100 ")
    writer.write(b"abc")
    assert await answer_of(reader) == (200, b"app:abc")
    writer.close()


@pytest.mark.parametrize("is_patient", [False, True])
@pytest.mark.parametrize("body", [b"bad", b"odd"])
async def test_an_error_is_the_applications_to_answer_and_the_connection_goes_on(site, body, is_patient):
    site.way.is_patient = is_patient
    talk = asyncio.create_task(site.talk(HEAD + body, HEAD + b"abc", answers=2, pause=0.05))
    while not talk.done():
        await asyncio.sleep(0.01)
        for go in [site.way.waiting.pop(0) for _ in site.way.waiting]:
            go()

    assert await talk == [(400, body), (202, b'"abc"')]


async def test_what_is_wrong_with_the_headers_is_answered_before_the_body_is_there(site):
    wrong = HEAD.replace(b"Host: x", b"Host: x\r\nX-Wrong: 1")
    assert await site.talk(wrong, b"abc" + HEAD + b"abc", answers=2) == [(400, b"wrong"), (202, b'"abc"')]


async def test_requests_in_one_piece_are_answered_in_their_order(site):
    piece = b"".join(HEAD + b"%03d" % number for number in range(20))
    answers = await site.talk(piece, answers=20)

    assert [body[-4:].strip(b'"')[-3:] for _, body in answers] == [b"%03d" % number for number in range(20)]


@pytest.mark.parametrize("first", [b"abc", b"odd"])
async def test_what_is_sent_ahead_waits_for_the_answer_before_it(site, first):
    site.way.is_patient = True
    talk = asyncio.create_task(site.talk(HEAD + first, HEAD + b"def", HEAD + b"ghi", answers=3))
    await asyncio.sleep(0.2)
    assert [body for _, body in site.way.taken] == [first]
    site.way.is_patient = False
    site.way.waiting.pop()()

    begun = (202, b'"abc"') if first == b"abc" else (400, b"odd")
    assert [begun, b"def", b"ghi"] == [
        answer if index == 0 else answer[1].strip(b'"').removeprefix(b"app:") for index, answer in enumerate(await talk)
    ]


async def test_a_client_that_sends_ahead_without_end_is_not_read_while_it_waits(site):
    site.way.is_patient = True
    with socket.socket() as client:
        client.connect(("127.0.0.1", site.port))
        client.settimeout(0)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, HEAD + b"abc")
        assert await eventually(lambda: site.way.waiting)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.sock_sendall(client, (HEAD + b"abc") * 500_000), 1)
        site.way.waiting.pop()()


async def test_a_client_that_never_reads_its_answers_is_ended(site, monkeypatch):
    monkeypatch.setattr(http_guard, "REQUEST_SECONDS", 0.4)
    site.way.repeat = 50_000
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", site.port))
        client.settimeout(0)

        async def flood():
            while True:
                await loop.sock_sendall(client, HEAD + b"abc")
                await asyncio.sleep(0)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(flood(), 30)


async def test_half_a_request_is_ended_with_408(monkeypatch):
    monkeypatch.setattr(http_guard, "REQUEST_SECONDS", 0.4)
    async with serving(App(), "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"a")
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_what_is_under_way_when_it_stops_is_answered():
    app = App()
    app.short_way.is_patient = True
    async with serving(app, "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"abc")
        assert await eventually(lambda: app.short_way.waiting)
        asyncio.get_running_loop().call_later(0.3, app.short_way.waiting.pop())
    assert await answer_of(reader) == (202, b'"abc"')
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_half_a_request_that_arrives_when_it_stops_may_end_and_is_answered():
    async with serving(App(), "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"a")
        await asyncio.sleep(0.1)
        asyncio.get_running_loop().call_later(0.3, writer.write, b"bc")
    assert await answer_of(reader) == (200, b"app:abc")
    writer.close()


async def test_the_headers_of_a_request_that_arrives_in_pieces_are_checked_once(site, monkeypatch):
    checked: list[object] = []
    monkeypatch.setattr(site.way, "check", checked.append)
    await site.talk(HEAD[:20], HEAD[20:], b"a", b"b", b"c", answers=1)

    assert len(checked) == 1


@pytest.mark.parametrize("body", [b"abc", b"odd"])
def test_a_client_that_goes_before_its_answer_is_no_fault_of_ours(body):
    faults: list[object] = []

    async def leave():
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
        app = App()
        app.short_way.is_patient = True
        async with serving(app, "127.0.0.1", 0) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + body)
            assert await eventually(lambda: app.short_way.waiting)
            writer.write(HEAD + body)
            await asyncio.sleep(0.1)
            writer.transport.abort()
            await asyncio.sleep(0.1)
            app.short_way.is_patient = False
            app.short_way.waiting.pop()()
            await asyncio.sleep(0.1)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(leave())

    assert faults == []


# The webhooks' own way


def ways_of(sent):
    """Return the parts of one request in the forms that take one way and the other."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.headers.items())
    start = f"POST /webhooks/sync HTTP/1.1\r\nHost: x\r\n{lines}".encode()
    whole = start + b"Content-Length: %d\r\n\r\n" % len(sent.body)
    chunked = start + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(sent.body), sent.body)
    return [whole + sent.body], [whole, sent.body], [chunked]


@pytest.mark.parametrize("kind", ["good", "running", "changed", "no JSON", "no generation", "another type", "unsigned"])
async def test_a_webhook_is_answered_alike_on_either_way(sqlite_database, open_client, kind):
    sent = webhook(status="PROCESSING") if kind == "running" else webhook()
    match kind:
        case "changed":
            sent = replace(sent, body=sent.body.replace(b"COMPLETED", b"COMPLETEd"))
        case "no JSON":
            sent = webhook(b"{")
        case "no generation":
            sent = webhook(b"[]")
        case "another type":
            sent.headers["Content-Type"] = "text/plain"
        case "unsigned":
            del sent.headers["Sync-Signature"]
    answers = []
    async with open_client(sqlite_database) as client:
        for parts in ways_of(sent):
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.05)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            body = await reader.readexactly(int(re.findall(rb"content-length: ([0-9]+)", head)[0]))
            lines = {line for line in head.lower().split(b"\r\n") if not line.startswith(b"date:")}
            answers.append((lines, body))
            writer.close()

    assert answers[0] == answers[1] == answers[2]
