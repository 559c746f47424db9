"""POST /webhooks/sync: what it answers, and that a 202 comes after the commit."""

import asyncio
import json
import sqlite3
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial

import asyncpg
import pytest

from service.core.key import Key
from service.core.lifecycle import Move, State
from service.jobs import connection
from service.ledger.opening import open_database
from service.runtime import logging
from service.web import webhooks
from service.web.webhooks import MAX_BODY_BYTES
from tests.conftest import API_TOKEN
from tests.support.ledger import count, moves_of, row_of
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET, Webhook, batch, notification, signature, webhook

DAY = timedelta(days=1)
JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def client(sqlite_database, open_client):
    """A client of the application over SQLite, for what does not depend on the database."""
    async with open_client(sqlite_database) as client:
        yield client


def send(client, sent, **headers):
    return client.post("/webhooks/sync", content=sent.body, headers=sent.headers | headers)


def assert_problem(answer, status):
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert answer.json()["title"]
    assert "whsec" not in answer.text


# Taken


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "REJECTED", "CANCELED", "TIMED_OUT"])
async def test_a_terminal_generation_is_stored_and_scheduled_before_the_answer(app_client, database, status):
    at = datetime.now(UTC).replace(microsecond=0)
    sent = webhook(status=status, at=at.timestamp())
    answer = await send(app_client, sent)
    row = await row_of(database, Key("default", sent.id))

    assert answer.status_code == 202
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"id", "state", "dueAt"}
    assert (answer.json()["id"], answer.json()["state"]) == (sent.id, "scheduled")
    assert datetime.fromisoformat(answer.json()["dueAt"]) == at + DAY == row.due_at
    assert row.notification.encode() == sent.body


async def test_a_redelivered_webhook_is_answered_202_and_stored_once(app_client, database):
    sent = webhook()
    first, second = await send(app_client, sent), await send(app_client, sent)

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    assert await moves_of(database, Key("default", sent.id)) == [Move.RECEIVE]


async def test_fifty_of_the_same_webhook_at_once_make_one_record(app_client, database):
    sent = webhook()
    answers = await asyncio.gather(*(send(app_client, sent) for _ in range(50)))

    assert {answer.status_code for answer in answers} == {202}
    assert await count(database) == 1
    assert await moves_of(database, Key("default", sent.id)) == [Move.RECEIVE]


async def test_a_hundred_webhooks_at_once_make_a_hundred_records(app_client, database):
    answers = await asyncio.gather(*(send(app_client, webhook()) for _ in range(100)))

    assert {answer.status_code for answer in answers} == {202}
    assert await count(database) == 100


@pytest.mark.parametrize(
    ("query", "state"), [("ttl=72h", "scheduled"), ("ttl=forever", "kept"), ("hold=case", "held"), ("ttl=x", "held")]
)
async def test_the_generations_own_override_decides(client, sqlite_database, query, state):
    sent = webhook(webhookUrl=f"https://hooks.example.com/webhooks/sync?{query}")
    answer = await send(client, sent)

    assert answer.json()["state"] == state
    assert (await row_of(sqlite_database, Key("default", sent.id))).state == state


async def test_a_rule_decides_by_what_the_webhook_says(sqlite_database, open_client, tmp_path):
    file = tmp_path / "mayfly.toml"
    file.write_text(
        """
        [[rule]]
        id = "acme"
        labels = { customer = "acme*" }
        forever = true
        [[rule]]
        id = "spoken"
        input_type = "text"
        hold = "check the script"
        [[rule]]
        id = "film"
        project = "*"
        forever = true
        [[rule]]
        id = "failures"
        status = "FAILED"
        ttl = "1h"
        """
    )
    spoken = [{"type": "text", "provider": {"script": "Hello"}}]
    sent = {
        "rule: acme": webhook(webhookUrl="https://hooks.example.com/webhooks/sync?label.customer=acme-west"),
        "rule: spoken": webhook(input=spoken),
        "rule: failures": webhook(status="FAILED"),
        "MAYFLY_TTL": webhook(),
    }
    async with open_client(sqlite_database, MAYFLY_CONFIG=str(file)) as client:
        states = [(await send(client, one)).json()["state"] for one in sent.values()]
    rules = [(await row_of(sqlite_database, Key("default", one.id))).rule for one in sent.values()]

    assert states == ["kept", "held", "scheduled", "scheduled"]
    assert rules == [*sent]


async def test_a_hold_is_stored_with_any_reason(app_client, database):
    sent = webhook(webhookUrl="https://hooks.example.com/webhooks/sync?hold=%00%FF%F0%9F%AA%B0")
    answer = await send(app_client, sent)

    assert (answer.status_code, answer.json()["state"]) == (202, "held")
    assert (await row_of(database, Key("default", sent.id))).hold_reason == "\ufffd🪰"


@pytest.mark.parametrize(
    ("query", "state", "rule"),
    [
        ("ttl=1s", "scheduled", "MAYFLY_TTL"),
        ("ttl=forever", "kept", "override: ttl"),
        ("ttl=9d", "scheduled", "override: ttl"),
        ("hold=legal", "held", "override: hold"),
        ("keep=1", "held", "invalid override"),
    ],
)
async def test_the_requests_own_query_can_lengthen_or_hold(client, sqlite_database, query, state, rule):
    sent = webhook(webhookUrl=None)
    answer = await client.post(f"/webhooks/sync?{query}", content=sent.body, headers=sent.headers)

    assert (answer.status_code, answer.json()["state"]) == (202, state)
    assert (await row_of(sqlite_database, Key("default", sent.id))).rule == rule


@pytest.mark.parametrize("url", [{}, 7, ["https://hooks.example.com/"], {"url": "https://hooks.example.com/"}])
async def test_a_webhook_url_that_is_no_text_is_202_and_held(app_client, database, url):
    sent = webhook(webhookUrl=url)
    answer = await send(app_client, sent)
    row = await row_of(database, Key("default", sent.id))

    assert (answer.status_code, answer.json()["state"]) == (202, "held")
    assert "not a URL" in row.hold_reason
    assert row.notification.encode() == sent.body


# Relayed by an app that keeps its webhookUrl

# What an app's own HTTP client and the proxies on the way add.
OF_THE_APP = {
    "User-Agent": "python-httpx/0.28.1",
    "Content-Type": "application/json; charset=utf-8",
    "Accept": "*/*",
    "Authorization": "Bearer of-the-app",
    "Cookie": "session=1",
    "X-Request-Id": "7f1c",
    "X-Forwarded-For": "203.0.113.7",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}


async def test_a_webhook_that_an_app_relays_unchanged_is_stored_as_if_it_came_itself(app_client, database):
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=4)
    sent = webhook(at=at.timestamp(), webhookUrl="https://app.example.com/hooks/sync")
    relayed = {"Sync-Signature": sent.headers["Sync-Signature"]} | OF_THE_APP
    answer = await app_client.post("/webhooks/sync", content=sent.body, headers=relayed)
    row = await row_of(database, Key("default", sent.id))

    assert (answer.status_code, answer.json()["state"]) == (202, "scheduled")
    assert (row.notification.encode(), row.sent_at, row.due_at) == (sent.body, at, at + DAY)


async def test_a_relay_after_the_tolerance_is_refused_and_told_what_to_do(client, sqlite_database):
    sent = webhook(at=time.time() - 400)
    relayed = {"Sync-Signature": sent.headers["Sync-Signature"]} | OF_THE_APP
    answer = await client.post("/webhooks/sync", content=sent.body, headers=relayed)

    assert_problem(answer, 401)
    assert "behind Mayfly's clock (300 s allowed)" in answer.json()["detail"]
    assert "relays a webhook has to do so within MAYFLY_WEBHOOK_TOLERANCE" in answer.json()["detail"]
    assert "POST /api/records" in answer.json()["detail"]
    assert await count(sqlite_database) == 0


async def test_a_relay_that_writes_the_json_anew_is_refused(client, sqlite_database):
    sent = webhook()
    anew = json.dumps(json.loads(sent.body), separators=(",", ":")).encode()
    answer = await client.post("/webhooks/sync", content=anew, headers=sent.headers | OF_THE_APP)

    assert_problem(answer, 401)
    assert await count(sqlite_database) == 0


def logged(capsys):
    """Return the log events written since the last call."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]


async def test_one_line_is_logged_for_each_stored_webhook_and_no_other(client, capsys):
    logging.configure_logging("json")
    sent = webhook()
    answer = await send(client, sent)
    await send(client, sent)
    await client.post("/webhooks/sync", content=b"{}", headers=JSON)
    stored = [event for event in logged(capsys) if event["event"] == "webhook.stored"]

    assert [event.keys() for event in stored] == [{"event", "generation", "due_at", "state", "level", "timestamp"}]
    assert (stored[0]["generation"], stored[0]["state"]) == (sent.id, "scheduled")
    assert datetime.fromisoformat(stored[0]["due_at"]) == datetime.fromisoformat(answer.json()["dueAt"])


async def test_an_invalid_override_is_logged_without_its_value(client, capsys):
    logging.configure_logging("json")
    sent = webhook(webhookUrl="https://hooks.example.com/webhooks/sync?token=t0ken5&keep=s3cret")
    await send(client, sent)
    await send(client, sent)
    events = logged(capsys)
    (event,) = [event for event in events if event["event"] == "webhook.override_invalid"]

    assert (event["generation"], event["name"], event["value_length"]) == (sent.id, "keep", 6)
    assert "s3cret" not in json.dumps(events)
    assert "t0ken5" not in json.dumps(events)


async def test_a_webhook_signed_with_the_previous_secret_is_accepted(sqlite_database, open_client):
    old = "whsec_old_0123456789abcdef"
    async with open_client(sqlite_database, SYNC_WEBHOOK_SECRET=f"{SECRET},{old}") as client:
        assert (await send(client, webhook(secret=old))).status_code == 202
        assert (await send(client, webhook())).status_code == 202


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING", "PAUSED", "completed"])
async def test_a_generation_that_is_not_terminal_is_answered_202_and_ignored(client, sqlite_database, metrics, status):
    sent = webhook(status=status)
    answer = await send(client, sent)

    assert (answer.status_code, answer.json()) == (202, {"id": sent.id, "state": "ignored"})
    assert await count(sqlite_database) == 0
    unknown = metrics.registry.get_sample_value("mayfly_statuses_unknown_total")
    assert unknown == float(status not in ("PENDING", "PROCESSING"))


async def test_a_batch_is_answered_202_and_counted(client, sqlite_database, metrics):
    answer = await send(client, webhook(json.dumps(batch()).encode()))

    assert (answer.status_code, answer.json()) == (202, {"id": "batch_abc123", "state": "batch"})
    assert await count(sqlite_database) == 0
    assert metrics.registry.get_sample_value("mayfly_webhooks_total", {"answer": "batch"}) == 1


async def test_each_content_type_of_json_is_accepted(client):
    names = [
        *("application/json", "application/json; charset=utf-8", 'application/json;charset="UTF-8"', ""),
        *("APPLICATION/JSON", "application/cloudevents+json", "application/json; charset=utf8; version=1"),
    ]
    statuses = {name: (await send(client, webhook(), **{"Content-Type": name})).status_code for name in names}

    assert statuses == dict.fromkeys(names, 202)


# Refused, with nothing stored


async def test_a_webhook_without_a_valid_signature_is_401_and_not_stored(client, sqlite_database, metrics):
    headers: dict[str, list[str | None]] = {
        "missing": [None, ""],
        "malformed": ["v1=00", "t=" + "9" * 400 + ",v1=00", "\xff" * 3000],
        "stale": [f"t=1761300005,v1={'0' * 64}", "t=1,v1=" + "ü" * 64],
        "mismatch": [f"t={int(time.time())},v1={'0' * 64}"],
    }
    for reason, values in headers.items():
        for value in values:
            signature = {} if value is None else {"Sync-Signature": value.encode("latin-1")}
            answer = await client.post("/webhooks/sync", content=webhook().body, headers={**JSON, **signature})

            assert_problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Sync-Signature"
        counted = metrics.registry.get_sample_value("mayfly_signatures_refused_total", {"reason": reason})
        assert counted == len(values)
    assert await count(sqlite_database) == 0


@pytest.mark.parametrize("minutes", [6, -6])
async def test_a_webhook_with_a_stale_signature_is_401(client, sqlite_database, minutes):
    at = datetime.now(UTC).timestamp() + 60 * minutes

    answer = await send(client, webhook(at=at))

    assert_problem(answer, 401)
    assert f"{'ahead of' if minutes > 0 else 'behind'} Mayfly's clock (300 s allowed)" in answer.json()["detail"]
    assert await count(sqlite_database) == 0


async def test_a_replay_within_a_configured_tolerance_is_accepted(sqlite_database, open_client):
    async with open_client(sqlite_database, MAYFLY_WEBHOOK_TOLERANCE="1h") as client:
        answer = await send(client, webhook(at=datetime.now(UTC).timestamp() - 1800))

    assert answer.status_code == 202


async def test_a_changed_body_is_401(client):
    sent = webhook()

    assert_problem(await send(client, Webhook(sent.body + b" ", sent.headers)), 401)


SHAPES = [
    *(b"", b"null", b"[]", b"{}", b"{", b'{"id":"g1"}', b"\xff\xfe\x00", b'{"id":"","status":"COMPLETED"}'),
    *(b'{"id":"..","status":"COMPLETED"}', b'{"id":"g1","id":"g2","status":"COMPLETED"}'),
    *(b'{"id":"a\\u0000","status":"COMPLETED"}', b'{"id":"g1","status":"COMPLETED","error":"\\u0000"}'),
    *(b"[" * 100_000, b'{"id":"g1","status":"COMPLETED","input":' + b"[" * 100_000),
    *(b'{"id":"g1\\ud800","status":"COMPLETED"}', b'{"id":"g1","status":1}'),
]


async def test_a_signed_body_of_another_shape_is_400_and_not_stored(client, sqlite_database):
    answers = [await send(client, webhook(body)) for body in SHAPES]

    for answer in answers:
        assert_problem(answer, 400)
    assert await count(sqlite_database) == 0


async def test_a_lone_surrogate_is_stored_unchanged_and_shown_as_a_replacement(app_client, database):
    sent = webhook(b'{"id":"g1","status":"FAILED","error":"cut \\ud83d","options":{"a":"\\ude00"}}')
    answer = await send(app_client, sent)
    token = {"Authorization": f"Bearer {API_TOKEN}"}
    shown = (await app_client.get("/api/records/g1", headers=token)).json()

    assert answer.status_code == 202
    assert (shown["error"], shown["options"]) == ("cut \ufffd", {"a": "\ufffd"})
    assert (await row_of(database, Key("default", "g1"))).notification.encode() == sent.body


async def test_a_nested_input_is_refused_or_can_be_read_back(client):
    for depth in (50, 200, 500, 900, 1000, 3000):
        nested = b"[" * depth + b"]" * depth
        sent = webhook(b'{"id":"g%d","status":"COMPLETED","input":%s}' % (depth, nested))
        answer = await send(client, sent)

        assert answer.status_code in (202, 400)
    shown = await client.get("/api/records", headers={"Authorization": f"Bearer {API_TOKEN}"})
    assert shown.status_code == 200


async def test_an_unsigned_body_is_401_whatever_its_shape(client):
    assert_problem(await client.post("/webhooks/sync", content=b"{", headers={"Content-Type": "application/json"}), 401)


async def test_a_content_type_other_than_json_in_utf8_is_415(client, sqlite_database):
    names = [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json"),
        *("application/json; charset=utf-16", "application/json;charset=latin1", "application/jsonp", "\xff/\xfe"),
    ]
    for name in names:
        sent = webhook()
        headers = [(b"Content-Type", name.encode("latin-1")), (b"Sync-Signature", signature(sent.body).encode())]

        assert_problem(await client.post("/webhooks/sync", content=sent.body, headers=headers), 415)
    assert await count(sqlite_database) == 0


async def test_a_body_over_the_limit_is_413_by_its_length(client, sqlite_database):
    sent = webhook(error="x" * MAX_BODY_BYTES)

    assert_problem(await send(client, sent), 413)
    assert await count(sqlite_database) == 0


async def test_a_body_over_the_limit_is_413_without_a_length_too(client, sqlite_database):
    sent = webhook(error="x" * MAX_BODY_BYTES)

    async def chunks():
        for start in range(0, len(sent.body), 65536):
            yield sent.body[start : start + 65536]

    assert_problem(await client.post("/webhooks/sync", content=chunks(), headers=sent.headers), 413)
    assert await count(sqlite_database) == 0


async def test_a_body_just_under_the_limit_is_accepted_in_chunks(client):
    empty = len(json.dumps(notification(error="")).encode())
    sent = webhook(error="x" * (MAX_BODY_BYTES - empty))

    async def chunks():
        yield sent.body[:1]
        yield sent.body[1:]

    assert len(sent.body) == MAX_BODY_BYTES
    assert (await client.post("/webhooks/sync", content=chunks(), headers=sent.headers)).status_code == 202


@asynccontextmanager
async def half_sent(client, sent, *, size=None):
    """Send so much of a webhook over a socket of its own and yield what reads the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.headers.items())
    writer.write(f"POST /webhooks/sync HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent.body)}\r\n{head}\r\n".encode())
    writer.write(sent.body[:size])
    await writer.drain()
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def head_of(reader):
    return (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode()


async def test_concurrent_large_bodies_share_a_memory_limit_that_they_free(client, monkeypatch, metrics):
    monkeypatch.setattr(webhooks, "MAX_UNREAD_BYTES", 250_000)
    large = webhook(error="x" * 120_000)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(half_sent(client, large, size=110_000))
        await asyncio.sleep(0.2)
        async with half_sent(client, large, size=110_000) as (reader, _):
            refused = await head_of(reader)
        small = await send(client, webhook())
        halved = webhook()
        async with half_sent(client, halved, size=50) as (reader, writer):  # none of the large ones
            await asyncio.sleep(0.1)
            writer.write(halved.body[50:])
            taken = await head_of(reader)
    await asyncio.sleep(0.1)
    after = await send(client, large)

    assert refused.startswith("HTTP/1.1 503 ")
    assert "retry-after: 5" in refused
    assert taken.startswith("HTTP/1.1 202 ")
    assert [answer.status_code for answer in (small, after)] == [202, 202]
    assert metrics.registry.get_sample_value("mayfly_webhooks_total", {"answer": "unavailable"}) == 1


@pytest.mark.parametrize("signature", ["", "t=1,v1=00", f"t=1761300005,v1={'0' * 64}"])
async def test_a_body_with_a_malformed_signature_is_not_read(client, signature, metrics):
    sent = webhook()
    sent.headers["Sync-Signature"] = signature
    async with half_sent(client, sent, size=50) as (reader, _):
        assert (await head_of(reader)).startswith("HTTP/1.1 401 ")
    assert metrics.registry.get_sample_value("mayfly_webhooks_total", {"answer": "refused"}) == 1


async def test_a_body_that_arrives_too_slowly_is_408_and_ends_the_connection(client, monkeypatch, metrics):
    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.3)
    async with half_sent(client, webhook(), size=50) as (reader, _):
        answer = (await asyncio.wait_for(reader.read(), 5)).decode()

    assert answer.startswith("HTTP/1.1 408 ")
    assert "content-type: application/problem+json" in answer
    assert json.loads(answer.partition("\r\n\r\n")[2])["status"] == 408
    assert metrics.registry.get_sample_value("mayfly_webhooks_total", {"answer": "broken_off"}) == 1


async def test_every_refusal_is_counted_and_logged_by_its_kind(client, metrics, capsys):
    logging.configure_logging("json")
    sent = webhook()
    for content, headers in (
        (sent.body, sent.headers | {"Content-Type": "application/octet-stream"}),
        (sent.body, sent.headers | {"Sync-Signature": "t=1,v1=2"}),
        (b"x" * (MAX_BODY_BYTES + 1), sent.headers),
        (b"{}", webhook(b"{}").headers),
    ):
        await client.post("/webhooks/sync", content=content, headers=headers)
    async with half_sent(client, sent, size=50):
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.1)
    counted = {
        kind: metrics.registry.get_sample_value("mayfly_webhooks_total", {"answer": kind})
        for kind in ("unsupported", "refused", "too_large", "malformed", "broken_off")
    }

    assert counted == dict.fromkeys(counted, 1)
    assert capsys.readouterr().err.count("webhook.not_stored") == 5


async def test_another_method_is_405(client):
    answers = [await client.request(method, "/webhooks/sync") for method in ("GET", "PUT", "DELETE", "HEAD", "PATCH")]

    assert [answer.status_code for answer in answers] == [405] * 5
    assert {answer.headers["allow"] for answer in answers} == {"POST, OPTIONS"}


async def test_a_sender_that_disconnects_stores_nothing(client, sqlite_database):
    sent = webhook()
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.headers.items())
    writer.write(f"POST /webhooks/sync HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent.body)}\r\n{head}\r\n".encode())
    writer.write(sent.body[:20])
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    del reader
    answer = await send(client, webhook())

    assert answer.status_code == 202
    assert await count(sqlite_database) == 1


# The ledger cannot commit


async def test_a_locked_sqlite_ledger_is_503_with_retry_after_and_no_row(sqlite_url, open_client):
    async with open_database(sqlite_url, write_seconds=0.3) as database, open_client(database) as client:
        blocker = sqlite3.connect(sqlite_url.database, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        answer = await send(client, webhook())
        stored_meanwhile = await count(database)
        blocker.execute("ROLLBACK")
        blocker.close()

        assert_problem(answer, 503)
        assert answer.headers["retry-after"] == "5"
        assert stored_meanwhile == 0
        after = await eventually(partial(send_until_taken, client))
        assert after.status_code == 202


async def send_until_taken(client):
    answer = await send(client, webhook())
    return answer if answer.status_code == 202 else None


async def test_a_locked_postgresql_ledger_is_503_with_retry_after_and_no_row(postgres_url, open_client):
    blocker = await asyncpg.connect(user="postgres", host=postgres_url.query["host"], database=postgres_url.database)
    async with open_database(postgres_url, write_seconds=1.0) as database, open_client(database) as client:
        lock = blocker.transaction()
        await lock.start()
        await blocker.execute("LOCK TABLE records IN EXCLUSIVE MODE")
        answer = await send(client, webhook())
        stored_meanwhile = await count(database)
        await lock.rollback()
        await blocker.close()

        assert_problem(answer, 503)
        assert answer.headers["retry-after"] == "5"
        assert stored_meanwhile == 0
        assert (await send(client, webhook())).status_code == 202


async def test_an_unreachable_redis_delays_no_answer(sqlite_database, settings, metrics, tmp_path):
    from service.core.secret import Secret
    from service.web.app import make_app
    from service.web.server import serving
    from tests.conftest import http_client

    pool = connection.connect(Secret(f"unix://{tmp_path}/nowhere.sock"), retries=0)
    app = make_app(settings(), sqlite_database, pool, metrics)
    async with serving(app, "127.0.0.1", 0) as port, http_client(f"http://127.0.0.1:{port}") as client:
        answer = await send(client, webhook())

        assert answer.status_code == 202
        assert await eventually(lambda: metrics.registry.get_sample_value("mayfly_enqueue_failures_total") == 2)
    await pool.aclose(close_connection_pool=True)
    assert await count(sqlite_database) == 1


async def test_jobs_beyond_the_waiting_limit_are_counted(sqlite_database, open_client, pool, metrics, monkeypatch):
    monkeypatch.setattr("service.jobs.enqueue._MAX_WAITING", 3)
    async with open_client(sqlite_database) as client:
        await asyncio.gather(*(send(client, webhook()) for _ in range(5)))

        assert await eventually(lambda: metrics.registry.get_sample_value("mayfly_enqueue_failures_total") == 7)
    assert await pool.zcard(connection.QUEUE) == 3


async def test_a_stored_webhook_has_a_job_unless_it_is_due_beyond_the_horizon(sqlite_database, open_client, pool):
    async with open_client(sqlite_database, MAYFLY_QUEUE_HORIZON="48h") as client:
        near = webhook()
        far = webhook(webhookUrl="https://h/x?ttl=30d")
        await send(client, far)
        await send(client, near)
        assert await eventually(partial(pool.zcard, connection.QUEUE))
    jobs = {job.decode() for job in await pool.zrange(connection.QUEUE, 0, -1)}

    assert jobs == {f"default:{near.id}:1", f"default:{near.id}:copy", f"default:{far.id}:copy"}
    assert (await row_of(sqlite_database, Key("default", far.id))).state == State.SCHEDULED
