"""The commands send, simulate and doctor, on real sockets."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import URL
from structlog.testing import capture_logs

from service.commands.account_checks import check_clock, judge_page
from service.config.settings import read_settings
from service.core.secret import Secret
from service.ledger import heartbeats
from service.ledger.opening import open_database
from service.sync.organisation import (
    OTHER_ORGANISATION,
    check_organisations,
    is_same_organisation,
    warn_if_not_compared,
)
from tests.conftest import API_TOKEN, http_client
from tests.support.commands import command
from tests.support.ledger import HOUR, claim_one, given_up, settle, store
from tests.support.ports import free_port
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
async def test_a_sample_webhook_is_signed_and_accepted(intake, status, state):
    wanted = str(uuid4())

    code, output, _ = await mayfly(
        "send", "--status", status, "--id", wanted, "--url", intake, SYNC_WEBHOOK_SECRET=SECRET
    )

    assert code == 0
    assert (json.loads(output)["id"], json.loads(output)["state"]) == (wanted, state)


async def test_overrides_in_the_url_apply_to_the_sample(intake):
    _, output, _ = await mayfly("send", "--url", f"{intake}?ttl=forever", SYNC_WEBHOOK_SECRET=SECRET)

    assert json.loads(output)["state"] == "kept"


async def test_send_uses_the_configured_host_and_port_by_default(intake):
    port = str(httpx.URL(intake).port)

    code, _, _ = await mayfly("send", SYNC_WEBHOOK_SECRET=SECRET, MAYFLY_HOST="0.0.0.0", MAYFLY_PORT=port)

    assert code == 0


async def test_a_body_from_a_file_is_sent_unchanged(intake, tmp_path):
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
        ((), "whsec_of_another_account_012", "401"),
        (("--at", "2020-01-01T00:00:00Z"), SECRET, "401"),
        (("--file", "-"), SECRET, "400"),
    ],
)
async def test_a_refusal_is_printed_and_sets_the_exit_code(intake, arguments, secret, status):
    code, output, errors = await mayfly("send", "--url", intake, *arguments, stdin=b"{", SYNC_WEBHOOK_SECRET=secret)

    assert code == 1
    assert errors.splitlines()[-1].startswith(status)  # after the log lines of this test's web side
    assert json.loads(output)["status"] == int(status)


async def test_an_unreachable_service_is_reported_in_one_line():
    code, output, errors = await mayfly("send", "--url", "http://127.0.0.1:1/webhooks/sync", SYNC_WEBHOOK_SECRET=SECRET)

    assert (code, output, len(errors.splitlines())) == (1, "", 1)


@pytest.mark.parametrize("at", ["yesterday", "2026-12-31T00:00:00"])
async def test_an_invalid_time_is_a_usage_error(at):
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


async def test_the_simulator_prints_all_variables_that_mayfly_needs(tmp_path):
    async with simulating() as told:
        code, output, _ = await mayfly("doctor", "--json", MAYFLY_DATA_DIR=str(tmp_path / "data"), **told)

    parts = {finding["part"]: finding["status"] for finding in json.loads(output)["findings"]}
    assert code == 0
    assert (parts["webhook secret"], parts["API key"]) == ("ok", "ok")


async def test_the_simulator_makes_samples_and_sends_their_webhooks(sqlite_database, open_client):
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


async def test_the_simulator_listens_on_loopback_only():
    code, output, errors = await mayfly("simulate", "--host", "0.0.0.0", "--port", "0")

    assert (code, output, len(errors.splitlines())) == (1, "", 1)
    assert "--allow-remote" in errors


async def test_a_port_in_use_is_reported_in_one_line(simulator):
    code, _, errors = await mayfly("simulate", "--port", str(httpx.URL(simulator.url).port))

    assert (code, len(errors.splitlines())) == (1, 1)
    assert "--port" in errors


# doctor


async def examined(tmp_path, simulator, *options: str, **environment: str):
    """Run the doctor; return the exit code and the findings by part."""
    defaults = {
        "SYNC_BASE_URL": simulator.url,
        "SYNC_API_KEY": simulator.api_key,
        "SYNC_WEBHOOK_SECRET": SECRET,
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "MAYFLY_PORT": str(free_port()),
    }
    code, output, _ = await mayfly("doctor", "--json", *options, **defaults | environment)
    return code, {finding["part"]: finding for finding in json.loads(output)["findings"]}


async def test_doctor_passes_on_a_fresh_machine_and_changes_nothing(tmp_path, simulator):
    code, found = await examined(tmp_path, simulator)

    assert code == 0
    assert {part: finding["status"] for part, finding in found.items()} == {
        "webhook secret": "ok",
        "data dir": "ok",
        "ledger": "ok",
        "redis": "ok",
        "API key": "ok",
        "organisation": "ok",
        "clock": "ok",
        "service": "ok",  # not started yet
    }
    assert found["data dir"]["detail"] == f"{tmp_path}/data, does not exist yet: the first start makes it"
    assert list(tmp_path.iterdir()) == []
    assert [call.operation for call in simulator.calls] == ["LIST", "SECRET"]


async def test_doctor_passes_with_postgresql_and_redis(tmp_path, simulator, postgres_url, redis_url):
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
        ({"SYNC_BASE_URL": "http://127.0.0.1:1"}, "API key", "SYNC_BASE_URL"),
        ({"MAYFLY_REDIS_URL": "redis://127.0.0.1:1"}, "redis", "MAYFLY_REDIS_URL"),
        ({"MAYFLY_DATABASE_URL": "postgresql://x:hunter2@127.0.0.1:1/x"}, "ledger", "MAYFLY_DATABASE_URL"),
        ({"MAYFLY_DATA_DIR": "/etc/passwd/data"}, "data dir", "MAYFLY_DATA_DIR"),
    ],
)
async def test_doctor_names_the_variable_of_each_failure_and_continues(tmp_path, simulator, environment, part, named):
    code, found = await examined(tmp_path, simulator, **environment)

    assert code == 1
    assert [name for name, finding in found.items() if finding["status"] == "failing"] == [part]
    assert named in found[part]["detail"]
    assert "hunter2" not in found[part]["detail"]


@pytest.mark.parametrize("side", ["up", "worker"])
async def test_a_key_of_another_organisation_refuses_to_start_in_one_sentence(tmp_path, simulator, side):
    simulator.webhook_secret = "whsec_of_another_organisation"
    environment = {
        "SYNC_BASE_URL": simulator.url,
        "SYNC_API_KEY": simulator.api_key,
        "SYNC_WEBHOOK_SECRET": SECRET,
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
    }
    ended = await asyncio.to_thread(
        subprocess.run,
        [*MAYFLY, side],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"mayfly: {OTHER_ORGANISATION}; check SYNC_WEBHOOK_SECRET and SYNC_API_KEY\n"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b'{"secret":"whsec_a"}', True),
        (200, b'{"secret":"whsec_b","createdAt":null}', True),
        (200, b'{"secret":"whsec_c"}', False),
        (200, b'{"secret":"whsec_c****"}', None),
        (200, b'{"secret":null}', None),
        (200, b"{}", None),
        (200, b"[]", None),
        (200, b"<html>", None),
        (200, b"\xff", None),
        (401, b'{"secret":"whsec_c"}', None),
        (404, b"", None),
        (500, b"{}", None),
    ],
)
def test_only_a_whole_other_secret_shows_another_organisation(status, body, expected):
    secrets = (Secret("whsec_a"), Secret("whsec_b"))

    assert is_same_organisation(status, body, secrets) is expected
    assert is_same_organisation(status, body, ()) is None


async def test_an_api_that_does_not_answer_at_start_only_warns(tmp_path):
    settings = read_settings(
        {
            "SYNC_BASE_URL": "http://127.0.0.1:9",
            "SYNC_API_KEY": "sk-x",
            "SYNC_WEBHOOK_SECRET": SECRET,
            "MAYFLY_DATA_DIR": str(tmp_path),
        }
    )

    with capture_logs() as logs:
        warn_if_not_compared(await check_organisations(settings))

    assert [(line["event"], line["log_level"]) for line in logs] == [("organisation.not_compared", "warning")]


async def test_doctor_fails_with_a_secret_of_another_organisation(tmp_path, simulator):
    simulator.webhook_secret = "whsec_of_another_organisation"
    code, found = await examined(tmp_path, simulator)

    assert (code, found["organisation"]["status"]) == (1, "failing")
    assert "another_organisation" not in str(found)


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (402, b"{}"), (403, b""), (404, b"{}"), (301, b"")])
def test_doctor_fails_if_the_url_or_the_key_is_wrong(status, body):
    assert judge_page(status, body, "SYNC_API_KEY").status == "failing"
    assert judge_page(200, b"[]", "SYNC_API_KEY").status == "ok"


async def test_doctor_fails_if_deletions_are_late(tmp_path, simulator, sqlite_database, sqlite_url):
    await store(sqlite_database, due_in=-HOUR)
    code, found = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=f"sqlite:///{sqlite_url.database}")

    assert (code, found["deletions"]["status"]) == (1, "failing")
    assert "60 min overdue" in found["deletions"]["detail"]


async def test_doctor_fails_if_a_full_disk_lets_nothing_be_committed(tmp_path, simulator, sqlite_url, redis_url):
    environment = {
        "SYNC_BASE_URL": simulator.url,
        "SYNC_API_KEY": simulator.api_key,
        "SYNC_WEBHOOK_SECRET": SECRET,
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "MAYFLY_DATABASE_URL": f"sqlite:///{sqlite_url.database}",
        "MAYFLY_REDIS_URL": redis_url,
    }
    # No file may grow, as on a full disk; the pipe is none.
    no_room = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *MAYFLY, "doctor", "--json"]
    ended = await asyncio.to_thread(subprocess.run, no_room, env=os.environ | environment, capture_output=True)
    found = {finding["part"]: finding for finding in json.loads(ended.stdout)["findings"]}

    assert (ended.returncode, found["ledger"]["status"]) == (1, "failing")
    assert "the disk" in found["ledger"]["detail"]


async def test_doctor_names_the_worker_and_the_failed_and_held_records(
    tmp_path, simulator, sqlite_database, sqlite_url
):
    url = f"sqlite:///{sqlite_url.database}"
    failed = await store(sqlite_database)
    await settle(sqlite_database, given_up(await claim_one(sqlite_database)))
    held = [await store(sqlite_database, hold="legal", due_in=None) for _ in range(7)]
    _, before = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=url)
    await sqlite_database.write(partial(heartbeats.record_beat, name=heartbeats.WORKER, now=datetime.now(UTC)))
    code, found = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=url)

    assert (before["worker"]["status"], before["worker"]["detail"]) == ("warning", "no worker has been seen")
    assert (code, found["worker"]["status"]) == (0, "ok")
    assert found["failed records"]["status"] == "warning"
    assert found["failed records"]["detail"] == (
        f"1 given up, each needs an operator: {failed.id}; mayfly records list --state failed"
    )
    newest = ", ".join(key.id for key in reversed(held[2:]))
    assert found["held records"]["detail"] == f"7 on hold: {newest} and 2 more; mayfly records list --state held"


async def test_doctor_shows_the_data_directory_by_its_absolute_path(tmp_path, simulator):
    for made in (False, True):
        if made:
            (tmp_path / "data").mkdir()
        environment = {"SYNC_BASE_URL": simulator.url, "MAYFLY_DATA_DIR": "data", "MAYFLY_PORT": "0"}
        ended = await asyncio.to_thread(
            subprocess.run,
            [*MAYFLY, "doctor", "--json"],
            env={"PATH": os.environ["PATH"], **environment},
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        found = {finding["part"]: finding for finding in json.loads(ended.stdout)["findings"]}

        assert found["data dir"]["detail"].partition(",")[0] == str(tmp_path / "data")


async def test_doctor_says_that_a_running_mayfly_is_ready(tmp_path, simulator, sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        _, found = await examined(tmp_path, simulator, MAYFLY_PORT=str(client.base_url.port))

    assert found["service"] == {
        "part": "service",
        "status": "ok",
        "detail": f"Mayfly is ready at http://127.0.0.1:{client.base_url.port}",
    }


async def test_doctor_says_why_a_running_mayfly_is_degraded_or_not_ready(
    tmp_path, simulator, sqlite_database, open_client
):
    async with open_client(sqlite_database, MAYFLY_DRY_RUN="true") as client:
        _, dry = await examined(tmp_path, simulator, MAYFLY_PORT=str(client.base_url.port))
    broken = URL.create("postgresql", "mayfly", "verysecret", "127.0.0.1", 1, "mayfly")
    async with open_database(broken) as database, open_client(database) as client:
        code, failing = await examined(tmp_path, simulator, MAYFLY_PORT=str(client.base_url.port))

    assert dry["service"]["status"] == "warning"
    assert dry["service"]["detail"].endswith("but deletions: MAYFLY_DRY_RUN is on: nothing is deleted")
    assert (code, failing["service"]["status"]) == (1, "failing")
    assert failing["service"]["detail"].startswith("Mayfly is not ready at http://127.0.0.1:")
    assert "ledger: the database accepts no writes" in failing["service"]["detail"]
    assert "verysecret" not in str(failing)


@pytest.mark.parametrize("exists", [False, True])
async def test_doctor_says_that_nothing_runs(tmp_path, simulator, sqlite_url, exists):
    ledger = {"MAYFLY_DATABASE_URL": f"sqlite:///{sqlite_url.database}"} if exists else {}
    code, found = await examined(tmp_path, simulator, **ledger)

    assert (code, found["service"]["status"]) == (0, "warning" if exists else "ok")
    assert found["service"]["detail"].startswith("nothing answers at http://127.0.0.1:")


async def test_doctor_says_that_something_else_is_at_the_port(tmp_path, simulator):
    async def stay_silent(reader, writer):
        await reader.read()
        writer.close()

    port = httpx.URL(simulator.url).port
    code, found = await examined(tmp_path, simulator, MAYFLY_PORT=str(port))
    async with await asyncio.start_server(stay_silent, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        _, hung = await examined(tmp_path, simulator, MAYFLY_PORT=str(port))

    assert (code, found["service"]["status"]) == (1, "failing")
    assert "another program answers at" in found["service"]["detail"]
    assert hung["service"]["status"] == "failing"
    assert "gives no answer" in hung["service"]["detail"]


async def test_doctor_asks_a_worker_by_itself_at_its_own_default_port():
    code, output, _ = await mayfly("doctor", "--role", "worker", "--json")
    found = {finding["part"]: finding for finding in json.loads(output)["findings"]}

    assert code == 1
    assert "http://127.0.0.1:8081" in found["service"]["detail"]


async def test_doctor_warns_of_a_postgresql_that_may_lose_commits(tmp_path, simulator, postgres_url):
    url = postgres_url.render_as_string(hide_password=False)  # the tests' server has fsync off
    code, found = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=url)

    assert (code, found["durability"]["status"]) == (0, "warning")
    assert "fsync off" in found["durability"]["detail"]


async def test_doctor_fails_for_a_database_in_another_encoding(tmp_path, simulator, latin_url):
    code, found = await examined(
        tmp_path, simulator, MAYFLY_DATABASE_URL=latin_url.render_as_string(hide_password=False)
    )

    assert (code, found["ledger"]["status"]) == (1, "failing")
    assert "LATIN1" in found["ledger"]["detail"]


@pytest.mark.parametrize(
    ("role", "missing", "part"),
    [("api", "SYNC_API_KEY", "API key"), ("worker", "SYNC_WEBHOOK_SECRET", "webhook secret")],
)
async def test_doctor_knows_which_secret_a_role_does_not_need(tmp_path, simulator, role, missing, part):
    simulator.webhook_secret = "whsec_" + "*" * 8  # masked: it cannot be fetched
    code, found = await examined(tmp_path, simulator, "--role", role, **{missing: ""})
    other, _ = await examined(tmp_path, simulator, **{missing: ""})

    assert (code, found[part]["status"], other) == (0, "ok", 1)
    assert found[part]["detail"] == f"not set, and not needed by {role}"


async def test_doctor_fails_if_redis_would_drop_jobs(tmp_path, simulator):
    with redis_server(tmp_path, maxmemory_policy="allkeys-lru") as url:
        code, found = await examined(tmp_path, simulator, MAYFLY_REDIS_URL=url)

    assert (code, found["redis"]["status"]) == (1, "failing")
    assert "noeviction" in found["redis"]["detail"]


async def test_doctor_reports_missing_tables_and_a_dry_run(tmp_path, simulator, postgres):
    url = await postgres.empty()
    text = url.render_as_string(hide_password=False)
    code, found = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=text, MAYFLY_DRY_RUN="true")
    await postgres.drop(url)

    assert code == 1
    assert "mayfly migrate" in found["ledger"]["detail"]
    assert found["dry run"]["status"] == "warning"


@pytest.mark.parametrize(("off", "status"), [(0, "ok"), (120, "warning"), (3600, "failing")])
def test_doctor_compares_the_clock_with_the_api(off, status):
    theirs = format_datetime(datetime.now(UTC) + timedelta(seconds=off), usegmt=True)

    assert [finding.status for finding in check_clock(theirs, timedelta(minutes=5))] == [status]


async def test_doctor_says_that_the_secret_is_fetched_with_the_key(tmp_path, simulator):
    code, found = await examined(tmp_path, simulator, SYNC_WEBHOOK_SECRET="")

    assert (code, found["webhook secret"]["status"]) == (0, "ok")
    assert "fetched with SYNC_API_KEY" in found["webhook secret"]["detail"]
    simulator.webhook_secret = "whsec_********"
    code, found = await examined(tmp_path, simulator, SYNC_WEBHOOK_SECRET="")

    assert (code, found["webhook secret"]["status"]) == (1, "failing")
    assert "SYNC_WEBHOOK_SECRET" in found["webhook secret"]["detail"]


async def test_doctor_checks_each_account_by_its_own_variables(tmp_path, simulator):
    config = tmp_path / "mayfly.toml"
    config.write_text(
        "".join(f'[[account]]\nid = "{name}"\napi_key_env = "{name.upper()}_KEY"\n' for name in ("acme", "bolt"))
        + 'webhook_secret_env = "BOLT_SECRET"\n',
        encoding="utf-8",
    )
    keys = {"ACME_KEY": "sk-revoked", "BOLT_KEY": simulator.api_key, "BOLT_SECRET": "whsec_of_another_organisation"}
    code, found = await examined(tmp_path, simulator, MAYFLY_CONFIG=str(config), **keys)

    assert code == 1
    states = {part: finding["status"] for part, finding in found.items()}
    assert states["API key of default"] == states["organisation of default"] == "ok"
    assert states["API key of acme"] == "failing"
    assert "ACME_KEY" in found["API key of acme"]["detail"]
    assert (states["API key of bolt"], states["organisation of bolt"]) == ("ok", "failing")
    assert "BOLT_SECRET and BOLT_KEY" in found["organisation of bolt"]["detail"]
    assert list(states).count("clock") == 1
    assert not any(key in str(found) for key in keys.values())
