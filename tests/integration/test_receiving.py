"""One record per generation, whatever the number, order and sender of its webhooks."""

import asyncio
import json
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
import pytest
from sqlalchemy import event, select

from service.core.generation import read_generation
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.ledger import holding, moving, receiving
from service.ledger.columns import GENERATION_COLUMNS, generation_values
from service.ledger.opening import open_database
from service.ledger.outcomes import CopyResult, Settled
from service.ledger.schema import labels
from tests.support.ledger import (
    ACTOR,
    HOUR,
    arrival,
    claim,
    claim_one,
    confirmed,
    copy,
    count,
    deferred,
    end_lease,
    given_up,
    lose_leases,
    move,
    moves_of,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)


async def test_a_first_webhook_schedules_a_record_and_stores_its_body_unchanged(database):
    item = arrival(due_in=HOUR, error="Größe ✂", novelty={"a": [1.0]})
    (receipt,) = await receive(database, item)
    row = await row_of(database, item.key)

    assert (receipt.state, receipt.due_at, receipt.is_new, receipt.is_moved) == (
        State.SCHEDULED,
        item.retention.due_at,
        True,
        True,
    )
    assert row.notification == item.body
    assert (row.state, row.status, row.attempts) == (State.SCHEDULED, "COMPLETED", 0)
    assert row.due_at == row.wake_at == item.retention.due_at
    assert row.received_at == item.received_at
    assert (row.rule, row.ttl_seconds) == ("MAYFLY_TTL", 3600)
    assert row.copied_at is row.deleted_at is row.last_error is row.outcome is None
    assert await moves_of(database, item.key) == [Move.RECEIVE]


async def test_a_webhook_without_a_due_time_makes_a_kept_record_that_never_wakes(database):
    key = await store(database, due_in=None)
    row = await row_of(database, key)

    assert row.state == State.KEPT
    assert row.due_at is row.wake_at is row.ttl_seconds is None
    assert await moves_of(database, key) == [Move.KEEP]


async def test_a_later_webhook_changes_the_due_time_of_a_held_record_but_not_its_hold(database):
    (held,) = await receive(database, arrival(id="g1", due_in=timedelta(hours=1), hold="legal"))

    (again,) = await receive(database, arrival(id="g1", due_in=timedelta(days=3)))
    (sooner,) = await receive(database, arrival(id="g1", due_in=timedelta(minutes=1)))

    row = await row_of(database, Key("default", "g1"))
    assert (held.state, again.state, sooner.state) == (State.HELD, State.HELD, State.HELD)
    assert row.due_at == again.due_at == sooner.due_at != held.due_at
    assert (row.hold_reason, row.wake_at) == ("legal", None)


async def test_a_webhook_with_a_hold_makes_a_held_record(database):
    key = await store(database, hold="legal case")
    row = await row_of(database, key)

    assert (row.state, row.wake_at, row.hold_reason, row.hold_by) == (State.HELD, None, "legal case", "webhook")
    assert row.due_at is not None
    assert await moves_of(database, key) == [Move.RECEIVE, Move.HOLD]


async def test_a_duplicate_webhook_changes_nothing(database):
    item = arrival(due_in=HOUR)
    (first,) = await receive(database, item)
    (second,) = await receive(database, item)

    assert (second.seq, second.state, second.due_at) == (first.seq, first.state, first.due_at)
    assert (second.is_new, second.is_moved, second.is_conflict) == (False, False, False)
    assert await moves_of(database, item.key) == [Move.RECEIVE]
    assert await count(database) == 1


async def test_a_different_body_for_a_known_generation_is_reported_and_not_stored(database):
    first = arrival(id="g1", status="COMPLETED", due_in=HOUR)
    await receive(database, first)
    (receipt,) = await receive(database, arrival(id="g1", status="FAILED", due_in=timedelta(0)))
    row = await row_of(database, first.key)

    assert receipt.is_conflict
    assert (row.status, row.notification) == ("COMPLETED", first.body)


async def test_of_two_webhooks_the_later_due_time_wins(database):
    await store(database, id="g1", due_in=HOUR)
    (later,) = await receive(database, arrival(id="g1", due_in=3 * HOUR))
    (sooner,) = await receive(database, arrival(id="g1", due_in=2 * HOUR))
    row = await row_of(database, Key("default", "g1"))

    assert (later.is_moved, sooner.is_moved) == (True, False)
    assert row.due_at == row.wake_at == later.due_at == sooner.due_at
    assert row.ttl_seconds == 3 * 3600
    assert await moves_of(database, Key("default", "g1")) == [Move.RECEIVE, Move.RECEIVE]


async def test_forever_wins_over_any_due_time(database):
    await store(database, id="g1", due_in=HOUR)
    (kept,) = await receive(database, arrival(id="g1", due_in=None))
    (after,) = await receive(database, arrival(id="g1", due_in=9 * HOUR))
    row = await row_of(database, Key("default", "g1"))

    assert (kept.state, kept.is_moved, after.state, after.is_moved) == (State.KEPT, True, State.KEPT, False)
    assert row.due_at is row.wake_at is None
    assert await moves_of(database, Key("default", "g1")) == [Move.RECEIVE, Move.KEEP]


async def test_a_later_hold_wins_over_a_due_time_and_keeps_it_for_a_release(database):
    (first,) = await receive(database, arrival(id="g1", due_in=HOUR))
    (held,) = await receive(database, arrival(id="g1", due_in=timedelta(0), hold="wait"))
    row = await row_of(database, Key("default", "g1"))

    assert (held.state, held.due_at) == (State.HELD, first.due_at)
    assert (row.wake_at, row.due_at, row.hold_reason) == (None, first.due_at, "wait")


async def test_another_webhook_does_not_end_a_hold(database):
    key = await store(database, id="g1", hold="wait")
    await receive(database, arrival(id="g1", due_in=timedelta(0)))

    assert (await row_of(database, key)).state == State.HELD


async def test_a_webhook_after_the_deletion_changes_nothing(database):
    key = await store(database, id="g1")
    await settle(database, confirmed(await claim_one(database)))
    (receipt,) = await receive(database, arrival(id="g1", due_in=9 * HOUR, hold="too late"))

    assert (receipt.state, receipt.is_moved) == (State.DELETED, False)
    assert (await row_of(database, key)).state == State.DELETED


@pytest.mark.parametrize(
    ("later", "then"),
    [({"due_in": 9 * HOUR}, State.SCHEDULED), ({"due_in": None}, State.KEPT), ({"hold": "legal"}, State.HELD)],
)
async def test_a_webhook_for_a_failed_record_takes_effect_at_its_retry(database, later, then):
    key = await store(database, id="g1")
    await settle(database, given_up(await claim_one(database)))
    (receipt,) = await receive(database, arrival(id="g1", **later))
    (again,) = await receive(database, arrival(id="g1", due_in=HOUR))
    assert (receipt.state, receipt.is_moved, again.is_moved) == (State.FAILED, True, "hold" in later)
    await database.write(
        partial(moving.move_record, key=key, wanted=Move.RETRY, now=utc_now(), actor=ACTOR, reason=None)
    )
    row = await row_of(database, key)

    assert row.state == then
    assert row.wake_at == (receipt.due_at if then is State.SCHEDULED else None)


@pytest.mark.parametrize(
    ("later", "then", "moves"),
    [
        ({"due_in": 9 * HOUR}, State.SCHEDULED, [Move.LOSE_LEASE]),
        ({"due_in": None}, State.KEPT, [Move.LOSE_LEASE, Move.KEEP]),
        ({"hold": "legal"}, State.HELD, [Move.LOSE_LEASE, Move.HOLD]),
    ],
)
async def test_a_webhook_stops_a_worker_that_has_no_copy_yet(database, later, then, moves):
    key = await store(database, id="g1", due_in=-2 * HOUR)
    claim = await claim_one(database)
    (receipt,) = await receive(database, arrival(id="g1", **later))

    assert (receipt.state, receipt.is_moved) == (then, True)
    assert await copy(database, claim) is CopyResult.LOST
    assert await settle(database, confirmed(claim)) == [Settled.LOST]
    assert (await row_of(database, key)).state == then
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, *moves]


@pytest.mark.parametrize("later", [{"due_in": 9 * HOUR}, {"due_in": None}, {"hold": "legal"}])
async def test_a_webhook_is_too_late_after_the_copy(database, later):
    key = await store(database, id="g1")
    claim = await claim_one(database)
    assert await copy(database, claim) is CopyResult.KEPT
    (receipt,) = await receive(database, arrival(id="g1", **later))

    assert (receipt.state, receipt.is_moved) == (State.DELETING, False)
    assert await settle(database, confirmed(claim)) == [Settled.SETTLED]
    assert (await row_of(database, key)).state == State.DELETED


async def test_a_webhook_that_leaves_the_record_due_does_not_stop_a_worker(database):
    await store(database, id="g1", due_in=-2 * HOUR)
    claim = await claim_one(database)
    (receipt,) = await receive(database, arrival(id="g1", due_in=-HOUR))

    assert (receipt.state, receipt.is_moved) == (State.DELETING, False)
    assert await copy(database, claim) is CopyResult.KEPT


async def test_a_copy_of_an_earlier_attempt_does_not_make_it_too_late(database):
    key = await store(database, id="g1")
    earlier = await claim_one(database)
    await copy(database, earlier)
    await settle(database, deferred(earlier))
    later = await claim_one(database)
    (receipt,) = await receive(database, arrival(id="g1", hold="legal"))

    assert receipt.state is State.HELD
    assert await copy(database, later) is CopyResult.LOST
    assert (await row_of(database, key)).state == State.HELD


async def test_a_later_due_time_does_not_make_a_deferred_attempt_earlier(database):
    key = await store(database, id="g1", due_in=-2 * HOUR)
    retry_at = utc_now() + 5 * HOUR
    await settle(database, deferred(await claim_one(database), retry_at=retry_at))
    (receipt,) = await receive(database, arrival(id="g1", due_in=-HOUR))
    row = await row_of(database, key)

    assert receipt.is_moved
    assert (row.due_at, row.wake_at) == (receipt.due_at, retry_at)


async def test_a_batch_with_the_same_generation_several_times_makes_one_record(database):
    items = [arrival(id="g1", due_in=number * HOUR) for number in (1, 3, 2)]
    receipts = await receive(database, *items)

    assert [receipt.is_new for receipt in receipts] == [True, False, False]
    assert [receipt.is_moved for receipt in receipts] == [True, True, False]
    assert len({receipt.seq for receipt in receipts}) == 1
    assert (await row_of(database, items[0].key)).due_at == items[1].retention.due_at
    assert await count(database) == 1


async def test_the_same_id_in_two_accounts_is_two_records(database):
    one = arrival(id="g1")
    other = receiving.Arrival(Key("other", "g1"), one.generation, one.body, one.retention, one.received_at, one.sent_at)
    await receive(database, one, other)

    assert await count(database) == 2


async def test_two_processes_that_store_the_same_generations_never_deadlock(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        for number in range(5):
            arrivals = [arrival(id=f"g{number}-{index}", due_in=HOUR) for index in range(40)]
            orders = [arrivals, arrivals[::-1], arrivals[20:] + arrivals[:20]]
            writes = [receive(database, *order) for database, order in zip((one, other, one), orders, strict=True)]
            results = await asyncio.gather(*writes)

            assert sum(receipt.is_new for receipts in results for receipt in receipts) == 40
        assert await count(one) == 200


@pytest.mark.parametrize("generation_id", ["a/../b ü?#%2F", "'; drop table records; --", "Ä" * 255, "%", "🪰"])
async def test_any_id_finds_its_record(database, generation_id):
    key = await store(database, id=generation_id)

    assert (await row_of(database, key)).id == generation_id


async def test_texts_of_any_length_and_script_survive(database):
    item = arrival(error="🪰" * 10_000, input=[{"script": "ünïcödé \u2028"}])
    await receive(database, item)

    assert json.loads((await row_of(database, item.key)).notification) == json.loads(item.body)


async def test_receipt_fills_every_column_that_describes_the_generation(database):
    item = arrival(
        id="g1",
        error="no face",
        error_code="no_face",
        segments=[{"startTime": 0}],
        outputMediaUrl="https://media",
        segmentOutputUrl="https://segment",
        synthesizedAudioUrl="https://audio",
        outputFileName="take_07",
        projectId="film",
        source="api",
    )
    await receive(database, item)
    row = await row_of(database, item.key)
    columns = generation_values(item.generation)

    assert {name: getattr(row, name) for name in columns} == columns
    assert columns.keys() == {"status", *GENERATION_COLUMNS}
    assert None not in columns.values()


async def test_the_copy_replaces_the_webhooks_values_except_where_it_has_none(database):
    item = arrival(id="g1", model="announced", error="odd", outputFileName="take", options={"a": 1})
    await receive(database, item)
    claimed = await claim_one(database)
    await copy(database, claimed, model="copied", error=None, outputFileName="", options=None)
    row = await row_of(database, item.key)

    assert (row.model, row.error, row.output_file_name, row.options) == ("copied", "odd", "take", '{"a": 1}')


@pytest.mark.parametrize(("escape", "stored"), [("\\ud83d", "\\ufffd"), ("\\u0000", "\\u0000")])
async def test_lone_surrogates_and_nul_in_raw_parts_break_neither_database(database, escape, stored):
    item = arrival(id="g1", input=[{"script": "ODD"}], options={"ODD": "ODD"}, segments=["ODD"])
    body = item.body.replace("ODD", escape)
    await receive(database, msgspec.structs.replace(item, body=body, generation=read_generation(body.encode())))
    row = await row_of(database, item.key)

    assert row.notification == body
    assert (row.input, row.segments) == (f'[{{"script": "{stored}"}}]', f'["{stored}"]')


async def test_a_lone_surrogate_in_a_text_column_is_stored_as_a_replacement(database):
    item = arrival(id="g1", error="HALF", outputFileName="HALF")
    body = item.body.replace("HALF", "cut \\ud83d")
    await receive(database, msgspec.structs.replace(item, body=body, generation=read_generation(body.encode())))
    row = await row_of(database, item.key)

    assert (row.error, row.output_file_name) == ("cut \ufffd", "cut \ufffd")


async def test_known_generations_are_found_by_the_index(sqlite_database):
    one = arrival(id="g1")
    items = [
        one,
        arrival(id="g2"),
        receiving.Arrival(Key("other", "g1"), one.generation, one.body, one.retention, utc_now(), utc_now()),
    ]
    plans: list[str] = []

    def explain(_connection, cursor, statement, parameters, _context, _is_many):
        if statement.startswith("SELECT"):
            plans.extend(row[3] for row in cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters))

    def receive_explained(connection):
        event.listen(connection, "before_cursor_execute", explain)
        return receiving.receive(connection, items)

    await receive(sqlite_database, *items)
    receipts = await sqlite_database.write(receive_explained)

    assert not any(receipt.is_new for receipt in receipts)
    assert any("SEARCH" in plan for plan in plans)
    assert not any("SCAN" in plan for plan in plans)


def labelled(item, **named):
    return msgspec.structs.replace(item, retention=msgspec.structs.replace(item.retention, labels=named))


async def labels_of(database):
    rows = await database.read(lambda connection: connection.execute(select(labels)).all())
    return sorted((row.record, row.name, row.value) for row in rows)


async def test_the_labels_of_new_records_are_stored_with_them(database):
    items = [labelled(arrival(), customer="acme", shot="7"), arrival(), labelled(arrival(), customer="Größe ✂")]
    seqs = [receipt.seq for receipt in await receive(database, *items)]

    assert await labels_of(database) == sorted(
        [(seqs[0], "customer", "acme"), (seqs[0], "shot", "7"), (seqs[2], "customer", "Größe ✂")]
    )


async def test_a_known_record_keeps_the_labels_of_its_first_webhook(database):
    first = labelled(arrival(), customer="acme")
    again = labelled(first, customer="other", shot="7")
    (receipt, _) = await receive(database, first, again)
    await receive(database, again)

    assert await labels_of(database) == [(receipt.seq, "customer", "acme")]


async def test_a_webhook_without_labels_costs_no_statement_more(database):
    statements: list[str] = []
    with_labels: list[str] = []
    for found, item in ((statements, arrival()), (with_labels, labelled(arrival(), customer="acme"))):

        def write(connection, found=found, item=item):
            def note(_connection, _cursor, statement, *_rest: object):
                found.append(statement)

            event.listen(connection, "before_cursor_execute", note)
            receiving.receive(connection, [item])

        await database.write(write)

    assert len(with_labels) == len(statements) + 1


LATE: dict[str, dict[str, Any]] = {
    "hold": {"hold": "legal"},
    "later": {"due_in": 24 * HOUR},
    "forever": {"due_in": None},
}


@pytest.mark.parametrize("how", LATE)
@pytest.mark.parametrize("end", [deferred, given_up, None])
async def test_what_is_announced_during_a_delete_counts_if_that_does_not_succeed(database, how, end):
    key = await store(database)
    item = await claim_one(database)
    await copy(database, item)
    again = arrival(id=key.id, **LATE[how])
    (receipt,) = await receive(database, again)
    if end is None:
        await end_lease(database, key)
        await lose_leases(database)
    else:
        await settle(database, end(item))
    if end is given_up:
        await move(database, key, Move.RETRY)
    assert await claim(database, now=utc_now() + HOUR) == []
    row = await row_of(database, key)

    assert receipt.state == State.DELETING
    assert (row.state, row.hold_by, row.hold_until) == (
        State.HELD,
        "webhook",
        again.retention.due_at if how == "later" else None,
    )


async def test_a_hold_that_came_too_late_is_gone_with_the_generation(database):
    key = await store(database)
    item = await claim_one(database)
    await copy(database, item)
    await receive(database, arrival(id=key.id, hold="legal"))
    await settle(database, confirmed(item))

    assert (await row_of(database, key)).state == State.DELETED
    assert await database.read(partial(holding.find_hold, key=key)) is None


async def test_the_end_of_an_overrides_hold_is_stored_and_ends_it(database):
    until = utc_now() - timedelta(seconds=1)
    item = arrival(hold="legal")
    item = msgspec.structs.replace(item, retention=msgspec.structs.replace(item.retention, hold_until=until))
    await receive(database, item)
    held = await row_of(database, item.key)
    end = partial(holding.end_holds, account=item.key.account, min_ttl=HOUR, limit=10, now=utc_now())
    assert await database.write(end) == 1
    row = await row_of(database, item.key)

    assert (held.state, held.hold_until, row.state, row.hold_until) == (State.HELD, until, State.SCHEDULED, None)
    assert row.due_at > utc_now() + HOUR / 2
