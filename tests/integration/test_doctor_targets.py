"""What doctor says of targets: reachable or not, itself, and what waits for them."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import update

from service.core.forwarding import Target
from service.core.key import Key
from service.core.secret import Secret
from service.ledger.deliveries import Forwarding, insert_deliveries
from service.ledger.delivery_schema import deliveries
from tests.support.app import App
from tests.support.commands import command
from tests.support.ports import free_port
from tests.support.webhooks import SECRET, webhook


@pytest.fixture
def examine(tmp_path, simulator):
    """Run the doctor with tables ``[[forward]]``; return its exit code and the findings about targets by part."""

    async def run(tables: str, *options: str, **environment: str):
        config = tmp_path / "mayfly.toml"
        config.write_text(tables)
        defaults: dict[str, Any] = {
            "SYNC_BASE_URL": simulator.url,
            "SYNC_API_KEY": simulator.api_key,
            "SYNC_WEBHOOK_SECRET": SECRET,
            "CRM_SECRET": "whsec_" + "A" * 43 + "=",
            "MAYFLY_DATA_DIR": str(tmp_path / "data"),
            "MAYFLY_CONFIG": str(config),
            "MAYFLY_PORT": str(free_port()),
        }
        result = await asyncio.to_thread(command, "doctor", "--json", *options, **defaults | environment)
        found = [
            one
            for one in json.loads(result.stdout)["findings"]
            if one["part"].startswith(("target", "deliver", "failed"))
        ]
        return result.exit_code, {one["part"]: (one["status"], one["detail"]) for one in found}

    return run


def table(name: str, url: str, *lines: str) -> str:
    """Return the table of a target."""
    return "\n".join(["[[forward]]", f'id = "{name}"', f'url = "{url}"', *lines, ""])


async def test_doctor_connects_to_each_target_and_sends_nothing(examine):
    async with App() as app:
        url = f"{app.url}/hooks?token=hunter2"
        code, found = await examine(table("crm", url, 'secret_env = "CRM_SECRET"') + table("plain", url))

        accepts = f"{app.url} accepts connections; mayfly send --forward sends it a webhook"
        assert (code, app.requests, app.connections) == (0, [], 2)
        assert found == {
            "target crm": ("ok", accepts),
            "target plain": ("ok", f"{accepts}; without secret_env, apps cannot verify what is late"),
        }


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1:1/x?token=hunter2", "http://127.0.0.1:1 is not reached (ConnectionRefusedError: Conn"),
        ("https://nowhere.invalid/", "https://nowhere.invalid is not reached (its name cannot be resolved: "),
    ],
)
async def test_doctor_fails_for_a_target_that_is_not_reached(examine, url, cause):
    code, found = await examine(table("crm", url))

    assert (code, found["target crm"][0]) == (1, "failing")
    assert found["target crm"][1].startswith(cause)
    assert "hunter2" not in str(found)


async def test_doctor_says_within_seconds_that_a_target_speaks_no_tls(examine):
    async def stay_silent(reader, writer):
        await reader.read()
        writer.close()

    async with await asyncio.start_server(stay_silent, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        code, found = await examine(table("crm", f"https://127.0.0.1:{port}/"))

    assert code == 1
    assert "is not reached (no connection within 5 s)" in found["target crm"][1]


async def test_doctor_warns_of_a_target_with_the_path_of_mayflys_webhooks(examine):
    async with App() as app:
        code, found = await examine(
            table("one", f"{app.url}/webhooks/sync/") + table("two", f"{app.url}/webhooks/sync-x")
        )

    assert (code, found["target one"][0], found["target two"][0]) == (0, "warning", "ok")
    assert "set its url to that of your app" in found["target one"][1]


async def test_doctor_connects_to_no_target_for_an_api(examine):
    code, found = await examine(table("crm", "http://127.0.0.1:1/"), "--role", "api")

    assert (code, found) == (0, {})


async def test_a_loop_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "mayfly.toml").write_text(table("crm", "https://mayfly.example.com/webhooks/sync"))
    environment: dict[str, Any] = {
        "MAYFLY_CONFIG": str(tmp_path / "mayfly.toml"),
        "MAYFLY_PUBLIC_URL": "https://mayfly.example.com",
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "SYNC_API_KEY": "sk-1",
    }
    for name in ("doctor", "up"):
        result = await asyncio.to_thread(command, name, **environment)

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            "mayfly: forward crm: its url is that of Mayfly itself, MAYFLY_PUBLIC_URL and /webhooks/sync: "
            "set it to the URL of your app\n"
        )
    assert not (tmp_path / "data").exists()


@pytest.fixture
def ledger(sqlite_url):
    """The setting of a ledger that is there."""
    return {"MAYFLY_DATABASE_URL": f"sqlite:///{sqlite_url.database}"}


async def store_delivery(database, target, **changes):
    """Store a delivery, and change columns of it."""
    body = webhook().body
    key, now = Key("default", str(uuid4())), datetime.now(UTC)
    form = (body, "application/json", "t=1,v1=0")
    sent = Forwarding(key, "COMPLETED", *form, now, (Target(target, Secret("x")),), is_final=False)

    def store(connection):
        (new,) = insert_deliveries(connection, [sent])
        if changes:
            connection.execute(update(deliveries).where(deliveries.c.id == new.id).values(changes))

    await database.write(store)


async def test_doctor_counts_the_deliveries_that_have_failed(examine, ledger, sqlite_database):
    for target in ("app", "crm", "crm"):
        await store_delivery(sqlite_database, target, state="failed", wake_at=None)
    async with App() as app:
        code, found = await examine(table("crm", app.url), **ledger)

    assert code == 0
    assert found["failed deliveries"] == (
        "warning",
        "1 to app, 2 to crm: not sent again, unless you replay them; mayfly forwards list --state failed",
    )
    assert set(found) == {"target crm", "failed deliveries"}


async def test_doctor_names_deliveries_of_a_target_that_is_not_configured(examine, ledger, sqlite_database):
    await store_delivery(sqlite_database, "old")
    await store_delivery(sqlite_database, "crm")
    async with App() as app:
        _, found = await examine(table("crm", app.url), **ledger)

    assert set(found) == {"target crm", "deliveries to old"}
    status, detail = found["deliveries to old"]
    assert status == "warning"
    assert detail.startswith("1 wait, and nobody sends them: the target is not configured; add its [[forward]] again")


async def test_doctor_names_deliveries_that_wait_for_long(examine, ledger, sqlite_database):
    await store_delivery(sqlite_database, "crm", since=datetime.now(UTC) - timedelta(minutes=42))
    await store_delivery(sqlite_database, "crm")
    async with App() as app:
        code, found = await examine(table("crm", app.url), **ledger)

    assert code == 0
    status, detail = found["deliveries to crm"]
    assert status == "warning"
    assert detail.startswith(
        "2 wait, the oldest for 42 min: check its app and that a worker runs; mayfly forwards list"
    )
