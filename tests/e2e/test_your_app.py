"""The programs of the page "Your app keeps its webhooks", in both languages, as processes on real sockets."""

import asyncio
import json
import sqlite3
import subprocess
import time
from contextlib import closing
from uuid import uuid4

import httpx
import pytest

from tests.conftest import API_TOKEN, http_client
from tests.support.app import Answer, App
from tests.support.examples import LANGUAGES, PACKAGES, Example, compile_examples
from tests.support.forwards import FORWARD_SECRET, forwarded_headers
from tests.support.npm import install
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET, Webhook, signature, webhook

HOUR = 3600
OTHER_SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
OPERATOR = {"Authorization": f"Bearer {API_TOKEN}"}


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """The examples in TypeScript, checked and compiled, with what they import."""
    folder = install(tmp_path_factory.mktemp("examples"), *PACKAGES)
    try:
        compile_examples(folder)
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stdout)
    return folder


@pytest.fixture(params=LANGUAGES)
def example(request, tmp_path):
    """Make an example: ``example("receive", FORWARD_SECRET=…)``; all are ended with the test."""
    made = []

    def make(name, **environment):
        modules = request.getfixturevalue("modules") if request.param == "typescript" else None
        folder = tmp_path / "app"
        folder.mkdir(exist_ok=True)
        made.append(Example(name, folder, modules, {"SYNC_WEBHOOK_SECRET": SECRET} | environment))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
async def client():
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        yield client


def stored(example):
    """Return the bodies in the inbox of the app."""
    if (example.folder / "inbox.db").exists():
        with closing(sqlite3.connect(example.folder / "inbox.db")) as db:
            # The file is there before its table.
            has_table = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'inbox'").fetchone()
            return [body for (body,) in db.execute("SELECT body FROM inbox")] if has_table else []
    return [path.read_bytes() for path in (example.folder / "inbox").glob("*.json")]


# Forwarding: the app receives from Mayfly


async def post(client, app, sent, headers, body=None):
    answer = await client.post(app.url, content=sent.body if body is None else body, headers=headers)
    return answer.status_code


async def test_a_forwarded_webhook_is_taken_with_either_signature_while_it_is_fresh(example, client):
    app = example("receive", FORWARD_SECRET=FORWARD_SECRET)
    await app.start()
    both, one = webhook(error="Größe überschritten"), webhook(status="FAILED")

    assert await post(client, app, both, forwarded_headers(both)) == 204
    assert await post(client, app, one, forwarded_headers(one, secret=None)) == 204
    assert sorted(stored(app)) == sorted([both.body, one.body])


async def test_a_late_delivery_is_taken_by_the_signature_of_its_attempt_alone(example, client):
    app = example("receive", FORWARD_SECRET=FORWARD_SECRET)
    await app.start()
    late = webhook(at=time.time() - 50 * HOUR)

    assert await post(client, app, late, forwarded_headers(late, secret=None)) == 401
    assert await post(client, app, late, forwarded_headers(late, attempt=9)) == 204
    assert stored(app) == [late.body]


async def test_an_app_without_the_second_secret_takes_fresh_webhooks_alone(example, client):
    app = example("receive")
    await app.start()
    fresh, late = webhook(), webhook(at=time.time() - 301)

    assert await post(client, app, late, forwarded_headers(late)) == 401
    assert await post(client, app, fresh, forwarded_headers(fresh)) == 204
    assert stored(app) == [fresh.body]


async def test_a_delivery_is_stored_once_over_retries_replays_and_restarts(example, client):
    app = example("receive", FORWARD_SECRET=FORWARD_SECRET)
    await app.start()
    sent, delivery = webhook(), str(uuid4())
    statuses = [
        await post(client, app, sent, forwarded_headers(sent, delivery=delivery, attempt=attempt)) for attempt in (1, 2)
    ]
    await app.kill9()
    await app.start()
    other = webhook()  # what is stored, perhaps marked as done by now, is not written again
    statuses.append(await post(client, app, other, forwarded_headers(other, delivery=delivery, attempt=3)))
    direct = webhook()
    statuses += [await post(client, app, direct, direct.headers) for _ in range(2)]

    assert statuses == [204] * 5
    assert sorted(stored(app)) == sorted([sent.body, direct.body])


async def test_deliveries_that_come_at_once_are_each_stored_once(example):
    app = example("receive", FORWARD_SECRET=FORWARD_SECRET)
    await app.start()
    sent = [(one, str(uuid4())) for one in (webhook() for _ in range(20))]
    as_mayfly = httpx.Limits(max_connections=8)  # its concurrency unless it is set
    async with httpx.AsyncClient(trust_env=False, timeout=10, limits=as_mayfly) as many:
        posts = [post(many, app, one, forwarded_headers(one, delivery=delivery)) for one, delivery in [*sent, *sent]]
        statuses = await asyncio.gather(*posts)

    assert statuses == [204] * 40
    assert sorted(stored(app)) == sorted(one.body for one, _ in sent)


def _refused(now):
    """Yield what a receiver with both secrets refuses: a name, the webhook, its headers, the body if it is changed."""
    fresh, late = webhook(), webhook(at=now - HOUR)
    changed = fresh.body.replace(b"COMPLETED", b"FAILED", 1)
    yield "a changed body", fresh, forwarded_headers(fresh), changed
    yield "a changed body, one signature", fresh, forwarded_headers(fresh, secret=None), changed
    resigned = forwarded_headers(Webhook(changed, fresh.headers))
    yield "a changed body that only Mayfly signed", fresh, resigned, changed
    yield "an empty body", fresh, forwarded_headers(fresh), b""
    yield "a stale t", late, forwarded_headers(late, secret=None), None
    yield "a stale attempt", late, forwarded_headers(late, at=now - 301), None
    yield "an attempt ahead", late, forwarded_headers(late, at=now + 400), None
    yield (
        "the attempt's time changed",
        late,
        forwarded_headers(late, at=now - HOUR) | {"webhook-timestamp": str(int(now))},
        None,
    )
    yield "the delivery changed", late, forwarded_headers(late) | {"webhook-id": str(uuid4())}, None
    yield "a wrong second secret", late, forwarded_headers(late, secret=OTHER_SECRET), None
    yield "a wrong second secret beside a fresh t", fresh, forwarded_headers(fresh, secret=OTHER_SECRET), None
    other = webhook(secret="whsec_other")
    yield "another organisation's secret", other, forwarded_headers(other), None
    unprefixed = fresh.headers | {"Sync-Signature": signature(fresh.body, secret=SECRET.removeprefix("whsec_"))}
    yield "a secret without its prefix", fresh, forwarded_headers(Webhook(fresh.body, unprefixed)), None
    whole = forwarded_headers(fresh)
    yield "no Sync-Signature", fresh, {name: whole[name] for name in whole if name != "Sync-Signature"}, None
    yield "no signature at all", fresh, {"Content-Type": "application/json"}, None
    for wrong in (
        "",
        "t=,v1=",
        "v1=00,t=1",
        "t=1",
        f"t={int(now)},v1=",
        f"t=1e9,v1={'0' * 64}",
        f"t={'9' * 5000},v1={'0' * 64}",
        "t=٣,v1=é",
    ):
        yield f"Sync-Signature {wrong[:20]!r}", fresh, whole | {"Sync-Signature": wrong}, None
    for wrong in ("v1", "v1,a,b", "v1,%%%", "v1,é", "v1,AAAA  v1,AAAA", "v2,AAAA", f"v1,{'A' * 43}"):
        yield f"webhook-signature {wrong!r}", late, forwarded_headers(late) | {"webhook-signature": wrong}, None
    for wrong in ("", "now", "nan", "inf", "1e400", "-1"):
        yield f"webhook-timestamp {wrong!r}", late, forwarded_headers(late) | {"webhook-timestamp": wrong}, None


async def test_everything_else_is_refused_with_401_and_not_stored(example, client):
    app = example("receive", FORWARD_SECRET=FORWARD_SECRET)
    await app.start()
    statuses = {}
    for name, sent, headers, body in _refused(time.time()):
        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        statuses[name] = await post(client, app, sent, raw, body)

    assert {name: status for name, status in statuses.items() if status != 401} == {}
    assert len(statuses) > 30
    assert stored(app) == []


@pytest.mark.parametrize("name", ["receive", "relay"])
@pytest.mark.parametrize("length", [-1, 2**40])
async def test_a_body_without_a_sensible_length_is_not_read(example, name, length):
    app = example(name, MAYFLY_PUBLIC_URL="http://127.0.0.1:9", FORWARD_SECRET=FORWARD_SECRET)
    await app.start()
    url = httpx.URL(app.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"POST / HTTP/1.1\r\nHost: app\r\nContent-Length: {length}\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.readline(), 10)
    writer.close()

    assert b" 4" in answer[:13]


async def test_a_webhook_is_signed_by_either_secret_while_sync_sos_is_rotated(example, client):
    app = example("receive", SYNC_WEBHOOK_SECRET=f"whsec_new,{SECRET}")
    await app.start()
    old, new = webhook(), webhook(secret="whsec_new")

    assert [await post(client, app, one, one.headers) for one in (old, new)] == [204, 204]


async def test_what_the_app_cannot_store_is_not_answered_2xx(example, client):
    app = example("receive", FORWARD_SECRET=FORWARD_SECRET)
    (app.folder / "inbox.db").mkdir()
    (app.folder / "inbox").write_text("a file where the folder should be")
    await app.start()
    sent = webhook()
    try:
        status = await post(client, app, sent, forwarded_headers(sent))
    except httpx.RemoteProtocolError:  # http.server closes the connection without an answer
        status = 500
    (app.folder / "inbox.db").rmdir()
    (app.folder / "inbox").unlink()

    assert status == 500
    assert await post(client, app, sent, forwarded_headers(sent, attempt=2)) == 204
    assert stored(app) == [sent.body]


def forwarding(folder, url, more=""):
    """Return the environment of a Mayfly that forwards to *url*; *more* is the rest of the table."""
    path = folder / "forward.toml"
    path.write_text(f'[[forward]]\nid = "app"\nurl = "{url}"\n{more}')
    # A wider tolerance than the app's, so that what is late for the app is not for Mayfly, however slow the machine is.
    return {"MAYFLY_CONFIG": str(path), "MAYFLY_TTL": "7d", "MAYFLY_WEBHOOK_TOLERANCE": "1h"}


async def test_an_app_that_was_down_takes_what_mayfly_forwards_to_it_late(example, mayfly, simulator, tmp_path, client):
    app = example("receive", FORWARD_SECRET=FORWARD_SECRET)
    second = {"FORWARD_SECRET": FORWARD_SECRET, "SYNC_BASE_URL": simulator.url}
    up = await mayfly("up", **forwarding(tmp_path, app.url, 'secret_env = "FORWARD_SECRET"'), **second).start()
    late, after = webhook(b'{ "id": "g1", "status": "COMPLETED", "n": 1.0 }', at=time.time() - 400), webhook()
    answer = await client.post(f"{up.url}/webhooks/sync", content=late.body, headers=late.headers)
    await eventually(lambda: up.logs("forward.deferred"), seconds=20)
    await app.start()
    await client.post(f"{up.url}/webhooks/sync", content=after.body, headers=after.headers)
    await eventually(lambda: len(stored(app)) == 2, seconds=30)

    assert answer.status_code == 202
    assert sorted(stored(app)) == sorted([late.body, after.body])


async def test_an_app_without_the_second_secret_refuses_what_comes_late(example, mayfly, simulator, tmp_path, client):
    app = example("receive")
    await app.start()
    up = await mayfly("up", **forwarding(tmp_path, app.url), SYNC_BASE_URL=simulator.url).start()
    fresh = webhook()
    await client.post(f"{up.url}/webhooks/sync", content=fresh.body, headers=fresh.headers)
    await eventually(lambda: stored(app), seconds=20)
    late = webhook(at=time.time() - 400)
    await client.post(f"{up.url}/webhooks/sync", content=late.body, headers=late.headers)
    await eventually(lambda: up.logs("forward.deferred"), seconds=20)

    assert "401" in up.logs("forward.deferred")[0]["error"]
    assert stored(app) == [fresh.body]


# The relay: the app receives from sync.so, and passes it on


async def test_the_relay_passes_on_the_very_bytes_with_the_headers_of_sync_so(example, client):
    async with App() as mayfly:
        mayfly.script(Answer(202), is_for_ever=True)
        app = example("relay", MAYFLY_PUBLIC_URL=mayfly.url)
        await app.start()
        # Not as a parser would write it again: blanks, an escape, 1.0, "ü".
        sent = webhook(b'{ "id": "3f1c2a9e", "status":"COMPLETED","n": 1.0, "a": "\\u00fc", "b": "\xc3\xbc" }\n')
        status = await post(client, app, sent, sent.headers | {"Cookie": "a=b", "Authorization": "Bearer private"})
        (relayed,) = await mayfly.wait_for(1)

    assert status == 204
    assert (relayed.path, relayed.body) == ("/webhooks/sync", sent.body)
    assert relayed.header("Sync-Signature") == sent.headers["Sync-Signature"]
    assert relayed.header("Content-Type") == "application/json"
    assert (relayed.header("Cookie"), relayed.header("Authorization")) == (None, None)


async def record_of(api, generation_id):
    """Return the record once it is there."""

    async def look():
        async with http_client(api.url) as operator:
            answer = await operator.get(f"/api/records/{generation_id}", headers=OPERATOR)
        return answer.json() if answer.status_code == 200 else None

    return await eventually(look, seconds=20)


async def test_a_relayed_webhook_becomes_a_record_of_mayfly(example, client, mayfly, simulator):
    api = await mayfly("up", SYNC_BASE_URL=simulator.url).start()
    app = example("relay", MAYFLY_PUBLIC_URL=api.url)
    await app.start()
    sent = webhook(webhookUrl="https://app.example.com/webhooks/sync?ttl=9d&label.customer=acme")
    foreign = webhook(webhookUrl="https://app.example.com/hooks?ttl=5m&label.customer=acme")
    for one in (sent, foreign):
        assert await post(client, app, one, one.headers) == 204

    ours, other = await record_of(api, sent.id), await record_of(api, foreign.id)
    assert (ours["state"], ours["retention"]["rule"], ours["labels"]) == (
        "scheduled",
        "override: ttl",
        {"customer": "acme"},
    )
    assert (other["state"], other["retention"]["rule"], other["labels"]) == ("scheduled", "MAYFLY_TTL", {})


async def test_the_relay_tries_again_while_mayfly_is_down_or_busy(example, client):
    async with App() as mayfly:
        mayfly.script(Answer(503), Answer(end="reset"), Answer(202))
        app = example("relay", MAYFLY_PUBLIC_URL=mayfly.url)
        await app.start()
        await mayfly.refuse()
        sent = webhook()
        assert await post(client, app, sent, sent.headers) == 204
        await mayfly.accept()
        relayed = await mayfly.wait_for(3, seconds=30)

        assert {one.body for one in relayed} == {sent.body}
        assert not (app.folder / "not-relayed.txt").exists()


@pytest.mark.parametrize(
    ("answer", "age"),
    [
        (Answer(401), 0),
        (Answer(302, headers=(("Location", "/login"),)), 0),
        (Answer(200, body="login"), 0),
        (Answer(503), 268),
    ],
    ids=["refused", "redirected", "not Mayfly", "down for too long"],
)
async def test_what_could_not_be_relayed_is_noted_to_be_added_later(example, client, answer, age):
    async with App() as mayfly:
        mayfly.script(answer, is_for_ever=True)
        app = example("relay", MAYFLY_PUBLIC_URL=mayfly.url)
        await app.start()
        sent = webhook(at=time.time() - age)
        assert await post(client, app, sent, sent.headers) == 204
        noted = app.folder / "not-relayed.txt"
        await eventually(noted.exists, seconds=20)

        assert await eventually(noted.read_text) == f"{sent.id}\n"
        assert {one.path for one in mayfly.requests} == {"/webhooks/sync"}


async def test_the_relay_refuses_what_sync_so_did_not_send_just_now(example, client):
    async with App() as mayfly:
        app = example("relay", MAYFLY_PUBLIC_URL=mayfly.url)
        await app.start()
        sent, stale, other = webhook(), webhook(at=time.time() - 301), webhook(secret="whsec_other")
        statuses = [
            await post(client, app, sent, sent.headers, sent.body + b" "),
            await post(client, app, stale, stale.headers),
            await post(client, app, other, other.headers),
            await post(client, app, sent, {"Content-Type": "application/json"}),
        ]

        assert statuses == [401] * 4
        assert mayfly.requests == []


# The call: the app names its generations


async def test_the_call_names_each_generation_with_its_ttl_and_labels(example):
    async with App() as mayfly:
        mayfly.script(
            Answer(
                202,
                (("Content-Type", "application/json"),),
                json.dumps({"id": "3f1c2a9e", "state": "scheduled", "dueAt": "2026-12-31T00:00:00Z"}),
            ),
            is_for_ever=True,
        )
        add = example("add", MAYFLY_PUBLIC_URL=mayfly.url, MAYFLY_INTAKE_TOKEN="intake-token")
        code, output = await add.run("3f1c2a9e", "a40d7c52")

    assert (code, output.count("scheduled")) == (0, 2)
    assert [(one.method, one.path) for one in mayfly.requests] == [("POST", "/api/records")] * 2
    assert {one.header("Authorization") for one in mayfly.requests} == {"Bearer intake-token"}
    assert [json.loads(one.body) for one in mayfly.requests] == [
        {"id": generation_id, "ttl": "72h", "labels": {"customer": "acme"}}
        for generation_id in ("3f1c2a9e", "a40d7c52")
    ]


async def test_a_generation_that_is_called_for_has_a_record_a_wrong_token_adds_none(example, mayfly, simulator):
    shared = {"SYNC_BASE_URL": simulator.url, "MAYFLY_INTAKE_TOKEN": "intake-token-of-the-tests"}
    up = await mayfly("up", **shared).start()
    created = [simulator.add().id for _ in range(2)]
    wrong = example("add", MAYFLY_PUBLIC_URL=up.url, MAYFLY_INTAKE_TOKEN="wrong")
    right = example("add", MAYFLY_PUBLIC_URL=up.url, MAYFLY_INTAKE_TOKEN=shared["MAYFLY_INTAKE_TOKEN"])
    refused, _ = await wrong.run(created[0])
    codes = [(await right.run(created[1]))[0] for _ in range(2)]
    record = await record_of(up, created[1])
    async with http_client(up.url) as operator:
        unknown = await operator.get(f"/api/records/{created[0]}", headers=OPERATOR)

    assert (refused, codes) == (1, [0, 0])
    assert (record["state"], record["retention"]["ttl"], record["labels"]) == ("scheduled", "3d", {"customer": "acme"})
    assert unknown.status_code == 404


async def test_the_call_fails_loudly(example):
    async with App() as mayfly:
        mayfly.script(Answer(401, body="a wrong token"), is_for_ever=True)
        add = example("add", MAYFLY_PUBLIC_URL=mayfly.url, MAYFLY_INTAKE_TOKEN="wrong")
        code, output = await add.run("3f1c2a9e")

    assert code == 1
    assert "401" in output
