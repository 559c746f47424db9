"""Forgetting records: what is removed, what stays, who may, and when it happens by itself."""

import asyncio
import json
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, insert, select, update

import workers.runner
from service.commands import record_moves
from service.config.settings import read_settings
from service.core.key import Key
from service.core.record_ttls import RecordTtls
from service.ledger import forgetting
from service.ledger.opening import open_database
from service.ledger.schema import events, labels, records
from tests.conftest import API_TOKEN
from tests.support.commands import command
from tests.support.ledger import (
    ACTOR,
    HOUR,
    arrival,
    claim,
    claim_one,
    confirmed,
    copy,
    deferred,
    given_up,
    gone_already,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)
from tests.support.webhooks import webhook
from workers.hygiene import BATCH, MINUTES, Hygiene, hygiene_cron

# It is in every field that may be personal, and in the texts of the history.
SECRET = "the face of Ada"
PERSONAL: dict[str, Any] = {
    "input": [{"type": "text", "script": SECRET}],
    "options": {"note": SECRET},
    "segments": [{"note": SECRET}],
    "outputUrl": f"https://x/{SECRET}?token=1",
    "outputMediaUrl": f"https://x/{SECRET}?token=2",
    "segmentOutputUrl": f"https://x/{SECRET}?token=3",
    "synthesizedAudioUrl": f"https://x/{SECRET}?token=4",
    "webhookUrl": f"https://hooks.example.com/webhooks/sync?client={SECRET}",
    "outputFileName": f"{SECRET}.mp4",
    "error": SECRET,
    "unknown": SECRET,
}
RECEIPT = json.dumps({"method": "DELETE", "status": 200, "at": "2026-01-01T00:00:00Z", "body": SECRET})
# The columns that are not emptied.
STAYING = {
    *("seq", "account", "id", "state", "outcome", "status", "model", "created_at", "output_duration", "project_id"),
    *("error_code", "receipt", "received_at", "due_at", "copied_at", "deleted_at", "wake_at", "attempts"),
    *("copied_attempt", "unanswered_attempt", "counted_on", "failing_since", "failures", "refusals"),
    *("rule", "ttl_seconds", "forgotten_at", "sent_at", "source", "looks"),
}


@pytest.fixture
async def client(app_client):
    """A client with the operator's token: the test runs once on each kind of database."""
    app_client.headers["Authorization"] = f"Bearer {API_TOKEN}"
    return app_client


@pytest.fixture
def mayfly(database_url, tmp_path):
    """Run a command on the ledger of the test."""
    environment = {
        "MAYFLY_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
    }

    async def run(*arguments: str, stdin: bytes = b""):
        return await asyncio.to_thread(command, *arguments, stdin=stdin, **environment)

    return run


def ttls_of(default, **by_rule):
    """Return how long records are kept: *default*, or as a rule says."""
    return RecordTtls(default, {f"rule: {name}": ttl for name, ttl in by_rule.items()})


@pytest.fixture
def make_hygiene(database, metrics):
    """Make the hygiene of a worker: ``make_hygiene(ttl)``."""

    def make(ttl, *, now=utc_now, on=database, **by_rule):
        return Hygiene(on, ttls_of(ttl, **by_rule), now=now, metrics=metrics, stopping=asyncio.Event())

    return make


async def deleted(database, *, ago=timedelta(0), **fields):
    """Store a record with personal data that was held, copied, tried twice and deleted *ago*."""
    key = await store(database, **(PERSONAL | fields))
    await settle(database, deferred(await claim_one(database)))
    item = await claim_one(database, now=utc_now() + HOUR)
    await copy(database, item, **PERSONAL)
    await settle(database, confirmed(item, receipt=RECEIPT), now=utc_now() - ago)
    named = insert(labels).values(record=(await row_of(database, key)).seq, name="customer", value=SECRET)
    await database.write(lambda connection: connection.execute(named).rowcount)
    return key


async def make_due(database):
    """Let the scheduled records be due."""
    past = utc_now() - timedelta(minutes=1)
    await database.write(
        lambda connection: connection.execute(update(records).values(due_at=past, wake_at=past)).rowcount
    )


async def texts_of(database, key):
    """Return all that the ledger has about a record as one text."""
    row = await row_of(database, key)
    named = await database.read(
        lambda connection: connection.execute(select(labels).where(labels.c.record == row.seq)).all()
    )
    return f"{row} {await events_of(database, key)} {named}"


async def events_of(database, key):
    row = await row_of(database, key)
    statement = select(events).where(events.c.record == row.seq)
    return await database.read(lambda connection: connection.execute(statement).all())


async def forget(client, key, body=None):
    return await client.post(f"/api/records/{key.id}/forget", json=body)


# What is removed, and what stays


def test_each_column_is_emptied_or_known_to_stay():
    assert set(forgetting.EMPTIED) | STAYING == set(records.c.keys())
    assert set(forgetting.EMPTIED) & STAYING == set()


async def test_a_forgotten_record_has_its_proof_and_nothing_personal(client, database):
    key = await deleted(database)
    before = (await client.get(f"/api/records/{key.id}")).json()
    answer = await forget(client, key, {"reason": "asked for"})
    record = answer.json()

    assert answer.status_code == 200
    assert SECRET not in await texts_of(database, key)
    assert "token=" not in await texts_of(database, key)
    for name in ("id", "state", "outcome", "status", "receivedAt", "dueAt", "copiedAt", "deletedAt", "attempts"):
        assert record[name] == before[name], name
    assert record["receipt"] == {"method": "DELETE", "status": 200, "at": "2026-01-01T00:00:00Z"}
    assert (record["notification"], record["copy"], record["input"]) == (None, None, None)
    assert record["forgottenAt"] is not None
    moves = ["receive", "claim", "defer", "claim", "confirm", "forget"]
    assert [event["move"] for event in record["events"]] == moves
    assert record["events"][2]["detail"].keys() == {"attempt", "verdict", "retryAt"}
    assert record["events"][4]["detail"] == before["events"][4]["detail"]
    assert record["events"][5]["detail"] == {"reason": "asked for"}


async def test_to_forget_a_record_again_changes_nothing(client, database):
    key = await deleted(database)
    first = (await forget(client, key)).json()

    assert (await forget(client, key)).json() == first


async def test_a_late_webhook_of_a_forgotten_generation_brings_nothing_back(client, database, metrics):
    sent = webhook(**PERSONAL)
    accepted = await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
    key = arrival(id=sent.id).key
    await make_due(database)
    await settle(database, confirmed(await claim_one(database)))
    await forget(client, key)
    before = await texts_of(database, key)
    late = webhook(**PERSONAL | {"id": sent.id, "webhookUrl": "https://h/webhooks/sync?ttl=forever&hold=x"})
    answer = await client.post("/webhooks/sync", content=late.body, headers=late.headers)

    assert (accepted.status_code, answer.status_code, answer.json()["state"]) == (202, 202, "deleted")
    assert await texts_of(database, key) == before
    assert len((await client.get("/api/records")).json()["items"]) == 1
    assert metrics.registry.get_sample_value("mayfly_conflicts_total") == 0


# Who may


@pytest.mark.parametrize("state", ["failed", "kept"])
async def test_what_nobody_wants_is_forgotten_and_kept(client, database, state):
    key = await store(database, **PERSONAL, due_in=None if state == "kept" else -HOUR)
    if state == "failed":
        await settle(database, given_up(await claim_one(database)))
    record = (await forget(client, key)).json()
    counts = (await client.get("/api/stats")).json()["records"]

    assert (record["state"], record["dueAt"]) == ("kept", None)
    assert (counts["failed"], counts["kept"]) == (0, 1)
    assert SECRET not in await texts_of(database, key)
    assert await claim(database, now=utc_now() + timedelta(days=9999)) == []
    assert record["retention"]["rule"] == ("forgotten by operator" if state == "failed" else "MAYFLY_TTL")


@pytest.mark.parametrize("state", ["scheduled", "held", "deleting"])
async def test_what_is_to_be_deleted_cannot_be_forgotten(client, database, state):
    key = await store(database, hold="legal" if state == "held" else None)
    if state == "deleting":
        await claim_one(database)
    before = await texts_of(database, key)
    answer = await forget(client, key)

    assert answer.status_code == 409
    assert answer.json()["detail"].startswith(f"cannot forget: the record is {state}")
    assert ("keep it first" in answer.json()["detail"]) == (state != "deleting")
    assert await texts_of(database, key) == before


async def test_a_forgotten_record_that_is_released_gets_a_copy_again(client, database):
    key = await store(database, due_in=None, **PERSONAL)
    await forget(client, key)
    released = (await client.post(f"/api/records/{key.id}/release", json={})).json()
    await make_due(database)
    item = await claim_one(database)
    await copy(database, item, **PERSONAL)
    record = (await client.get(f"/api/records/{key.id}")).json()

    assert (released["state"], released["forgottenAt"]) == ("scheduled", None)
    assert (record["notification"], record["copy"]["error"]) == (None, SECRET)


async def test_a_forgotten_record_that_was_gone_unseen_can_be_reopened(client, database):
    key = await store(database)
    await settle(database, gone_already(await claim_one(database)))
    await forget(client, key)
    reopened = (await client.post(f"/api/records/{key.id}/reopen")).json()

    assert (reopened["state"], reopened["forgottenAt"]) == ("scheduled", None)


async def test_a_missing_record_cannot_be_forgotten(client):
    assert (await forget(client, arrival().key)).status_code == 404


async def test_a_grace_does_not_go_with_forget(client, database):
    key = await deleted(database)

    assert (await forget(client, key, {"graceSeconds": 5})).status_code == 400


# The command


async def test_the_command_forgets_each_record_and_reports_it(mayfly, database):
    gone, other = await deleted(database), await deleted(database)
    waiting = await store(database, due_in=HOUR)
    result = await mayfly(
        "records", "forget", "--yes", gone.id, waiting.id, "-", stdin=f"{other.id}\nnobody\n".encode()
    )
    listed = (await mayfly("records", "list", "--state", "deleted")).stdout

    assert result.exit_code == 1
    assert result.stdout.splitlines() == [f"{gone.id} is forgotten.", f"{other.id} is forgotten."]
    why = "the record is scheduled; keep it first, or wait until its generation is deleted"
    assert result.stderr.splitlines() == [
        f"mayfly: {waiting.id}: cannot forget: {why}",
        "mayfly: there is no record of generation nobody",
    ]
    assert listed.count(", forgotten") == 2


async def test_the_command_forgets_nothing_without_a_word(mayfly, database):
    key = await deleted(database)
    result = await mayfly("records", "forget", key.id)

    assert (result.exit_code, result.stdout) == (1, "")
    assert "nothing was forgotten" in result.stderr
    assert "add --yes" in result.stderr
    assert (await row_of(database, key)).forgotten_at is None


@pytest.mark.parametrize(("answer", "exit_code"), [("y", 0), ("n", 1)])
async def test_the_command_asks_once_on_a_terminal(mayfly, database, monkeypatch, answer, exit_code):
    keys = [await deleted(database) for _ in range(2)]
    monkeypatch.setattr(record_moves, "is_terminal", lambda: True)
    result = await mayfly("records", "forget", *(key.id for key in keys), stdin=f"{answer}\n".encode())

    assert result.exit_code == exit_code
    assert result.stdout.count("Remove what is personal from these 2 records for good? [y/N]") == 1
    assert [(await row_of(database, key)).forgotten_at is None for key in keys] == [bool(exit_code)] * 2


# By itself


async def test_records_are_forgotten_once_their_generations_have_been_gone_for_the_ttl(database, make_hygiene):
    old, young = await deleted(database, ago=3 * HOUR), await deleted(database, ago=HOUR)
    failed = await store(database, **PERSONAL)
    await settle(database, given_up(await claim_one(database)))

    assert await make_hygiene(2 * HOUR).run() == 1
    assert await make_hygiene(2 * HOUR).run() == 0
    rows = [await row_of(database, key) for key in (old, young, failed)]
    assert [row.forgotten_at is None for row in rows] == [False, True, True]
    assert rows[2].state == "failed"
    (forgot,) = [entry for entry in await events_of(database, old) if entry.move == "forget"]
    assert forgot.actor == "MAYFLY_RECORD_TTL"
    assert SECRET not in await texts_of(database, old)


async def test_a_clock_that_is_ahead_forgets_nothing_early_on_postgresql(postgres_url, make_hygiene):
    async with open_database(postgres_url) as database:
        key = await deleted(database, ago=HOUR)
        forgotten = await make_hygiene(2 * HOUR, now=lambda: utc_now() + 5 * HOUR, on=database).run()

        assert forgotten == 0
        assert (await row_of(database, key)).forgotten_at is None


async def deleted_by(database, rule, **options):
    """Store a record that *rule* decided and that is deleted."""
    key = await deleted(database, **options)
    named = update(records).where(records.c.id == key.id).values(rule=rule)
    await database.write(lambda connection: connection.execute(named).rowcount)
    return key


async def forgetters_of(database, *keys: Key):
    """Return who forgot each record; None for one that is not forgotten."""
    entries = [await events_of(database, key) for key in keys]
    return [next((one.actor for one in mine if one.move == "forget"), None) for mine in entries]


async def test_a_rule_has_a_record_ttl_of_its_own(database, make_hygiene):
    rules = ("rule: short", "rule: film", "rule: gone", "MAYFLY_TTL", "override: ttl")
    keys = [await deleted_by(database, rule, ago=3 * HOUR) for rule in rules]
    young = await deleted_by(database, "rule: short", ago=HOUR / 2)

    assert await make_hygiene(24 * HOUR, short=HOUR, film=None).run() == 1
    assert await forgetters_of(database, *keys, young) == ["rule: short", *[None] * 5]
    assert SECRET not in await texts_of(database, keys[0])
    assert await make_hygiene(2 * HOUR, short=HOUR, film=None).run() == 3
    assert await forgetters_of(database, *keys[1:], young) == [None, *["MAYFLY_RECORD_TTL"] * 3, None]


async def test_without_the_setting_a_rule_alone_says_when_records_are_forgotten(database, make_hygiene):
    keys = [await deleted_by(database, rule, ago=3 * HOUR) for rule in ("rule: short", "rule: gone", "MAYFLY_TTL")]

    assert await make_hygiene(None, short=HOUR).run() == 1
    assert await forgetters_of(database, *keys) == ["rule: short", None, None]


def test_the_settings_have_the_record_ttl_of_each_rule(tmp_path):
    file = tmp_path / "mayfly.toml"
    rule = '[[rule]]\nid = "short"\nstatus = "FAILED"\nttl = "1h"\nrecord_ttl = "7d"\n'
    file.write_text(rule, encoding="utf-8")
    settings = read_settings({"MAYFLY_CONFIG": str(file), "MAYFLY_RECORD_TTL": "90d"})

    assert settings.record_ttls == RecordTtls(90 * 24 * HOUR, {"rule: short": 7 * 24 * HOUR})


async def test_what_is_to_be_forgotten_is_found_by_an_index(database):
    """Each rule costs its own entries alone, however many records there are."""
    searched = {"sqlite": "records_rule_deleted_at (rule=? AND deleted_at<?)", "postgresql": "records_rule_deleted_at"}
    rows: list[str] = []

    def explain(connection):
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")

        def note(conn, _cursor, text, parameters, _context, _many):
            if "deleted_at <=" in text and "EXPLAIN" not in text:
                rows.extend(str(row[-1]) for row in conn.exec_driver_sql(_explain(connection, text), parameters))

        event.listen(connection, "before_cursor_execute", note)
        forgetting.forget_deleted(connection, "MAYFLY_TTL", ttl=HOUR, after=None, now=utc_now(), limit=5, actor=ACTOR)
        return connection.dialect.name

    name = await database.write(explain)
    assert any(searched[name] in row for row in rows)


def _explain(connection, text):
    return f"{'EXPLAIN QUERY PLAN' if connection.dialect.name == 'sqlite' else 'EXPLAIN'} {text}"


async def many_deleted(database, number):
    """Store *number* records that were deleted an hour ago."""
    items = [arrival(**PERSONAL) for _ in range(number)]
    await receive(database, *items)
    done = update(records).values(
        state="deleted", outcome="deleted", deleted_at=utc_now() - HOUR, wake_at=None, receipt=RECEIPT
    )
    await database.write(lambda connection: connection.execute(done).rowcount)


async def test_more_than_one_batch_is_forgotten_in_one_run(database, make_hygiene):
    await many_deleted(database, 2 * BATCH + 5)

    assert await make_hygiene(timedelta(minutes=1)).run() == 2 * BATCH + 5


async def test_several_workers_at_once_forget_each_record_once(database, make_hygiene):
    await many_deleted(database, BATCH + 50)
    counts = await asyncio.gather(*(make_hygiene(timedelta(minutes=1)).run() for _ in range(3)))
    # On PostgreSQL a worker leaves to another what that one has locked.
    rest = await make_hygiene(timedelta(minutes=1)).run()
    forgets = select(events.c.record).where(events.c.move == "forget")
    noted = await database.read(lambda connection: connection.execute(forgets).scalars().all())

    assert sum(counts) + rest == len(noted) == len(set(noted)) == BATCH + 50


async def test_a_batch_is_bounded_and_continues_after_the_last(database):
    await many_deleted(database, 7)
    forget_some = partial(
        forgetting.forget_deleted, rule="MAYFLY_TTL", ttl=timedelta(0), now=utc_now(), limit=5, actor=ACTOR
    )
    first = await database.write(partial(forget_some, after=None))
    second = await database.write(partial(forget_some, after=first.last_deleted_at))
    third = await database.write(partial(forget_some, after=second.last_deleted_at))

    assert [batch.number for batch in (first, second, third)] == [5, 2, 0]


async def test_a_stop_ends_a_run_after_its_batch(database, metrics):
    await many_deleted(database, BATCH + 1)
    stopping = asyncio.Event()
    stopping.set()
    hygiene = Hygiene(database, ttls_of(HOUR / 2), metrics=metrics, stopping=stopping)

    assert await hygiene.run() == BATCH


async def test_a_database_that_does_not_answer_ends_a_run_and_is_counted(sqlite_database, metrics):
    await sqlite_database.close()
    hygiene = Hygiene(sqlite_database, ttls_of(HOUR), metrics=metrics, stopping=asyncio.Event())

    assert await hygiene.run() == 0
    assert metrics.registry.get_sample_value("mayfly_loops_failed_total", {"loop": "hygiene"}) == 1


async def test_arq_runs_the_hygiene_when_a_worker_starts(pool, metrics, sqlite_database, make_hygiene):
    key = await deleted(sqlite_database, ago=2 * HOUR)
    stopping = asyncio.Event()
    hygiene = make_hygiene(HOUR, on=sqlite_database)
    jobs = workers.runner.jobs_of_account("default", None, None, None, 5, (), hygiene)  # type: ignore[arg-type]
    running = asyncio.create_task(workers.runner.run_jobs(pool, jobs, metrics, stopping))
    for _ in range(100):
        await asyncio.sleep(0.05)
        if (await row_of(sqlite_database, key)).forgotten_at is not None:
            break
    stopping.set()
    await asyncio.wait_for(running, 10)

    assert (await row_of(sqlite_database, key)).forgotten_at is not None


def test_the_hygiene_runs_every_ten_minutes_and_leaves_no_result():
    job = hygiene_cron()

    assert sorted(MINUTES) == [5, 15, 25, 35, 45, 55]
    assert (job.minute, job.second, job.unique, job.keep_result_s) == (set(MINUTES), 0, True, 0)
    assert job.timeout_s is not None
    assert job.timeout_s < 600
