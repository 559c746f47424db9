"""Several accounts in commands, routes, doctor and health: each names the account, and none is taken for another."""

import json
from functools import partial

import pytest

from service.core.key import Key, choose_account
from service.core.lifecycle import State
from service.ledger import holding, pausing
from service.ledger.account_reading import find_others, find_overdue, read_backlogs
from service.ledger.pausing import Kind, Pause
from tests.conftest import API_TOKEN
from tests.integration.test_accounts import CONFIG, OTHER, OTHER_SECRET, of_account
from tests.integration.test_cli_trying import examined, mayfly
from tests.support.ledger import ACTOR, HOUR, arrival, receive, row_of, utc_now
from tests.support.metrics import numbers_of
from tests.support.webhooks import SECRET

BEARER = {"authorization": f"Bearer {API_TOKEN}"}


@pytest.fixture
def environment(tmp_path, sqlite_url):
    """The variables of a service with the accounts ``default`` and ``acme``."""
    path = tmp_path / "mayfly.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return {
        "MAYFLY_CONFIG": str(path),
        "MAYFLY_DATABASE_URL": f"sqlite:///{sqlite_url.database}",
        "SYNC_API_KEY": "sk-1",
        "SYNC_WEBHOOK_SECRET": SECRET,
        "ACME_KEY": "sk-2",
        "ACME_SECRET": OTHER_SECRET,
    }


@pytest.fixture
async def both(sqlite_database):
    """One record of each account, with ids of their own."""
    mine, theirs = arrival(due_in=HOUR), of_account(arrival(due_in=HOUR), OTHER)
    await receive(sqlite_database, mine, theirs)
    return mine.key, theirs.key


@pytest.mark.parametrize(
    ("accounts", "name", "expected"),
    [
        (("default",), None, "default"),
        (("acme",), None, "acme"),
        (("default", "acme"), None, "default"),
        (("bolt", "acme"), None, "default"),
        (("default", "acme"), "acme", "acme"),
    ],
)
def test_without_a_name_the_only_account_is_meant_or_the_default_one(accounts, name, expected):
    assert choose_account(accounts, name) == expected


@pytest.mark.parametrize(
    ("command", "state"), [("hold", State.HELD), ("keep", State.KEPT), ("release --yes", State.SCHEDULED)]
)
async def test_a_move_of_an_id_that_another_account_has_names_that_account(
    sqlite_database, both, environment, command, state
):
    _, theirs = both
    move = ["records", *command.split(), theirs.id]
    code, _, errors = await mayfly(*move, **environment)

    assert code == 1
    assert f"no record of generation {theirs.id} in account default, but account acme has one" in errors
    assert "--account acme" in errors
    assert (await row_of(sqlite_database, theirs)).state == State.SCHEDULED
    await mayfly(*move, "--account", OTHER, **environment)
    assert (await row_of(sqlite_database, theirs)).state == state


async def test_twins_are_moved_one_by_one(sqlite_database, environment):
    mine = arrival(due_in=HOUR)
    await receive(sqlite_database, mine, of_account(mine, OTHER))
    code, _, _ = await mayfly("records", "hold", mine.key.id, "--account", OTHER, **environment)
    states = [(await row_of(sqlite_database, Key(name, mine.key.id))).state for name in ("default", OTHER)]

    assert (code, states) == (0, [State.SCHEDULED, State.HELD])


@pytest.mark.parametrize("command", ["records show", "records hold", "explain", "records keep"])
async def test_a_mistyped_account_is_refused_and_the_known_ones_are_named(both, environment, command):
    mine, _ = both
    code, _, errors = await mayfly(*command.split(), mine.id, "--account", "acne", **environment)

    assert code == 1
    assert "there is no account 'acne': there is default, acme" in errors


async def test_lists_and_bulk_moves_are_of_one_account(sqlite_database, both, environment):
    mine, theirs = both
    _, output, _ = await mayfly("records", "list", "--json", "--account", OTHER, **environment)
    exported = (await mayfly("records", "export", "--account", OTHER, **environment))[1]
    code, _, _ = await mayfly("records", "hold", "--account", OTHER, "--yes", **environment)

    assert [item["id"] for item in json.loads(output)["items"]] == [theirs.id]
    assert (theirs.id in exported, mine.id in exported) == (True, False)
    assert code == 0
    assert [(await row_of(sqlite_database, key)).state for key in both] == [State.SCHEDULED, State.HELD]


async def test_show_explain_and_forget_find_their_account(sqlite_database, both, environment):
    _, theirs = both
    _, _, missing = await mayfly("records", "show", theirs.id, **environment)
    _, shown, _ = await mayfly("records", "show", theirs.id, "--json", "--account", OTHER, **environment)
    _, unseen, _ = await mayfly("explain", theirs.id, **environment)
    _, explained, _ = await mayfly("explain", theirs.id, "--account", OTHER, "--json", **environment)
    await mayfly("records", "keep", theirs.id, "--account", OTHER, **environment)
    _, _, refused = await mayfly("records", "forget", theirs.id, "--yes", **environment)
    code, _, _ = await mayfly("records", "forget", theirs.id, "--yes", "--account", OTHER, **environment)

    assert "add --account acme" in missing
    assert json.loads(shown)["account"] == OTHER
    assert "account acme has one" in unseen
    assert "will not delete it" not in unseen
    assert json.loads(explained)["state"] == "scheduled"
    assert "add --account acme" in refused
    assert code == 0
    assert (await row_of(sqlite_database, theirs)).forgotten_at is not None


async def test_a_pause_of_one_account_and_its_end(sqlite_database, environment):
    code, said, _ = await mayfly("pause", "--account", OTHER, "--reason", "audit", **environment)
    _, numbers, _ = await mayfly("stats", **environment)
    pauses = await sqlite_database.read(pausing.find_pauses)

    assert (code, said) == (0, "Deletions of account acme are paused.\n")
    assert [(one.account, one.kind) for one in pauses] == [(OTHER, Kind.OPERATOR)]
    assert "acme: operator since" in numbers
    await mayfly("pause", **environment)
    _, left, _ = await mayfly("resume", "--account", OTHER, **environment)
    assert left == "Ended: operator. All accounts are still paused: mayfly resume ends that.\n"
    await mayfly("resume", **environment)
    assert await sqlite_database.read(pausing.find_pauses) == []
    code, _, errors = await mayfly("pause", "--account", "acne", **environment)
    assert (code, "there is no account 'acne'" in errors) == (1, True)


async def test_what_waits_in_an_account_that_is_not_configured_is_named(sqlite_database, environment):
    late = of_account(arrival(due_in=-HOUR), "gone")
    await receive(sqlite_database, late)
    _, numbers, _ = await mayfly("stats", **environment)
    _, output, _ = await mayfly("stats", "--json", **environment)

    assert "Account gone is not configured: nothing deletes its 1 records." in numbers
    (gone,) = [one for one in json.loads(output)["accounts"] if not one["configured"]]
    assert (gone["account"], gone["waiting"], gone["due"]) == ("gone", 1, 1)
    assert gone["oldestOverdueSeconds"] >= HOUR.total_seconds()


async def test_doctor_and_health_name_the_account_that_is_not_configured(
    tmp_path, simulator, sqlite_database, sqlite_url, open_client
):
    await receive(sqlite_database, of_account(arrival(due_in=-HOUR), "gone"))
    code, found = await examined(tmp_path, simulator, MAYFLY_DATABASE_URL=f"sqlite:///{sqlite_url.database}")
    async with open_client(sqlite_database) as client:
        health = (await client.get("/health/ready")).json()

    assert (code, found["deletions of gone"]["status"]) == (1, "failing")
    assert "not configured" in found["deletions of gone"]["detail"]
    assert "deletions of default" not in found
    assert health["parts"]["deletions"]["status"] == "late"
    assert health["parts"]["deletions"]["detail"].startswith("account gone is not configured")


async def test_a_paused_account_hides_no_other_that_is_late(sqlite_database, open_client, environment):
    await receive(sqlite_database, arrival(due_in=-HOUR), of_account(arrival(due_in=-HOUR), OTHER))
    pause = Pause(Kind.UNAUTHORIZED, utc_now(), ACTOR, "the API refuses the key", utc_now() + HOUR, OTHER)
    await sqlite_database.write(partial(pausing.pause, wanted=pause))
    async with open_client(sqlite_database, **environment) as client:
        detail = (await client.get("/health/ready")).json()["parts"]["deletions"]["detail"]

    assert detail.startswith("account acme, since")
    assert "check ACME_KEY" in detail
    assert "account default: the oldest is 60 min overdue" in detail


async def test_metrics_name_the_account(sqlite_database, open_client, environment):
    await receive(sqlite_database, of_account(arrival(due_in=-HOUR), OTHER))
    pause = Pause(Kind.THROTTLED, utc_now(), ACTOR, "the API answered 429", utc_now() + HOUR, OTHER)
    await sqlite_database.write(partial(pausing.pause, wanted=pause))
    async with open_client(sqlite_database, **environment) as client:
        numbers = await numbers_of(client)

    assert numbers["mayfly_account_overdue_seconds", OTHER] >= HOUR.total_seconds()
    assert numbers["mayfly_account_overdue_seconds", "default"] == 0
    assert [numbers["mayfly_account_paused", name] for name in (OTHER, "default")] == [1, 0]
    assert numbers["mayfly_pauses", "throttled"] == 1


async def test_routes_take_the_account(sqlite_database, both, open_client, environment):
    mine, theirs = both
    async with open_client(sqlite_database, **environment) as client:
        client.headers.update(BEARER)
        missing = await client.get(f"/api/records/{theirs.id}")
        shown = await client.get(f"/api/records/{theirs.id}?account=acme")
        unheld = await client.post(f"/api/records/{theirs.id}/hold", json={"reason": "audit"})
        unknown = await client.post(f"/api/records/{mine.id}/hold?account=acne", json={"reason": "audit"})
        listed = await client.get("/api/records?account=acme")
        paused = await client.post("/api/pause?account=acme", json={"reason": "audit"})
        mistyped = await client.post("/api/pause?account=acne")
        resumed = await client.post("/api/resume?account=acme")
        held = await client.post("/api/records/hold", json={"filter": {"account": "acme"}, "reason": "audit"})

    assert (missing.status_code, "account acme has one" in missing.json()["detail"]) == (404, True)
    assert shown.json()["account"] == OTHER
    assert (unheld.status_code, "account=acme" in unheld.json()["detail"]) == (404, True)
    assert (unknown.status_code, mistyped.status_code) == (400, 400)
    assert [item["id"] for item in listed.json()["items"]] == [theirs.id]
    assert [(one["account"], one["kind"]) for one in paused.json()["pauses"]] == [("acme", "operator")]
    assert resumed.json()["pauses"] == []
    assert held.json()["result"]["moved"] == 1
    assert [(await row_of(sqlite_database, key)).state for key in both] == [State.SCHEDULED, State.HELD]


@pytest.mark.parametrize("how", ["route", "filter", "command", "command of a filter"])
async def test_what_an_operator_releases_waits_for_the_minimum_of_its_account(
    sqlite_database, open_client, environment, how
):
    """MAYFLY_MIN_TTL is 1 m, that of the account acme 2 h."""
    theirs = of_account(arrival(hold="x"), OTHER)
    await receive(sqlite_database, theirs)
    async with open_client(sqlite_database, **environment) as client:
        client.headers.update(BEARER)
        if how == "route":
            await client.post(f"/api/records/{theirs.key.id}/release?account=acme")
        elif how == "filter":
            chosen = {"filter": {"account": OTHER}, "reason": "audit", "expected": 1}
            await client.post("/api/records/release", json=chosen)
    if how == "command":
        await mayfly("records", "keep", theirs.key.id, "--account", OTHER, **environment)
        await mayfly("records", "release", theirs.key.id, "--account", OTHER, "--yes", **environment)
    elif how == "command of a filter":
        await mayfly("records", "release", "--account", OTHER, "--reason", "x", "--expect", "1", "--yes", **environment)
    row = await row_of(sqlite_database, theirs.key)

    assert row.state == State.SCHEDULED
    assert row.due_at >= utc_now() + 1.9 * HOUR


async def test_a_hold_before_the_first_webhook_names_its_account(sqlite_database, open_client, environment):
    async with open_client(sqlite_database, **environment) as client:
        client.headers.update(BEARER)
        unsaid = await client.post("/api/records/gen-new/hold", json={"reason": "audit"})
        held = await client.post("/api/records/gen-new/hold?account=acme", json={"reason": "audit"})
    code, _, errors = await mayfly("records", "hold", "gen-other", **environment)
    said, _, _ = await mayfly("records", "hold", "gen-other", "--account", OTHER, **environment)

    assert (unsaid.status_code, "account=" in unsaid.json()["detail"], held.status_code) == (400, True, 202)
    assert (code, "--account" in errors, said) == (1, True, 0)
    keys = [Key(account, one) for account in ("default", OTHER) for one in ("gen-new", "gen-other")]
    found = await sqlite_database.read(partial(holding.find_holds, keys=keys))
    assert {key.account for key in found} == {OTHER}
    assert len(found) == 2


async def test_the_only_account_is_meant_whatever_its_name(sqlite_database, both, open_client, environment):
    _, theirs = both
    only = environment | {"SYNC_API_KEY": "", "SYNC_WEBHOOK_SECRET": ""}
    async with open_client(sqlite_database, **only) as client:
        answer = await client.get(f"/api/records/{theirs.id}", headers=BEARER)
    code, _, _ = await mayfly("records", "show", theirs.id, **only)

    assert (answer.status_code, code) == (200, 0)


async def test_a_sample_is_sent_for_an_account(sqlite_database, open_client, environment):
    async with open_client(sqlite_database, **environment) as client:
        port = {"MAYFLY_HOST": "127.0.0.1", "MAYFLY_PORT": str(client.base_url.port)}
        code, output, _ = await mayfly("send", "--account", OTHER, **environment, **port)
        refused, _, errors = await mayfly("send", "--account", "acne", **environment, **port)
    row = await row_of(sqlite_database, Key(OTHER, json.loads(output)["id"]))

    assert (code, row.account) == (0, OTHER)
    assert (refused, "there is no account 'acne': there is default, acme" in errors) == (2, True)


async def test_a_sample_is_signed_with_the_secret_that_the_key_fetches(open_client, sqlite_database, simulator):
    simulator.webhook_secret = SECRET
    api = {"SYNC_API_KEY": simulator.api_key, "SYNC_BASE_URL": simulator.url}
    async with open_client(sqlite_database) as client:
        where = {"MAYFLY_HOST": "127.0.0.1", "MAYFLY_PORT": str(client.base_url.port)}
        code, _, _ = await mayfly("send", **api, **where)
        without, _, errors = await mayfly("send", **where)

    assert (code, without) == (0, 2)
    assert "SYNC_WEBHOOK_SECRET is not set" in errors


async def test_what_waits_is_counted_for_each_account(database):
    twin = arrival(due_in=-HOUR)
    later = of_account(arrival(due_in=HOUR), OTHER)
    await receive(database, twin, of_account(twin, OTHER), later)
    found = await database.read(partial(read_backlogs, configured=(OTHER, "empty"), now=utc_now()))
    late = await database.read(partial(find_overdue, now=utc_now(), than=HOUR / 2))

    assert [(one.account, one.configured, one.waiting, one.due) for one in found] == [
        (OTHER, True, 2, 1),
        ("empty", True, 0, 0),
        ("default", False, 1, 1),
    ]
    assert sorted(late) == [OTHER, "default"]
    assert await database.read(partial(find_others, key=twin.key)) == [OTHER]
    assert await database.read(partial(find_others, key=Key("empty", twin.key.id))) == [OTHER, "default"]
