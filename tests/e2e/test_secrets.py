"""After a run with all kinds of failures, no secret is in logs, Redis, process titles or answers."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import redis.asyncio as redis

from service.config.settings import read_settings
from tests.conftest import API_KEY, API_TOKEN, http_client
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET, notification, webhook

FAULTS = ["500", "401", "403-html", "invalid-json", "html", "drop", "422", "non-utf8", "wrong-id"]
SCRIPT = "streng geheimes Drehbuch 4711"
INPUT_URL = "https://cdn.example.com/in/geheime-quelle-0815.mp4"
INPUT_TOKEN = "eingangs-marke-2342"
INPUT = [
    {"type": "video", "url": f"{INPUT_URL}?token={INPUT_TOKEN}"},
    {"type": "text", "provider": {"name": "elevenlabs", "voiceId": "EXAVITQu4vr4", "script": SCRIPT}},
]
INTAKE_TOKEN = "marke-der-anwendung-2342"
APP = {"Authorization": f"Bearer {INTAKE_TOKEN}"}
OPERATOR = {"Authorization": f"Bearer {API_TOKEN}"}


def found(secrets: dict[str, str], text: str) -> list[str]:
    """Name the secrets that stand in *text*."""
    return [name for name, secret in secrets.items() if secret in text]


async def redis_content(client: redis.Redis) -> str:
    """Read every key and its value, whatever its type: a dump would be compressed."""
    content = []
    async for key in client.scan_iter():
        match await client.type(key):
            case b"string":
                value = await client.get(key)
            case b"zset":
                value = await client.zrange(key, 0, -1, withscores=True)
            case b"hash":
                value = await client.hgetall(key)  # type: ignore[misc] # the library's types are of both worlds
            case b"set":
                value = await client.smembers(key)  # type: ignore[misc]
            case b"list":
                value = await client.lrange(key, 0, -1)  # type: ignore[misc]
            case b"none":
                continue  # a job that has just ended; what it was is among the commands
            case other:
                raise AssertionError(f"a key of type {other!r}")
        content.append((key, value))
    return repr(content)


@contextlib.asynccontextmanager
async def monitored(client: redis.Redis) -> AsyncIterator[list[str]]:
    """Note every command that Redis is sent until the block ends: what was there for a moment is seen as well."""
    commands: list[str] = []

    async def listen() -> None:
        async with client.monitor() as monitor:
            while True:
                commands.append(str((await monitor.next_command())["command"]))

    task = asyncio.create_task(listen())
    try:
        yield commands
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def process_titles(pid: int) -> str:
    """Return what `ps` shows to everybody of the process and of those that it started."""
    pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return "\n".join(
        Path(f"/proc/{one}/{name}").read_text().replace("\0", " ") for one in pids for name in ("cmdline", "comm")
    )


async def answers_to_strangers(url: str) -> str:
    """Collect what anyone may read: pages, metrics, OpenAPI, and what requests of every wrong kind are answered."""
    told = notification(input=INPUT)
    body, nameless = json.dumps(told).encode(), json.dumps(told | {"id": ""}).encode()
    headers = webhook(body).headers
    huge = body + b" " * 2**20
    async with http_client(url) as client:
        requests = [
            *(client.get(path) for path in ("/metrics", "/health/ready", "/health/live", "/schema/openapi.json")),
            *(client.get(path) for path in ("/", "/schema", "/nowhere", "/api/records")),
            client.get("/api/records", headers={"Authorization": "Bearer wrong-token-of-another-user"}),
            client.post("/webhooks/sync", content=body, headers={"Sync-Signature": "t=1,v1=00"}),
            client.post("/webhooks/sync", content=body, headers=headers | {"Sync-Signature": f"t=1,v1={'0' * 64}"}),
            client.post("/webhooks/sync", content=body, headers=headers | {"Content-Type": "text/plain"}),
            client.post("/webhooks/sync", content=nameless, headers=webhook(nameless).headers),
            client.post("/webhooks/sync", content=body[:-1], headers=webhook(body[:-1]).headers),
            client.post("/webhooks/sync", content=huge, headers=webhook(huge).headers),
            client.post("/webhooks/sync", content=b"\xff", headers=webhook(b"\xff").headers),
            client.delete("/webhooks/sync"),
        ]
        answers: list[httpx.Response] = await asyncio.gather(*requests)
    assert {401, 400, 405, 413, 415} <= {answer.status_code for answer in answers}
    return "".join(f"{answer.headers}{answer.text}" for answer in answers)


async def errors_of_the_operator(url: str, generation_id: str) -> str:
    """Collect what an operator's own mistakes are answered; records themselves are theirs to read."""
    async with http_client(url) as client:
        answers = [
            await client.get("/api/records/nobody", headers=OPERATOR),
            await client.get("/api/records", params={"cursor": "none", "limit": 5}, headers=OPERATOR),
            await client.post(f"/api/records/{generation_id}/release", json={"graceSeconds": -1}, headers=OPERATOR),
            await client.post(f"/api/records/{generation_id}/explode", headers=OPERATOR),
            await client.post("/api/pause", json={"reason": 7}, headers=OPERATOR),
            await client.post("/api/records", json={"id": generation_id, "ttl": "7"}, headers=APP),
            await client.get("/api/records", headers=APP),
        ]
    assert all(400 <= answer.status_code < 500 for answer in answers)
    return "".join(f"{answer.headers}{answer.text}" for answer in answers)


async def test_no_secret_reaches_logs_redis_process_titles_errors_metrics_or_openapi(mayfly, simulator, tmp_path):
    # With the Redis that it starts itself, whose title is to be seen, too.
    data = tmp_path / "d"
    environment = {"MAYFLY_TTL": "1s", "MAYFLY_MIN_TTL": "1s", "MAYFLY_DATA_DIR": str(data)}
    environment["MAYFLY_INTAKE_TOKEN"] = INTAKE_TOKEN
    service = await mayfly("up", SYNC_BASE_URL=simulator.url, **environment).start()
    troubled = [
        simulator.add(input=INPUT, faults={method: [fault]}) for fault in FAULTS for method in ("GET", "DELETE")
    ]
    trouble = {(fault, method) for fault in FAULTS for method in ("GET", "DELETE")}
    waiting = simulator.add(
        input=INPUT, webhook_url=f"https://hooks.example.com/webhooks/sync?token={INPUT_TOKEN}&ttl=1h"
    )
    announced = [webhook(one.notification()) for one in (*troubled, waiting)]
    secrets = {"API key": API_KEY, "webhook secret": SECRET, "operator token": API_TOKEN, "app's token": INTAKE_TOKEN}
    sent = {"script": SCRIPT, "input URL": INPUT_URL, "input token": INPUT_TOKEN}
    sent |= {f"output token {number}": one.token for number, one in enumerate((*troubled, waiting))}

    async with http_client(service.url) as client, redis.Redis.from_url(f"unix://{data}/redis/redis.sock") as server:
        async with monitored(server) as commands:
            for announcement in announced:
                answer = await client.post("/webhooks/sync", content=announcement.body, headers=announcement.headers)
                assert answer.status_code == 202

            async def is_all_trouble_met() -> bool:
                await client.post("/api/resume", headers=OPERATOR)  # a 401 has paused all
                return {(call.fault, call.method) for call in simulator.calls} >= trouble

            await eventually(is_all_trouble_met, seconds=30)
            await eventually(lambda: len(service.logs("cleanup.deferred")) >= len(FAULTS), seconds=5)
            places = {
                "answers": await answers_to_strangers(service.url),
                "errors": await errors_of_the_operator(service.url, waiting.id),
                "Redis": await redis_content(server),
                "process titles": process_titles(service.pid),
                "log": service.output(),
            }
        places["commands to Redis"] = "\n".join(commands)

    # What is looked for was there to be found, and where it was looked for is something.
    bodies = b"".join(announcement.body for announcement in announced).decode()
    assert found(sent, bodies) == list(sent)
    assert all(call.has_key for call in simulator.calls)
    assert str(waiting.id) in places["Redis"]
    assert str(waiting.id) in places["commands to Redis"]
    assert "redis" in places["process titles"]
    assert "cleanup.deferred" in places["log"]
    assert "webhook.not_stored" in places["log"]
    assert {place: found(secrets | sent, text) for place, text in places.items()} == {place: [] for place in places}


def test_settings_show_no_secret_in_their_repr():
    settings = read_settings(
        {
            "SYNC_API_KEY": API_KEY,
            "SYNC_WEBHOOK_SECRET": SECRET,
            "MAYFLY_API_TOKEN": API_TOKEN,
            "MAYFLY_INTAKE_TOKEN": INTAKE_TOKEN,
            "MAYFLY_DATABASE_URL": "postgresql://mayfly:hidden-password@db/mayfly",
            "MAYFLY_REDIS_URL": "rediss://:hidden-password@redis:6379",
        }
    )

    assert (
        found({"a": API_KEY, "b": SECRET, "c": API_TOKEN, "e": INTAKE_TOKEN, "d": "hidden-password"}, repr(settings))
        == []
    )


async def test_the_data_directory_is_for_its_owner_alone(mayfly, simulator, tmp_path):
    await mayfly("up", SYNC_BASE_URL=simulator.url, MAYFLY_DATA_DIR=str(tmp_path / "own")).start()

    modes = {name: os.stat(tmp_path / "own" / name).st_mode & 0o777 for name in (".", "redis", "redis/redis.sock")}
    assert modes == {".": 0o700, "redis": 0o700, "redis/redis.sock": 0o600}
