"""The simulator's batches: one file in, one file out, and one webhook at the end."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from service.core.signature import verify
from tests.conftest import API_KEY, http_client
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET

MINUTE = timedelta(minutes=1)
VALID = {"model": "lipsync-2", "input": [{"type": "video", "url": "https://cdn.example.com/a.mp4"}]}


@pytest.fixture
async def client(simulator):
    simulator.switches.processing_seconds = 0.1
    async with http_client(simulator.url) as client:
        client.headers["x-api-key"] = API_KEY
        yield client


@pytest.fixture
async def inbox():
    """A receiver of webhooks: its URL, and the headers and bodies that it got."""
    received = []

    async def answer(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
        received.append((headers, await reader.readexactly(int(headers["content-length"]))))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/batches", received


def line(number, **changes):
    return {"request_id": f"r{number}", "endpoint": "/v2/generate", "payload": VALID} | changes


def written(lines):
    return b"\n".join(json.dumps(line).encode() for line in lines)


def send(client, content, **fields):
    return client.post("/v2/batch", data=fields, files={"input": ("batch.jsonl", content)})


async def finished(client, batch_id):
    async def look():
        batch = (await client.get(f"/v2/batch/{batch_id}")).json()
        return batch if batch["status"] in ("COMPLETED", "FAILED") else None

    return await eventually(look)


async def test_a_batch_ends_with_its_webhook_and_its_results(simulator, client, inbox):
    url, received = inbox
    simulator.switches.endings = ("COMPLETED", "COMPLETED", "COMPLETED", "FAILED")
    created = await send(client, written(line(number) for number in range(20)), webhook_url=url)
    began = created.json()
    batch = await finished(client, began["id"])
    await eventually(lambda: received)
    headers, body = received[0]
    redirect = await client.get(batch["outputUrl"])
    async with httpx.AsyncClient(trust_env=False) as stranger:
        results = await stranger.get(redirect.headers["location"])
    rows = [json.loads(row) for row in results.text.splitlines()]

    assert (created.status_code, began["status"], began["metrics"]["pending_count"]) == (201, "PENDING", 20)
    assert began["outputUrl"] == batch["outputUrl"]
    assert not began["id"].count("-")  # not a UUID
    assert batch["metrics"] == {"total_generations": 20, "success_count": 15, "failed_count": 5, "pending_count": 0}
    verify(headers["sync-signature"], body, secrets=[SECRET.encode()], now=datetime.now(UTC), tolerance=MINUTE)
    assert json.loads(body) == batch
    assert redirect.status_code == 302
    assert results.headers["content-type"].startswith("application/jsonl")
    assert [row["request_id"] for row in rows] == [f"r{number}" for number in range(20)]
    assert {row["generation"]["id"] for row in rows} == set(simulator.generations)
    assert rows[3]["generation"]["errorCode"]


async def test_a_batch_is_failed_if_none_of_its_generations_completed(simulator, client):
    simulator.switches.endings = ("REJECTED",)
    created = (await send(client, written(line(number) for number in range(20)))).json()
    batch = await finished(client, created["id"])

    assert (batch["status"], batch["metrics"]["failed_count"], batch["webhookUrl"]) == ("FAILED", 20, None)


async def test_a_batch_passes_through_each_documented_status(simulator, client):
    simulator.switches.processing_seconds = 1
    batch_id = (await send(client, written(line(number) for number in range(20)))).json()["id"]
    seen = []

    async def look():
        batch = (await client.get(f"/v2/batch/{batch_id}")).json()
        if batch["status"] not in seen:
            seen.append(batch["status"])
        return batch["status"] == "COMPLETED"

    await eventually(look)

    assert seen == ["PENDING", "JOBS_CREATED", "PROCESSING", "COMPLETED"]


async def test_there_are_no_results_before_the_end_and_none_without_the_token(simulator, client):
    simulator.switches.processing_seconds = 0.5
    batch = (await send(client, written(line(number) for number in range(20)))).json()
    early = await client.get(batch["outputUrl"])
    await finished(client, batch["id"])
    location = (await client.get(batch["outputUrl"])).headers["location"]

    assert early.status_code == 404
    assert (await client.get(batch["outputUrl"].partition("?")[0])).status_code == 403
    assert (await client.get(location.partition("?")[0])).status_code == 403


async def test_the_results_stay_as_they_were_when_a_generation_is_deleted(simulator, client):
    batch = await finished(client, (await send(client, written(line(n) for n in range(20)))).json()["id"])
    for generation_id in list(simulator.generations):
        await client.delete(f"/v2/generations/{generation_id}")
    results = await client.get((await client.get(batch["outputUrl"])).headers["location"])

    assert not simulator.generations
    assert len(results.text.splitlines()) == 20
    assert (await client.get(f"/v2/batch/{batch['id']}")).json()["metrics"]["success_count"] == 20


@pytest.mark.parametrize("is_listed", [True, False])
async def test_generations_of_a_batch_are_listed_or_not(simulator, client, is_listed):
    simulator.switches.lists_batches = is_listed
    single = simulator.add().id
    await finished(client, (await send(client, written(line(n) for n in range(20)))).json()["id"])
    listed = [item["id"] for item in (await client.get("/v2/generations?limit=100")).json()]

    assert len(listed) == (21 if is_listed else 1)
    assert single in listed


async def test_a_webhook_of_a_payload_is_sent_too(client, inbox, simulator):
    url, received = inbox
    lines = [line(number) for number in range(19)] + [line(19, payload=VALID | {"webhookUrl": url})]
    await finished(client, (await send(client, written(lines))).json()["id"])
    await eventually(lambda: received)

    assert json.loads(received[0][1])["id"] in simulator.generations


async def test_a_dry_run_validates_and_makes_nothing(simulator, client):
    valid = await send(client, written(line(number) for number in range(20)), dry_run="true")
    invalid = await send(client, written([line(0)] * 20), dry_run="true")

    assert (valid.status_code, valid.json()) == (200, {"status": "VALIDATED"})
    assert invalid.status_code == 400
    assert not simulator.batches


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([line(number) for number in range(19)], "20 to 500 lines, not 19"),
        ([line(number) for number in range(501)], "20 to 500 lines, not 501"),
        ([line(0), *(line(number) for number in range(19))], "line 2: request_id r0 is there twice"),
        ([line(number, endpoint="/v2/batch") for number in range(20)], "line 1: endpoint must be /v2/generate"),
        ([line(number) for number in range(19)] + [{"payload": VALID}], "line 20: request_id must be a string"),
        ([line(number) for number in range(19)] + [line(19, payload={})], "line 20: payload: model must be one of"),
        ([*(line(number) for number in range(19)), 7], "line 20: request_id"),
    ],
)
async def test_a_wrong_file_is_400_and_names_the_line(simulator, client, lines, named):
    answer = await send(client, written(lines))

    assert (answer.status_code, answer.json()["field"]) == (400, "input")
    assert named in " ".join(answer.json()["message"])
    assert not simulator.batches


@pytest.mark.parametrize(
    ("fields", "field"), [({"webhook_url": "not a url"}, "webhook_url"), ({"dry_run": "yes"}, "dry_run")]
)
async def test_a_wrong_field_of_a_batch_is_400_and_named(client, fields, field):
    answer = await send(client, written(line(number) for number in range(20)), **fields)

    assert (answer.status_code, answer.json()["field"]) == (400, field)


async def test_a_batch_without_a_file_or_with_too_large_a_one_is_400(client):
    without = await client.post("/v2/batch", json=[])
    large = await send(client, b"x" * (5 << 20) + b"\n")

    assert (without.status_code, without.json()["field"]) == (400, "input")
    assert "5 MB" in large.json()["message"][0]


async def test_batches_are_listed_newest_first_and_filtered(simulator, client):
    ids = [(await send(client, written(line(n) for n in range(20)))).json()["id"] for _ in range(3)]
    await finished(client, ids[-1])
    now = datetime.now(UTC)
    for number, batch_id in enumerate(ids):
        simulator.batches[batch_id].created_at = now - timedelta(hours=3 - number)

    async def found(**params):
        return [batch["id"] for batch in (await client.get("/v2/batch", params=params)).json()]

    assert await found() == ids[::-1]
    assert await found(created_after=(now - timedelta(hours=2.5)).isoformat()) == ids[:0:-1]
    assert await found(created_before=f"{now - timedelta(hours=2.5):%Y-%m-%dT%H:%M:%SZ}") == ids[:1]
    assert await found(status="PENDING,FAILED") == []


@pytest.mark.parametrize(("query", "field"), [("status=DONE", "status"), ("created_after=today", "created_after")])
async def test_a_wrong_filter_of_batches_is_400_and_named(client, query, field):
    answer = await client.get(f"/v2/batch?{query}")

    assert (answer.status_code, answer.json()["field"]) == (400, field)


async def test_an_unknown_batch_is_404_and_batches_need_the_key(simulator, client):
    async with http_client(simulator.url) as stranger:
        refused = [await stranger.get("/v2/batch"), await stranger.get("/v2/batch/x"), await stranger.post("/v2/batch")]

    assert (await client.get("/v2/batch/batch_x")).status_code == 404
    assert (await client.get("/v2/batch/batch_x/result?token=x")).status_code == 404
    assert [answer.status_code for answer in refused] == [401, 401, 401]


async def test_a_fault_of_a_batch_creates_none(simulator, client):
    simulator.plan.script("BATCH-CREATE", ["500", "drop"])
    failed = await send(client, written(line(number) for number in range(20)))
    with pytest.raises(httpx.TransportError):
        await send(client, written(line(number) for number in range(20)))

    assert failed.status_code == 500
    assert not simulator.batches


async def test_the_simulator_stops_at_once_while_a_batch_is_processed(simulator):
    simulator.switches.processing_seconds = 60
    async with http_client(simulator.url) as client:
        client.headers["x-api-key"] = API_KEY
        batch_id = (await send(client, written(line(number) for number in range(20)))).json()["id"]
    async with asyncio.timeout(1):
        await simulator.quiesce()

    assert not simulator.batches[batch_id].is_finished
