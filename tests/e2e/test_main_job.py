"""The main job on real processes: a webhook leads to a deletion, whatever is killed in between."""

import asyncio
import sqlite3
import time
from datetime import datetime

import httpx
import pytest

from service.ledger.opening import open_database
from tests.conftest import API_TOKEN, http_client
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET, webhook

OPERATOR = {"Authorization": f"Bearer {API_TOKEN}"}
# What is not set here is as a user would find it.
SHORT = {"MAYFLY_TTL": "2s", "MAYFLY_MIN_TTL": "1s"}


def announced(simulator, **options):
    """Add a generation and return it with its signed webhook."""
    generation = simulator.add(**options)
    body = generation.notification()
    return generation, webhook(body)


async def post(url, announcement):
    async with http_client(url) as client:
        return await client.post("/webhooks/sync", content=announcement.body, headers=announcement.headers)


async def record_of(url, generation):
    async with http_client(url) as client:
        answer = await client.get(f"/api/records/{generation.id}", headers=OPERATOR)
    return answer.json() if answer.status_code == 200 else None


async def record_once(state, url, generation, *, seconds=30.0):
    """Return the record once it is in *state*."""

    async def look():
        record = await record_of(url, generation)
        return record if record and record["state"] == state else None

    return await eventually(look, seconds=seconds)


def assert_complete(record, generation):
    """Hold everything that the API showed against the record."""
    shown = {name: value for name, value in generation.body().items() if value is not None}
    assert {name: record[name] for name in shown} == shown


async def test_a_generation_is_deleted_once_due_and_its_record_is_complete(mayfly, simulator):
    service = await mayfly("up", SYNC_BASE_URL=simulator.url, **SHORT).start()
    generation, announcement = announced(simulator, text_input=True, output_file_name="take 1", project_id="p-1")

    answer = await post(service.url, announcement)
    record = await record_once("deleted", service.url, generation)

    assert answer.status_code == 202
    assert answer.json()["state"] == "scheduled"
    assert_complete(record, generation)
    assert record["synthesizedAudioUrl"]
    assert (record["outcome"], record["receipt"]["status"]) == ("deleted", 200)
    assert [event["move"] for event in record["events"]] == ["receive", "claim", "confirm"]
    deleted_at = simulator.deleted[generation.id]
    assert max(datetime.fromisoformat(record[name]) for name in ("dueAt", "copiedAt")) <= deleted_at
    assert await service.terminate() == 0
    assert SECRET not in service.output()
    assert "token=" not in service.output()


async def test_a_service_killed_before_the_due_time_deletes_after_its_restart(mayfly, simulator):
    service = await mayfly("up", SYNC_BASE_URL=simulator.url, MAYFLY_TTL="8s", MAYFLY_MIN_TTL="1s").start()
    generations = [announced(simulator, output_file_name=f"take {number}") for number in range(5)]
    for _, announcement in generations:
        assert (await post(service.url, announcement)).status_code == 202

    await service.kill9()
    assert simulator.deleted == {}
    await service.restart()
    records = [await record_once("deleted", service.url, generation) for generation, _ in generations]

    for record, (generation, _) in zip(records, generations, strict=True):
        assert_complete(record, generation)
        assert record["attempts"] == 1
    assert len(simulator.deleted) == 5


async def test_a_service_killed_during_a_delete_finds_the_generation_gone(mayfly, simulator, tmp_path):
    service = await mayfly("up", SYNC_BASE_URL=simulator.url, **SHORT).start()
    generation, announcement = announced(simulator, output_file_name="take 1", faults={"DELETE": ["hold-after"]})
    await post(service.url, announcement)
    await eventually(lambda: generation.deleted_at is not None, seconds=20)

    await service.kill9()
    end_leases(tmp_path / "data" / "ledger.db")
    await service.restart()
    record = await record_once("deleted", service.url, generation)

    assert_complete(record, generation)
    assert record["outcome"] == "deleted"
    assert record["receipt"]["detail"] == "answer lost, confirmed by a later 404"
    assert [event["move"] for event in record["events"]] == ["receive", "claim", "lose_lease", "claim", "confirm"]


def end_leases(ledger):
    """Let every lease end now: nobody wants to wait a minute for it."""
    with sqlite3.connect(ledger) as connection:
        connection.execute("UPDATE records SET wake_at = 1 WHERE state = 'deleting'")
    connection.close()


async def test_api_and_worker_run_as_two_processes_on_one_redis_and_postgresql(
    mayfly, simulator, postgres_url, redis_url
):
    shared = {
        "SYNC_BASE_URL": simulator.url,
        "MAYFLY_DATABASE_URL": postgres_url.render_as_string(hide_password=False),
        "MAYFLY_REDIS_URL": redis_url,
        **SHORT,
    }
    api, worker = mayfly("api", **shared, SYNC_API_KEY=""), mayfly("worker", **shared, SYNC_WEBHOOK_SECRET="")
    await asyncio.gather(api.start(), worker.start())
    generation, announcement = announced(simulator, output_file_name="take 1", faults={"DELETE": ["500"]})

    await post(api.url, announcement)
    record = await record_once("deleted", api.url, generation)

    assert_complete(record, generation)
    assert record["attempts"] == 2
    async with open_database(postgres_url) as database:
        states = await database.read(lambda c: c.exec_driver_sql("SELECT state FROM records").scalars().all())
    assert states == ["deleted"]
    assert (await api.terminate(), await worker.terminate()) == (0, 0)


async def test_a_worker_that_starts_later_deletes_what_is_due(mayfly, simulator, postgres_url, redis_url):
    shared = {
        "SYNC_BASE_URL": simulator.url,
        "MAYFLY_DATABASE_URL": postgres_url.render_as_string(hide_password=False),
        "MAYFLY_REDIS_URL": redis_url,
        **SHORT,
    }
    api = await mayfly("api", **shared).start()
    generation, announcement = announced(simulator)
    await post(api.url, announcement)
    await asyncio.sleep(2.5)
    assert (await record_of(api.url, generation))["state"] == "scheduled"

    await mayfly("worker", **shared).start()

    assert_complete(await record_once("deleted", api.url, generation), generation)


async def test_a_pause_survives_a_restart(mayfly, simulator):
    environment = {"SYNC_BASE_URL": simulator.url, **SHORT}
    service = await mayfly("up", **environment).start()
    assert await run(mayfly("pause --reason audit", **environment)) == 0
    generation, announcement = announced(simulator)
    await post(service.url, announcement)

    await service.terminate()
    await service.restart()
    await asyncio.sleep(3)
    assert (await record_of(service.url, generation))["state"] == "scheduled"
    assert await run(mayfly("resume", **environment)) == 0

    await record_once("deleted", service.url, generation)


async def run(command):
    command.spawn()
    return await command.wait()


@pytest.mark.parametrize(
    ("command", "environment", "code", "named"),
    [
        ("up", {"SYNC_WEBHOOK_SECRET": ""}, 2, "SYNC_WEBHOOK_SECRET"),
        ("up", {"SYNC_API_KEY": ""}, 2, "SYNC_API_KEY"),
        ("api", {"SYNC_WEBHOOK_SECRET": "secret-without-its-prefix"}, 2, "SYNC_WEBHOOK_SECRET"),
        ("worker", {"SYNC_API_KEY": ""}, 2, "SYNC_API_KEY"),
        ("up", {"MAYFLY_TTL": "24"}, 2, "MAYFLY_TTL"),
        ("up", {"MAYFLY_DRYRUN": "true"}, 2, "MAYFLY_DRY_RUN"),
        ("worker", {"MAYFLY_DATABASE_URL": "postgresql://mayfly:hunter2@127.0.0.1:1/mayfly"}, 1, "MAYFLY_DATABASE_URL"),
        ("api", {"MAYFLY_DATABASE_URL": "postgresql://mayfly:hunter2@127.0.0.1:1/mayfly"}, 1, "MAYFLY_DATABASE_URL"),
        ("up", {"MAYFLY_DATA_DIR": "/proc/nowhere"}, 1, "/proc/nowhere"),
    ],
)
async def test_a_start_that_fails_prints_one_line_that_names_the_variable(mayfly, command, environment, code, named):
    process = mayfly(command, **environment)

    assert await run(process) == code
    assert len(process.output().splitlines()) == 1
    assert process.output().startswith("mayfly: ")
    assert named in process.output()
    assert "hunter2" not in process.output()
    assert "without-its-prefix" not in process.output()


@pytest.mark.parametrize(("side", "missing"), [("up", "SYNC_API_KEY"), ("api", "SYNC_WEBHOOK_SECRET")])
async def test_a_missing_variable_is_named(mayfly, side, missing):
    process = mayfly(side, SYNC_API_KEY="", SYNC_WEBHOOK_SECRET="")

    assert await run(process) == 2
    assert [line.split()[1] for line in process.output().splitlines()] == [missing]


async def test_missing_tables_are_reported_with_the_command_to_run(mayfly, postgres):
    url = await postgres.empty()
    process = mayfly("worker", MAYFLY_DATABASE_URL=url.render_as_string(hide_password=False))

    assert await run(process) == 1
    assert "mayfly migrate" in process.output()
    await postgres.drop(url)


async def test_a_port_in_use_is_reported_in_one_line(mayfly, simulator):
    port = httpx.URL(simulator.url).port
    process = mayfly("up", MAYFLY_PORT=str(port))

    assert await run(process) == 1
    told = [line for line in process.output().splitlines() if not line.startswith("{")]
    assert len(told) == 1
    assert "MAYFLY_PORT" in told[0]


async def test_the_service_ends_soon_after_sigterm(mayfly, simulator):
    service = await mayfly("up", SYNC_BASE_URL=simulator.url).start()
    began = time.monotonic()

    assert await service.terminate() == 0
    assert time.monotonic() - began < 10
