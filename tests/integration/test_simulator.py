"""The simulator answers like the Sync API, and has each documented fault."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import re
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import UUID

import httpx
import pytest

from service.simulator import Operation, Simulator, serve_forever
from service.simulator.answers import OTHER_ID
from service.simulator.control import control_app
from service.simulator.faults import ABSENT_BODIES

SECRET = "whsec_test_0123456789abcdef0123456789abcdef"
PROJECT = "612bb64a-e7f4-40c1-977b-3e9797845637"
UNKNOWN_ID = "11111111-1111-4111-8111-111111111111"
KEY = {"x-api-key": "sk-sim"}
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # spares each client 60 ms of reading certificates


@pytest.fixture
async def simulator():
    simulator = Simulator(api_key="sk-sim", webhook_secret=SECRET, seed=0)
    async with simulator.serve():
        yield simulator


@pytest.fixture
async def client(simulator):
    async with httpx.AsyncClient(
        base_url=simulator.url, headers=KEY, verify=NO_TLS, trust_env=False, timeout=5
    ) as client:
        yield client


@pytest.fixture
async def inbox():
    """A receiver of webhooks that answers 200: its URL and the raw requests it got."""
    received = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        received.append((head.decode(), await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/webhooks/sync?ttl=72h", received


async def eventually(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.01)


def get(client, generation, **options):
    return client.get(f"/v2/generate/{generation.id}", **options)


def delete(client, generation, **options):
    return client.delete(f"/v2/generations/{generation.id}", **options)


# What the API does


async def test_each_answer_says_that_it_comes_from_the_simulator(simulator, client):
    answer = await get(client, simulator.add())

    assert answer.headers["server"] == "mayfly-simulator"


async def test_a_missing_and_a_wrong_key_are_answered_401_in_their_two_shapes(simulator):
    async with httpx.AsyncClient(base_url=simulator.url, verify=NO_TLS, trust_env=False) as client:
        missing = await client.get("/v2/generations")
        wrong = await client.get("/v2/generations", headers={"x-api-key": "sk-other"})

    assert missing.status_code == wrong.status_code == 401
    assert missing.json() == {
        "message": "Either Cookie or x-api-key header must be provided",
        "error": "Unauthorized",
        "statusCode": 401,
    }
    assert wrong.json() == {"message": "Unauthorized", "statusCode": 401}
    assert [call.has_key for call in simulator.calls] == [False, True]


@pytest.mark.parametrize("path", ["/v2/generate", "/v2/generations"])
async def test_get_shows_a_completed_generation_with_its_unset_values_as_nulls(simulator, client, path):
    generation = simulator.add(project_id=PROJECT, output_file_name="Take 07/ü.mp4")
    answer = await client.get(f"{path}/{generation.id}")
    body = answer.json()

    assert answer.status_code == 200
    assert [*body] == [
        *("id", "createdAt", "status", "model", "input", "segments", "webhookUrl", "options", "outputUrl"),
        *("segmentOutputUrl", "outputDuration", "outputFileName", "projectId", "error", "errorCode"),
    ]
    assert UUID(body["id"]).version == 4
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", body["createdAt"])
    assert UUID(httpx.URL(body["outputUrl"]).params["token"])
    assert body["outputFileName"] == "Take_07mp4"
    assert body["projectId"] == PROJECT
    assert body["segments"] is body["webhookUrl"] is body["error"] is body["errorCode"] is None


async def test_only_a_generation_with_a_text_input_has_synthesized_audio(simulator, client):
    spoken = (await get(client, simulator.add(text_input=True))).json()
    recorded = (await get(client, simulator.add())).json()

    assert spoken["input"][1]["type"] == "text"
    assert "token=" in spoken["synthesizedAudioUrl"]
    assert "synthesizedAudioUrl" not in recorded


@pytest.mark.parametrize("status", ["FAILED", "REJECTED"])
async def test_a_generation_that_did_not_complete_has_an_error_and_no_output(simulator, client, status):
    body = (await get(client, simulator.add(status=status))).json()

    assert body["status"] == status
    assert body["error"]
    assert body["errorCode"].startswith("generation_")
    assert body["outputUrl"] is None


async def test_delete_answers_200_with_the_generation_and_404_from_then_on(simulator, client):
    generation = simulator.add()
    shown = (await get(client, generation)).json()
    first, second, read = [
        await delete(client, generation),
        await delete(client, generation),
        await get(client, generation),
    ]

    assert (first.status_code, first.json()) == (200, shown)
    assert second.status_code == read.status_code == 404
    assert second.json()["errorCode"] == "generation_not_found"
    assert generation.id not in simulator.generations
    assert simulator.deleted[generation.id] >= simulator.calls[1].at


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING"])
async def test_an_unfinished_generation_cannot_be_deleted(simulator, client, status):
    generation = simulator.add(status=status)
    answer = await delete(client, generation)

    assert answer.status_code == 409
    assert answer.json()["errorCode"] == "generation_not_deletable_while_processing"
    assert generation.id in simulator.generations


async def test_deletion_is_at_generations_and_not_at_generate(simulator, client):
    generation = simulator.add()
    answer = await client.delete(f"/v2/generate/{generation.id}")

    assert answer.status_code == 404
    assert generation.id in simulator.generations


@pytest.mark.parametrize("path", ["/v2/generations", "/v2/generations/", "/v2/generations/%2e", "/v2/generations/.."])
async def test_a_delete_that_lost_its_id_is_refused_and_recorded(simulator, path):
    simulator.add()
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(simulator.url).port)
    writer.write(f"DELETE {path} HTTP/1.1\r\nHost: sim\r\nx-api-key: sk-sim\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()

    assert head.startswith(b"HTTP/1.1 404 ")
    assert [(call.operation, call.raw_path) for call in simulator.calls] == [("COLLECTION-DELETE", path)]
    assert len(simulator.generations) == 1


async def test_the_path_is_recorded_and_read_as_it_was_received(simulator, client):
    generation = simulator.add(generation_id="a/../b ü?")
    answer = await client.delete("/v2/generations/a%2F..%2Fb%20%C3%BC%3F?x=1")

    assert answer.status_code == 200
    assert generation.id in simulator.deleted
    assert simulator.calls[0].raw_path == "/v2/generations/a%2F..%2Fb%20%C3%BC%3F"
    assert simulator.calls[0].query == "x=1"
    assert simulator.calls[0].generation_id == "a/../b ü?"


async def test_the_list_is_paged_newest_first_with_the_last_id_as_cursor(simulator, client):
    start = datetime(2026, 10, 1, tzinfo=UTC)
    ids = [simulator.add(created_at=start + timedelta(minutes=number)).id for number in range(5)]
    simulator.remove(ids[2])
    first = (await client.get("/v2/generations", params={"limit": 2})).json()
    second = (await client.get("/v2/generations", params={"limit": 2, "cursor": first[-1]["id"]})).json()
    third = (await client.get("/v2/generations", params={"limit": 2, "cursor": second[-1]["id"]})).json()

    assert [[item["id"] for item in page] for page in (first, second, third)] == [
        [ids[4], ids[3]],
        [ids[1], ids[0]],
        [],
    ]


async def test_the_list_without_a_limit_has_everything(simulator, client):
    ids = {simulator.add().id for _ in range(150)}
    page = (await client.get("/v2/generations")).json()

    assert {item["id"] for item in page} == ids


async def test_list_and_count_filter_by_status_ids_and_project(simulator, client):
    completed, failed = simulator.add(project_id=PROJECT), simulator.add(status="FAILED")
    simulator.add(status="PROCESSING")

    async def found(**params):
        page = (await client.get("/v2/generations", params={"limit": 100, **params})).json()
        count = (await client.get("/v2/generations/count", params=params)).json()
        assert count == {"count": len(page)}
        return {item["id"] for item in page}

    assert await found(status="COMPLETED,FAILED") == {completed.id, failed.id}
    assert await found(ids=f"{failed.id},{UNKNOWN_ID}") == {failed.id}
    assert await found(projectId=PROJECT) == {completed.id}
    assert await found(projectId=UNKNOWN_ID) == set()


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "cursor=abc", "status=completed", "projectId=7"])
async def test_an_invalid_list_query_is_answered_400(client, query):
    assert (await client.get(f"/v2/generations?{query}")).status_code == 400


async def test_the_webhook_secret_can_be_asked_for_and_masked(client):
    shown = (await client.get("/v2/organizations/webhook/secret")).json()
    masked = (await client.get("/v2/organizations/webhook/secret?masked=true")).json()

    assert shown == {"secret": SECRET}
    assert SECRET not in masked["secret"]


async def test_a_created_generation_is_processed_and_then_announced(simulator, client, inbox):
    url, received = inbox
    simulator.switches.processing_seconds = 0.2
    request = {
        "model": "sync-3",
        "input": [{"type": "video", "url": "https://cdn.example.com/a.mp4"}],
        "webhookUrl": url,
    }
    created = await client.post("/v2/generate", json=request)
    path = f"/v2/generate/{created.json()['id']}"
    await asyncio.sleep(0.1)
    meanwhile = (await client.get(path)).json()
    await eventually(lambda: simulator.deliveries)

    assert (created.status_code, created.json()["status"], created.json()["input"]) == (
        201,
        "PENDING",
        request["input"],
    )
    assert meanwhile["status"] == "PROCESSING"
    assert (await client.get(path)).json()["status"] == "COMPLETED"
    assert json.loads(received[0][1])["status"] == "COMPLETED"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"model": 1, "input": []}'])
async def test_a_generation_without_model_or_input_is_not_created(simulator, client, body):
    answer = await client.post("/v2/generate", content=body)

    assert answer.status_code == 400
    assert isinstance(answer.json()["message"], list)
    assert not simulator.generations


# Webhooks


async def test_the_webhook_is_signed_over_its_raw_bytes_with_the_whole_secret(simulator):
    at = datetime.fromtimestamp(1761300005, UTC)
    body, headers = simulator.webhook(simulator.add(text_input=True).id, at=at)
    expected = hmac.new(SECRET.encode(), b"1761300005." + body, hashlib.sha256).hexdigest()

    assert headers["Sync-Signature"] == f"t=1761300005,v1={expected}"
    assert "Grüße".encode() in body


async def test_the_webhook_lacks_what_only_the_polled_generation_has(simulator):
    failed = simulator.add(status="FAILED", text_input=True, project_id=PROJECT, output_file_name="x")
    body = json.loads(simulator.webhook(failed.id)[0])

    assert body["error_code"] == "generation_input_video_inaccessible"
    assert body.keys().isdisjoint({"errorCode", "synthesizedAudioUrl", "outputFileName", "projectId", "segments"})


async def test_a_webhook_is_delivered_as_often_as_asked_for(simulator, inbox):
    url, received = inbox
    generation = simulator.add(webhook_url=url)
    deliveries = await simulator.deliver(generation.id, copies=3)
    head, body = received[0]

    assert [delivery.status for delivery in deliveries] == [200, 200, 200]
    assert len(received) == 3
    assert head.startswith("POST /webhooks/sync?ttl=72h HTTP/1.1")
    assert "sync-signature: t=" in head.lower()
    assert body == simulator.webhook(generation.id)[0]


async def test_an_undelivered_webhook_is_not_sent_again(simulator):
    generation = simulator.add(webhook_url="http://127.0.0.1:9/", processing_seconds=0.05, status="REJECTED")
    await eventually(lambda: simulator.deliveries)
    await asyncio.sleep(0.1)

    assert [(sent.generation_id, sent.error) for sent in simulator.deliveries] == [(generation.id, "ConnectError")]


async def test_overrides_change_the_wire_by_name_and_survive_the_end_of_processing(simulator, client):
    generation = simulator.add(processing_seconds=0.05, errorCode="odd", outputDuration=None, novelty=[1])
    await eventually(lambda: generation.status == "COMPLETED")
    body = (await get(client, generation)).json()

    assert (body["errorCode"], body["outputDuration"], body["novelty"]) == ("odd", None, [1])
    assert json.loads(simulator.webhook(generation.id)[0])["error_code"] == "odd"


# Faults that are answers


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("409", 409, "generation_not_deletable_while_processing"),
        ("409-conflict", 409, "generation_conflict"),
        ("429", 429, "rate_limit_exceeded"),
        ("500", 500, "internal_error"),
        ("503", 503, "controller_unavailable"),
        ("504", 504, "controller_timeout"),
        ("400", 400, "invalid_generation_id"),
        ("405", 405, None),
        ("422", 422, None),
        ("401", 401, None),
        ("403", 403, None),
    ],
)
async def test_an_error_answer_has_its_shape_and_leaves_the_generation(simulator, client, fault, status, code):
    generation = simulator.add(faults={"DELETE": [fault]})
    answer = await delete(client, generation)

    assert (answer.status_code, answer.json()["statusCode"], answer.json().get("errorCode")) == (
        status,
        status,
        code,
    )
    assert ("requestId" in answer.json()) == (status >= 500)
    assert (simulator.calls[0].status, simulator.calls[0].fault) == (status, fault)
    assert (await delete(client, generation)).status_code == 200


@pytest.mark.parametrize(("fault", "status"), [("502", 502), ("403-html", 403), ("html", 200)])
async def test_a_proxy_before_the_api_answers_in_html_and_deletes_nothing(simulator, client, fault, status):
    generation = simulator.add(faults={"DELETE": [fault]})
    answer = await delete(client, generation)

    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert "<html>" in answer.text
    assert generation.id in simulator.generations


@pytest.mark.parametrize("value", ["2", "-5", "soon", "315360000", "Wed"])
@pytest.mark.parametrize("name", ["429", "503"])
async def test_retry_after_is_sent_as_scripted(simulator, client, name, value):
    answer = await get(client, simulator.add(faults={"GET": [f"{name}:retry_after={value}"]}))

    assert (answer.status_code, answer.headers["retry-after"]) == (int(name), value)


@pytest.mark.parametrize("seconds", [30, -3600])
async def test_retry_after_may_be_a_date_to_come_or_past(simulator, client, seconds):
    answer = await get(client, simulator.add(faults={"GET": [f"429:date={seconds}"]}))
    distance = parsedate_to_datetime(answer.headers["retry-after"]) - datetime.now(UTC)

    assert abs(distance.total_seconds() - seconds) < 3


async def test_the_wait_may_stand_in_the_body_alone(simulator, client):
    answer = await get(client, simulator.add(faults={"GET": ["429:body=7"]}))

    assert answer.json()["retryAfterSeconds"] == 7
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_points_where_the_script_says(simulator, client, status):
    generation = simulator.add(faults={"DELETE": [f"{status}:location=http://127.0.0.1:9/steal?a=b"]})
    answer = await delete(client, generation)

    assert (answer.status_code, answer.headers["location"]) == (status, "http://127.0.0.1:9/steal?a=b")
    assert generation.id in simulator.generations


@pytest.mark.parametrize("fault", ["404", "410"])
async def test_a_gone_fault_deletes_the_generation(simulator, client, fault):
    generation = simulator.add(faults={"GET": [fault]})
    answer = await get(client, generation)

    assert answer.status_code == int(fault)
    assert generation.id in simulator.deleted


@pytest.mark.parametrize("operation", ["GET", "DELETE"])
@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("body", sorted(ABSENT_BODIES))
async def test_a_404_or_410_with_any_body_leaves_the_generation(simulator, client, operation, status, body):
    generation = simulator.add(faults={operation: [f"{status}:answer={body}"]})
    answer = await (get if operation == "GET" else delete)(client, generation)

    assert answer.status_code == status
    assert (b"generation_not_found" in answer.content) == (body == "own")
    assert (answer.content == b"") == (body == "empty")
    assert generation.id in simulator.generations


def test_an_unknown_body_of_a_404_is_refused(simulator):
    with pytest.raises(ValueError, match="answer is not one of"):
        simulator.add(faults={"GET": ["404:answer=nothing"]})


@pytest.mark.parametrize(("fault", "has_body"), [("202", True), ("204", False)])
async def test_a_deletion_may_be_answered_202_or_204(simulator, client, fault, has_body):
    generation = simulator.add(faults={"DELETE": [fault]})
    answer = await delete(client, generation)

    assert answer.status_code == int(fault)
    assert bool(answer.content) == has_body
    assert generation.id in simulator.deleted


async def test_whether_a_faulty_answer_has_an_effect_can_be_chosen(simulator, client):
    kept, gone = (
        simulator.add(faults={"DELETE": ["204:effect=0"]}),
        simulator.add(faults={"DELETE": ["500:effect=1"]}),
    )
    await delete(client, kept)
    await delete(client, gone)

    assert kept.id in simulator.generations
    assert gone.id in simulator.deleted


async def test_an_answer_may_be_broken_json_or_not_utf8_or_about_another_generation(simulator, client):
    generation = simulator.add(faults={"GET": ["invalid-json", "non-utf8", "wrong-id", "processing"]})
    broken, binary, other, unfinished = [await get(client, generation) for _ in range(4)]

    with pytest.raises(json.JSONDecodeError):
        broken.json()
    with pytest.raises(UnicodeDecodeError):
        binary.content.decode()
    assert other.json()["id"] == OTHER_ID
    assert (unfinished.json()["id"], unfinished.json()["status"]) == (generation.id, "PROCESSING")
    assert {answer.status_code for answer in (broken, binary, other, unfinished)} == {200}


# Faults of the connection


@pytest.mark.parametrize(("fault", "error"), [("drop", httpx.RemoteProtocolError), ("reset", httpx.ReadError)])
async def test_a_dropped_call_has_no_answer_and_no_effect(simulator, client, fault, error):
    generation = simulator.add(faults={"DELETE": [fault]})
    with pytest.raises(error):
        await delete(client, generation)

    assert generation.id in simulator.generations
    assert (simulator.calls[0].status, simulator.calls[0].fault) == (None, fault)


async def test_a_lost_answer_leaves_the_generation_deleted(simulator, client):
    generation = simulator.add(faults={"DELETE": ["lost"]})
    with pytest.raises(httpx.RemoteProtocolError):
        await delete(client, generation)

    assert generation.id in simulator.deleted


async def test_a_truncated_answer_promises_more_than_it_holds(simulator, client):
    generation = simulator.add(faults={"GET": ["truncated"]})
    with pytest.raises(httpx.RemoteProtocolError, match=r"without sending complete|incomplete"):
        await get(client, generation)

    assert (await get(client, generation)).status_code == 200


async def test_a_slow_answer_drips(simulator, client):
    generation = simulator.add(faults={"GET": ["slow:interval=0.02"]})
    started = time.monotonic()
    async with client.stream("GET", f"/v2/generate/{generation.id}") as answer:
        chunks = answer.aiter_raw()
        first = [await anext(chunks) for _ in range(5)]

    assert answer.status_code == 200
    assert b"".join(first).startswith(b'{"id"')
    assert len(b"".join(first)) < 10
    assert time.monotonic() - started >= 0.06


async def test_a_huge_answer_has_the_megabytes_it_was_asked_for(simulator, client):
    answer = await get(client, simulator.add(faults={"GET": ["huge:megabytes=3"]}))

    assert len(answer.content) == 3 << 20


async def test_a_call_held_before_its_effect_waits_for_its_release(simulator, client):
    generation = simulator.add(faults={"DELETE": ["hold"]})
    call = asyncio.create_task(delete(client, generation))
    await simulator.gates.reached(generation.id)
    is_there = generation.id in simulator.generations
    status_before = simulator.calls[0].status
    released = simulator.release(generation.id)

    assert is_there
    assert status_before is None
    assert released == 1
    assert (await call).status_code == 200
    assert generation.id in simulator.deleted


async def test_a_call_held_after_its_effect_has_had_it(simulator, client):
    generation = simulator.add(faults={"DELETE": ["hold-after"]})
    call = asyncio.create_task(delete(client, generation))
    await simulator.gates.reached(generation.id)
    is_gone = generation.id in simulator.deleted
    simulator.release(generation.id)

    assert is_gone
    assert (await call).status_code == 200


# How faults are dealt out


async def test_a_script_applies_call_by_call_and_to_its_method_only(simulator, client):
    generation = simulator.add(faults={"DELETE": ["409*2", "500"]})
    read = await get(client, generation)
    deletes = [await delete(client, generation) for _ in range(4)]

    assert read.status_code == 200
    assert [answer.status_code for answer in deletes] == [409, 409, 500, 200]


async def test_a_fault_can_repeat_forever_for_one_generation(simulator, client):
    poisoned, healthy = simulator.add(faults={"DELETE": ["422*"]}), simulator.add()
    answers = [await delete(client, poisoned) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [422, 422, 422]
    assert (await delete(client, healthy)).status_code == 200


async def test_a_standing_fault_applies_to_all_calls_until_it_is_removed(simulator, client):
    simulator.plan.stand("LIST", "503")
    during = [(await client.get("/v2/generations")).status_code for _ in range(2)]
    simulator.plan.stand("LIST", None)

    assert during == [503, 503]
    assert (await client.get("/v2/generations")).status_code == 200


def test_a_seed_gives_the_same_random_faults_in_any_order_of_calls():
    simulator, other = Simulator(seed=0), Simulator(seed=0)
    ids = [simulator.add().id for _ in range(200)]
    for plan in (simulator.plan, other.plan):
        plan.mix("DELETE", {"500": 0.2, "lost": 0.1})
    forwards = {id_: simulator.plan.next(Operation.DELETE, id_) for id_ in ids}
    backwards = {id_: other.plan.next(Operation.DELETE, id_) for id_ in reversed(ids)}
    names = [fault.name.value if fault else None for fault in forwards.values()]

    assert forwards == backwards
    assert 15 < names.count("500") < 65
    assert 5 < names.count("lost") < 40
    assert simulator.plan.next(Operation.GET, ids[0]) is None


@pytest.mark.parametrize("text", ["418", "", "500:retry=1", "429*x", "slow:interval=long"])
def test_a_fault_that_does_not_exist_is_refused_by_name(text):
    with pytest.raises(ValueError, match="fault"):
        Simulator().add(faults={"DELETE": [text]})


# Switches


async def test_in_an_outage_no_call_is_answered(simulator, client):
    simulator.switches.outage = True
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get("/v2/generations")
    simulator.switches.outage = False

    assert (await client.get("/v2/generations")).status_code == 200
    assert [call.fault for call in simulator.calls] == ["outage", None]


async def test_a_revoked_key_is_answered_401_until_it_is_valid_again(simulator, client):
    generation = simulator.add()
    simulator.switches.unauthorized = True
    revoked = await delete(client, generation)
    simulator.switches.unauthorized = False

    assert revoked.json() == {"message": "Unauthorized", "statusCode": 401}
    assert (await delete(client, generation)).status_code == 200


async def test_latency_is_added_to_each_get_and_delete(simulator, client):
    simulator.switches.latency_seconds = 0.1
    started = time.monotonic()
    await get(client, simulator.add())

    assert time.monotonic() - started >= 0.1


async def test_calls_beyond_the_rate_are_answered_429(simulator, client):
    simulator.switches.rate = 3
    generation = simulator.add()
    statuses = [(await get(client, generation)).status_code for _ in range(9)]

    # Nine calls take far less than two seconds, and may lie across the border of one.
    assert 3 <= statuses.count(200) <= 6
    assert statuses.count(200) + statuses.count(429) == 9


# Control routes


async def test_other_processes_add_script_and_read_over_http(client):
    requests = [
        {"count": 2, "status": "FAILED", "overrides": {"model": "react-1"}},
        {"faults": {"DELETE": ["500"]}, "webhook_url": "http://127.0.0.1:9/"},
    ]
    ids = (await client.post("/simulator/generations", json=requests)).json()
    scripted = await client.post(
        "/simulator/faults", json=[{"operation": "GET", "faults": ["404:effect=0"], "generation_id": ids[0]}]
    )
    statuses = [
        (await client.get(f"/v2/generate/{ids[0]}")).status_code,
        (await client.get(f"/v2/generate/{ids[1]}")).json()["model"],
        (await client.delete(f"/v2/generations/{ids[2]}")).status_code,
    ]

    assert scripted.status_code == 201
    assert len(ids) == 3
    assert statuses == [404, "react-1", 500]


async def test_calls_are_read_page_by_page_over_http(simulator, client):
    generation = simulator.add()
    await get(client, generation)
    first = (await client.get("/simulator/calls")).json()
    await delete(client, generation)
    second = (await client.get("/simulator/calls", params={"since": first["next"]})).json()

    assert [call["operation"] for call in first["calls"]] == ["GET"]
    assert [(call["operation"], call["status"], call["has_key"]) for call in second["calls"]] == [("DELETE", 200, True)]
    assert datetime.fromisoformat(second["calls"][0]["at"]).tzinfo is not None


async def test_state_summary_and_delete_times_are_read_over_http(simulator, client):
    gone, kept = simulator.add(), simulator.add()
    before = time.time()
    await delete(client, gone)
    state = (await client.get("/simulator/generation", params={"id": gone.id})).json()
    summary = (await client.get("/simulator/summary")).json()
    times = dict((await client.get("/simulator/deletes")).json())

    assert state["generation"]["id"] == gone.id
    assert state["deleted_at"] is not None
    assert (summary["existing"], summary["deleted"], summary["calls"]) == (1, 1, {"DELETE 200": 1})
    assert before <= times[gone.id] <= time.time()
    assert times[kept.id] is None


async def test_switches_standing_faults_and_mixes_are_set_over_http(simulator, client):
    generation = simulator.add()
    switched = await client.patch("/simulator/switches", json={"latency_seconds": 0.01, "rate": 500})
    await client.put("/simulator/standing", json={"GET": "500"})
    await client.put("/simulator/mix", json={"DELETE": {"422": 1.0}})
    statuses = [(await get(client, generation)).status_code, (await delete(client, generation)).status_code]
    await client.put("/simulator/standing", json={"GET": None})
    await client.put("/simulator/mix", json={"DELETE": {}})

    assert switched.json()["outage"] is False
    assert (simulator.switches.latency_seconds, simulator.switches.rate) == (0.01, 500)
    assert (await client.get("/simulator/switches")).json() == switched.json()
    assert statuses == [500, 422]
    assert (await get(client, generation)).status_code == (await delete(client, generation)).status_code == 200


async def test_gates_webhooks_and_removals_are_driven_over_http(simulator, client, inbox):
    url, received = inbox
    generation = simulator.add(webhook_url=url, faults={"GET": ["hold"]})
    held = asyncio.create_task(get(client, generation))
    await simulator.gates.reached(generation.id)
    of_it = {"id": generation.id}
    waiting = (await client.get("/simulator/generation", params=of_it)).json()["held"]
    released = (await client.post("/simulator/release", params=of_it)).json()
    webhook = (await client.get("/simulator/webhook", params=of_it)).json()
    sent = (await client.post("/simulator/deliver", json={"ids": [generation.id], "copies": 2})).json()
    removed = await client.delete("/simulator/generation", params=of_it)

    assert (waiting, released) == (1, {"released": 1})
    assert (await held).status_code == 200
    assert [delivery["status"] for delivery in sent] == [200, 200]
    assert {body for _, body in received} == {webhook["body"].encode()}
    assert webhook["headers"]["Sync-Signature"].startswith("t=")
    assert removed.status_code == 204
    assert generation.id in simulator.deleted


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/simulator/generations", [{"faults": {"DELETE": ["nonsense"]}}], 400),
        ("POST", "/simulator/generations", [{"colour": "red"}], 400),
        ("PATCH", "/simulator/switches", {"outrage": True}, 400),
        ("PUT", "/simulator/mix", {"GET": {"500": 0.7, "502": 0.7}}, 400),
        ("GET", "/simulator/generation?id=nobody", None, 404),
        ("GET", "/simulator/nowhere", None, 404),
    ],
)
async def test_an_invalid_control_call_is_answered_with_the_reason(client, method, path, body, status):
    answer = await client.request(method, path, json=body)

    assert answer.status_code == status
    assert answer.json()["detail"]


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"x-api-key": "sk-other"}, 401), (KEY, 200)])
async def test_control_routes_need_the_key_from_other_machines(simulator, headers, status):
    app: Any = control_app(simulator)  # httpx and Litestar spell the type of an ASGI application differently
    transport = httpx.ASGITransport(app, client=("203.0.113.9", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://sim", headers=headers) as client:
        answer = await client.get("/simulator/summary")

    assert answer.status_code == status


async def test_thousands_are_added_by_one_call(client):
    started = time.monotonic()
    ids = (await client.post("/simulator/generations", json=[{"count": 5000}])).json()

    assert len(set(ids)) == 5000
    assert time.monotonic() - started < 3


# Being served


async def test_the_simulator_refuses_a_remote_address_by_default():
    with pytest.raises(ValueError, match="loopback"):
        async with Simulator().serve(host="0.0.0.0"):
            pass


async def test_with_allow_remote_the_control_routes_still_serve_this_machine():
    async with (
        Simulator().serve(host="0.0.0.0", allow_remote=True) as url,
        httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client,
    ):
        answer = await client.get(f"{url.replace('0.0.0.0', '127.0.0.1')}/simulator/summary")

    assert answer.status_code == 200


async def test_the_simulator_stops_at_once_with_held_calls_and_keeps_its_state(caplog):
    simulator = Simulator(api_key="sk-sim")
    generation = simulator.add(faults={"DELETE": ["hold", "slow"]})
    async with httpx.AsyncClient(headers=KEY, verify=NO_TLS, trust_env=False) as client:
        async with simulator.serve() as url:
            held = asyncio.create_task(client.delete(f"{url}/v2/generations/{generation.id}"))
            await simulator.gates.reached(generation.id)
            started = time.monotonic()
        with contextlib.suppress(httpx.TransportError):
            await held
        stopped_in = time.monotonic() - started
        async with simulator.serve() as url:
            answer = await client.get(f"{url}/v2/generations/{generation.id}")

    assert stopped_in < 1
    assert answer.status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_the_simulator_stops_at_once_while_a_client_does_not_read_a_huge_answer():
    simulator = Simulator(api_key="sk-sim")
    generation = simulator.add(faults={"GET": ["huge:megabytes=64"]})
    async with simulator.serve() as url:
        _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        writer.write(b"GET /v2/generate/%b HTTP/1.1\r\nx-api-key: sk-sim\r\n\r\n" % generation.id.encode())
        await eventually(lambda: simulator.calls and simulator.calls[0].status)
        started = time.monotonic()
    stopped_in = time.monotonic() - started
    writer.transport.abort()

    assert stopped_in < 1


async def test_the_simulator_serves_ipv6():
    async with (
        Simulator().serve(host="::1") as url,
        httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client,
    ):
        answer = await client.get(f"{url}/simulator/summary")

    assert answer.status_code == 200


async def exchange(simulator, sent):
    """Send the bytes and return what comes back until the simulator closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(simulator.url).port)
    writer.write(sent)
    async with asyncio.timeout(5):
        received = await reader.read()
    writer.close()
    await writer.wait_closed()
    return received


async def test_requests_sent_without_waiting_are_answered_in_order(simulator):
    first = b"GET /v2/generations/count HTTP/1.1\r\nx-api-key: sk-sim\r\n\r\n"
    last = b"HEAD /v2/generations/count HTTP/1.1\r\nx-api-key: sk-sim\r\nconnection: close\r\n\r\n"
    received = await exchange(simulator, first + last)

    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"404"]
    assert received.endswith(b"connection: close\r\n\r\n")  # HEAD has no body


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ],
)
async def test_a_request_that_cannot_be_parsed_is_answered_400(simulator, sent):
    received = await exchange(simulator, sent)

    assert received.startswith(b"HTTP/1.1 400 ")
    assert simulator.calls == []


async def test_serve_forever_makes_samples_and_sends_their_webhooks(inbox, capfd):
    url, received = inbox
    ready: asyncio.Future[Simulator] = asyncio.Future()
    serving = asyncio.create_task(
        serve_forever(
            port=0,
            webhook_url=url,
            every_seconds=0.01,
            processing_seconds=0.02,
            count=5,
            on_ready=ready.set_result,
        )
    )
    simulator = await ready
    await eventually(lambda: len(received) == 5)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)

    assert simulator.url.startswith("http://127.0.0.1:")
    assert {json.loads(body)["status"] for _, body in received} == {"COMPLETED", "FAILED", "REJECTED"}
    assert capfd.readouterr() == ("", "")
