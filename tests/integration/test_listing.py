"""The list of generations is read as a whole, over a socket, whatever the API does meanwhile."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest

from service.core.attempts import Verdict
from service.core.secret import Secret
from service.simulator import Operation
from service.sync.client import open_sync_api
from service.sync.listing import list_generations
from tests.conftest import API_KEY
from tests.support.webhooks import notification

START = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
async def api(simulator, metrics):
    """A client of the simulator."""
    async with open_sync_api(simulator.url, Secret(API_KEY), connections=1, metrics=metrics) as api:
        yield api


async def allowed():
    return True


def fill(simulator, number, **options):
    """Add *number* generations, the first one the oldest, and return their ids."""
    return [simulator.add(created_at=START + timedelta(seconds=at), **options).id for at in range(number)]


async def read(api, *, acquire=allowed, wanted=lambda _generation: True, **options):
    return await list_generations(api, acquire=acquire, wanted=wanted, **options)


def queries(simulator):
    return [call.query for call in simulator.calls if call.operation is Operation.LIST]


@pytest.mark.parametrize(("number", "pages"), [(0, 1), (1, 1), (99, 1), (100, 2), (101, 2), (250, 3)])
async def test_every_generation_is_listed_once_newest_first(simulator, api, number, pages):
    ids = fill(simulator, number)
    listing = await read(api)

    assert [item.generation.id for item in listing.items] == ids[::-1]
    assert (listing.read, listing.pages, listing.unreadable, listing.failure) == (number, pages, 0, None)
    assert all(query.startswith("limit=100") for query in queries(simulator))


async def test_the_body_of_each_generation_is_as_received(simulator, api):
    generation = simulator.add(text_input=True)
    listing = await read(api)

    assert listing.items[0].body.encode() == generation.encoded()


async def test_only_what_is_wanted_is_kept_and_all_are_counted(simulator, api):
    fill(simulator, 150)
    failed = fill(simulator, 2, status="FAILED")
    listing = await read(api, wanted=lambda generation: generation.status == "FAILED")

    assert {item.generation.id for item in listing.items} == set(failed)
    assert listing.read == 152


async def test_each_call_waits_for_the_budget_and_none_is_made_without(simulator, api):
    fill(simulator, 250)
    turns = iter([True, True, False])

    async def acquire():
        return next(turns)

    listing = await read(api, acquire=acquire)

    assert len(queries(simulator)) == 2
    assert listing.failure == "deletions needed all calls, or Mayfly was stopped"


@pytest.mark.parametrize("answer", ["end", "400", "restart"])
async def test_a_cursor_that_was_deleted_begins_the_list_anew(simulator, api, answer):
    ids = fill(simulator, 350)
    simulator.switches.dead_cursor = answer
    begun: list[int] = []

    def remove_cursor(listing):
        if listing.pages == 2 and len(begun) == 1:
            simulator.remove(ids[150])  # the last one of the second page

    listing = await read(api, begin=lambda: begun.append(1), progress=remove_cursor)

    assert [item.generation.id for item in listing.items] == [one for one in ids[::-1] if one != ids[150]]
    assert (len(begun), listing.read, listing.failure) == (2, 349, None)


async def test_an_api_that_begins_anew_at_a_dead_cursor_loses_nothing_that_came_meanwhile(simulator, api):
    ids = fill(simulator, 250)
    simulator.switches.dead_cursor = "restart"

    def disturb(listing):
        if listing.pages == 1 and simulator.remove(ids[150]) is not None:
            ids.append(simulator.add(created_at=START + timedelta(hours=1)).id)

    listing = await read(api, progress=disturb)

    assert {item.generation.id for item in listing.items} == set(ids)  # also the one that was there when it was read
    assert listing.failure is None


async def test_a_list_whose_cursors_always_die_is_given_up(simulator, api):
    ids = fill(simulator, 2000)

    def remove_cursor(listing):
        simulator.remove(listing.items[-1].generation.id)

    listing = await read(api, progress=remove_cursor)

    assert "were deleted while they were listed" in listing.failure
    assert len(simulator.generations) == len(ids) - 6


async def test_an_api_that_ignores_the_cursor_is_noticed(metrics):
    page = json.dumps([notification() for _ in range(100)])
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(page)}\r\n\r\n{page}".encode()

    async def serve(reader, writer):
        while b"GET /v2/generate/" not in (head := await reader.readuntil(b"\r\n\r\n")):
            writer.write(answer)
        one = json.dumps(notification(id=head.split()[1].rpartition(b"/")[2].decode()))
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(one)}\r\nConnection: close\r\n\r\n{one}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_sync_api(url, Secret(API_KEY), connections=1, metrics=metrics) as api:
        listing = await read(api)

    assert listing.failure == "the API shows the same page again, or one that cannot be read"
    assert listing.pages == 2


async def test_items_that_cannot_be_read_are_counted_and_lose_no_other(simulator, api):
    ids = fill(simulator, 150)
    for place in (0, 50, 149):  # the last one of the list, of the first page, and the first one of all
        simulator.generations[ids[place]].overrides = {"id": 7}
    simulator.add(created_at=START, status="")
    listing = await read(api)

    assert (listing.read, listing.unreadable, listing.failure) == (147, 4, None)
    assert len(listing.oddities) == 4
    assert all(oddity.startswith("not a generation: ") for oddity in listing.oddities)


async def test_a_page_of_items_that_cannot_be_read_ends_the_list(simulator, api):
    fill(simulator, 200, status="")
    listing = await read(api)

    assert (listing.unreadable, listing.pages) == (100, 1)
    assert listing.failure == "the API shows the same page again, or one that cannot be read"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("401", "the API answered 401"),
        ("403-html", "the API answered 403"),
        ("302", "the API answered 302"),
        ("404:answer=html", "the API answered 404"),
        ("502", "the API answered 502"),
        ("html", "the API answered 200 without a list of generations"),
        ("invalid-json", "the API answered 200 without a list of generations"),
        ("non-utf8", "the API answered 200 without a list of generations"),
        ("drop", "the GET did not get through"),
        ("429:retry_after=3600", "the API answered 429 rate_limit_exceeded"),
    ],
)
async def test_an_answer_that_is_no_list_ends_it_with_a_reason(simulator, api, fault, reason):
    fill(simulator, 150)
    simulator.plan.script("LIST", [f"{fault}*"])
    listing = await read(api, wait_seconds=0.001)

    assert listing.failure is not None
    assert listing.failure.startswith(reason)
    assert len(queries(simulator)) <= 4


async def test_a_few_failures_in_a_row_are_retried(simulator, api):
    ids = fill(simulator, 150)
    simulator.plan.script("LIST", ["502", "429:retry_after=1"])
    began = asyncio.get_running_loop().time()
    listing = await read(api)

    assert (listing.read, listing.failure) == (len(ids), None)
    assert asyncio.get_running_loop().time() - began >= 6


async def test_a_failure_that_says_when_to_come_back_is_in_the_result(simulator, api):
    simulator.plan.script("LIST", ["429:retry_after=600"])
    listing = await read(api)

    assert listing.answer.verdict is Verdict.RETRY
    assert listing.answer.throttle == timedelta(minutes=10)


async def test_what_becomes_of_a_cursor_is_asked_within_the_budget(simulator, api):
    fill(simulator, 100)
    calls = []

    async def acquire():
        calls.append(1)
        return True

    await read(api, acquire=acquire)

    assert len(calls) == len(simulator.calls) == 3  # two pages, and one look at the cursor of the empty one
    assert simulator.calls[-1].operation is Operation.GET
