"""An attempt stores a copy, then deletes, in this order, and commits its outcome."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial

import msgspec
import pytest

from service.core.attempts import ANSWER_LOST, Outcome, Verdict
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.core.matchers import Pattern, Texts
from service.core.retention import Policy
from service.core.rules import Rule, RuleSet
from service.core.secret import Secret
from service.ledger import history, moving, pausing, settling
from service.ledger.database import LedgerUnavailableError, UnknownOutcomeError
from service.ledger.key_history import MAX_UNKNOWN
from service.ledger.opening import open_database
from service.ledger.outcomes import CopyResult, Settled, Settlement
from service.ledger.pausing import Kind
from service.simulator import Operation
from service.simulator.faults import ABSENT_BODIES
from service.sync.answers import Reply, read_get
from service.sync.client import open_sync_api
from tests.conftest import API_KEY
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    claim,
    claim_one,
    confirmed,
    end_lease,
    gone_already,
    lose_leases,
    moves_of,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)
from tests.support.ledger import arrival as arrival_of
from workers.attempt import DRY_RUN_AGAIN, Cleaner
from workers.key_proof import KeyProof

WEEK = timedelta(days=7)


async def no_next(_key, _attempt, _at):
    """Enqueue nothing."""


@pytest.fixture
def cleaner_of(database, metrics):
    """Make a Cleaner over the ledger, without grouping and without a budget."""

    def make(api, now=utc_now, **changes):
        async def copy(item):
            write = partial(
                settling.store_copies, account=ACCOUNT, copies=[item], now=utc_now(), limit=None, actor=ACTOR
            )
            return (await database.write(write))[0]

        async def settle_one(item):
            return (await settle(database, item))[0]

        @asynccontextmanager
        async def call_slot(until):
            yield now() <= until

        async def acquire():
            return True

        cleaner = Cleaner(
            key_name="SYNC_API_KEY",
            api=api,
            copy=copy,
            settle=settle_one,
            enqueue_next=no_next,
            call_slot=call_slot,
            now=now,
            give_up_after=WEEK,
            policy=Policy(timedelta(hours=1), timedelta(minutes=1)),
            is_dry_run=False,
            metrics=metrics,
            key_proof=KeyProof(api, call_slot=call_slot, acquire=acquire),
        )
        return replace(cleaner, **changes)

    return make


@pytest.fixture
async def api(simulator, metrics):
    async with open_sync_api(simulator.url, Secret(API_KEY), connections=5, metrics=metrics) as api:
        yield api


@pytest.fixture
def cleaner(cleaner_of, api):
    return cleaner_of(api)


@pytest.fixture
def announced(simulator, database):
    """Add a generation and store its webhook as due."""

    async def add(**options):
        generation = simulator.add(**options)
        return await store(database, **json.loads(simulator.webhook(generation.id)[0]))

    return add


def calls_of(simulator):
    return [(call.method, call.status) for call in simulator.calls]


async def test_a_due_generation_is_copied_and_deleted_with_its_receipt(cleaner, database, simulator, announced):
    key = await announced(
        text_input=True, output_file_name="take 07", project_id="612bb64a-e7f4-40c1-977b-3e9797845637"
    )

    assert await cleaner.clean(await claim_one(database)) is Verdict.DONE
    row = await row_of(database, key)
    assert (row.state, row.outcome) == (State.DELETED, Outcome.DELETED)
    assert row.synthesized_audio_url is not None
    assert "token=" in row.output_url
    assert (row.output_file_name, row.project_id) == ("take_07", "612bb64a-e7f4-40c1-977b-3e9797845637")
    assert row.copied_at <= row.deleted_at
    receipt = json.loads(row.receipt)
    assert (receipt["method"], receipt["status"]) == ("DELETE", 200)
    assert json.loads(receipt["body"])["id"] == key.id
    assert calls_of(simulator) == [("GET", 200), ("DELETE", 200)]
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.CONFIRM]
    assert key.id in simulator.deleted


@pytest.mark.parametrize(
    "case",
    [
        ("?ttl=forever", (State.KEPT, "override: ttl")),
        ("?ttl=9d", (State.SCHEDULED, "override: ttl")),
        ("?hold=legal", (State.HELD, "override: hold")),
        ("?Hold=legal", (State.HELD, "override: hold")),
        ("?hodl=legal", (State.HELD, "invalid override")),
    ],
)
async def test_an_override_that_only_the_api_shows_keeps_the_generation(cleaner, database, simulator, announced, case):
    query, leads_to = case
    key = await announced()
    simulator.generations[key.id].webhook_url = f"https://hooks.example.com/webhooks/sync{query}"
    assert await cleaner.clean(await claim_one(database)) is Verdict.DONE
    row = await row_of(database, key)

    state = row.state
    assert (state, row.rule) == leads_to
    assert calls_of(simulator) == [("GET", 200)]
    assert row.wake_at == (row.due_at if state == State.SCHEDULED else None)
    assert (row.due_at is None) == (state == State.KEPT)
    assert state != State.SCHEDULED or row.due_at > utc_now() + timedelta(days=8)


@pytest.mark.parametrize(
    ("does", "leads_to"),
    [
        ({"is_forever": True}, (State.KEPT, None)),
        ({"ttl": WEEK}, (State.SCHEDULED, None)),
        ({"hold": "case 7"}, (State.HELD, "policy")),
    ],
)
async def test_a_rule_about_what_only_the_api_shows_keeps_the_generation(
    cleaner_of, api, database, simulator, announced, *, does, leads_to
):
    key = await announced()
    simulator.generations[key.id].project_id = "film"
    film = Rule("film", (Texts("project", (Pattern.of("film"),)),), **does)
    cleaner = cleaner_of(api, policy=Policy(timedelta(hours=1), timedelta(minutes=1), RuleSet([film])))
    assert await cleaner.clean(await claim_one(database)) is Verdict.DONE
    row = await row_of(database, key)

    assert ((row.state, row.hold_by), row.rule) == (leads_to, "rule: film")
    assert calls_of(simulator) == [("GET", 200)]
    assert row.state != State.SCHEDULED or row.due_at > utc_now() + timedelta(days=6)


async def test_a_rule_about_a_label_of_the_webhook_counts_whatever_url_the_api_shows(
    cleaner_of, api, database, simulator
):
    generation = simulator.add(project_id="film")
    body = json.loads(simulator.webhook(generation.id)[0])
    item = arrival_of(**body)
    labelled = msgspec.structs.replace(item.retention, labels={"customer": "acme"})
    await receive(database, msgspec.structs.replace(item, retention=labelled))
    about = (Texts("project", (Pattern.of("film"),)), Texts("label.customer", (Pattern.of("acme"),)))
    rules = RuleSet([Rule("film", about, is_forever=True)])
    cleaner = cleaner_of(api, policy=Policy(timedelta(hours=1), timedelta(minutes=1), rules))
    await cleaner.clean(await claim_one(database))

    assert (await row_of(database, item.key)).state == State.KEPT
    assert [method for method, _ in calls_of(simulator)] == ["GET"]


async def test_a_rule_that_would_shorten_changes_nothing_at_the_last_look(cleaner_of, api, database, announced):
    key = await announced()
    fast = Rule("fast", expires=utc_now() - timedelta(days=1))
    cleaner = cleaner_of(api, policy=Policy(timedelta(hours=1), timedelta(minutes=1), RuleSet([fast])))
    await cleaner.clean(await claim_one(database))
    row = await row_of(database, key)

    assert (row.state, row.rule) == (State.DELETED, "MAYFLY_TTL")


async def test_a_record_held_by_an_override_is_deleted_after_its_release(cleaner, database, simulator, announced):
    key = await announced()
    simulator.generations[key.id].webhook_url = "https://hooks.example.com/webhooks/sync?hold=legal"
    await cleaner.clean(await claim_one(database))
    release = partial(moving.move_record, key=key, wanted=Move.RELEASE, now=utc_now(), actor="an operator", reason=None)
    await database.write(release)
    await cleaner.clean(await claim_one(database))

    assert (await row_of(database, key)).state == State.DELETED
    assert await moves_of(database, key) == [
        *(Move.RECEIVE, Move.CLAIM, Move.DEFER, Move.HOLD, Move.RELEASE, Move.CLAIM, Move.CONFIRM)
    ]


async def test_the_receipt_survives_a_short_outage_of_the_ledger(cleaner_of, api, database, announced):
    key = await announced()
    item = await claim_one(database)
    faults = [LedgerUnavailableError("database is locked")] * 2

    async def settle_in_the_end(settlement):
        if faults:
            raise faults.pop()
        return (await settle(database, settlement))[0]

    assert await cleaner_of(api, settle=settle_in_the_end).clean(item) is Verdict.DONE
    row = await row_of(database, key)
    assert (row.outcome, row.attempts) == (Outcome.DELETED, 1)
    assert json.loads(row.receipt)["status"] == 200


async def test_a_settlement_whose_commit_was_reported_late_is_not_logged_as_lost(
    cleaner_of, api, database, announced, capfd
):
    key = await announced()
    item = await claim_one(database)
    tries = []

    async def settle_late(settlement):
        tries.append((await settle(database, settlement))[0])
        if len(tries) == 1:
            raise UnknownOutcomeError("the database did not answer in time")
        return tries[-1]

    assert await cleaner_of(api, settle=settle_late).clean(item) is Verdict.DONE
    assert tries == [Settled.SETTLED, Settled.ALREADY]
    assert "lease_lost" not in capfd.readouterr().out
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.CONFIRM]


async def test_an_attempt_waits_for_the_ledger_no_longer_than_its_lease(cleaner_of, api, database, announced):
    key = await announced()
    item = await claim_one(database)
    clock = [utc_now()]

    async def never(_settlement):
        clock[0] = item.lease_until
        raise LedgerUnavailableError("database is locked")

    assert await cleaner_of(api, settle=never, now=lambda: clock[0]).clean(item) is None
    assert (await row_of(database, key)).state == State.DELETING


@pytest.mark.parametrize(
    ("fault", "is_refund"),
    [
        *(("409", True), ("422", True), ("401", True), ("429", True)),
        *(("500", False), ("lost", False), ("wrong-id", False), ("202", False)),
    ],
)
async def test_a_delete_counts_against_the_daily_limit_unless_the_api_refused_it(
    cleaner, database, announced, fault, is_refund
):
    await announced(faults={"DELETE": [fault]})
    settled: list[Settlement] = []

    async def settle_one(settlement):
        settled.append(settlement)
        return (await settle(database, settlement))[0]

    await replace(cleaner, settle=settle_one).clean(await claim_one(database))

    assert [one.is_refund for one in settled] == [is_refund]


async def test_a_429_pauses_every_worker_for_as_long_as_the_api_asks(cleaner, database, announced):
    await announced(faults={"GET": ["429:retry_after=120"]})
    await cleaner.clean(await claim_one(database))
    (pause,) = await database.read(pausing.find_pauses)

    assert pause.kind is Kind.THROTTLED
    assert timedelta(seconds=115) < pause.until - utc_now() <= timedelta(seconds=120)


async def test_the_copy_is_durable_before_the_delete_has_any_effect(
    cleaner, database, database_url, simulator, announced
):
    key = await announced(text_input=True, faults={"DELETE": ["hold"]})
    cleaning_up = asyncio.create_task(cleaner.clean(await claim_one(database)))
    await asyncio.wait_for(simulator.gates.reached(key.id), 10)
    async with open_database(database_url) as elsewhere:
        row = await row_of(elsewhere, key)

    assert (row.state, row.outcome) == (State.DELETING, None)
    assert row.copied_at is not None
    assert json.loads(row.copy)["synthesizedAudioUrl"] == row.synthesized_audio_url
    assert key.id in simulator.generations
    simulator.release(key.id)
    assert await cleaning_up is Verdict.DONE


@pytest.mark.parametrize(
    "fault",
    [
        *("500", "502", "drop", "reset", "truncated", "html", "invalid-json", "non-utf8", "wrong-id", "202", "204"),
        *("302", "429", "409", "400", "401", "403-html", "processing", "huge:megabytes=3"),
    ],
)
async def test_without_a_copy_nothing_is_deleted(cleaner, database, simulator, announced, fault):
    key = await announced(faults={"GET": [fault]})
    await cleaner.clean(await claim_one(database))
    row = await row_of(database, key)

    assert row.state == State.SCHEDULED
    assert row.copied_at is None
    assert row.last_error
    assert {call.method for call in simulator.calls} == {"GET"}


async def test_no_delete_is_sent_if_the_copy_cannot_be_committed(cleaner_of, api, database, simulator, announced):
    key = await announced()
    item = await claim_one(database)
    clock = [utc_now()]

    async def unavailable(_):
        clock[0] = item.lease_until  # until then it would be tried again
        raise LedgerUnavailableError("unavailable")

    assert await cleaner_of(api, copy=unavailable, now=lambda: clock[0]).clean(item) is None
    assert calls_of(simulator) == [("GET", 200)]
    assert (await row_of(database, key)).state == State.DELETING


@pytest.mark.parametrize("faults", [{"GET": ["404"]}, {"GET": ["410"]}, {"DELETE": ["404"]}, {"DELETE": ["410"]}])
async def test_a_generation_that_is_gone_already_ends_as_already_gone(cleaner, database, announced, faults):
    key = await announced(faults=faults)
    await cleaner.clean(await claim_one(database))
    row = await row_of(database, key)

    assert (row.state, row.outcome) == (State.DELETED, Outcome.ALREADY_GONE)
    assert json.loads(row.receipt)["method"] == next(iter(faults))
    assert (row.copied_at is None) == ("GET" in faults)
    assert row.notification


async def test_a_delete_refused_while_processing_is_made_later(cleaner, database, simulator, announced):
    key = await announced(faults={"DELETE": ["409"]})
    before = utc_now()

    assert await cleaner.clean(await claim_one(database)) is Verdict.RUNNING
    row = await row_of(database, key)
    assert (row.state, row.failures, row.refusals) == (State.SCHEDULED, 1, 0)
    assert row.wake_at >= before + timedelta(seconds=2.5)
    assert row.last_error == "the API answered 409 generation_not_deletable_while_processing"
    assert row.copied_at is not None

    again = await claim_one_later(database, key)
    assert await cleaner.clean(again) is Verdict.DONE
    assert calls_of(simulator) == [("GET", 200), ("DELETE", 409), ("GET", 200), ("DELETE", 200)]
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.DEFER, Move.CLAIM, Move.CONFIRM]


async def claim_one_later(database, key):
    """Claim a put-off record as if its time had come."""
    await end_lease(database, key)
    return await claim_one(database)


async def test_a_delete_whose_answer_was_lost_is_confirmed_by_the_next_get(cleaner, database, simulator, announced):
    key = await announced(faults={"DELETE": ["lost"]})

    assert await cleaner.clean(await claim_one(database)) is Verdict.RETRY
    assert key.id in simulator.deleted
    assert await cleaner.clean(await claim_one_later(database, key)) is Verdict.GONE
    row = await row_of(database, key)
    assert (row.state, row.outcome) == (State.DELETED, Outcome.DELETED)
    assert json.loads(row.receipt)["detail"] == ANSWER_LOST
    entries = await database.read(partial(history.read_entries, record=row.seq))
    assert entries[-1].detail["detail"] == ANSWER_LOST
    assert row.copied_at is not None
    assert [method for method, _ in calls_of(simulator)] == ["GET", "DELETE", "GET"]


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (["lost"], Outcome.DELETED),
        (["500:effect=1"], Outcome.DELETED),
        (["drop"], Outcome.DELETED),  # lost on its way to the API, which cannot be told apart
        (["404:answer=gateway"], Outcome.DELETED),  # so is what a gateway did before it answered
        (["409"], Outcome.ALREADY_GONE),
        (["400"], Outcome.ALREADY_GONE),
        (["lost:effect=0", "409"], Outcome.ALREADY_GONE),  # the GET in between still showed it
    ],
)
async def test_only_a_delete_without_a_known_answer_explains_a_later_404(
    cleaner, database, simulator, announced, *, script, outcome
):
    key = await announced(faults={"DELETE": script})
    await cleaner.clean(await claim_one(database))
    for _ in script[1:]:
        await cleaner.clean(await claim_one_later(database, key))
    simulator.remove(key.id)
    await cleaner.clean(await claim_one_later(database, key))
    row = await row_of(database, key)

    assert (row.state, row.outcome) == (State.DELETED, outcome)
    assert ("detail" in json.loads(row.receipt)) == (outcome is Outcome.DELETED)


async def test_a_rehearsed_delete_explains_no_later_404(cleaner_of, api, database, simulator, announced):
    key = await announced()
    cleaner = cleaner_of(api, is_dry_run=True)
    await cleaner.clean(await claim_one(database))
    simulator.remove(key.id)
    await cleaner.clean(await claim_one_later(database, key))

    assert (await row_of(database, key)).outcome == Outcome.ALREADY_GONE


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "fault", [f"{n}:answer={body}" for n in (404, 410) for body in sorted(ABSENT_BODIES - {"own"})]
)
async def test_a_404_without_the_apis_own_code_only_defers(cleaner, database, simulator, announced, *, method, fault):
    key = await announced(faults={method: [f"{fault}*6"]})
    await cleaner.clean(await claim_one(database))
    for _ in range(5):
        await cleaner.clean(await claim_one_later(database, key))
    row = await row_of(database, key)

    assert (row.state, row.failures, row.refusals) == (State.SCHEDULED, 6, 0)
    assert row.last_error.startswith(f"the API answered {fault[:3]}")
    assert key.id in simulator.generations

    assert await cleaner.clean(await claim_one_later(database, key)) is Verdict.DONE


async def test_the_next_attempt_obeys_retry_after(cleaner, database, announced):
    key = await announced(faults={"DELETE": ["429:retry_after=600"]})
    before = utc_now()
    await cleaner.clean(await claim_one(database))

    assert (await row_of(database, key)).wake_at >= before + timedelta(seconds=600)


async def test_a_refused_record_is_given_up_after_a_few_tries_and_that_row_alone(cleaner, database, announced):
    key = await announced(faults={"DELETE": ["400*"]})
    other = await store(database, due_in=timedelta(days=1))
    await cleaner.clean(await claim_one(database))
    for _ in range(4):
        await cleaner.clean(await claim_one_later(database, key))
    row = await row_of(database, key)

    assert (row.state, row.refusals, row.last_error) == (
        State.FAILED,
        5,
        "the API answered 400 invalid_generation_id",
    )
    assert (await row_of(database, other)).state == State.SCHEDULED


async def test_a_refused_key_pauses_deletions_and_counts_as_no_failure(cleaner, database, simulator, announced):
    key = await announced()
    simulator.switches.unauthorized = True

    assert await cleaner.clean(await claim_one(database)) is Verdict.UNAUTHORIZED
    row = await row_of(database, key)
    assert (row.state, row.failures, row.refusals, row.failing_since) == (State.SCHEDULED, 0, 0, None)
    assert [pause.kind for pause in await database.read(pausing.find_pauses)] == [pausing.Kind.UNAUTHORIZED]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("fault", ["401", "403", "403-html"])
async def test_a_refusal_of_one_record_fails_it_and_pauses_nothing(
    cleaner, database, simulator, announced, *, method, fault
):
    key = await announced(faults={method: [f"{fault}*"]})
    await cleaner.clean(await claim_one(database))
    for _ in range(4):
        await cleaner.clean(await claim_one_later(database, key))
    row = await row_of(database, key)

    assert (row.state, row.refusals) == (State.FAILED, 5)
    assert row.last_error == f"the API answered {fault[:3]} for this generation, and accepts the key"
    assert await database.read(pausing.find_pauses) == []
    assert [(call.raw_path, call.query) for call in simulator.calls if call.operation is Operation.LIST] == [
        ("/v2/generations", "limit=1")
    ] * 5


@pytest.mark.parametrize("proof", ["403-html", "500", "drop", "429:retry_after=1", "html", "404:answer=empty"])
async def test_a_refusal_without_a_word_on_the_key_only_defers(cleaner, database, simulator, announced, proof):
    key = await announced(faults={"GET": ["403"]})
    simulator.plan.stand("LIST", proof)

    assert await cleaner.clean(await claim_one(database)) is Verdict.RETRY
    row = await row_of(database, key)
    assert (row.state, row.failures, row.refusals) == (State.SCHEDULED, 1, 0)
    assert [one.kind for one in await database.read(pausing.find_pauses)] == [Kind.THROTTLED] * ("429" in proof)


async def test_one_proof_of_the_key_serves_all_attempts_that_wait_for_it(cleaner, database, simulator, announced):
    for _ in range(10):
        await announced()
    simulator.switches.unauthorized = True
    simulator.switches.latency_seconds = 0.2
    claims = await claim(database, limit=10)

    assert set(await asyncio.gather(*map(cleaner.clean, claims))) == {Verdict.UNAUTHORIZED}
    assert len([call for call in simulator.calls if call.operation is Operation.LIST]) < 5


async def test_a_402_concerns_the_account_and_pauses_without_a_proof(cleaner_of, database, announced):
    await announced()

    class Api:
        async def get(self, _):
            return read_get(Reply(402, b"{}", None), "g1")

    assert await cleaner_of(Api()).clean(await claim_one(database)) is Verdict.UNAUTHORIZED
    assert [one.kind for one in await database.read(pausing.find_pauses)] == [Kind.UNAUTHORIZED]


async def test_a_dry_run_copies_and_sends_no_delete(cleaner_of, api, database, simulator, announced):
    key = await announced(text_input=True)
    before = utc_now()
    await cleaner_of(api, is_dry_run=True).clean(await claim_one(database))
    row = await row_of(database, key)

    assert [call.method for call in simulator.calls] == ["GET"]
    assert key.id in simulator.generations
    assert (row.state, row.outcome) == (State.SCHEDULED, None)
    assert row.copied_at is not None
    assert row.wake_at >= before + DRY_RUN_AGAIN
    assert row.last_error == "dry run: it would have been deleted"


async def test_no_delete_is_sent_if_the_lease_was_lost_during_the_get(cleaner, database, simulator, announced):
    key = await announced(faults={"GET": ["hold"]})
    asleep = asyncio.create_task(cleaner.clean(await claim_one(database)))
    await asyncio.wait_for(simulator.gates.reached(key.id), 10)
    await end_lease(database, key)
    await lose_leases(database)
    simulator.release(key.id)

    assert await asleep is None
    assert [call.method for call in simulator.calls] == ["GET"]
    row = await row_of(database, key)
    assert (row.state, row.copied_at) == (State.SCHEDULED, None)


async def test_after_a_lease_lost_during_the_delete_the_next_claim_settles_the_record(
    cleaner, database, simulator, announced
):
    key = await announced(faults={"DELETE": ["hold-after"]})
    asleep = asyncio.create_task(cleaner.clean(await claim_one(database)))
    await asyncio.wait_for(simulator.gates.reached(key.id), 10)
    await end_lease(database, key)
    await lose_leases(database)
    successor = await claim_one(database)
    simulator.release(key.id)

    assert await asleep is None
    assert (await row_of(database, key)).state == State.DELETING
    assert await cleaner.clean(successor) is Verdict.GONE
    assert (await row_of(database, key)).outcome == Outcome.DELETED


@pytest.mark.parametrize("seconds", [1, 35])
async def test_no_call_is_made_if_too_little_of_the_lease_is_left(cleaner, database, simulator, announced, seconds):
    key = await announced()
    item = await claim_one(database, lease=timedelta(seconds=seconds))
    await cleaner.clean(item)
    row = await row_of(database, key)

    assert simulator.calls == []
    assert (row.state, row.failures) == (State.SCHEDULED, 0)
    assert row.wake_at <= utc_now()


async def test_no_delete_is_sent_if_the_commit_took_too_much_of_the_lease(
    cleaner_of, api, database, simulator, announced
):
    key = await announced()
    item = await claim_one(database)
    late = {"by": timedelta(0)}

    async def slow_copy(_):
        late["by"] = timedelta(seconds=45)
        return CopyResult.KEPT

    cleaner = cleaner_of(api, copy=slow_copy, now=lambda: utc_now() + late["by"])
    await cleaner.clean(item)

    assert [call.method for call in simulator.calls] == ["GET"]
    assert (await row_of(database, key)).state == State.SCHEDULED


async def test_at_the_daily_limit_the_copy_is_stored_and_the_delete_waits(
    cleaner_of, api, database, simulator, announced
):
    async def copy(item):
        write = partial(settling.store_copies, account=ACCOUNT, copies=[item], now=utc_now(), limit=0, actor=ACTOR)
        return (await database.write(write))[0]

    key = await announced()
    await cleaner_of(api, copy=copy).clean(await claim_one(database))
    row = await row_of(database, key)

    assert [call.method for call in simulator.calls] == ["GET"]
    assert (row.state, row.failures) == (State.SCHEDULED, 0)
    assert row.copied_at is not None
    assert [pause.kind for pause in await database.read(pausing.find_pauses)] == [pausing.Kind.DAILY_LIMIT]


async def test_no_delete_is_sent_if_an_operator_pauses_after_the_claim(cleaner, database, simulator, announced):
    key = await announced()
    item = await claim_one(database)
    wanted = pausing.Pause(pausing.Kind.OPERATOR, utc_now(), "an operator", "a reason", None)
    await database.write(partial(pausing.pause, wanted=wanted))
    await cleaner.clean(item)
    row = await row_of(database, key)

    assert [call.method for call in simulator.calls] == ["GET"]
    assert (row.state, row.failures, row.last_error) == (State.SCHEDULED, 0, "deletions were paused")
    assert row.copied_at is not None


async def test_an_internal_error_in_one_record_is_stored_and_retried(cleaner_of, api, database, simulator, announced):
    async def broken(_):
        raise ZeroDivisionError

    key = await announced()

    assert await cleaner_of(api, copy=broken).clean(await claim_one(database)) is None
    row = await row_of(database, key)
    assert (row.state, row.refusals) == (State.SCHEDULED, 1)
    assert row.last_error == "an internal error; see Mayfly's log"
    assert [call.method for call in simulator.calls] == ["GET"]


async def test_an_attempt_that_cannot_store_its_error_raises_nothing(cleaner_of, api, database, announced):
    async def broken(_):
        raise ZeroDivisionError

    await announced()

    assert await cleaner_of(api, copy=broken, settle=broken).clean(await claim_one(database)) is None


@pytest.mark.parametrize(
    "faults",
    [{"GET": ["500"]}, {"DELETE": ["409"]}, {"DELETE": ["429:retry_after=600"]}, {"GET": ["processing"]}],
    ids=str,
)
async def test_a_deferred_attempt_enqueues_the_next_one_at_its_time(cleaner_of, api, database, announced, faults):
    enqueued: list[tuple[Key, int, datetime]] = []

    async def enqueue_next(key: Key, attempt: int, at: datetime):
        row = await row_of(database, key)
        assert row.state == State.SCHEDULED  # the commit comes first
        enqueued.append((key, attempt, at))

    key = await announced(faults=faults)
    await cleaner_of(api, enqueue_next=enqueue_next).clean(await claim_one(database))
    row = await row_of(database, key)

    assert enqueued == [(key, 2, row.wake_at)]


async def test_an_attempt_that_returns_its_record_enqueues_the_next_one_at_once(cleaner_of, api, database, announced):
    enqueued: list[tuple[Key, int, datetime]] = []

    async def enqueue_next(key: Key, attempt: int, at: datetime):
        enqueued.append((key, attempt, at))

    key = await announced()
    item = await claim_one(database, lease=timedelta(seconds=1))
    await cleaner_of(api, enqueue_next=enqueue_next).clean(item)

    ((enqueued_key, attempt, at),) = enqueued
    assert (enqueued_key, attempt) == (key, 2)
    assert at <= utc_now()


@pytest.mark.parametrize("override", ["", "?hold=legal", "?ttl=forever"])
async def test_an_attempt_that_ends_in_a_final_state_enqueues_nothing(  # noqa: PLR0917 - fixtures
    cleaner_of, api, database, simulator, announced, override
):
    enqueued: list[tuple[Key, int, datetime]] = []

    async def enqueue_next(key: Key, attempt: int, at: datetime):
        enqueued.append((key, attempt, at))

    key = await announced()
    simulator.generations[key.id].webhook_url = f"https://hooks.example.com/webhooks/sync{override}"
    await cleaner_of(api, enqueue_next=enqueue_next).clean(await claim_one(database))

    assert enqueued == []
    assert (await row_of(database, key)).wake_at is None


async def test_an_attempt_whose_lease_was_lost_enqueues_nothing(cleaner_of, api, database, announced):
    enqueued: list[tuple[Key, int, datetime]] = []

    async def enqueue_next(key: Key, attempt: int, at: datetime):
        enqueued.append((key, attempt, at))

    await announced(faults={"GET": ["500"]})

    async def lost(_settlement):
        return Settled.LOST

    await cleaner_of(api, settle=lost, enqueue_next=enqueue_next).clean(await claim_one(database))

    assert enqueued == []


async def test_the_webhooks_values_stay_where_the_api_shows_nothing(cleaner, database, simulator):
    generation = simulator.add(model=None, outputUrl=None, outputDuration=None, outputFileName="take")
    item = arrival_of(id=generation.id, model="sync-3", outputDuration=4.5)
    await receive(database, item)
    await cleaner.clean(await claim_one(database))
    row = await row_of(database, Key("default", generation.id))

    assert row.state == State.DELETED
    assert json.loads(row.notification)["model"] == "sync-3"
    assert json.loads(row.copy)["model"] is None
    assert row.output_file_name == "take"


async def test_each_attempt_is_counted_by_its_verdict(cleaner, database, announced, metrics):
    await announced()
    await cleaner.clean(await claim_one(database))

    assert metrics.registry.get_sample_value("mayfly_attempts_total", {"verdict": "done"}) == 1


def counted(metrics, name):
    """Return what a counter has, by label."""
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {s.labels.get("result"): s.value for s in samples if s.name == name and s.value}


@pytest.mark.parametrize(
    ("options", "changes", "result"),
    [
        ({}, {}, "deleted"),
        ({"faults": {"GET": ["404"]}}, {}, "already_gone"),
        ({"faults": {"DELETE": ["409"]}}, {}, "deferred"),
        ({}, {"is_dry_run": True}, "rehearsed"),
    ],
)
async def test_each_attempt_is_counted_by_what_became_of_its_record(  # noqa: PLR0917 - fixtures
    cleaner_of, api, database, announced, metrics, options, changes, result
):
    await announced(**options)
    await cleaner_of(api, **changes).clean(await claim_one(database))

    assert counted(metrics, "mayfly_settlements_total") == {result: 1}
    lags = metrics.registry.get_sample_value("mayfly_deletion_lag_seconds_count")
    assert lags == (result in {"deleted", "already_gone"})
    assert lags == 0 or 3500 < metrics.registry.get_sample_value("mayfly_deletion_lag_seconds_sum") < 3700


async def test_a_record_in_doubt_is_logged_as_such_and_not_as_a_lost_lease(
    cleaner, database, announced, metrics, capfd
):
    keys = [await announced(faults={"GET": ["404"]}) for _ in range(MAX_UNKNOWN + 1)]
    for item in await claim(database):
        assert await cleaner.clean(item) in {Verdict.GONE, None}
    said = capfd.readouterr().out

    assert counted(metrics, "mayfly_settlements_total") == {"already_gone": MAX_UNKNOWN, "doubted": 1}
    assert (said.count("cleanup.doubted"), said.count("lease_lost")) == (1, 0)
    assert sorted([(await row_of(database, key)).state for key in keys])[-1] == State.SCHEDULED


async def test_a_doubt_whose_commit_was_reported_late_is_still_a_doubt(database, announced):
    for _ in range(MAX_UNKNOWN + 1):
        await announced()
    *others, last = [gone_already(item) for item in await claim(database)]
    await settle(database, *others)

    assert [(await settle(database, last))[0] for _ in range(2)] == [Settled.DOUBTED] * 2


async def test_a_settled_record_cannot_be_settled_again(database, announced):
    key = await announced()
    item = await claim_one(database)
    await settle(database, confirmed(item))

    assert await settle(database, confirmed(item)) == [Settled.ALREADY]
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.CONFIRM]
