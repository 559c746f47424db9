"""The commands that try things out, on real sockets: send, simulate, doctor."""

import asyncio
import json
import signal
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import uuid4

import httpx
import pytest

from service.commands.doctor import _check_clock, _judge_answer
from tests.conftest import API_TOKEN, http_client
from tests.support.commands import command
from tests.support.ledger import HOUR, store
from tests.support.redis import redis_server
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET, webhook

MAYFLY = [sys.executable, "-c", "from service.cli import main; main()"]
_SECONDS = 30


async def mayfly(*arguments: str, **options):
    """Run a command; return its exit code, output and errors."""
    result = await asyncio.to_thread(command, *arguments, **options)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
async def intake(sqlite_database, open_client):
    """The URL of a web side that takes webhooks."""
    async with open_client(sqlite_database) as client:
        yield str(client.base_url.join("/webhooks/sync"))


# send


@pytest.mark.parametrize(
    ("status", "state"),
    [("COMPLETED", "scheduled"), ("FAILED", "scheduled"), ("REJECTED", "scheduled"), ("PROCESSING", "ignored")],
)
async def test_a_sample_is_signed_and_taken(intake, status, state):
    wanted = str(uuid4())

    code, output, _ = await mayfly(
        "send", "--status", status, "--id", wanted, "--url", intake, SYNC_WEBHOOK_SECRET=SECRET
    )

    assert code == 0
    assert (json.loads(output)["id"], json.loads(output)["state"]) == (wanted, state)


async def test_wishes_in_the_url_are_the_samples_own(intake):
    _, output, _ = await mayfly("send", "--url", f"{intake}?ttl=forever", SYNC_WEBHOOK_SECRET=SECRET)

    assert json.loads(output)["state"] == "kept"


async def test_it_sends_to_the_service_that_is_set_unless_told_otherwise(intake):
    port = str(httpx.URL(intake).port)

    code, _, _ = await mayfly("send", SYNC_WEBHOOK_SECRET=SECRET, MAYFLY_HOST="0.0.0.0", MAYFLY_PORT=port)

    assert code == 0


async def test_a_body_is_sent_as_it_is(intake, tmp_path):
    one, other = webhook(error="Größe").body, webhook().body
    (tmp_path / "body.json").write_bytes(one)

    from_file = await mayfly("send", "--url", intake, "--file", str(tmp_path / "body.json"), SYNC_WEBHOOK_SECRET=SECRET)
    from_stdin = await mayfly("send", "--url", intake, "--file", "-", stdin=other, SYNC_WEBHOOK_SECRET=SECRET)

    assert [json.loads(output)["id"] for _, output, _ in (from_file, from_stdin)] == [
        json.loads(body)["id"] for body in (one, other)
    ]


@pytest.mark.parametrize(
    ("arguments", "secret", "status"),
    [
        ((), "whsec_of_somebody_else_012", "401"),
        (("--at", "2020-01-01T00:00:00Z"), SECRET, "401"),
        (("--file", "-"), SECRET, "400"),
    ],
)
async def test_a_refusal_is_printed_and_told_by_the_exit_code(intake, arguments, secret, status):
    code, output, errors = await mayfly("send", "--url", intake, *arguments, stdin=b"{", SYNC_WEBHOOK_SECRET=secret)

    assert code == 1
    assert errors.splitlines()[-1].startswith(status)  # behind what the web side of this test logs
    assert json.loads(output)["status"] == int(status)


async def test_a_service_that_is_away_is_one_line():
    code, output, errors = await mayfly("send", "--url", "http://127.0.0.1:1/webhooks/sync", SYNC_WEBHOOK_SECRET=SECRET)

    assert (code, output, len(errors.splitlines())) == (1, "", 1)


@pytest.mark.parametrize("at", ["yesterday", "2026-12-31T00:00:00"])
async def test_a_time_that_cannot_be_read_is_a_wrong_use(at):
    code, _, errors = await mayfly("send", "--at", at, SYNC_WEBHOOK_SECRET=SECRET)

    assert code == 2
    assert "--at" in errors


# simulate


@asynccontextmanager
async def simulating(*arguments: str):
    """Run the simulator as a process and yield what it tells the user to set."""
    process = await asyncio.create_subprocess_exec(
        *(*MAYFLY, "simulate", "--port", "0", *arguments), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    told = {}
    try:
        async with asyncio.timeout(_SECONDS):
            while "SYNC_WEBHOOK_SECRET" not in told:
                words = (await process.stdout.readline()).decode().split()
                if words[:1] == ["export"]:
                    name, _, value = words[1].partition("=")
                    told[name] = value
        yield told
    finally:
        process.send_signal(signal.SIGINT)
        await process.communicate()


async def test_what_the_simulator_tells_to_set_is_all_that_mayfly_needs(tmp_path):
    async with simulating() as told:
        code, output, _ = await mayfly("doctor", "--json", MAYFLY_DATA_DIR=str(tmp_path / "data"), **told)

    parts = {finding["part"]: finding["status"] for finding in json.loads(output)["findings"]}
    assert code == 0
    assert (parts["webhook secret"], parts["API key"]) == ("ok", "ok")


async def test_the_simulator_makes_samples_and_announces_them(sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        url = str(client.base_url.join("/webhooks/sync"))
        sample = ("--count", "2", "--every", "0.1", "--processing", "0.1", "--webhook-url", url)
        async with simulating(*sample, "--webhook-secret", SECRET) as told:
            headers = {"x-api-key": told["SYNC_API_KEY"]}
            bearer = {"Authorization": f"Bearer {API_TOKEN}"}

            async def both():
                items = (await client.get("/api/records", headers=bearer)).json()["items"]
                return items if len(items) == 2 else None

            items = await eventually(both, seconds=_SECONDS)
            async with http_client(told["SYNC_BASE_URL"]) as api:
                made = (await api.get("/v2/generations", headers=headers)).json()

    assert {item["id"] for item in items} == {generation["id"] for generation in made}


async def test_the_simulator_is_for_this_machine_alone():
    code, output, errors = await mayfly("simulate", "--host", "0.0.0.0", "--port", "0")

    assert (code, output, len(errors.splitlines())) == (1, "", 1)
    assert "--allow-remote" in errors


async def test_a_port_that_is_taken_is_one_line(simulator):
    code, _, errors = await mayfly("simulate", "--port", str(httpx.URL(simulator.url).port))

    assert (code, len(errors.splitlines())) == (1, 1)
    assert "--port" in errors


# doctor


async def examined(tmp_path, simulator, **environment: str):
    """Run the doctor; return the exit code and the findings by part."""
    defaults = {
        "SYNC_BASE_URL": simulator.url,
        "SYNC_API_KEY": simulator.api_key,
        "SYNC_WEBHOOK_SECRET": SECRET,
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
    }
    code, output, _ = await mayfly("doctor", "--json", **defaults | environment)
    return code, {finding["part"]: finding for finding in json.loads(output)["findings"]}


async def test_a_fresh_machine_is_fit_and_stays_as_it_was(tmp_path, simulator):
    code, found = await examined(tmp_path, simulator)

    assert code == 0
    assert {part: finding["status"] for part, finding in found.items()} == {
        "webhook secret": "ok",
        "data dir": "ok",
        "ledger": "ok",
        "redis": "ok",
        "API key": "ok",
        "organisation": "ok",
        "clock": "warning",  # the simulator tells no date
    }
    assert list(tmp_path.iterdir()) == []
    assert [call.operation for call in simulator.calls] == ["LIST", "SECRET"]


async def test_postgresql_and_redis_that_are_fit_are_told(tmp_path, simulator, postgres_url, redis_url):
    url = postgres_url.render_as_string(hide_password=False)

    with redis_server(tmp_path, appendonly="yes") as durable:
        _, found = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=url, MAYFLY_REDIS_URL=durable)
    _, less = await examined(tmp_path, simulator, MAYFLY_REDIS_URL=redis_url)

    assert (found["ledger"]["status"], found["redis"]["status"]) == ("ok", "ok")
    assert found["ledger"]["detail"].startswith("PostgreSQL")
    assert less["redis"]["status"] == "warning"
    assert "appendonly" in less["redis"]["detail"]


@pytest.mark.parametrize(
    ("environment", "part", "named"),
    [
        ({"SYNC_API_KEY": "sk-another"}, "API key", "SYNC_API_KEY"),
        ({"SYNC_API_KEY": ""}, "API key", "SYNC_API_KEY"),
        ({"SYNC_WEBHOOK_SECRET": ""}, "webhook secret", "SYNC_WEBHOOK_SECRET"),
        ({"SYNC_BASE_URL": "http://127.0.0.1:1"}, "API key", "SYNC_BASE_URL"),
        ({"MAYFLY_REDIS_URL": "redis://127.0.0.1:1"}, "redis", "MAYFLY_REDIS_URL"),
        ({"MAYFLY_DATABASE_URL": "postgresql://x:hunter2@127.0.0.1:1/x"}, "ledger", "MAYFLY_DATABASE_URL"),
        ({"MAYFLY_DATA_DIR": "/etc/passwd/data"}, "data dir", "MAYFLY_DATA_DIR"),
    ],
)
async def test_what_fails_is_named_with_the_variable_and_the_rest_is_looked_at(
    tmp_path, simulator, environment, part, named
):
    code, found = await examined(tmp_path, simulator, **environment)

    assert code == 1
    assert [name for name, finding in found.items() if finding["status"] == "failing"] == [part]
    assert named in found[part]["detail"]
    assert "hunter2" not in found[part]["detail"]


async def test_a_secret_of_another_organisation_is_failing(tmp_path, simulator):
    simulator.webhook_secret = "whsec_of_another_organisation"
    code, found = await examined(tmp_path, simulator)

    assert (code, found["organisation"]["status"]) == (1, "failing")
    assert "another_organisation" not in str(found)


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (402, b"{}"), (403, b""), (404, b"{}"), (301, b"")])
def test_what_is_not_the_api_or_does_not_take_the_key_is_failing(status, body):
    assert _judge_answer(status, body).status == "failing"
    assert _judge_answer(200, b"[]").status == "ok"


async def test_deletions_that_are_late_are_failing(tmp_path, simulator, sqlite_database, sqlite_url):
    await store(sqlite_database, due_in=-HOUR)
    code, found = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=f"sqlite:///{sqlite_url.database}")

    assert (code, found["deletions"]["status"]) == (1, "failing")
    assert "60 min overdue" in found["deletions"]["detail"]


async def test_a_redis_that_would_drop_jobs_is_failing(tmp_path, simulator):
    with redis_server(tmp_path, maxmemory_policy="allkeys-lru") as url:
        code, found = await examined(tmp_path, simulator, MAYFLY_REDIS_URL=url)

    assert (code, found["redis"]["status"]) == (1, "failing")
    assert "noeviction" in found["redis"]["detail"]


async def test_tables_that_are_missing_and_a_dry_run_are_told(tmp_path, simulator, postgres):
    url = await postgres.empty()
    text = url.render_as_string(hide_password=False)
    code, found = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=text, MAYFLY_DRY_RUN="true")
    await postgres.drop(url)

    assert code == 1
    assert "mayfly migrate" in found["ledger"]["detail"]
    assert found["dry run"]["status"] == "warning"


@pytest.mark.parametrize(("off", "status"), [(0, "ok"), (120, "warning"), (3600, "failing")])
def test_the_clock_is_held_against_the_api(off, status):
    theirs = format_datetime(datetime.now(UTC) + timedelta(seconds=off), usegmt=True)

    assert [finding.status for finding in _check_clock(theirs, timedelta(minutes=5))] == [status]
