"""After a run with every kind of trouble, no secret stands anywhere but where it belongs."""

import asyncio
import os
from pathlib import Path

import httpx
import redis.asyncio as redis

from service.settings import read_settings
from tests.conftest import API_KEY, API_TOKEN, http_client
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET, webhook

FAULTS = ["500", "401", "403-html", "invalid-json", "html", "drop", "422"]


def found(secrets: dict[str, str], text: str) -> list[str]:
    """Name the secrets that stand in *text*."""
    return [name for name, secret in secrets.items() if secret in text]


async def redis_content(url: str) -> str:
    """Dump every key and value, whatever its type."""
    async with redis.Redis.from_url(url) as client:
        keys = [key async for key in client.scan_iter()]
        return repr([(key, await client.dump(key)) for key in keys])


def process_titles(pid: int) -> str:
    """Return what `ps` shows of the process to everybody."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


async def answers_to_strangers(url: str) -> str:
    """Collect what anyone may read: pages, errors to bad requests, metrics, OpenAPI."""
    async with http_client(url) as client:
        requests = [
            client.get("/metrics"),
            client.get("/health/ready"),
            client.get("/schema/openapi.json"),
            client.get("/api/records"),
            client.get("/api/records", headers={"Authorization": "Bearer wrong-token-of-somebody"}),
            client.post("/webhooks/sync", content=b"{}", headers={"Sync-Signature": "t=1,v1=00"}),
            client.post("/webhooks/sync", content=b"\xff", headers=webhook(b"\xff").headers),
            client.delete("/webhooks/sync"),
        ]
        answers: list[httpx.Response] = await asyncio.gather(*requests)
    return "".join(f"{answer.headers}{answer.text}" for answer in answers)


async def test_no_secret_reaches_logs_redis_process_titles_errors_metrics_or_openapi(mayfly, simulator, redis_url):
    environment = {"MAYFLY_TTL": "1s", "MAYFLY_MIN_TTL": "1s", "MAYFLY_REDIS_URL": redis_url}
    service = await mayfly("up", SYNC_BASE_URL=simulator.url, **environment).start()
    troubled = [simulator.add(text_input=True, faults={"GET": [fault]}) for fault in FAULTS]
    troubled += [simulator.add(text_input=True, faults={"DELETE": [fault]}) for fault in FAULTS]
    waiting = simulator.add(text_input=True, webhook_url="https://hooks.example.com/sync?ttl=1h")
    tokens = [url.partition("token=")[2] for url in (waiting.body()["outputUrl"], troubled[0].body()["outputUrl"])]
    secrets = {"API key": API_KEY, "webhook secret": SECRET, "operator token": API_TOKEN, "script": "streng geheim"}
    secrets |= {f"token {number}": token for number, token in enumerate(tokens)}

    async with http_client(service.url) as client:
        for generation in [*troubled, waiting]:
            announcement = webhook(generation.notification())
            answer = await client.post("/webhooks/sync", content=announcement.body, headers=announcement.headers)
            assert answer.status_code == 202
    await eventually(lambda: len(service.logs("cleanup.deferred")) >= 3, seconds=30)
    places = {
        "log": service.output(),
        "Redis": await redis_content(redis_url),
        "process title": process_titles(service.pid),
        "answers": await answers_to_strangers(service.url),
    }

    assert all(len(secret) >= 5 for secret in secrets.values())
    assert str(waiting.id) in places["Redis"]
    assert {place: found(secrets, text) for place, text in places.items()} == {place: [] for place in places}


def test_settings_show_no_secret_in_their_repr():
    settings = read_settings(
        {
            "SYNC_API_KEY": API_KEY,
            "SYNC_WEBHOOK_SECRET": SECRET,
            "MAYFLY_API_TOKEN": API_TOKEN,
            "MAYFLY_DATABASE_URL": "postgresql://mayfly:hidden-password@db/mayfly",
            "MAYFLY_REDIS_URL": "rediss://:hidden-password@redis:6379",
        }
    )

    assert found({"a": API_KEY, "b": SECRET, "c": API_TOKEN, "d": "hidden-password"}, repr(settings)) == []


async def test_the_data_directory_is_for_its_owner_alone(mayfly, simulator, tmp_path):
    await mayfly("up", SYNC_BASE_URL=simulator.url, MAYFLY_DATA_DIR=str(tmp_path / "own")).start()

    modes = {name: os.stat(tmp_path / "own" / name).st_mode & 0o777 for name in (".", "redis", "redis/redis.sock")}
    assert modes == {".": 0o700, "redis": 0o700, "redis/redis.sock": 0o600}
