"""What no client may send is refused with an answer, behind those that are due, and takes nothing with it."""

import asyncio
import re
import time

import pytest

from service.http_guard import MAX_HEADER_BYTES, MAX_HEADERS, MAX_REQUEST_BYTES, MAX_URL_BYTES
from service.serving import serving
from tests.support.short_way import HEAD, App, answer_of
from tests.support.waiting import eventually

CHUNKED = HEAD.replace(b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n"
USUAL = HEAD.replace(b"/hook", b"/other") + b"abc"
FOREIGN = b"GET /other HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADE = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c"


@pytest.fixture
async def site():
    """Serve an App and give it and its port."""
    app = App()
    async with serving(app, "127.0.0.1", 0) as port:
        yield app, port


async def all_of(port, *parts: bytes):
    """Return all that comes back for *parts*, up to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    back = b""
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.02)
        while piece := await asyncio.wait_for(reader.read(65_536), 5):
            back += piece
    except ConnectionError:
        pass  # what was sent behind the refusal is not read: the end may come as a reset
    finally:
        writer.close()
    return back


def statuses(answers: bytes):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answers)]


def with_headers(count: int, of: bytes = b"X-%d: a") -> bytes:
    """Return a request with *count* headers."""
    more = b"".join(of % number + b"\r\n" for number in range(count - 2))
    return HEAD.replace(b"Host: x\r\n", b"Host: x\r\n" + more) + b"abc"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([with_headers(MAX_HEADERS + 1)], 431),
        ([with_headers(4000, b"a%d:")], 431),
        ([b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 40_000], 431),
        ([b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 150_000], 431),
        ([b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ", *[b"a" * 4000] * (MAX_HEADER_BYTES // 4000 + 1)], 431),
        ([HEAD.replace(b"/hook", b"/hook?" + b"a" * MAX_URL_BYTES) + b"a"], 414),
        ([HEAD.replace(b"/hook", b"/other?" + b"a" * MAX_URL_BYTES) + b"abc"], 414),
        ([HEAD.replace(b"/hook", b"/hook?" + b"a" * 65_600) + b"a"], 431),
        ([HEAD.replace(b"Host: x", UPGRADE) + b"abc"], 400),
        ([HEAD.replace(b"Host: x", UPGRADE), FOREIGN], 400),
        ([b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", FOREIGN], 400),
        ([CHUNKED, b"no chunk\r\n"], 400),
        ([b"\x16\x03\x01\x02\x00"], 400),
        ([USUAL.replace(b"/other", b"http:///x")], 400),
        ([CHUNKED + b"0\r\nX-A: ", *[b"a" * 60_000] * 3], 413),
        ([CHUNKED + b"0\r\n" + b"a:\r\n" * 60_000], 413),
        ([CHUNKED, b"F000\r\n" + b"a" * 0xF000 + b"\r\n0\r\nX-A: ", *[b"a" * 20_000] * 3], 413),
        ([CHUNKED, *[b"1;" + b"e" * 60_000 + b"\r\na\r\n"] * 3], 413),
        ([USUAL.replace(b": 3", b": %d" % (2 * MAX_REQUEST_BYTES)) + b"a" * (MAX_REQUEST_BYTES + 1)], 413),
    ],
    ids=[
        "a header too many",
        "far too many",
        "far too many, without end",
        "a long header",
        "a long header in pieces",
        "a long URL for the short way",
        "a long URL",
        "a URL that no parser takes apart",
        "a switch of protocols",
        "a request in place of the body, after a switch",
        "CONNECT",
        "a broken chunk",
        "TLS",
        "a URL without a host",
        "a long trailer",
        "many trailers",
        "a long trailer behind a long body",
        "long extensions of chunks",
        "a long body",
    ],
)
async def test_what_is_too_much_or_no_http_is_refused_once_and_the_connection_ended(site, caplog, parts, status):
    app, port = site
    answers = await all_of(port, *parts)

    assert statuses(answers) == [status]
    head, _, body = answers.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert b"connection: close" in head
    assert b"content-length: %d\r\n" % len(body) in head + b"\r\n"
    assert app.short_way.taken == []
    assert caplog.records == []  # anyone can send it, as often as they like
    assert statuses(await all_of(port, USUAL.replace(b"Host: x", b"Host: x\r\nConnection: close"))) == [200]


@pytest.mark.parametrize(
    "request_",
    [with_headers(MAX_HEADERS), HEAD.replace(b"/hook", b"/hook?" + b"a" * (MAX_URL_BYTES - 6)) + b"abc"],
    ids=["headers", "URL"],
)
async def test_as_much_as_there_may_be_is_taken(site, request_):
    reader, writer = await asyncio.open_connection("127.0.0.1", site[1])
    writer.write(request_)
    assert await answer_of(reader) == (202, b'"abc"')
    writer.close()


async def test_a_trailer_is_no_header(site):
    app, port = site
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(CHUNKED + b"0\r\nAuthorization: Bearer x\r\n\r\n")
    assert await answer_of(reader) == (200, b"app:abc")
    writer.close()

    assert [name for name, _ in app.headers] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize("is_patient", [False, True], ids=["answered at once", "answered later"])
@pytest.mark.parametrize(
    "junk",
    [
        *(b"\x00\x01\x02", b"GARBAGE\r\n\r\n"),
        *(FOREIGN.replace(b"Host: x", UPGRADE), FOREIGN.replace(b"/other", b"http:///x")),
    ],
)
@pytest.mark.parametrize("first", [HEAD + b"abc", USUAL], ids=["short way", "usual way"])
async def test_what_came_before_the_junk_is_answered_first(site, first, junk, is_patient):
    app, port = site
    app.short_way.is_patient = is_patient
    talk = asyncio.create_task(all_of(port, first + junk))
    while not talk.done():
        await asyncio.sleep(0.05)
        for go in app.short_way.waiting:
            go()
        app.short_way.waiting.clear()
    answers = await talk

    assert statuses(answers) in ([202], [200], [202, 400])
    assert b"connection: close" in answers
    assert b"abc" in answers


@pytest.mark.parametrize("is_patient", [False, True], ids=["answered at once", "answered later"])
@pytest.mark.parametrize(
    "sent", [[HEAD + b"abc"], [USUAL], [HEAD + b"abc", HEAD + b"abc"], [HEAD + b"odd", HEAD + b"abc"], [USUAL * 2]],
    ids=["short way", "usual way", "two", "an error first", "two on the usual way"],
)  # fmt: skip
async def test_a_client_that_sends_no_more_is_answered_still(site, sent, is_patient):
    app, port = site
    app.short_way.is_patient = is_patient
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in sent:
        writer.write(part)
        await asyncio.sleep(0.02)
    writer.write_eof()
    await asyncio.sleep(0.1)
    app.short_way.is_patient = False
    for go in app.short_way.waiting:
        go()
    answers = await asyncio.wait_for(reader.read(), 5)
    writer.close()

    assert len(statuses(answers)) == b"".join(sent).count(b"HTTP/1.1")


async def test_a_client_that_goes_with_half_a_request_is_not_waited_for(site):
    reader, writer = await asyncio.open_connection("127.0.0.1", site[1])
    writer.write(HEAD + b"a")
    writer.write_eof()

    assert await asyncio.wait_for(reader.read(), 3) == b""
    writer.close()


@pytest.mark.parametrize(("body", "status"), [(b"abc", 202), (b"odd", 400)])
async def test_the_last_answer_at_a_stop_says_so_and_is_waited_for_no_longer_than_it_takes(body, status):
    app = App()
    app.short_way.is_patient = True
    async with serving(app, "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + body)
        assert await eventually(lambda: app.short_way.waiting)
        asyncio.get_running_loop().call_later(0.3, app.short_way.waiting.pop())
        begun = time.monotonic()
    took = time.monotonic() - begun
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()

    assert statuses(answer) == [status]
    assert b"connection: close" in answer
    assert took < 3
