"""The results of a batch are read without the key, over one redirect, within bounds, from public addresses alone."""

import asyncio
import contextlib
import json
import time

import httpx
import pytest

from service.sync.results import MAX_LINE_BYTES, ResultsReader, make_results_reader
from tests.support.webhooks import notification

OK = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
PUBLIC = "93.184.216.34"


def found(generation_id, **fields):
    return json.dumps({"request_id": "r", "generation": notification(id=generation_id, **fields)}).encode()


def moved(location):
    return f"HTTP/1.1 302 Found\r\nlocation: {location}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()


@contextlib.asynccontextmanager
async def host(answer):
    """Serve bytes, or what *answer* yields, at a URL of its own; yield the URL and the requests that came."""
    requests, serving = [], set()

    async def serve(reader, writer):
        serving.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            chunks = answer if isinstance(answer, list) else [answer]
            for chunk in chunks:
                await asyncio.sleep(chunk) if isinstance(chunk, float) else writer.write(chunk)
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/results?token=t", requests
    await asyncio.gather(*(task for task in serving if task is not None))


async def read(answer, **options):
    async with host(answer) as (url, _):
        return await make_results_reader("http://127.0.0.1:1").read(url, **options)


async def test_the_key_goes_neither_to_the_api_nor_to_the_storage(simulator):
    async with host(OK + found("a")) as (storage, at_storage), host(moved(storage)) as (first, at_first):
        results = await make_results_reader(simulator.url).read(first)

    assert (list(results.generations), results.failure) == (["a"], None)
    for (head,) in (at_first, at_storage):
        names = {line.partition(":")[0].lower() for line in head.splitlines()[1:] if line}
        assert names == {"host", "accept", "accept-encoding", "connection", "user-agent"}


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n\r\n"])
async def test_each_line_is_read_whatever_it_ends_with(ending):
    results = await read(OK + b"\n".join([found("a"), b"", found("b", status="FAILED")]) + ending)

    assert {name: is_ended for name, (_, is_ended) in results.generations.items()} == {"a": True, "b": True}
    assert (results.lines, results.unread, results.failure) == (2, 0, None)


async def test_lines_that_cannot_be_read_are_counted():
    lines = [b"garbage", b'{"error":"boom"}', b"\xff\xfe", found("a"), b"{}"]
    results = await read(OK + b"\n".join(lines))

    assert (list(results.generations), results.errors, results.unread, results.failure) == (["a"], 1, 3, None)


async def test_a_line_that_is_too_long_loses_no_other():
    long = [b"x" * 65_536] * (2 * MAX_LINE_BYTES // 65_536)
    results = await read([OK, found("a"), b"\n", *long, b"\n", found("b"), b"\n", *long])

    assert (list(results.generations), results.unread, results.failure) == (["a", "b"], 2, None)


async def test_a_file_that_is_too_large_is_read_in_part():
    chunk = (b"x" * 1023 + b"\n") * 1024
    results = await read([OK, found("a"), b"\n", *[chunk] * 80])

    assert list(results.generations) == ["a"]
    assert results.failure in ("the results are larger than 64 MiB", "the results have more than 20000 lines")


async def test_a_file_that_never_ends_has_a_timeout():
    begun = time.monotonic()
    results = await read([OK, found("a"), b"\n", *[b"x", 0.05] * 200], seconds=0.5)

    assert time.monotonic() - begun < 3
    assert (list(results.generations), results.failure) == (["a"], "the results were not read within 0 s")


async def test_a_file_that_breaks_off_was_not_read_to_its_end():
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"
    results = await read(head + found("a") + b"\n" + found("b")[:40])

    assert (list(results.generations), results.unread) == (["a"], 0)
    assert results.failure.startswith("the results did not get through: ")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "the results answered 404"),
        (b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n", "the results answered 302 without a location"),
        (OK.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n"), "the results are compressed, which was not"),
        (moved("/again"), "the results redirect more than once"),
        (moved("ftp://storage.example.com/x"), "the results lead to a URL that is not https"),
        (moved("file:///etc/passwd"), "the results lead to a URL that is not https"),
        (moved("http://user:word@127.0.0.1/x"), "the results lead to a URL with a login"),
        (moved("http://127.0.0.1:1/x"), "the results did not get through: "),
        (moved("http://[::1"), "the results did not get through: "),
        (b"nonsense\r\n\r\n", "the results did not get through: "),
    ],
    ids=range(10),
)
async def test_what_cannot_be_read_says_why(answer, failure):
    results = await read(answer)

    assert results.failure.startswith(failure)
    assert "token" not in results.failure


class Internet:
    """Answers requests as a httpx transport, and resolves names: no test reaches the real one."""

    def __init__(self, answers, addresses=None) -> None:
        self.answers = answers
        self.addresses = addresses or {}
        self.requests: list[tuple[str, str, object]] = []

    def reader(self, base_url="https://api.sync.so"):
        transport = httpx.MockTransport(self._answer)
        return ResultsReader(lambda: httpx.AsyncClient(transport=transport), base_url, self._resolve)

    async def _resolve(self, name, _port):
        if name not in self.addresses:
            raise OSError("no such host")
        return self.addresses[name]

    def _answer(self, request):
        self.requests.append((str(request.url), request.headers["host"], request.extensions.get("sni_hostname")))
        status, headers, body = self.answers[len(self.requests) - 1]
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


FIRST = "https://api.sync.so/v2/batch/b/result?token=t"


def to(location):
    return (302, {"location": location}, b"")


async def test_the_connection_goes_to_the_address_that_was_checked():
    net = Internet([to("https://storage.example.com/f?s=1"), (200, {}, found("a"))], {"storage.example.com": [PUBLIC]})
    results = await net.reader().read(FIRST)

    assert (list(results.generations), results.failure) == (["a"], None)
    assert net.requests == [
        (FIRST, "api.sync.so", None),
        (f"https://{PUBLIC}/f?s=1", "storage.example.com", "storage.example.com"),
    ]


@pytest.mark.parametrize(
    ("location", "addresses"),
    [
        ("https://storage.example.com/f", ["10.0.0.1"]),
        ("https://storage.example.com/f", [PUBLIC, "127.0.0.1"]),
        ("https://storage.example.com/f", ["::ffff:169.254.169.254"]),
        ("https://169.254.169.254/latest/meta-data", ["169.254.169.254"]),
        ("https://127.0.0.1:8443/f", ["127.0.0.1"]),
    ],
)
async def test_a_redirect_to_a_private_address_is_not_followed(location, addresses):
    net = Internet([to(location)], {httpx.URL(location).host: addresses})
    results = await net.reader().read(FIRST)

    assert results.failure == "the results lead to an address that is not public"
    assert len(net.requests) == 1


@pytest.mark.parametrize(
    "location", ["http://storage.example.com/f", "http://api.sync.so/f", "//user@storage.example.com/f"]
)
async def test_a_redirect_to_plain_http_or_with_a_login_is_not_followed(location):
    net = Internet([to(location)], {"storage.example.com": [PUBLIC]})
    results = await net.reader().read(FIRST)

    assert results.failure.startswith("the results lead to a URL ")
    assert len(net.requests) == 1


async def test_the_webhooks_own_url_may_lead_to_another_host_under_the_same_rules():
    net = Internet([(200, {}, found("a"))], {"cdn.sync.so": [PUBLIC], "inner.example": ["10.0.0.1"]})
    reader = net.reader()

    assert list((await reader.read("https://cdn.sync.so/f")).generations) == ["a"]
    assert (await reader.read("https://inner.example/f")).failure == "the results lead to an address that is not public"
    assert (await reader.read("https://nowhere.example/f")).failure.startswith("the results did not get through")
