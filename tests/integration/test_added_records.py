"""Records that were added by their ids: what looks, attempts and webhooks make of them, and how a wrong id is told."""

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import cast

import msgspec
import pytest
from sqlalchemy import update
from structlog.testing import capture_logs

from service.core.asking import read_asked
from service.core.attempts import SHOWN_WITHIN, Verdict, describe_unknown_id
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.core.matchers import Facts, Pattern, Texts
from service.core.retention import Policy, decide_asked_retention
from service.core.rules import Rule, RuleSet
from service.core.secret import Secret
from service.ledger import adding, explanations, history, pausing, settling
from service.ledger.key_history import MAX_UNKNOWN
from service.ledger.schema import records
from service.simulator import Operation
from service.sync.client import open_sync_api
from service.sync.rate_limit import SpareCalls
from tests.conftest import API_KEY
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    KEY,
    arrival,
    claim,
    claim_one,
    move,
    moves_of,
    receive,
    row_of,
    settle,
    utc_now,
)
from workers.attempt import Cleaner
from workers.copy import LookLedger, Looks
from workers.key_proof import KeyProof
from workers.ledger import WorkerLedger

DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)
RULES = RuleSet(
    [
        Rule("failures", (Texts("status", (Pattern.of("FAILED"),)),), ttl=2 * HOUR),
        Rule("film", (Texts("project", (Pattern.of("film"),)),), is_forever=True),
        Rule("court", (Texts("project", (Pattern.of("court"),)),), hold="a court asked"),
        Rule("acme", (Texts("label.customer", (Pattern.of("acme"),)),), ttl=7 * DAY),
    ]
)
POLICY = Policy(DAY, MINUTE, RULES)
WRONG = describe_unknown_id("default")


@pytest.fixture
async def api(simulator, metrics):
    async with open_sync_api(simulator.url, Secret(API_KEY), connections=5, metrics=metrics) as api:
        yield api


class Calls:
    """What deletions leave of the budget: enough."""

    is_spent = False

    async def take(self):
        return True


@asynccontextmanager
async def slot(_until):
    yield True


@pytest.fixture
def looks_of(api, metrics, database):
    """Make the job of a worker with a policy; *enqueued* has what it enqueues."""

    def make(policy=POLICY, now=utc_now):
        ledger = WorkerLedger(database, limit=None, is_dry_run=False, actor=ACTOR, key=KEY, min_ttl=HOUR, now=now)
        enqueued = []

        async def enqueue_cleanup(key, attempt, at):
            enqueued.append((key, attempt, at))

        looks = Looks(
            ledger=LookLedger(ledger.is_look_wanted, ledger.store_look, ledger.put_off_look, ledger.end_look),
            get=api.get,
            call_slot=slot,
            calls=cast("SpareCalls", Calls()),
            enqueue_cleanup=enqueue_cleanup,
            policy=policy,
            now=now,
            metrics=metrics,
            stopping=asyncio.Event(),
        )
        return looks, enqueued

    return make


@pytest.fixture
def cleaner(api, metrics, database):
    async def copy(item):
        write = partial(settling.store_copies, account=ACCOUNT, copies=[item], now=utc_now(), limit=None, actor=ACTOR)
        return (await database.write(write))[0]

    async def settle_one(item):
        return (await settle(database, item))[0]

    async def acquire():
        return True

    async def no_next(_key, _attempt, _at):
        """Enqueue nothing."""

    return Cleaner(
        key_name="SYNC_API_KEY",
        api=api,
        copy=copy,
        settle=settle_one,
        enqueue_next=no_next,
        call_slot=slot,
        now=utc_now,
        give_up_after=7 * DAY,
        policy=POLICY,
        is_dry_run=False,
        metrics=metrics,
        key_proof=KeyProof(api, call_slot=slot, acquire=acquire),
    )


@pytest.fixture
def add(database):
    """Add an id as an app does, *ago*."""

    async def make(name="g1", *, ago=timedelta(0), policy=POLICY, labels=None, **asked):
        key, now = Key("default", name), utc_now() - ago
        wanted = read_asked(labels=labels or {}, **asked)
        retention = decide_asked_retention(policy, Facts(), wanted, by="app", now=now)
        item = adding.make_arrival(key, retention, now=now, actor=adding.APP)
        await database.write(partial(adding.add_records, arrivals=[item]))
        return key

    return make


def deletes(simulator):
    return [call for call in simulator.calls if call.operation is Operation.DELETE]


async def explain(database, key):
    found = await database.read(partial(explanations.explain_key, key=key, now=utc_now(), is_dry_run=False))
    return found.explain


# The early look


async def test_the_look_finds_the_rest_of_a_generation_that_has_ended(database, simulator, looks_of, add):
    simulator.add(generation_id="g1", output_file_name="take_07", project_id="any", webhook_url="https://app.example/h")
    key = await add(ttl="3h")
    due_at = (await row_of(database, key)).due_at
    looks, enqueued = looks_of()
    await looks.run(key)
    row = await row_of(database, key)

    assert (row.status, row.output_file_name, row.project_id) == ("COMPLETED", "take_07", "any")
    assert (row.webhook_url, row.look_at, row.notification) == ("https://app.example/h", None, None)
    assert json.loads(row.copy)["id"] == "g1"
    assert (row.state, row.due_at, row.wake_at) == (State.SCHEDULED, due_at, due_at)
    assert enqueued == [(key, 1, due_at)]
    assert "It was added by its id, by the app. It is due at" in await explain(database, key)
    assert "the ttl that the app asked for decided this, 3h after it was added" in await explain(database, key)


@pytest.mark.parametrize(
    ("options", "state", "rule", "moves"),
    [
        ({"status": "FAILED"}, State.SCHEDULED, "rule: failures", [Move.RESCHEDULE]),
        ({"project_id": "film"}, State.KEPT, "rule: film", [Move.KEEP]),
        ({"project_id": "court"}, State.HELD, "rule: court", [Move.HOLD]),
    ],
)
async def test_the_rules_decide_when_its_facts_are_known(  # noqa: PLR0917 - four are fixtures
    database, simulator, looks_of, add, options, state, rule, moves
):
    simulator.add(generation_id="g1", **options)
    key = await add()
    looks, _ = looks_of()
    await looks.run(key)
    row = await row_of(database, key)

    assert (row.state, row.rule) == (state, rule)
    assert (await moves_of(database, key))[1:] == moves
    if state is State.SCHEDULED:
        assert row.due_at == row.wake_at == row.sent_at + 2 * HOUR


async def test_its_labels_count_for_the_rules(database, simulator, looks_of, add):
    simulator.add(generation_id="g1", status="COMPLETED")
    key = await add(labels={"customer": "acme"})
    looks, _ = looks_of()
    await looks.run(key)
    row = await row_of(database, key)

    assert (row.rule, row.due_at) == ("rule: acme", row.sent_at + 7 * DAY)


@pytest.mark.parametrize(
    ("options", "state", "rule", "moves"),
    [
        ({}, State.KEPT, "MAYFLY_TTL", [Move.KEEP]),
        ({"status": "FAILED"}, State.SCHEDULED, "rule: failures", [Move.KEEP, Move.RELEASE]),
        ({"project_id": "court"}, State.HELD, "rule: court", [Move.KEEP, Move.RELEASE, Move.HOLD]),
    ],
)
async def test_what_is_kept_only_until_its_facts_are_known_is_decided_then(  # noqa: PLR0917 - four are fixtures
    database, simulator, looks_of, add, options, state, rule, moves
):
    forever = Policy(None, MINUTE, RULES)
    simulator.add(generation_id="g1", **options)
    key = await add(policy=forever)
    looks, enqueued = looks_of(forever)
    await looks.run(key)
    row = await row_of(database, key)

    assert (row.state, row.rule, await moves_of(database, key)) == (state, rule, moves)
    assert len(enqueued) == (state is State.SCHEDULED)


@pytest.mark.parametrize("asked", [{"ttl": "forever"}, {"hold": "legal"}])
async def test_what_was_asked_to_be_kept_or_held_stays_so(database, simulator, looks_of, add, asked):
    simulator.add(generation_id="g1", status="FAILED")
    key = await add(**asked)
    before = await row_of(database, key)
    looks, enqueued = looks_of()
    await looks.run(key)
    row = await row_of(database, key)

    assert (row.state, row.rule, row.status, enqueued) == (before.state, before.rule, "FAILED", [])
    assert row.hold_reason == asked.get("hold")
    # Under the hold the policy has decided by what it knows now: a release brings that back.
    assert row.due_at == (row.sent_at + 2 * HOUR if "hold" in asked else None)


async def test_while_it_is_processing_the_record_waits_and_is_looked_at_again(database, simulator, looks_of, add):
    simulator.add(generation_id="g1", status="PROCESSING")
    key = await add(ttl="3h")
    looks, enqueued = looks_of()
    await looks.run(key)
    row = await row_of(database, key)

    assert (row.state, row.status, row.copy, row.looks) == (State.SCHEDULED, "PROCESSING", None, 1)
    assert row.look_at > utc_now()
    assert enqueued == []
    assert "sync.so still processes it, and it is not deleted before it has ended" in await explain(database, key)
    assert "Mayfly looks again at" in await explain(database, key)


async def test_min_ttl_counts_from_when_it_is_seen_to_have_ended(database, simulator, looks_of, add):
    simulator.add(generation_id="g1")
    key = await add(ttl="2m", ago=HOUR)
    looks, enqueued = looks_of()
    begun = utc_now()
    await looks.run(key)
    row = await row_of(database, key)

    assert begun + MINUTE <= row.due_at <= utc_now() + MINUTE
    assert enqueued == [(key, 1, row.due_at)]


async def test_an_override_that_only_the_api_shows_can_only_keep_it_longer(database, simulator, looks_of, add):
    address = "https://hooks.example.com/webhooks/sync?ttl="
    simulator.add(generation_id="g1", webhook_url=f"{address}9d")
    simulator.add(generation_id="g2", webhook_url=f"{address}1h")
    looks, _ = looks_of()
    for name in ("g1", "g2"):
        await looks.run(await add(name, ttl="3d"))
    longer, same = await row_of(database, Key("default", "g1")), await row_of(database, Key("default", "g2"))

    assert (longer.rule, longer.due_at) == ("override: ttl", longer.sent_at + 9 * DAY)
    assert (same.rule, same.due_at) == ("override: ttl by app", same.sent_at + 3 * DAY)


# A wrong id


async def test_an_id_that_is_not_known_yet_is_looked_for_a_little_longer(database, simulator, looks_of, add):
    key = await add(ago=SHOWN_WITHIN - timedelta(seconds=5))
    looks, _ = looks_of()
    await looks.run(key)
    row = await row_of(database, key)
    assert (row.state, row.looks, row.last_error) == (State.SCHEDULED, 1, None)
    assert row.look_at > utc_now()
    simulator.add(generation_id="g1")
    await looks.run(key)

    assert (await row_of(database, key)).status == "COMPLETED"


@pytest.mark.parametrize(
    ("asked", "state", "moves"),
    [
        ({}, State.FAILED, [Move.RECEIVE, Move.GIVE_UP]),
        ({"hold": "legal"}, State.HELD, [Move.RECEIVE, Move.HOLD]),
        ({"ttl": "forever"}, State.KEPT, [Move.KEEP]),
    ],
)
async def test_a_wrong_id_is_told_and_not_called_gone(  # noqa: PLR0917 - three are fixtures
    database, looks_of, add, asked, state, moves
):
    key = await add(ago=SHOWN_WITHIN, **asked)
    looks, _ = looks_of()
    with capture_logs() as logs:
        await looks.run(key)
    row = await row_of(database, key)

    assert (row.state, row.outcome, row.last_error) == (state, None, WRONG)
    assert (row.look_at, row.wake_at is None) == (None, True)
    assert await moves_of(database, key) == moves
    assert [line["event"] for line in logs] == ["copy.unknown"]
    assert WRONG in await explain(database, key)


async def test_the_attempt_at_the_due_time_tells_a_wrong_id_as_well(database, cleaner, add):
    key = await add(ttl="1m", ago=HOUR)

    assert await cleaner.clean(await claim_one(database)) is Verdict.GONE
    row = await row_of(database, key)
    entries = await database.read(partial(history.read_entries, record=row.seq))
    assert (row.state, row.outcome, row.last_error) == (State.FAILED, None, WRONG)
    assert [entry.move for entry in entries] == [Move.RECEIVE, Move.CLAIM, Move.GIVE_UP]
    assert entries[-1].detail["error"] == WRONG


async def test_an_attempt_within_the_first_minute_only_defers(database, cleaner, add):
    key = await add(policy=Policy(timedelta(seconds=1), timedelta(seconds=1)), ago=timedelta(seconds=5))

    assert await cleaner.clean(await claim_one(database)) is Verdict.GONE
    row = await row_of(database, key)
    assert (row.state, row.outcome, row.status) == (State.SCHEDULED, None, "UNKNOWN")
    assert row.wake_at > utc_now()


async def test_wrong_ids_pause_no_deletions(database, cleaner, add):
    for number in range(MAX_UNKNOWN + 5):
        await add(f"g{number}", ttl="1m", ago=HOUR)
    for item in await claim(database, limit=100):
        await cleaner.clean(item)

    assert await database.read(pausing.find_pauses) == []
    states = {(await row_of(database, Key("default", f"g{number}"))).state for number in range(MAX_UNKNOWN + 5)}
    assert states == {State.FAILED}


async def test_a_retry_asks_again_and_goes_on_if_the_id_is_known_now(database, simulator, cleaner, looks_of, add):
    key = await add(ago=HOUR)
    looks, _ = looks_of()
    await looks.run(key)
    await move(database, key, Move.RETRY)
    await database.write(lambda c: c.execute(update(records).values(due_at=utc_now(), wake_at=utc_now())))
    assert await cleaner.clean(await claim_one(database)) is Verdict.GONE
    assert (await row_of(database, key)).state == State.FAILED
    simulator.add(generation_id="g1")
    await move(database, key, Move.RETRY)
    assert await cleaner.clean(await claim_one(database)) is Verdict.DONE
    row = await row_of(database, key)

    assert (row.state, row.status) == (State.SCHEDULED, "COMPLETED")
    assert row.due_at > utc_now()


async def test_once_the_api_has_shown_it_a_generation_not_found_means_that_it_is_gone(
    database, simulator, cleaner, looks_of, add
):
    simulator.add(generation_id="g1", status="PROCESSING")
    key = await add(ttl="1m", ago=HOUR)
    looks, _ = looks_of()
    await looks.run(key)
    simulator.remove("g1")
    await looks.run(key)
    assert (await row_of(database, key)).state == State.SCHEDULED
    await cleaner.clean(await claim_one(database))
    row = await row_of(database, key)

    assert (row.state, row.outcome) == (State.DELETED, "already_gone")


# Attempts


async def test_what_processes_at_its_due_time_is_not_deleted_and_then_waits_for_min_ttl(
    database, simulator, cleaner, add
):
    generation = simulator.add(generation_id="g1", status="PROCESSING")
    key = await add(ttl="1m", ago=HOUR)
    assert await cleaner.clean(await claim_one(database)) is Verdict.RUNNING
    row = await row_of(database, key)
    assert (row.state, row.status) == (State.SCHEDULED, "PROCESSING")
    generation.become("COMPLETED")
    await database.write(lambda c: c.execute(update(records).values(wake_at=utc_now())))
    assert await cleaner.clean(await claim_one(database)) is Verdict.DONE
    row = await row_of(database, key)
    assert (row.state, row.status, deletes(simulator)) == (State.SCHEDULED, "COMPLETED", [])
    assert row.due_at > utc_now() + MINUTE / 2
    assert await claim(database) == []
    await database.write(lambda c: c.execute(update(records).values(due_at=utc_now(), wake_at=utc_now())))
    assert await cleaner.clean(await claim_one(database)) is Verdict.DONE

    assert (await row_of(database, key)).state == State.DELETED
    assert len(deletes(simulator)) == 1


async def test_the_first_attempt_that_sees_it_ended_lets_the_rules_decide(database, simulator, cleaner, add):
    simulator.add(generation_id="g1", project_id="film")
    simulator.add(generation_id="g2", project_id="court")
    kept, held = await add("g1", ago=2 * DAY), await add("g2", ttl="1h", ago=2 * DAY)
    for item in await claim(database):
        assert await cleaner.clean(item) is Verdict.DONE

    assert (await row_of(database, kept)).state == State.KEPT
    assert ((await row_of(database, held)).state, (await row_of(database, held)).hold_reason) == (
        State.HELD,
        "a court asked",
    )
    assert deletes(simulator) == []


# Its webhook comes later


async def test_a_webhook_brings_a_wrong_id_back_with_what_it_says(database, looks_of, add):
    key = await add(ttl="7d", ago=HOUR, labels={"customer": "acme"})
    looks, _ = looks_of()
    await looks.run(key)
    asked = await row_of(database, key)
    sent = arrival(id="g1", due_in=DAY)
    (receipt,) = await receive(database, sent)
    row = await row_of(database, key)

    assert (receipt.state, receipt.is_moved, receipt.due_at) == (State.SCHEDULED, True, asked.due_at)
    assert (row.state, row.due_at, row.wake_at, row.rule) == (State.SCHEDULED, asked.due_at, asked.due_at, asked.rule)
    assert (row.status, row.notification, row.last_error) == ("COMPLETED", sent.body, None)
    assert row.look_at == sent.received_at
    assert await moves_of(database, key) == [Move.RECEIVE, Move.GIVE_UP, Move.RETRY]


@pytest.mark.parametrize(
    ("options", "state"), [({"due_in": None}, State.KEPT), ({"due_in": DAY, "hold": "legal"}, State.HELD)]
)
async def test_a_webhook_that_holds_or_keeps_brings_a_wrong_id_back_so(database, looks_of, add, options, state):
    key = await add(ago=HOUR)
    looks, _ = looks_of()
    await looks.run(key)
    await receive(database, arrival(id="g1", **options))

    assert (await row_of(database, key)).state == state


async def test_a_webhook_completes_the_record_of_a_sweep_and_changes_no_word_of_the_api(database):
    swept = arrival(id="g1", due_in=DAY, model="of-the-api", outputFileName="take_07", error=None)
    await receive(database, msgspec.structs.replace(swept, is_adopted=True, actor="sweep"))
    labels = {"customer": "acme"}
    sent = arrival(id="g1", due_in=HOUR, model="of-the-webhook", error="odd")
    sent = msgspec.structs.replace(sent, retention=msgspec.structs.replace(sent.retention, labels=labels))
    await receive(database, sent)
    row = await row_of(database, swept.key)
    found = await database.read(lambda c: dict(c.exec_driver_sql("SELECT name, value FROM labels").all()))

    assert (row.notification, row.copy) == (sent.body, swept.body)
    assert (row.model, row.output_file_name, row.error) == ("of-the-api", "take_07", "odd")
    assert (row.due_at, row.look_at, found) == (swept.retention.due_at, None, labels)
    entries = await database.read(partial(history.read_entries, record=row.seq))
    assert [(entry.move, entry.actor) for entry in entries] == [(Move.RECEIVE, "sweep"), (Move.RECEIVE, "webhook")]


async def test_a_webhook_brings_nothing_back_to_a_forgotten_record(database, add):
    key = await add(ttl="forever")
    await database.write(lambda c: c.execute(update(records).values(forgotten_at=utc_now())))
    await receive(database, arrival(id="g1"))
    row = await row_of(database, key)

    assert (row.notification, row.status, row.output_url) == (None, "UNKNOWN", None)
