"""What the API and the command line show of records: bounded pages, bodies as they came, spans of time, exports."""

import asyncio
import csv
import io
import json
import time
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import update

from service.core.attempts import Outcome, Step, Verdict
from service.core.generation import read_generation
from service.core.lifecycle import Move
from service.ledger.outcomes import Settlement
from service.ledger.reading import MAX_PAGE_BYTES
from service.ledger.schema import records
from tests.conftest import API_TOKEN
from tests.support.commands import command
from tests.support.ledger import (
    HOUR,
    arrival,
    claim_one,
    confirmed,
    copy,
    deferred,
    lose_leases,
    receive,
    settle,
    store,
    utc_now,
)

# A body of 225 KB, as a long script makes it.
LARGE = [{"type": "text", "provider": {"name": "x", "script": "word " * 45_000}}]
MANY = 60


@pytest.fixture
async def client(app_client):
    """A client with the operator's token: the test runs once on each kind of database."""
    app_client.headers["Authorization"] = f"Bearer {API_TOKEN}"
    return app_client


@pytest.fixture
def mayfly(database_url, tmp_path):
    """Run a command on the ledger of the test."""
    environment = {
        "MAYFLY_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
    }

    async def run(*arguments: str):
        return await asyncio.to_thread(command, *arguments, **environment)

    return run


async def pages_of(client, **params):
    """Read all pages and return the answers."""
    answers: list[Any] = []
    while not answers or answers[-1].json()["nextCursor"]:
        cursor = {"cursor": answers[-1].json()["nextCursor"]} if answers else {}
        answers.append(await client.get("/api/records", params=params | cursor))
    return answers


async def ids_of(client, **params):
    return [item["id"] for answer in await pages_of(client, **params) for item in answer.json()["items"]]


async def set_columns(database, key, **values):
    await database.write(
        lambda connection: connection.execute(update(records).where(records.c.id == key.id).values(values)).rowcount
    )


# Pages


async def test_a_page_ends_before_it_is_larger_than_4_mib(client, database):
    items = [arrival(due_in=HOUR, input=LARGE) for _ in range(MANY)]
    await receive(database, *items)
    answers = await pages_of(client, limit=500)

    assert len(answers) == -(-MANY // 18)
    assert all(MAX_PAGE_BYTES // 2 < len(answer.content) < MAX_PAGE_BYTES for answer in answers[:-1])
    assert [item["id"] for answer in answers for item in answer.json()["items"]] == [
        item.key.id for item in reversed(items)
    ]
    assert answers[0].json()["items"][0]["input"] == LARGE


async def test_a_record_larger_than_a_page_is_on_a_page_by_itself(client, database):
    huge = [{"type": "text", "script": "x" * (MAX_PAGE_BYTES + 1)}]
    keys = [await store(database, due_in=HOUR, input=one) for one in (LARGE, huge, LARGE)]
    pages = [[item["id"] for item in answer.json()["items"]] for answer in await pages_of(client, limit=500)]

    assert pages == [[key.id] for key in reversed(keys)]


async def test_large_pages_leave_the_event_loop_to_webhooks(client, database):
    # 60 records of 225 KB; all of them in one answer took 0.3 s on the loop for 500, and 320 MB.
    await receive(database, *(arrival(due_in=HOUR, input=LARGE) for _ in range(MANY)))
    longest, is_over = 0.0, False

    async def tick():
        nonlocal longest
        while not is_over:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)

    ticking = asyncio.create_task(tick())
    await asyncio.gather(*(client.get("/api/records?limit=500") for _ in range(4)))
    is_over = True
    await ticking

    assert longest < 0.5


async def test_a_list_for_scripts_ends_where_the_page_does_and_a_table_does_not(mayfly, database):
    await receive(database, *(arrival(due_in=HOUR, input=LARGE) for _ in range(MANY)))
    page = json.loads((await mayfly("records", "list", "--json", "--limit", "500")).stdout)
    table = (await mayfly("records", "list", "--limit", "500")).stdout.splitlines()

    assert 0 < len(page["items"]) < MANY
    assert page["nextCursor"]
    assert len(table) == 1 + MANY


# Bodies as they came


async def test_both_bodies_are_shown_byte_for_byte(client, database, mayfly):
    body = '{"id":"g1","status":"COMPLETED","completedAt":"2026-11-28T09:00:00Z","creditsUsed":1.50,"x":1e2,"x":[ 1 ]}'
    item = arrival(id="g1")
    await receive(database, msgspec.structs.replace(item, body=body, generation=read_generation(body.encode())))
    await copy(database, await claim_one(database), creditsUsed=2, deep={"n": 12345678901234567890123})
    answer = await client.get("/api/records/g1")
    printed = (await mayfly("records", "show", "g1", "--json")).stdout

    assert f'"notification":{body},' in answer.text
    assert '"n": 12345678901234567890123}' in answer.text
    assert f'"notification":{body},' in printed
    assert (answer.json()["copy"]["creditsUsed"], json.loads(printed)["copy"]["creditsUsed"]) == (2, 2)


async def test_an_output_media_url_replaces_no_output_url(client, database):
    key = await store(database, outputUrl="https://a/1", outputMediaUrl="https://b/1")
    announced = (await client.get(f"/api/records/{key.id}")).json()
    await copy(database, await claim_one(database), outputUrl=None, outputMediaUrl="https://b/2")
    copied = (await client.get(f"/api/records/{key.id}")).json()

    assert (announced["outputUrl"], announced["outputMediaUrl"]) == ("https://a/1", "https://b/1")
    assert (copied["outputUrl"], copied["outputMediaUrl"]) == ("https://a/1", "https://b/2")
    assert copied["copy"]["outputMediaUrl"] == "https://b/2"


async def test_the_copy_is_shown_after_an_empty_answer_to_the_delete(client, database):
    key = await store(database)
    item = await claim_one(database)
    await copy(database, item, outputMediaUrl="https://b", credits=3)
    await settle(database, confirmed(item, receipt='{"method":"DELETE","status":204,"body":""}'))
    record = (await client.get(f"/api/records/{key.id}")).json()

    assert (record["state"], record["receipt"]["status"], record["receipt"]["body"]) == ("deleted", 204, "")
    assert (record["copy"]["outputMediaUrl"], record["copy"]["credits"]) == ("https://b", 3)


async def test_the_copy_is_shown_after_an_answer_that_was_lost(client, database):
    key = await store(database)
    item = await claim_one(database)
    await copy(database, item, credits=3)
    await settle(database, deferred(item))
    again = await claim_one(database, now=utc_now() + HOUR)
    detail = "answer lost, confirmed by a later 404"
    step = Step(Move.CONFIRM, again.progress, outcome=Outcome.DELETED, detail=detail)
    await settle(database, Settlement(again, Verdict.DONE, step, receipt='{"method":"GET","status":404}'))
    record = (await client.get(f"/api/records/{key.id}")).json()

    assert (record["outcome"], record["copy"]["credits"]) == ("deleted", 3)


async def test_a_clock_that_is_behind_sorts_no_event_before_the_receipt(client, database, mayfly):
    key = await store(database, due_in=-3 * HOUR)
    behind = utc_now() - 2 * HOUR
    await claim_one(database, now=behind, lease=timedelta(seconds=1))
    await lose_leases(database, now=behind + timedelta(minutes=1))
    await client.post(f"/api/records/{key.id}/hold", json={"reason": "by a host whose clock is right"})
    record = (await client.get(f"/api/records/{key.id}")).json()
    printed = (await mayfly("records", "show", key.id)).stdout.partition("History")[2]

    assert [event["move"] for event in record["events"]] == ["receive", "claim", "lose_lease", "hold"]
    assert record["events"][1]["at"] < record["events"][0]["at"]
    assert printed.index("receive") < printed.index("claim") < printed.index("lose_lease") < printed.index("hold")


# Spans of time


async def test_records_are_found_by_when_they_are_due(client, database):
    soon, later, overdue = [await store(database, due_in=due) for due in (HOUR / 2, 2 * HOUR, -HOUR)]
    await store(database, due_in=None)
    now, hour = utc_now(), (utc_now() + HOUR).isoformat()

    assert await ids_of(client, dueFrom=now.isoformat(), dueTo=hour) == [soon.id]
    assert await ids_of(client, dueTo=hour, state="scheduled") == [overdue.id, soon.id]
    assert await ids_of(client, dueFrom=hour) == [later.id]
    assert await ids_of(client, dueFrom=(now + 9 * HOUR).isoformat()) == []


async def test_records_are_found_by_when_they_were_deleted(client, database):
    keys = []
    for days in (3, 1, 0):
        keys.append(await store(database))
        await settle(database, confirmed(await claim_one(database)))
        await set_columns(database, keys[-1], deleted_at=utc_now() - timedelta(days=days, minutes=1))
    await store(database)
    yesterday = (utc_now() - timedelta(days=2)).isoformat()
    today = (utc_now() - HOUR).isoformat()

    assert await ids_of(client, deletedFrom=yesterday, deletedTo=today) == [keys[1].id]
    assert await ids_of(client, deletedFrom=yesterday, limit=1) == [keys[2].id, keys[1].id]
    assert await ids_of(client, deletedTo=yesterday) == [keys[0].id]
    assert await ids_of(client, deletedFrom=yesterday, state="scheduled") == []
    assert await ids_of(client, deletedFrom=yesterday, q=keys[1].id[:30]) == [keys[1].id]


@pytest.mark.parametrize("name", ["from", "to", "dueFrom", "dueTo", "deletedFrom", "deletedTo"])
async def test_an_instant_without_a_time_zone_is_400_and_named(client, name):
    answer = await client.get("/api/records", params={name: "2026-01-01T00:00:00"})

    assert (answer.status_code, answer.json()["detail"].split()[0]) == (400, name)


async def test_the_command_takes_times_that_count_from_now(mayfly, database):
    soon, later = [await store(database, due_in=due) for due in (HOUR / 2, 2 * HOUR)]
    gone = await store(database)
    await settle(database, confirmed(await claim_one(database)))

    async def found(*options: str):
        page = json.loads((await mayfly("records", "list", "--json", *options)).stdout)
        return [item["id"] for item in page["items"]]

    assert await found("--due-from", "0s", "--due-to", "1h") == [soon.id]
    assert await found("--due-from", "1h") == [later.id]
    assert await found("--deleted-from", "-1d") == [gone.id]
    assert await found("--deleted-to", "-1d") == []
    assert await found("--from", "-1h", "--state", "scheduled") == [later.id, soon.id]
    assert await found("--to", "2026-01-01") == []


@pytest.mark.parametrize("option", ["--from", "--deleted-from"])
async def test_a_time_to_come_is_refused_where_only_the_past_has_records(mayfly, option):
    future, unread = await mayfly("records", "list", option, "1h"), await mayfly("records", "list", option, "1")

    assert (future.exit_code, unread.exit_code) == (2, 2)
    assert "-1h is an hour ago" in future.stderr
    assert "an instant with its offset" in unread.stderr


@pytest.mark.parametrize("field", ["model", "error", "error_code", "id", "outputFileName"])
async def test_the_command_finds_the_webhooks_values_before_the_copy(mayfly, database, field):
    key = await store(database, due_in=HOUR, projectId="film", **{field: "half a Needle"})
    await store(database, due_in=HOUR)
    found = [(await mayfly("records", "list", *how)).stdout for how in (("--find", "needle"), ("--project", "film"))]

    assert [len(text.splitlines()) for text in found] == [2, 2]
    assert all(key.id[:30] in text for text in found)


# Exports


async def test_an_export_has_all_records_that_match_one_a_line(client, database, mayfly):
    await receive(database, *(arrival(due_in=HOUR, input=LARGE) for _ in range(25)))
    await store(database, due_in=None)
    answer = await client.get("/api/records/export?state=scheduled")
    printed = (await mayfly("records", "export", "--state", "scheduled")).stdout
    lines = answer.text.splitlines()

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    assert answer.headers["content-disposition"] == 'attachment; filename="records.jsonl"'
    assert [json.loads(line)["id"] for line in lines] == await ids_of(client, state="scheduled")
    assert json.loads(lines[0])["input"] == LARGE
    assert printed.splitlines() == lines


async def test_an_export_as_csv_has_a_line_of_names_and_no_formulas(client, database, mayfly):
    key = await store(database, due_in=HOUR, outputFileName='=HYPERLINK("x")', model="a,b\nc", error="half \u202e")
    answer = await client.get("/api/records/export?format=csv")
    printed = (await mayfly("records", "export", "--format", "csv")).stdout
    (row,) = csv.DictReader(io.StringIO(answer.text))

    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert (row["id"], row["state"], row["deletedAt"]) == (key.id, "scheduled", "")
    assert (row["outputFileName"], row["model"]) == ('\'=HYPERLINK("x")', "a,b\\nc")
    assert datetime.fromisoformat(row["dueAt"]) > utc_now()
    assert json.loads(row["input"])[0]["type"] == "video"
    assert next(csv.DictReader(io.StringIO(printed)))["id"] == key.id
    assert "\u202e" in answer.text
    assert "\u202e" not in printed


@pytest.mark.parametrize("path", ["?format=xml", "?stat=held", "?dueFrom=x", "?cursor=x", "?limit=5"])
async def test_an_invalid_export_is_400(client, path):
    assert (await client.get(f"/api/records/export{path}")).status_code == 400


async def test_an_export_of_nothing_is_empty(client, mayfly):
    answer = await client.get("/api/records/export")

    assert (answer.status_code, answer.text) == (200, "")
    assert (await mayfly("records", "export")).stdout == ""
