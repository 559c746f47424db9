"""Each connection to the Sync API carries one call at a time, and its place is freed however a call ends."""

import asyncio
import contextlib
from collections import Counter
from functools import partial

import httpx
import pytest

from service.sync.connections import Connections
from tests.support.waiting import eventually

COUNT = 3
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbo"


class Server:
    """Answers by the path: /whole, /half (and no more until *gate* is set), /hold (nothing until then), /break."""

    def __init__(self) -> None:
        self.url = ""
        self.gate = asyncio.Event()
        self.open = 0
        self.most_open = 0
        self.accepted = 0
        self.busy: Counter[int] = Counter()
        self.most_on_one = 0
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take requests, the next one perhaps before the last is answered, and note how many are open at once."""
        number = self.accepted = self.accepted + 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        answers: set[asyncio.Task[None]] = set()
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(head.split()[1])
                self.busy[number] += 1
                self.most_on_one = max(self.most_on_one, self.busy[number])
                answers.add(asyncio.create_task(self._answer(head.split()[1], number, writer)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            for answer in answers:
                answer.cancel()
            writer.close()

    async def _answer(self, path: bytes, number: int, writer: asyncio.StreamWriter) -> None:
        if path == b"/hold":
            await self.gate.wait()
        await asyncio.sleep(0.001)
        self.busy[number] -= 1
        writer.write(HALF if path in (b"/half", b"/break") else WHOLE)
        if path == b"/break":
            writer.close()


@pytest.fixture
async def server():
    """A server that notes what goes over each connection."""
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield server
    server.gate.set()
    listening.close()
    await eventually(lambda: server.open == 0)


@pytest.fixture
async def client(server):
    """A client with COUNT connections to it."""
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    open_transport = partial(httpx.AsyncHTTPTransport, verify=False, trust_env=False, limits=limits)
    async with httpx.AsyncClient(
        base_url=server.url, transport=Connections(open_transport, COUNT), trust_env=False, timeout=5
    ) as client:
        yield client


async def assert_that_all_are_usable(client, server):
    """As many calls as there are connections are under way at once, and end."""
    server.gate.clear()
    seen = len(server.requests)
    calls = [asyncio.create_task(client.get("/hold")) for _ in range(COUNT + 2)]
    await eventually(lambda: len(server.requests) == seen + COUNT)
    server.gate.set()
    answers = await asyncio.gather(*calls)

    assert [answer.content for answer in answers] == [b"body"] * (COUNT + 2)
    assert server.most_open <= COUNT
    assert server.most_on_one == 1


async def test_more_calls_than_connections_wait_and_all_are_answered(client, server):
    answers = await asyncio.gather(*(client.get("/whole") for _ in range(100)))

    assert [answer.content for answer in answers] == [b"body"] * 100
    assert server.accepted == server.most_open == COUNT
    assert server.most_on_one == 1


async def test_calls_in_a_row_use_one_connection(client, server):
    for _ in range(10):
        await client.get("/whole")

    assert server.accepted == 1


async def test_a_response_can_be_closed_twice(client, server):
    async with client.stream("GET", "/whole") as response:
        await response.aread()
        await response.aclose()
        await response.stream.aclose()

    await assert_that_all_are_usable(client, server)


async def test_an_incomplete_body_frees_its_place(client, server):
    for _ in range(2 * COUNT):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/break")

    await assert_that_all_are_usable(client, server)


async def test_a_body_that_is_not_read_to_its_end_ends_its_connection(client, server):
    for _ in range(2 * COUNT):
        async with client.stream("GET", "/half") as response:
            async for _ in response.aiter_raw():
                break

    assert server.accepted == 2 * COUNT
    await eventually(lambda: server.open == 0)
    await assert_that_all_are_usable(client, server)


async def test_calls_that_cannot_connect_free_their_places(server):
    limits = httpx.Limits(max_connections=1)
    connections = Connections(partial(httpx.AsyncHTTPTransport, verify=False, trust_env=False, limits=limits), COUNT)
    async with httpx.AsyncClient(transport=connections, trust_env=False, timeout=5) as client:
        for _ in range(2 * COUNT):
            with pytest.raises(httpx.ConnectError):
                await client.get("http://127.0.0.1:9/")
        client.base_url = server.url

        await assert_that_all_are_usable(client, server)


@pytest.mark.parametrize("path", ["/hold", "/half"])
async def test_a_cancelled_call_closes_its_connection_and_leaves_its_place(client, server, path):
    calls = [asyncio.create_task(client.get(path)) for _ in range(COUNT + 2)]
    await eventually(lambda: len(server.requests) == COUNT)
    for call in calls:
        call.cancel()
    ends = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(end) for end in ends] == [asyncio.CancelledError] * (COUNT + 2)
    await eventually(lambda: server.open == 0)
    assert len(server.requests) == COUNT  # those that waited were never sent
    await assert_that_all_are_usable(client, server)


async def test_calls_cancelled_at_any_moment_and_twice_free_all_places(client, server):
    async def interrupt(call, turns):
        for _ in range(2):
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()

    for turns in range(30):
        calls = [asyncio.create_task(client.get(path)) for path in ("/whole", "/half", "/hold", "/break", "/whole")]
        await asyncio.gather(*(interrupt(call, turns + at) for at, call in enumerate(calls)))
        await asyncio.gather(*calls, return_exceptions=True)

    await eventually(lambda: server.open <= COUNT)
    await assert_that_all_are_usable(client, server)


async def test_a_connection_that_the_server_has_closed_is_opened_again(client, server):
    await client.get("/whole")
    server.gate.set()
    with contextlib.suppress(httpx.HTTPError):
        await client.get("/break")

    assert (await client.get("/whole")).content == b"body"


async def test_closing_the_client_closes_all_connections(client, server):
    await asyncio.gather(*(client.get("/whole") for _ in range(COUNT)))
    await client.aclose()

    await eventually(lambda: server.open == 0)
