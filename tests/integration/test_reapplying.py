"""A changed policy on records that exist: nothing moves by itself, and what is applied moves only what it may."""

import asyncio
from datetime import timedelta
from functools import partial

import msgspec
import pytest
from sqlalchemy import URL, insert, text, update

from service.core.key import Key
from service.core.lifecycle import Move, State
from service.core.matchers import Pattern, Texts
from service.core.retention import Bounds, Policy
from service.core.rules import NO_RULES, Rule, RuleSet
from service.ledger import claiming, forgetting, history, holding, looking, moving, reapplying
from service.ledger.moving import Grace
from service.ledger.opening import open_database
from service.ledger.reapplying import FIRST, Place, Seen
from service.ledger.schema import labels, records
from tests.conftest import http_client
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    KEY,
    arrival,
    claim,
    claim_one,
    confirmed,
    deferred,
    given_up,
    moves_of,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)
from tests.support.waiting import eventually
from tests.support.webhooks import webhook

DAY, MINUTE = 24 * HOUR, timedelta(minutes=1)


def policy_of(*rules: Rule, ttl: timedelta | None = DAY):
    return Policy(ttl, MINUTE, RuleSet(rules))


def rule(name, *, ttl=None, hold=None, **about):
    """Return a rule; without a ttl and a hold it keeps forever."""
    texts = tuple(Texts(key, (Pattern.of(one),)) for key, one in about.items())
    return Rule(name, texts, ttl=ttl, hold=hold, is_forever=ttl is None and hold is None)


async def see_all(database, policy):
    """Return all records that the policy may change, as they are now."""
    found: list[Seen] = []
    place: Place | None = FIRST
    while place is not None:
        batch = await database.read(
            partial(reapplying.read_batch, rules=policy.rules, place=place, until=utc_now() + DAY)
        )
        found += batch.seen
        place = batch.next_place
    return found


async def write(database, policy, seen, *, now=None):
    """Apply *policy* to what was *seen*, and return how many records were changed."""
    return await database.write(
        partial(reapplying.apply_policy, policy=policy, seen=seen, now=now or utc_now(), user="ada")
    )


async def apply(database, policy):
    return await write(database, policy, await see_all(database, policy))


async def kept_by_rule(database, key):
    """Let a policy have kept the record for good."""
    values = {"state": State.KEPT, "rule": "rule: film", "due_at": None, "wake_at": None, "ttl_seconds": None}
    await set_columns(database, key, **values)


async def set_columns(database, key, **values: object):
    changed = update(records).where(records.c.id == key.id).values(**values)
    await database.write(lambda connection: connection.execute(changed).rowcount)


async def last_entry(database, key):
    row = await row_of(database, key)
    return (await database.read(partial(history.read_entries, record=row.seq)))[-1]


# What is applied


@pytest.mark.parametrize("ttl", [6 * HOUR, 3 * DAY])
async def test_a_scheduled_record_gets_another_due_time_from_the_time_it_was_sent(database, ttl):
    key = await store(database, due_in=DAY)
    before = await row_of(database, key)

    assert await apply(database, policy_of(ttl=ttl)) == 1
    row, entry = await row_of(database, key), await last_entry(database, key)
    assert row.due_at == row.wake_at == row.sent_at + ttl
    assert (row.state, row.rule, row.ttl_seconds) == (State.SCHEDULED, "MAYFLY_TTL", ttl.total_seconds())
    assert (entry.move, entry.actor) == (Move.RESCHEDULE, "policy apply by ada")
    assert entry.detail is not None
    assert (entry.detail["rule"], entry.detail["oldRule"]) == ("MAYFLY_TTL", "MAYFLY_TTL")
    times = [f"{at.isoformat()}".replace("+00:00", "Z") for at in (row.due_at, before.due_at)]
    assert [entry.detail["dueAt"], entry.detail["oldDueAt"]] == times


async def test_a_record_that_is_older_than_its_new_ttl_gets_the_minimum(database):
    key = await store(database, due_in=DAY)
    await set_columns(database, key, sent_at=utc_now() - 5 * HOUR, ttl_seconds=29 * 3600)
    begun = utc_now()

    assert await apply(database, policy_of(ttl=HOUR)) == 1
    assert begun + MINUTE <= (await row_of(database, key)).due_at <= utc_now() + MINUTE


async def test_a_rule_can_keep_hold_and_release_what_exists(database):
    film, court, old = [await store(database, due_in=DAY, projectId=name) for name in ("film", "court", "old")]
    for key in (film, court, old):
        await set_columns(database, key, copied_at=utc_now())
    await kept_by_rule(database, old)
    changed = policy_of(rule("film", project="film"), rule("court", project="court", hold="a court asked"))

    assert await apply(database, changed) == 3
    rows = [await row_of(database, key) for key in (film, court, old)]
    assert [(row.state, row.rule) for row in rows] == [
        (State.KEPT, "rule: film"),
        (State.HELD, "rule: court"),
        (State.SCHEDULED, "MAYFLY_TTL"),
    ]
    assert [row.wake_at for row in rows] == [None, None, rows[2].sent_at + DAY]
    assert (rows[0].due_at, rows[0].ttl_seconds) == (None, None)
    assert (rows[1].hold_by, rows[1].hold_reason, rows[1].due_at) == ("policy", "a court asked", rows[1].sent_at + DAY)
    assert [(await moves_of(database, key))[-1] for key in (film, court, old)] == [Move.KEEP, Move.HOLD, Move.RELEASE]


async def test_a_kept_record_is_held_by_a_release_and_a_hold(database):
    key = await store(database, due_in=DAY)
    await kept_by_rule(database, key)

    assert await apply(database, policy_of(rule("h", hold="case 7"))) == 1
    assert (await row_of(database, key)).state == State.HELD
    assert (await moves_of(database, key))[-2:] == [Move.RELEASE, Move.HOLD]


async def test_labels_and_input_types_are_facts_of_what_exists(database):
    labelled, spoken, other = [await store(database, due_in=DAY) for _ in range(3)]
    named = insert(labels).values(record=(await row_of(database, labelled)).seq, name="customer", value="acme")
    await database.write(lambda connection: connection.execute(named).rowcount)
    await set_columns(database, spoken, input='[{"type":"text","script":"hello"}]')
    by_label = rule("acme", ttl=2 * DAY, **{"label.customer": "acme"})

    assert await apply(database, policy_of(by_label, rule("spoken", ttl=3 * DAY, input_type="text"))) == 2
    rules = [(await row_of(database, key)).rule for key in (labelled, spoken, other)]
    assert rules == ["rule: acme", "rule: spoken", "MAYFLY_TTL"]


async def test_a_deferred_attempt_is_not_made_earlier_and_a_waiting_one_is(database):
    late, waiting = await store(database, due_in=-HOUR), await store(database, due_in=DAY)
    asked = utc_now() + 3 * HOUR
    await settle(database, deferred(await claim_one(database), retry_at=asked))
    await set_columns(database, waiting, attempts=1)

    assert await apply(database, policy_of(rule("all", ttl=2 * HOUR))) == 2
    rows = [await row_of(database, key) for key in (late, waiting)]
    assert rows[0].wake_at == asked
    assert rows[1].wake_at == rows[1].due_at == rows[1].sent_at + 2 * HOUR
    assert (rows[0].failures, rows[0].failing_since) == (0, None)


async def test_the_second_time_nothing_is_changed(database):
    for ttl in (DAY, 2 * DAY, None):
        await store(database, due_in=ttl)
    changed = policy_of(rule("c", ttl=2 * HOUR, status="COMPLETED"))

    assert await apply(database, changed) == 3
    assert await apply(database, changed) == 0


# What is left alone


async def test_what_is_not_the_policys_to_decide_stays(database):
    overridden, held, kept, failed, deleted, deleting, released, retried, forgotten = [
        await store(database, due_in=-HOUR if number in (3, 4, 5, 7) else DAY, hold="x" if number == 1 else None)
        for number in range(9)
    ]
    move = partial(moving.move_record, now=utc_now(), actor="operator", reason=None)
    await set_columns(database, overridden, rule="override: ttl")
    await database.write(partial(move, key=kept, wanted=Move.KEEP))
    for wanted in (Move.HOLD, Move.RELEASE):
        grace = Grace.of(timedelta(0), MINUTE)
        await database.write(partial(move, key=released, wanted=wanted, grace=grace))
    for key, end in ((failed, given_up), (retried, given_up), (deleted, confirmed)):
        await set_columns(database, key, wake_at=utc_now() - 2 * DAY)
        await settle(database, end(await claim_one(database, limit=1)))
    await database.write(partial(move, key=retried, wanted=Move.RETRY))
    await set_columns(database, retried, due_at=utc_now() + DAY, wake_at=utc_now() + DAY)
    await claim_one(database)
    await kept_by_rule(database, forgotten)
    await database.write(partial(forgetting.forget_record, key=forgotten, now=utc_now(), actor="operator", reason=None))
    keys = (overridden, held, kept, failed, deleted, deleting, released, retried, forgotten)
    before = [await row_of(database, key) for key in keys]

    assert await apply(database, policy_of(ttl=2 * HOUR)) == 0
    assert await apply(database, policy_of(rule("h", hold="case 7"))) == 0
    assert [await row_of(database, key) for key in keys] == before
    states = [State.SCHEDULED, State.HELD, State.KEPT, State.FAILED, State.DELETED, State.DELETING]
    assert [row.state for row in before] == [*states, State.SCHEDULED, State.SCHEDULED, State.KEPT]


async def test_the_end_of_a_hold_is_no_decision_of_an_operator(database):
    key = await store(database, due_in=HOUR)
    until = utc_now() + 2 * HOUR
    hold = partial(moving.move_record, key=key, wanted=Move.HOLD, actor="operator", reason="x", until=until)
    await database.write(partial(hold, now=utc_now()))
    await set_columns(database, key, hold_until=utc_now() - MINUTE)
    end = partial(holding.end_holds, account=ACCOUNT, now=utc_now(), min_ttl=3 * HOUR, limit=9)
    assert await database.write(end) == 1
    moved_to = (await row_of(database, key)).due_at

    assert await apply(database, policy_of(ttl=MINUTE)) == 0
    assert await apply(database, policy_of(ttl=DAY)) == 1
    assert (await row_of(database, key)).due_at > moved_to


async def test_without_a_copy_a_rule_about_the_project_may_protect(database):
    unknown, known = [await store(database, due_in=DAY) for _ in range(2)]
    await set_columns(database, known, copied_at=utc_now(), project_id="other")
    changed = policy_of(rule("film", ttl=3 * DAY, project="film"), ttl=2 * HOUR)

    assert await apply(database, changed) == 1
    assert [(await row_of(database, key)).ttl_seconds for key in (unknown, known)] == [86_400, 7_200]


async def test_of_what_a_sweep_adopted_all_is_known(database):
    key = await store(database, due_in=DAY, projectId="other")
    await set_columns(database, key, notification=None, look_at=None)
    changed = policy_of(rule("film", ttl=3 * DAY, project="film"), ttl=2 * HOUR)

    assert await apply(database, changed) == 1
    assert (await row_of(database, key)).ttl_seconds == 7_200


async def test_of_what_the_results_of_a_batch_named_a_rule_may_protect(database):
    named = msgspec.structs.replace(arrival(due_in=DAY), is_adopted=True, is_partial=True)
    await receive(database, named)
    changed = policy_of(rule("film", ttl=3 * DAY, project="film"), ttl=2 * HOUR)

    assert await apply(database, changed) == 0
    assert (await row_of(database, named.key)).ttl_seconds == 86_400


async def test_a_hold_of_a_webhook_counts_for_what_a_policy_kept_and_then_releases(database):
    item = arrival(due_in=DAY)
    await receive(database, item)
    await kept_by_rule(database, item.key)
    await receive(database, arrival(id=item.key.id, due_in=DAY, hold="legal"))
    assert (await row_of(database, item.key)).state == State.KEPT
    assert await apply(database, policy_of(ttl=HOUR)) == 1
    await set_columns(database, item.key, due_at=utc_now() - HOUR, wake_at=utc_now() - HOUR)

    assert await claim(database) == []
    row = await row_of(database, item.key)
    assert (row.state, row.hold_reason) == (State.HELD, "legal")


async def test_what_is_due_later_since_its_rehearsal_is_not_brought_forward(database):
    key = await store(database)
    rehearsed = update(records).values(last_error=claiming.DRY_RUN, wake_at=utc_now() + HOUR, ttl_seconds=86_400)
    await database.write(lambda connection: connection.execute(rehearsed).rowcount)
    assert await apply(database, policy_of(ttl=3 * DAY)) == 1
    forward = partial(claiming.bring_forward_rehearsed, account=ACCOUNT, now=utc_now())
    row = await row_of(database, key)

    assert await database.write(forward) == 0
    assert (await row_of(database, key)).wake_at == row.wake_at == row.due_at
    await set_columns(database, key, due_at=utc_now() - HOUR)
    assert await database.write(forward) == 1


# What changes meanwhile


async def hold(database, key):
    await database.write(
        partial(moving.move_record, key=key, wanted=Move.HOLD, now=utc_now(), actor="operator", reason="x")
    )


async def hold_and_release(database, key):
    await hold(database, key)
    grace = Grace.of(timedelta(0), MINUTE)
    await database.write(
        partial(moving.move_record, key=key, wanted=Move.RELEASE, now=utc_now(), actor="op", reason=None, grace=grace)
    )


async def announce_again(database, key):
    await receive(database, arrival(id=key.id, due_in=2 * DAY))


async def look(database, key):
    found = arrival(id=key.id, projectId="film")
    store_look = partial(looking.store_look, key=key, used=KEY, generation=found.generation, body=found.body)
    await database.write(partial(store_look, decide=lambda _known: None, now=utc_now(), actor=ACTOR))


async def begin(database, key):
    await set_columns(database, key, due_at=utc_now() - HOUR, wake_at=utc_now() - HOUR)
    await claim_one(database)


@pytest.mark.parametrize("happen", [hold, hold_and_release, announce_again, look, begin])
async def test_a_record_that_is_not_as_it_was_seen_stays(database, happen):
    key, other = await store(database, due_in=DAY), await store(database, due_in=DAY)
    changed = policy_of(ttl=2 * HOUR)
    seen = await see_all(database, changed)
    await happen(database, key)
    before = await row_of(database, key)

    assert await write(database, changed, seen) == 1
    assert await row_of(database, key) == before
    assert (await row_of(database, other)).ttl_seconds == 7_200


async def test_a_locked_record_is_left_and_the_others_are_changed(postgres_url):
    async with open_database(postgres_url) as database, open_database(postgres_url) as another:
        locked, free = await store(database, due_in=DAY), await store(database, due_in=DAY)
        changed = policy_of(ttl=2 * HOUR)
        seen = await see_all(database, changed)
        has_locked, loop = asyncio.Event(), asyncio.get_running_loop()

        def lock(connection):
            connection.execute(text("SELECT 1 FROM records WHERE id = :id FOR UPDATE"), {"id": locked.id})
            loop.call_soon_threadsafe(has_locked.set)
            connection.execute(text("SELECT pg_sleep(1.5)"))

        locking = asyncio.create_task(another.write(lock))
        await asyncio.wait_for(has_locked.wait(), 10)

        assert await write(database, changed, seen) == 1
        assert (await row_of(database, free)).ttl_seconds == 7_200
        await locking
        assert await apply(database, changed) == 1


async def test_a_clock_that_is_behind_makes_nothing_due_early_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        key = await store(database, due_in=DAY)
        begun = utc_now()
        changed = policy_of(ttl=timedelta(seconds=1))

        assert await write(database, changed, await see_all(database, changed), now=begun - 12 * HOUR) == 1
        assert (await row_of(database, key)).due_at >= begun + MINUTE


async def test_after_an_interruption_the_rest_is_applied_and_nothing_twice(database):
    keys = [await store(database, due_in=DAY) for _ in range(5)]
    changed = policy_of(ttl=2 * HOUR)
    await write(database, changed, (await see_all(database, changed))[:2])

    assert await apply(database, changed) == 3
    for key in keys:
        assert await moves_of(database, key) == [Move.RECEIVE, Move.RESCHEDULE]


async def test_batches_have_each_record_once_in_both_states(database):
    items = [arrival(due_in=DAY, id=f"scheduled-{number}") for number in range(450)]
    kept = [arrival(due_in=None, id=f"kept-{number}") for number in range(201)]
    await receive(database, *items, *kept)
    seen = await see_all(database, policy_of(rule("spoken", ttl=DAY, input_type="text")))  # in batches of 200

    assert sorted(one.row.id for one in seen) == sorted(item.key.id for item in [*items, *kept])


async def test_what_arrives_after_the_preview_is_not_read(database):
    await store(database, due_in=DAY)
    until = utc_now()
    await store(database, due_in=DAY)
    place = FIRST._replace(state=State.SCHEDULED)

    batch = await database.read(partial(reapplying.read_batch, rules=NO_RULES, place=place, until=until))
    assert len(batch.seen) == 1


# A configuration alone moves nothing


@pytest.mark.parametrize("ttl", ["2h", "9d", "forever"])
async def test_a_restart_with_another_policy_moves_no_record(open_client, database, ttl):
    sent = webhook()
    async with open_client(database, MAYFLY_TTL="1d") as client:
        await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
    key = Key(ACCOUNT, sent.id)
    before = await row_of(database, key)
    async with open_client(database, MAYFLY_TTL=ttl):
        pass

    assert await row_of(database, key) == before


async def test_a_second_webhook_under_a_shorter_policy_moves_no_record(open_client, database):
    sent = webhook()
    for ttl in ("1d", "2h"):
        async with open_client(database, MAYFLY_TTL=ttl) as client:
            answer = await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
    row = await row_of(database, Key(ACCOUNT, sent.id))

    assert answer.status_code == 202
    assert row.due_at == row.wake_at == row.sent_at + DAY
    assert await moves_of(database, Key(ACCOUNT, sent.id)) == [Move.RECEIVE]


# The job of a record that is due earlier


async def test_a_worker_deletes_what_became_due_earlier_in_time(mayfly, simulator, tmp_path):
    short = {"MAYFLY_MIN_TTL": "1s", "SYNC_BASE_URL": simulator.url}
    service = await mayfly("up", MAYFLY_TTL="1h", **short).start()
    generation = simulator.add()
    sent = webhook(generation.notification())
    async with http_client(service.url) as client:
        await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
    await asyncio.sleep(5)  # its job is in Redis, an hour from now, and its early look is over
    async with open_database(URL.create("sqlite", database=str(tmp_path / "data" / "ledger.db"))) as database:
        changed = Policy(
            timedelta(seconds=2), timedelta(seconds=1), NO_RULES, {"default": Bounds(timedelta(seconds=1))}
        )
        assert await apply(database, changed) == 1
        due_at = (await row_of(database, Key(ACCOUNT, generation.id))).due_at
        await eventually(lambda: generation.id in simulator.deleted, seconds=30)

    assert timedelta(0) <= simulator.deleted[generation.id] - due_at <= timedelta(seconds=8)
