"""Generations that an app adds by their ids: the route and its token, what becomes of the record, and both ways."""

import asyncio
import json
from datetime import datetime, timedelta
from functools import partial

import pytest

from service.core.key import Key
from service.core.lifecycle import Move, State
from service.ledger import history
from tests.conftest import API_TOKEN
from tests.support.commands import command
from tests.support.ledger import HOUR, arrival, claim_one, confirmed, copy, count, moves_of, receive, row_of, settle
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET, webhook

INTAKE_TOKEN = "intake-token-of-the-tests"
APP = {"Authorization": f"Bearer {INTAKE_TOKEN}"}
OPERATOR = {"Authorization": f"Bearer {API_TOKEN}"}
DAY = timedelta(days=1)
G1 = Key("default", "g1")
STUDIO = """
[[account]]
id = "studio"
webhook_secret_env = "STUDIO_SECRET"
api_key_env = "STUDIO_KEY"
min_ttl = "2h"
max_ttl = "30d"
"""


@pytest.fixture
async def app(database, open_client):
    """A client with the intake token: the test runs once on each kind of database."""
    async with open_client(database, MAYFLY_INTAKE_TOKEN=INTAKE_TOKEN) as client:
        client.headers.update(APP)
        yield client


@pytest.fixture
async def sqlite_app(sqlite_database, open_client):
    """The same over SQLite alone."""
    async with open_client(sqlite_database, MAYFLY_INTAKE_TOKEN=INTAKE_TOKEN) as client:
        client.headers.update(APP)
        yield client


def add(client, **body):
    return client.post("/api/records", json={"id": "g1"} | body)


def send(client, sent):
    return client.post("/webhooks/sync", content=sent.body, headers=sent.headers)


# The token


async def test_the_intake_token_is_refused_by_every_other_route_of_the_api(sqlite_app):
    document = (await sqlite_app.get("/schema/openapi.json")).json()
    refused = {}
    for path, operations in document["paths"].items():
        for method in operations if path.startswith("/api/") else ():
            where = path.replace("{generation_id}", "g1").replace("{batch_id}", "b1").replace("{move}", "hold")
            answer = await sqlite_app.request(method, where)
            refused[f"{method.upper()} {path}"] = answer.status_code

    assert refused.pop("POST /api/records") == 400  # without a body
    assert len(refused) > 10
    assert set(refused.values()) == {401}


@pytest.mark.parametrize("headers", [APP, OPERATOR], ids=["app", "operator"])
async def test_the_route_takes_either_token_and_the_history_says_whose(sqlite_app, sqlite_database, headers):
    answer = await sqlite_app.post("/api/records", json={"id": "g1"}, headers=headers)
    entry = (await sqlite_database.read(partial(history.read_entries, record=1)))[0]

    assert answer.status_code == 201
    assert entry.actor == ("app" if headers is APP else "operator")
    assert entry.detail == {"rule": "MAYFLY_TTL", "status": "UNKNOWN", "added": True}


@pytest.mark.parametrize("header", ["", "Bearer wrong", "Bearer", INTAKE_TOKEN, f"Basic {INTAKE_TOKEN}", "Bearer \xff"])
async def test_a_wrong_token_is_401_and_stores_nothing(sqlite_app, sqlite_database, header):
    answer = await sqlite_app.post(
        "/api/records", json={"id": "g1"}, headers={"Authorization": header.encode("latin-1")}
    )

    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "MAYFLY_INTAKE_TOKEN" in answer.json()["detail"]
    assert await count(sqlite_database) == 0


async def test_without_any_token_the_route_is_closed(sqlite_database, open_client):
    async with open_client(sqlite_database, MAYFLY_API_TOKEN="") as client:
        answer = await client.post("/api/records", json={"id": "g1"}, headers=APP)

    assert answer.status_code == 403
    assert "set MAYFLY_INTAKE_TOKEN or MAYFLY_API_TOKEN" in answer.json()["detail"]


async def test_one_token_of_the_two_is_enough(sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        assert (await client.post("/api/records", json={"id": "g1"}, headers=OPERATOR)).status_code == 201
        assert (await client.post("/api/records", json={"id": "g1"}, headers=APP)).status_code == 401
    async with open_client(sqlite_database, MAYFLY_API_TOKEN="", MAYFLY_INTAKE_TOKEN=INTAKE_TOKEN) as client:
        assert (await client.post("/api/records", json={"id": "g2"}, headers=APP)).status_code == 201
        assert (await client.get("/api/records", headers=APP)).status_code == 403


# What is stored


async def test_a_generation_is_added_by_its_id_alone_and_the_answer_is_the_record(app, database):
    answer = await add(app)
    row, found = await row_of(database, G1), answer.json()

    assert answer.status_code == 201
    assert (found["id"], found["account"], found["state"], found["status"]) == ("g1", "default", "scheduled", "UNKNOWN")
    assert datetime.fromisoformat(found["dueAt"]) == row.due_at == row.wake_at == row.received_at + DAY
    assert (row.notification, row.copy, row.look_at) == (None, None, row.received_at)
    assert found["retention"] == {"rule": "MAYFLY_TTL", "ttl": "1d"}
    assert "added by its id, by the app; sync.so has not shown it yet" in found["explain"]


@pytest.mark.parametrize(
    ("body", "state", "rule", "due_in"),
    [
        ({"ttl": "72h"}, "scheduled", "override: ttl by app", 3 * DAY),
        ({"ttl": "1s"}, "scheduled", "override: ttl by app", timedelta(minutes=1)),
        ({"ttl": "forever"}, "kept", "override: ttl by app", None),
        ({"expires": "2199-12-31"}, "scheduled", "override: expires by app", ...),
        ({"hold": "legal"}, "held", "override: hold by app", DAY),
        ({"hold": "no"}, "scheduled", "MAYFLY_TTL", DAY),
        ({"labels": {"customer": "acme", "take": "7"}}, "scheduled", "MAYFLY_TTL", DAY),
    ],
)
async def test_what_is_asked_for_is_stored(app, database, body, state, rule, due_in):  # noqa: PLR0917 - two are fixtures
    answer = await add(app, **body)
    row = await row_of(database, G1)

    assert (answer.status_code, answer.json()["state"], row.state, row.rule) == (201, state, state, rule)
    if due_in is not ...:
        assert row.due_at == (None if due_in is None else row.received_at + due_in)
    assert answer.json()["labels"] == body.get("labels", {})
    if state == "held":
        assert answer.json()["hold"] == {"by": "app", "reason": "legal", "until": None}


async def test_its_look_and_its_attempt_are_enqueued_after_the_commit(sqlite_app, pool):
    await add(sqlite_app)

    async def jobs():
        return await pool.zrange("mayfly:v1", 0, -1)

    async def are_enqueued():
        return len(await jobs()) == 2

    await eventually(are_enqueued)
    assert sorted(await jobs()) == [b"default:g1:1", b"default:g1:copy"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"ttl": "24"}, "`ttl=24`: a number with a unit: 90s, 15m, 24h, 7d, 2w, or forever"),
        ({"ttl": 3600}, "it accepts a text, a number with a unit: 90s"),
        ({"ttl": ""}, "ttl"),
        ({"expires": "tomorrow"}, "an instant with its offset, such as 2026-12-31T00:00:00Z, or a date"),
        ({"expires": 1767139200}, "it accepts a text, 2026-12-31T00:00:00Z or 2026-12-31"),
        ({"hold": True}, "it accepts a text, the reason"),
        ({"ttl": "1h", "expires": "2030-01-01"}, "at most one of ttl, expires and hold"),
        ({"ttl": "1h", "hold": "x"}, "at most one of ttl, expires and hold"),
        ({"labels": {"Customer": "acme"}}, "the name of a label has 1 to 63 of a-z, 0-9"),
        ({"labels": {"customer": 7}}, "labels"),
        ({"labels": ["customer"]}, "it accepts an object of texts"),
        ({"labels": {f"n{number}": "" for number in range(21)}}, "labels"),
        ({"ttls": "1h"}, "unknown field `ttls`"),
        ({"dueAt": "2030-01-01"}, "unknown field `dueAt`"),
        ({"id": ""}, "id"),
        ({"id": ".."}, "the id has characters that are not allowed"),
        ({"id": "a\nb"}, "the id has characters that are not allowed"),
        ({"id": 7}, "id"),
        ({"id": "x" * 256}, "id"),
        ({"account": "nope"}, "account: it accepts one of default"),
    ],
)
async def test_what_cannot_be_read_is_400_with_what_is_accepted(sqlite_app, sqlite_database, body, detail):
    answer = await add(sqlite_app, **body)

    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert detail in answer.json()["detail"]
    assert await count(sqlite_database) == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"g1"', b"{}", b'{"id": "\xff"}'])
async def test_a_body_that_is_no_object_with_an_id_is_400(sqlite_app, sqlite_database, body):
    answer = await sqlite_app.post("/api/records", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert await count(sqlite_database) == 0


async def test_a_body_that_is_too_large_is_413(sqlite_app, sqlite_database):
    answer = await add(sqlite_app, hold="x" * 2_000_000)

    assert answer.status_code == 413
    assert await count(sqlite_database) == 0


async def test_an_id_with_a_slash_can_be_added(sqlite_app, sqlite_database):
    answer = await add(sqlite_app, id="a/b später 🪰")

    assert answer.status_code == 201
    assert (await row_of(sqlite_database, Key("default", "a/b später 🪰"))).state == State.SCHEDULED


# Accounts


async def test_the_account_is_named_where_there_are_several_and_its_bounds_count(
    sqlite_database, open_client, tmp_path
):
    (tmp_path / "mayfly.toml").write_text(STUDIO, encoding="utf-8")
    names = {"STUDIO_SECRET": SECRET + "2", "STUDIO_KEY": "sk-2", "MAYFLY_CONFIG": str(tmp_path / "mayfly.toml")}
    async with open_client(sqlite_database, MAYFLY_INTAKE_TOKEN=INTAKE_TOKEN, **names) as client:
        client.headers.update(APP)
        assert (await add(client, account="studio", ttl="1m")).status_code == 201
        longest = await add(client, account="studio", id="g2", ttl="forever")
        unsaid = await add(client)
        other = await add(client, account="other")
        default = await add(client, account="default")
    row = await row_of(sqlite_database, Key("studio", "g1"))

    assert row.due_at == row.received_at + 2 * HOUR
    assert longest.json()["state"] == "scheduled"
    assert (unsaid.status_code, other.status_code, default.status_code) == (400, 400, 201)
    assert "studio has a record of this generation" in unsaid.json()["detail"]
    assert "it accepts one of default, studio" in other.json()["detail"]


# A generation that is known


async def test_twenty_calls_at_once_make_one_record_and_one_of_them_is_answered_201(app, database):
    answers = await asyncio.gather(*(add(app, ttl="3d", labels={"customer": "acme"}) for _ in range(20)))

    assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
    assert await count(database) == 1
    assert {answer.json()["labels"]["customer"] for answer in answers} == {"acme"}


async def test_a_second_call_is_answered_200_and_can_only_keep_it_longer(app, database):
    await add(app, ttl="3d", labels={"customer": "acme"})
    first = await row_of(database, G1)
    shorter = await add(app, ttl="2d", labels={"customer": "other", "take": "7"})
    assert (shorter.status_code, (await row_of(database, G1)).due_at) == (200, first.due_at)
    assert shorter.json()["labels"] == {"customer": "acme", "take": "7"}
    longer = await add(app, ttl="5d")
    row = await row_of(database, G1)
    assert (longer.status_code, row.due_at) == (200, row.sent_at + 5 * DAY)
    assert row.sent_at > first.sent_at
    held = await add(app, hold="legal")
    assert (held.json()["state"], held.json()["hold"]["reason"]) == ("held", "legal")
    assert (await row_of(database, G1)).due_at == row.due_at
    kept = await add(app, ttl="forever")

    assert (kept.json()["state"], kept.json()["dueAt"]) == ("held", None)


async def test_labels_of_many_calls_stay_within_the_limit_of_a_generation(app, database):
    for start in (0, 10):
        assert (await add(app, labels={f"n{start + number}": "x" for number in range(10)})).status_code in {200, 201}
    refused = await add(app, labels={"more": "x"}, ttl="9d")

    assert refused.status_code == 400
    assert "more than 20 labels" in refused.json()["detail"]
    assert (await row_of(database, G1)).rule == "MAYFLY_TTL"  # nothing of it is stored


async def test_a_generation_that_a_webhook_announced_keeps_its_body(app, database):
    sent = webhook(id="g1")
    await send(app, sent)
    answer = await add(app, ttl="9d", labels={"customer": "acme"})
    row = await row_of(database, G1)

    assert (answer.status_code, answer.json()["status"], row.notification) == (200, "COMPLETED", sent.body.decode())
    assert row.rule == "override: ttl by app"
    assert answer.json()["labels"] == {"customer": "acme"}
    assert "notification" in answer.json()


async def test_what_is_deleted_is_answered_as_it_is(app, database):
    await receive(database, arrival(id="g1"))
    claimed = await claim_one(database)
    await copy(database, claimed)
    await settle(database, confirmed(claimed))
    answer = await add(app, ttl="9d")

    assert (answer.status_code, answer.json()["state"], answer.json()["outcome"]) == (200, "deleted", "deleted")


# Both ways: its webhook comes as well


@pytest.mark.parametrize(
    ("body", "query", "state", "rule"),
    [
        ({}, "", State.SCHEDULED, "MAYFLY_TTL"),
        ({"ttl": "7d"}, "", State.SCHEDULED, "override: ttl by app"),
        ({"ttl": "1h"}, "ttl=3d", State.SCHEDULED, "override: ttl"),
        ({"ttl": "1h"}, "ttl=forever", State.KEPT, "override: ttl"),
        ({"hold": "mine"}, "ttl=3d", State.HELD, "override: ttl"),
        ({"ttl": "7d"}, "hold=theirs", State.HELD, "override: hold"),
    ],
)
async def test_a_webhook_that_comes_later_completes_the_record(  # noqa: PLR0917 - two are fixtures
    app, database, body, query, state, rule
):
    await add(app, labels={"customer": "acme"}, **body)
    before = await row_of(database, G1)
    address = f"https://hooks.example.com/webhooks/sync?label.take=7&label.customer=other&{query}"
    sent = webhook(id="g1", webhookUrl=address, status="FAILED", error="no face")
    answer = await send(app, sent)
    row = await row_of(database, G1)
    shown = await app.get("/api/records/g1", headers=OPERATOR)

    assert (answer.status_code, row.state, row.rule) == (202, state, rule)
    assert row.notification == sent.body.decode()
    assert (row.status, row.error, row.webhook_url) == ("FAILED", "no face", address)
    assert shown.json()["labels"] == {"customer": "acme", "take": "7"}
    assert row.due_at is None or row.due_at >= before.due_at
    assert row.look_at is not None


async def test_a_webhook_and_a_call_at_the_same_moment_make_one_complete_record(app, database):
    for number in range(10):
        sent = webhook(id=f"g{number}")
        answers = await asyncio.gather(
            send(app, sent), add(app, id=f"g{number}", ttl="7d", labels={"a": "b"}), send(app, sent)
        )
        row = await row_of(database, Key("default", f"g{number}"))
        assert {answer.status_code for answer in answers} <= {200, 201, 202}
        assert (row.status, row.notification) == ("COMPLETED", sent.body.decode())
        assert row.rule == "override: ttl by app"
    assert await count(database) == 10


async def test_a_repeated_webhook_after_that_changes_nothing_more(app, database):
    await add(app, ttl="7d")
    sent = webhook(id="g1")
    await send(app, sent)
    moves = await moves_of(database, G1)
    again = await send(app, webhook(id="g1", error="another"))

    assert again.status_code == 202
    assert (await row_of(database, G1)).notification == sent.body.decode()
    assert await moves_of(database, G1) == moves == [Move.RECEIVE, Move.RECEIVE]


# The command


@pytest.fixture
def environment(sqlite_url, tmp_path):
    """The environment of a command over the SQLite ledger."""
    return {
        "MAYFLY_DATABASE_URL": sqlite_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "SYNC_WEBHOOK_SECRET": SECRET,
        "SYNC_API_KEY": "sk-sim",
    }


async def records_add(environment, *arguments: str, stdin=b""):
    return await asyncio.to_thread(command, "records", "add", *arguments, stdin=stdin, **environment)


async def test_the_command_adds_ids_of_arguments_and_standard_input(environment, sqlite_database):
    result = await records_add(environment, "g1", "-", "--ttl", "3d", "--label", "customer=acme", stdin=b"g2\n\n g3 \n")
    rows = [await row_of(sqlite_database, Key("default", name)) for name in ("g1", "g2", "g3")]

    assert result.exit_code == 0
    assert [line.split(" at ")[0] for line in result.stdout.splitlines()] == [
        f"{name} is added. It is due in 2 days," for name in ("g1", "g2", "g3")
    ]
    assert "not before it has ended" in result.stdout
    assert {row.rule.partition(" by ")[0] for row in rows} == {"override: ttl"}
    assert all(row.look_at is not None and row.status == "UNKNOWN" for row in rows)


async def test_the_command_says_what_became_of_an_id_that_is_known(environment):
    await records_add(environment, "g1", "--ttl", "3d")
    unchanged = await records_add(environment, "g1", "--ttl", "2d")
    later = await records_add(environment, "g1", "--expires", "2199-01-01")
    held = await records_add(environment, "g1", "--hold", "case 7")
    kept = await records_add(environment, "g2", "--ttl", "forever")

    assert unchanged.stdout.startswith("g1 is unchanged. It is due in")
    assert later.stdout.startswith("g1 was there already, and is changed. It is due in")
    assert held.stdout == "g1 was there already, and is changed. It is held.\n"
    assert kept.stdout == "g2 is added. It is kept, and never deleted.\n"


async def test_the_command_prints_the_records_as_json_one_a_line(environment):
    result = await records_add(environment, "g1", "g2", "--json")
    found = [json.loads(line) for line in result.stdout.splitlines()]

    assert [(one["id"], one["state"], one["status"]) for one in found] == [
        ("g1", "scheduled", "UNKNOWN"),
        ("g2", "scheduled", "UNKNOWN"),
    ]


async def test_the_command_adds_what_it_can_and_exits_with_1_for_the_rest(environment, sqlite_database):
    result = await records_add(environment, "..", "g1", "x" * 256)

    assert result.exit_code == 1
    assert result.stderr.count("mayfly: ") == 2
    assert await count(sqlite_database) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--ttl", "24"), "`ttl=24`: a number with a unit: 90s"),
        (("--expires", "soon"), "an instant with its offset"),
        (("--ttl", "1h", "--hold", "x"), "at most one of ttl, expires and hold"),
        (("--label", "customer"), "NAME=VALUE"),
        (("--account", "nope"), "there is no account 'nope': there is default"),
    ],
)
async def test_the_command_exits_with_2_for_what_it_cannot_read(environment, sqlite_database, arguments, text):
    result = await records_add(environment, "g1", *arguments)

    assert (result.exit_code, text in result.stderr) == (2, True)
    assert await count(sqlite_database) == 0
