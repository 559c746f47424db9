"""The simulator creates what the API would create, refuses the rest by field, and waits when asked to."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import pytest

from tests.conftest import API_KEY, http_client

VIDEO = {"type": "video", "url": "https://cdn.example.com/a.mp4"}
AUDIO = {"type": "audio", "url": "https://cdn.example.com/a.wav", "refId": "a"}
SPEECH = {"type": "text", "provider": {"name": "elevenlabs", "voiceId": "v", "script": "Grüße"}}
VALID = {"model": "lipsync-2", "input": [VIDEO, AUDIO]}
SEGMENT = {"startTime": 0, "endTime": 2.5, "audioInput": {"refId": "a", "startTime": 1, "endTime": 3}}


@pytest.fixture
async def client(simulator):
    simulator.switches.processing_seconds = 60
    async with http_client(simulator.url) as client:
        client.headers["x-api-key"] = API_KEY
        yield client


async def create(client, body, **headers):
    return await client.post("/v2/generate", json=body, headers=headers)


async def test_everything_that_was_sent_is_kept(client):
    sent = VALID | {
        "segments": [SEGMENT | {"optionsOverride": {"temperature": 0.1}}],
        "options": {"sync_mode": "cut_off", "novelty": True},
        "webhookUrl": "https://mayfly.example.com/webhooks/sync?ttl=72h",
        "projectId": "612bb64a-e7f4-40c1-977b-3e9797845637",
        "outputFileName": "take_7",
    }
    created = (await create(client, sent)).json()
    polled = (await client.get(f"/v2/generate/{created['id']}")).json()

    assert {name: created[name] for name in sent} == sent
    assert polled["segments"] == sent["segments"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"webhookUrl": "not a url"}, "webhookUrl"),
        ({"webhookUrl": "mayfly.example.com/webhooks/sync"}, "webhookUrl"),
        ({"webhookUrl": "ftp://mayfly.example.com/"}, "webhookUrl"),
        ({"webhookUrl": "https://"}, "webhookUrl"),
        ({"webhookUrl": "https://[::1/"}, "webhookUrl"),
        ({"webhookUrl": 7}, "webhookUrl"),
        ({"webhookUrl": ""}, "webhookUrl"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": {"type": "video"}}, "input"),
        ({"input": ["https://cdn.example.com/a.mp4"]}, "input[0].type"),
        ({"input": [VIDEO, {"type": "audio"}]}, "input[1].url"),
        ({"input": [{"type": "video", "url": "a.mp4"}]}, "input[0].url"),
        ({"input": [{"type": "movie", "url": "https://cdn.example.com/a.mp4"}]}, "input[0].type"),
        ({"input": [VIDEO, {"type": "text", "provider": {"name": "elevenlabs"}}]}, "input[1].provider"),
        ({"input": [{"type": "image", "url": "https://cdn.example.com/a.png"}]}, "input[0].type"),
        ({"model": "lipsync-9"}, "model"),
        ({"model": None}, "model"),
        ({"model": ["lipsync-2"]}, "model"),
        ({"projectId": "7"}, "projectId"),
        ({"outputFileName": 7}, "outputFileName"),
        ({"options": []}, "options"),
        ({"segments": {}}, "segments"),
        ({"segments": [{"startTime": 0}]}, "segments[0]"),
        ({"segments": [{"startTime": 0, "endTime": True, "audioInput": {"refId": "a"}}]}, "segments[0]"),
        ({"segments": [{"startTime": 0, "endTime": 1}]}, "segments[0].audioInput"),
    ],
)
async def test_a_wrong_request_is_400_and_names_the_field(simulator, client, change, field):
    answer = await create(client, VALID | change)

    assert answer.status_code == 400
    assert (answer.json()["statusCode"], answer.json()["field"]) == (400, field)
    assert answer.json()["message"][0].startswith(field)
    assert not simulator.generations


async def test_each_problem_has_its_message(client):
    answer = await create(client, {"model": "x", "input": [], "webhookUrl": "x"})

    assert [message.partition(" ")[0] for message in answer.json()["message"]] == ["model", "webhookUrl", "input"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 100_000])
async def test_a_body_that_is_no_object_is_400(simulator, client, body):
    answer = await client.post("/v2/generate", content=body)

    assert (answer.status_code, answer.json()["field"]) == (400, "body")
    assert not simulator.generations


@pytest.mark.parametrize("inputs", [[VIDEO, SPEECH], [VIDEO, {"type": "audio", "assetId": "x"}], [VIDEO]])
async def test_each_documented_input_is_accepted(client, inputs):
    answer = await create(client, VALID | {"input": inputs})

    assert answer.status_code == 201
    assert answer.json()["input"] == inputs


async def test_the_estimate_checks_the_request_and_creates_nothing(simulator, client):
    estimate = await client.post("/v2/analyze/cost", json=VALID)
    refused = await client.post("/v2/analyze/cost", json=VALID | {"model": "x"})

    assert estimate.json()[0]["estimatedGenerationCost"] > 0
    assert (refused.status_code, refused.json()["field"]) == (400, "model")
    assert not simulator.generations


async def test_the_final_statuses_are_taken_in_turn(simulator, client):
    simulator.switches.processing_seconds = 0
    simulator.switches.endings = ("COMPLETED", "FAILED")
    ids = [(await create(client, VALID)).json()["id"] for _ in range(3)]
    async with asyncio.timeout(5):
        for id_ in ids:
            await simulator.generations[id_].wait_until_ended(5)

    assert [simulator.generations[id_].status for id_ in ids] == ["COMPLETED", "FAILED", "COMPLETED"]


# Files


async def test_a_form_with_files_makes_assets_and_a_generation_of_them(client):
    answer = await client.post(
        "/v2/generate",
        data={"model": "lipsync-2", "webhookUrl": "https://mayfly.example.com/", "options": '{"sync_mode": "loop"}'},
        files={"video": ("take.mp4", b"\r\n--\x00\xff"), "audio": ("vo.wav", b"RIFF")},
    )
    created = answer.json()
    assets = (await client.get("/v2/assets?sortBy=nameAsc")).json()["items"]

    assert answer.status_code == 201
    assert created["options"] == {"sync_mode": "loop"}
    assert created["webhookUrl"] == "https://mayfly.example.com/"
    assert [(item["type"], item["assetId"]) for item in created["input"]] == [
        ("video", assets[0]["id"]),
        ("audio", assets[1]["id"]),
    ]
    assert [(asset["name"], asset["size"], asset["type"]) for asset in assets] == [
        ("take.mp4", 6, "VIDEO"),
        ("vo.wav", 4, "AUDIO"),
    ]


@pytest.mark.parametrize(
    "inputs",
    [['[{"type": "audio", "url": "https://x.example/a"}]'], ['{"type": "audio", "url": "https://x.example/a"}']],
)
async def test_a_form_can_have_an_input_as_json_beside_a_file(client, inputs):
    answer = await client.post(
        "/v2/generate", data={"model": "lipsync-2", "input": inputs}, files={"video": ("a.mp4", b"x")}
    )

    assert [item["type"] for item in answer.json()["input"]] == ["audio", "video"]


@pytest.mark.parametrize(
    ("data", "field"), [({"model": "x"}, "model"), ({"model": "lipsync-2", "options": "{"}, "options")]
)
async def test_a_refused_form_leaves_no_asset(simulator, client, data, field):
    answer = await client.post("/v2/generate", data=data, files={"video": ("a.mp4", b"x")})

    assert (answer.status_code, answer.json()["field"]) == (400, field)
    assert not simulator.assets
    assert not simulator.generations


async def test_a_broken_form_is_400(client):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = await client.post("/v2/generate", content=b"--y\r\n", headers=headers)

    assert answer.status_code == 400
    assert "multipart" in answer.json()["message"]


# Idempotency


async def test_a_repeated_key_makes_one_generation(simulator, client):
    key = {"Idempotency-Key": "d9bc7a6e-73cd"}
    first = await create(client, VALID, **key)
    again = await create(client, dict(reversed(VALID.items())), **key)
    other = await create(client, VALID, **{"Idempotency-Key": "D9BC7A6E-73CD"})

    assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])
    assert other.json()["id"] != first.json()["id"]
    assert len(simulator.generations) == 2


async def test_a_repeated_key_covers_forms(simulator, client):
    def post():
        return client.post(
            "/v2/generate",
            data={"model": "lipsync-2"},
            files={"video": ("a.mp4", b"x"), "audio": ("a.wav", b"y")},
            headers={"Idempotency-Key": "k"},
        )

    first, again = await post(), await post()

    assert again.json()["id"] == first.json()["id"]
    assert len(simulator.assets) == 2


async def test_a_key_with_another_request_is_409(simulator, client):
    key = {"Idempotency-Key": "k"}
    await create(client, VALID, **key)
    answer = await create(client, VALID | {"model": "sync-3"}, **key)

    assert answer.status_code == 409
    assert len(simulator.generations) == 1


@pytest.mark.parametrize("key", ["", "a b", "ü".encode().decode("latin-1"), "x" * 129])
async def test_a_malformed_key_is_400(simulator, client, key):
    answer = await client.post("/v2/generate", json=VALID, headers=[(b"Idempotency-Key", key.encode("latin-1"))])

    assert (answer.status_code, answer.json()["errorCode"]) == (400, "INVALID_IDEMPOTENCY_KEY")
    assert not simulator.generations


async def test_two_keys_are_400(client):
    answer = await client.post("/v2/generate", json=VALID, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")])

    assert answer.json()["errorCode"] == "INVALID_IDEMPOTENCY_KEY"


async def test_a_refused_request_uses_up_no_key(client):
    key = {"Idempotency-Key": "k"}
    refused = await create(client, VALID | {"model": "x"}, **key)

    assert refused.status_code == 400
    assert (await create(client, VALID, **key)).status_code == 201


# Waiting


async def test_a_long_poll_answers_as_soon_as_the_generation_ends(simulator, client):
    generation = simulator.add(processing_seconds=0.3)
    began = time.monotonic()
    answer = await client.get(f"/v2/generate/{generation.id}?wait=true&timeout=9")

    assert answer.json()["status"] == "COMPLETED"
    assert 0.2 < time.monotonic() - began < 3
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["x-sync-wait-mode"] == "long_poll"
    assert answer.headers["x-sync-wait-timeout-seconds"] == "9"


async def test_a_long_poll_that_times_out_shows_the_present_status(simulator, client):
    generation = simulator.add(status="PROCESSING")
    began = time.monotonic()
    answer = await client.get(f"/v2/generate/{generation.id}?wait=true&timeout=1")

    assert answer.json()["status"] == "PROCESSING"
    assert time.monotonic() - began >= 0.9


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("wait=true&timeout=0", "timeout"),
        ("wait=true&timeout=11", "timeout"),
        ("wait=true&timeout=x", "timeout"),
        ("wait=yes", "wait"),
        ("wait=true&include=progress", "include"),
    ],
)
async def test_a_wrong_wait_is_400_and_names_the_field(simulator, client, query, field):
    answer = await client.get(f"/v2/generate/{simulator.add().id}?{query}")

    assert (answer.status_code, answer.json()["field"]) == (400, field)


async def test_only_generate_waits(simulator, client):
    generation = simulator.add(status="PROCESSING")
    answer = await client.get(f"/v2/generations/{generation.id}?wait=true&timeout=1")

    assert "x-sync-wait-mode" not in answer.headers


async def test_a_long_poll_about_nothing_is_404_at_once(client):
    answer = await client.get("/v2/generate/11111111-1111-4111-8111-111111111111?wait=true")

    assert answer.status_code == 404


# Headers


@pytest.mark.parametrize("path", ["/v2/generations", "/v2/errors", "/nowhere", "/simulator/summary"])
async def test_each_answer_has_the_date(client, path):
    answer = await client.get(path)
    (date,) = answer.headers.get_list("date")

    assert abs(datetime.now(UTC) - parsedate_to_datetime(date)) < timedelta(seconds=3)
