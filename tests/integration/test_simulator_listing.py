"""The simulator's list and count have the documented traps of the API's."""

from datetime import UTC, datetime, timedelta

import pytest

from tests.conftest import API_KEY, http_client

START = datetime(2026, 10, 1, tzinfo=UTC)
PROJECT = "612bb64a-e7f4-40c1-977b-3e9797845637"


@pytest.fixture
async def client(simulator):
    async with http_client(simulator.url) as client:
        client.headers["x-api-key"] = API_KEY
        yield client


async def ids_of(client, query):
    answer = await client.get(f"/v2/generations?{query}")
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()]


def add_in_a_row(simulator, count, **options):
    """Add generations a minute apart and return their ids, newest first."""
    made = [simulator.add(created_at=START + timedelta(minutes=number), **options).id for number in range(count)]
    return made[::-1]


# What clients send


@pytest.mark.parametrize("query", ["ids={0}&ids={1}", "ids={0},{1}", "ids={0}%2C{1}", "ids={0}&ids={1},{1}"])
async def test_lists_repeat_the_name_or_use_commas(simulator, client, query):
    first, second, _ = add_in_a_row(simulator, 3)

    assert set(await ids_of(client, query.format(first, second))) == {first, second}


async def test_a_repeated_status_finds_each_of_them(simulator, client):
    failed, rejected = simulator.add(status="FAILED").id, simulator.add(status="REJECTED").id
    simulator.add()

    assert set(await ids_of(client, "status=FAILED&status=REJECTED&limit=10")) == {failed, rejected}
    assert set(await ids_of(client, "status=FAILED,REJECTED")) == {failed, rejected}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ('ids=["a","b"]', "ids"),
        ("ids=%5B%22a%22%5D", "ids"),
        ('status=["COMPLETED"]', "status"),
        ("ids=", "ids"),
        ("ids=a,,b", "ids"),
        ("status=", "status"),
        ("status=completed", "status"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=%D9%A3", "limit"),  # a digit, but not an ASCII one
        ("limit=1&limit=2", "limit"),
        ("limit=", "limit"),
        ("cursor=abc", "cursor"),
        ("limit=5&cursor=", "cursor"),
        ("projectId=7", "projectId"),
        ("projectId={612bb64a-e7f4-40c1-977b-3e9797845637}", "projectId"),
    ],
)
async def test_a_wrong_query_is_400_and_names_the_field(simulator, client, query, field):
    simulator.add()
    answer = await client.get(f"/v2/generations?{query}")

    assert answer.status_code == 400
    assert answer.json()["field"] == field
    assert field in answer.json()["message"][0]


# Pages


async def test_with_a_limit_the_order_is_newest_first(simulator, client):
    newest_first = add_in_a_row(simulator, 30)

    assert await ids_of(client, "limit=100") == newest_first
    assert await ids_of(client, "limit=7") == newest_first[:7]


async def test_without_a_limit_everything_comes_in_an_order_of_no_meaning(simulator, client):
    newest_first = add_in_a_row(simulator, 120)
    first, second = await ids_of(client, ""), await ids_of(client, "")

    assert sorted(first) == sorted(second) == sorted(newest_first)
    assert first != second
    assert newest_first not in (first, second)


async def test_a_page_begins_after_its_cursor_and_the_last_is_short(simulator, client):
    newest_first = add_in_a_row(simulator, 5)
    pages: list[list[str]] = []
    cursor = ""
    while not pages or len(pages[-1]) == 2:
        pages.append(await ids_of(client, f"limit=2{cursor}"))
        cursor = f"&cursor={pages[-1][-1]}"

    assert pages == [newest_first[:2], newest_first[2:4], newest_first[4:]]


async def test_a_cursor_works_with_a_filter_that_it_does_not_pass(simulator, client):
    newest_first = add_in_a_row(simulator, 4)
    failed = simulator.add(status="FAILED", created_at=START - timedelta(hours=1)).id

    assert await ids_of(client, f"limit=2&status=FAILED&cursor={newest_first[1]}") == [failed]


async def test_generations_of_one_instant_are_on_one_page_each(simulator, client):
    made = {simulator.add(created_at=START).id for _ in range(7)}
    seen, cursor = [], ""
    while page := await ids_of(client, f"limit=3{cursor}"):
        seen += page
        cursor = f"&cursor={page[-1]}"

    assert len(seen) == 7
    assert set(seen) == made


@pytest.mark.parametrize(("switch", "following"), [("end", []), ("restart", [4, 3])])
async def test_a_cursor_that_was_deleted_ends_or_restarts_the_pages(simulator, client, switch, following):
    simulator.switches.dead_cursor = switch
    newest_first = add_in_a_row(simulator, 5)
    page = await ids_of(client, "limit=2")
    deleted = await client.delete(f"/v2/generations/{page[-1]}")
    rest = [id_ for id_ in newest_first if id_ != page[-1]]

    assert deleted.status_code == 200
    assert await ids_of(client, f"limit=2&cursor={page[-1]}") == (rest[:2] if following else [])


async def test_a_cursor_that_was_deleted_can_be_a_400(simulator, client):
    simulator.switches.dead_cursor = "400"
    first, _ = add_in_a_row(simulator, 2)
    simulator.remove(first)
    answer = await client.get(f"/v2/generations?limit=2&cursor={first}")

    assert (answer.status_code, answer.json()["field"]) == (400, "cursor")


async def test_a_deleted_generation_is_not_listed(simulator, client):
    kept, gone = simulator.add().id, simulator.add().id
    simulator.remove(gone)

    assert await ids_of(client, "limit=10") == await ids_of(client, "") == [kept]
    assert await ids_of(client, f"ids={gone}") == []


# Filters


async def test_the_source_of_a_generation_is_found_but_not_shown(simulator, client):
    created = await client.post(
        "/v2/generate",
        json={"model": "lipsync-2", "input": [{"type": "video", "url": "https://cdn.example.com/a.mp4"}]},
        headers={"x-sync-source": "comfyui"},
    )
    other = simulator.add(source="studio_lite").id
    state = (await client.get("/simulator/generation", params={"id": created.json()["id"]})).json()

    assert "source" not in created.json()
    assert state["source"] == "comfyui"
    assert await ids_of(client, "source=comfyui") == [created.json()["id"]]
    assert set(await ids_of(client, "source=comfyui,studio_lite")) == {created.json()["id"], other}
    assert await ids_of(client, "source=mcp") == []


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("", 5),
        ("status=COMPLETED", 4),
        ("source=comfyui", 1),
        ("type=api", 4),
        ("type=playground", 1),
        ("generationSource=api", 3),
        ("generationSource=studio_lite", 1),
        ("generationSource=api,studio_lite", 4),  # without the old one, from before there was a source
        ("currentUserOnly=true", 5),
        ("status=FAILED&type=playground", 0),
    ],
)
async def test_count_adds_up_what_passes_all_filters(simulator, client, query, count):
    simulator.add(status="FAILED")
    simulator.add(project_id=PROJECT)
    simulator.add(source="comfyui")
    simulator.add(generation_source="studio_lite")
    simulator.add(generation_source=None)

    assert (await client.get(f"/v2/generations/count?{query}")).json() == {"count": count}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("type=studio", "type"),
        ("generationSource=comfyui", "generationSource"),
        ("currentUserOnly=1", "currentUserOnly"),
    ],
)
async def test_a_wrong_count_is_400_and_names_the_field(client, query, field):
    answer = await client.get(f"/v2/generations/count?{query}")

    assert (answer.status_code, answer.json()["field"]) == (400, field)


# The organisation


async def test_the_secret_is_shown_whole_or_masked_and_needs_the_key(simulator, client):
    path = "/v2/organizations/webhook/secret"
    whole, masked = [(await client.get(path + query)).json()["secret"] for query in ("", "?masked=true")]
    async with http_client(simulator.url) as stranger:
        refused = await stranger.get(path)

    assert whole == simulator.webhook_secret
    assert masked.startswith("whsec_")
    assert masked.endswith("*")
    assert whole[12:] not in masked
    assert refused.status_code == 401
