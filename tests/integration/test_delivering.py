"""Deliveries in the ledger: committed with their webhook, in order, and won or lost by the WHERE of one statement."""

import asyncio
import hashlib
import json
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
from msgspec import structs
from sqlalchemy import select, text

from service.core.forwarding import GIVE_UP_AFTER, WAITS, DeliveryState, Reply
from service.core.lifecycle import State
from service.ledger import delivering, taking
from service.ledger.database import RefusedDataError
from service.ledger.delivering import Due
from service.ledger.delivery_schema import requirements
from service.ledger.group_commit import GroupCommit
from service.ledger.taking import Webhook
from tests.support import attempts as ours
from tests.support.attempts import (
    CRM,
    FILMS,
    LEASE,
    claim,
    claim_one,
    find_due,
    forwarding,
    insert,
    insert_one,
    settle,
)
from tests.support.ledger import HOUR, arrival, row_of, utc_now

OK, BUSY, GONE = Reply(200, "ok"), Reply(503, "busy"), Reply(410)
SECOND = timedelta(seconds=1)


async def due_of(settled):
    return [due for due, _ in settled.due]


async def refuse(database, table, column, value):
    """Let the database refuse a row of *table*, as it does a value that does not fit."""
    if database.__class__.__name__ == "SqliteDatabase":
        make = [
            (
                f"CREATE TRIGGER refuse BEFORE INSERT ON {table} WHEN NEW.{column} = '{value}' "
                "BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        ]
    else:
        make = [
            (
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '23514'; END $$"
            ),
            (
                f"CREATE TRIGGER refuse BEFORE INSERT ON {table} FOR EACH ROW WHEN (NEW.{column} = '{value}') "
                "EXECUTE FUNCTION refuse()"
            ),
        ]
    for statement in make:
        await database.write(lambda connection, statement=statement: connection.execute(text(statement)))


@pytest.fixture
async def refusing(database):
    """Let the database refuse rows until the test ends: PostgreSQL's is the next test's as well."""

    async def start(table, column, value):
        await refuse(database, table, column, value)

    yield start
    if database.__class__.__name__ != "SqliteDatabase":
        await database.write(lambda connection: connection.execute(text("DROP FUNCTION IF EXISTS refuse() CASCADE")))


# Committed with the webhook


async def test_a_delivery_is_committed_with_its_record(database):
    item = arrival()
    webhook = Webhook(arrival=item, forwarding=forwarding(item.key.id, targets=(CRM, FILMS)))
    taken = await database.write(partial(taking.take, webhooks=[webhook]))

    assert [one.target for one in taken.deliveries] == ["crm", "films"]
    assert (await row_of(database, item.key)).state == State.SCHEDULED
    for row, new in zip(await ours.rows(database), taken.deliveries, strict=True):
        assert (row.id, row.target, row.generation) == (new.id, new.target, item.key.id)
        assert (row.state, row.attempts, row.tries, row.leased_until) == ("waiting", 0, 0, None)
        assert row.wake_at == row.since == row.received_at == new.received_at


async def test_a_refused_record_stores_no_delivery_and_a_refused_delivery_no_record(database, refusing):
    items = [arrival() for _ in range(3)]
    await refusing("records", "id", items[1].key.id)
    group = GroupCommit(partial(_take_all, database))
    webhooks = [Webhook(arrival=one, forwarding=forwarding(one.key.id)) for one in items]
    answers = await asyncio.gather(*map(group.submit, webhooks), return_exceptions=True)

    assert [isinstance(answer, RefusedDataError) for answer in answers] == [False, True, False]
    assert [row.generation for row in await ours.rows(database)] == [items[0].key.id, items[2].key.id]


async def test_a_refused_delivery_leaves_no_record(database, refusing):
    items = [arrival() for _ in range(2)]
    await refusing("deliveries", "generation", items[0].key.id)
    group = GroupCommit(partial(_take_all, database))
    webhooks = [Webhook(arrival=one, forwarding=forwarding(one.key.id)) for one in items]
    answers = await asyncio.gather(*map(group.submit, webhooks), return_exceptions=True)

    assert isinstance(answers[0], RefusedDataError)
    ids = await database.read(lambda connection: connection.execute(text("SELECT id FROM records")).scalars().all())
    assert ids == [items[1].key.id]


async def _take_all(database, webhooks):
    return (await database.write(partial(taking.take, webhooks=webhooks))).receipts


async def test_the_row_has_the_webhook_as_it_came(database):
    body = (
        b'{"id" :  "g-1",\r\n"status":"COMPLETED","text":"\xc5\xbdi\xc5\xbeek \\u0000 \xf0\x9f\x8e\xac"}' + b" " * 2**20
    )
    came = forwarding("g-1", body=body)
    came = structs.replace(came, content_type="application/json; charset=UTF-8 \xe9", signature="t=5,v1=ab,v1=cd")
    (new,) = await insert(database, came)
    claimed = await claim_one(database, new.id)

    assert (claimed.body, claimed.content_type, claimed.signature) == (body, came.content_type, came.signature)
    assert (await ours.row_of(database, new.id)).digest == hashlib.sha256(body).digest()


async def test_an_equal_body_is_one_delivery_for_each_target_however_often_it_comes(database):
    body = json.dumps({"id": "g-1"}).encode()
    first = await insert(database, forwarding("g-1", body=body), forwarding("g-1", body=body))
    again = await insert(database, forwarding("g-1", body=body, targets=(CRM, FILMS)))

    assert [one.target for one in first] == ["crm"]
    assert [one.target for one in again] == ["films"]


async def test_an_equal_body_makes_no_second_delivery_once_the_first_is_over(database):
    body = json.dumps({"id": "g-1"}).encode()
    name = await insert_one(database, "g-1", body=body)
    await settle(database, await claim_one(database, name), OK)

    assert await insert(database, forwarding("g-1", body=body)) == []
    assert await ours.states(database) == [DeliveryState.DELIVERED]


async def test_another_body_account_or_generation_is_a_delivery_of_its_own(database):
    body = json.dumps({"id": "g-1"}).encode()
    webhooks = [
        forwarding("g-1", body=body),
        forwarding("g-1", body=body + b" "),
        forwarding("g-2", body=body),
        forwarding("g-1", body=body, account="studio"),
    ]

    assert len({one.id for one in await insert(database, *webhooks)}) == 4


async def test_many_large_webhooks_are_stored_in_their_order(database):
    bodies = [str(number).encode() + b"x" * 200_000 for number in range(40)]
    await insert(database, *(forwarding(f"g-{number % 3}", body=body) for number, body in enumerate(bodies)))

    assert [row.body for row in await ours.rows(database)] == bodies


async def test_the_same_webhooks_stored_by_two_processes_at_once_make_one_delivery_each(database):
    webhooks = [forwarding(f"g-{number}") for number in range(20)]
    groups = [GroupCommit(partial(_insert_each, database)) for _ in range(2)]
    await asyncio.gather(
        *(groups[0].submit(one) for one in webhooks), *(groups[1].submit(one) for one in reversed(webhooks))
    )

    assert len(await ours.rows(database)) == 20


async def _insert_each(database, items):
    await insert(database, *items)
    return [None] * len(items)


async def test_only_the_last_webhook_of_a_required_target_makes_a_requirement(database):
    crm = replace(CRM, is_required=True)
    running = structs.replace(forwarding("g-1", targets=(crm, FILMS)), is_final=False)
    await insert(database, running, forwarding("g-1", targets=(crm, FILMS)))
    found = await database.read(lambda connection: connection.execute(select(requirements)).all())

    assert [(row.account, row.generation, row.delivery) for row in found] == [
        ("default", "g-1", (await ours.rows(database))[2].seq)
    ]


# Claims


async def test_a_claim_counts_the_attempt_and_has_a_lease(database):
    name, now = await insert_one(database), utc_now()
    claimed = await claim_one(database, name, now=now)

    assert (claimed.attempt, claimed.tries, claimed.target) == (1, 1, "crm")
    row = await ours.row_of(database, name)
    assert (row.state, row.attempts, row.tries) == ("waiting", 1, 1)
    assert row.wake_at == row.leased_until == now + LEASE


async def test_an_attempt_is_claimed_once_by_whoever_is_first(database):
    names = [await insert_one(database) for _ in range(5)]
    found = await asyncio.gather(*(claim(database, *((name, 1) for name in names)) for _ in range(4)))

    claimed = [one.id for some in found for one in some if one is not None]
    assert sorted(claimed) == sorted(names)


async def test_a_first_attempt_is_due_at_once_although_the_receivers_clock_is_ahead(database):
    now = utc_now()
    name = await insert_one(database, received_at=now + timedelta(minutes=1))
    await settle(database, await claim_one(database, name, now=now), BUSY, now=now)

    assert await claim(database, (name, 2), now=now + 4 * SECOND) == [None]
    assert await claim(database, (name, 2), now=now + 5 * SECOND) != [None]


async def test_what_is_unknown_over_or_at_another_attempt_is_not_claimed(database):
    name, now = await insert_one(database), utc_now()
    assert await claim(database, (name, 2), (name, 0), ("unknown", 1)) == [None, None, None]
    claimed = await claim_one(database, name)
    assert await claim(database, (name, 1), (name, 2)) == [None, None]
    await settle(database, claimed, OK)

    assert await claim(database, (name, 1), (name, 2), now=now + HOUR) == [None, None]


async def test_a_lost_lease_is_found_and_claimed_as_the_next_attempt(database):
    name, now = await insert_one(database), utc_now()
    await claim_one(database, name, now=now)
    assert await find_due(database, now=now + LEASE - SECOND) == []
    assert await find_due(database, now=now + LEASE) == [Due("crm", name, 2)]

    assert (await claim_one(database, name, 2, now=now + LEASE)).tries == 2


# Order


async def test_a_later_webhook_of_the_generation_waits_for_the_earlier_one(database):
    first, second = await insert_one(database, "g-1"), await insert_one(database, "g-1")
    assert await claim(database, (second, 1)) == [None]
    claimed = await claim_one(database, first)
    assert await claim(database, (second, 1)) == [None]
    settled = await settle(database, claimed, BUSY)
    assert await due_of(settled) == [Due("crm", first, 2)]
    assert await claim(database, (second, 1)) == [None]
    again = await claim_one(database, first, 2, now=utc_now() + HOUR)
    settled = await settle(database, again, OK)

    assert await due_of(settled) == [Due("crm", second, 1)]
    assert (await claim_one(database, second)).id == second


async def test_of_one_generation_only_the_first_is_claimed_of_many_at_once(database):
    names = [await insert_one(database, "g-1") for _ in range(4)]

    found = await claim(database, *((name, 1) for name in reversed(names)))
    assert [one.id for one in found if one is not None] == [names[0]]
    assert await find_due(database, now=utc_now() + LEASE + SECOND) == [Due("crm", names[0], 2)]


@pytest.mark.parametrize("end", ["410", "exhausted"])
async def test_a_failed_webhook_is_followed_by_the_later_one_at_once(database, end):
    first, second = await insert_one(database, "g-1"), await insert_one(database, "g-1")
    claimed = await claim_one(database, first)
    if end == "410":
        settled = await settle(database, claimed, GONE)
    else:
        settled = await settle(database, structs.replace(claimed, tries=11), BUSY)

    assert await due_of(settled) == [Due("crm", second, 1)]
    assert await ours.states(database) == [DeliveryState.FAILED, DeliveryState.WAITING]
    assert (await claim_one(database, second)).id == second


async def test_a_webhook_that_was_given_up_holds_up_no_later_one(database):
    now = utc_now()
    await insert_one(database, "g-1", received_at=now - GIVE_UP_AFTER)
    second = await insert_one(database, "g-1")
    await ours.give_up(database, now=now)

    assert await ours.states(database) == [DeliveryState.FAILED, DeliveryState.WAITING]
    assert await find_due(database) == [Due("crm", second, 1)]
    assert (await claim_one(database, second)).id == second


async def test_neither_another_generation_target_nor_account_waits(database):
    await insert_one(database, "g-1")
    others = [
        await insert_one(database, "g-2"),
        await insert_one(database, "g-1", targets=(FILMS,)),
        await insert_one(database, "g-1", account="studio"),
    ]

    assert None not in await claim(database, *((name, 1) for name in others))


async def test_the_net_finds_the_first_of_each_generation_longest_due_first(database):
    now = utc_now()
    names = [
        await insert_one(database, generation, received_at=now - seconds * SECOND)
        for generation, seconds in (("g-1", 5), ("g-1", 9), ("g-2", 7), ("g-3", -60))
    ]
    await insert_one(database, "g-2", targets=(FILMS,))

    assert await find_due(database, now=now) == [Due("crm", names[2], 1), Due("crm", names[0], 1)]
    assert await find_due(database, now=now, limit=1) == [Due("crm", names[2], 1)]


# Outcomes


async def test_a_success_ends_it_and_keeps_what_was_answered(database):
    name, now = await insert_one(database), utc_now()
    settled = await settle(database, await claim_one(database, name), OK, now=now)

    assert settled.is_ours
    assert settled.due == []
    row = await ours.row_of(database, name)
    assert (row.state, row.wake_at, row.leased_until, row.finished_at) == ("delivered", None, None, now)
    assert (row.last_status, row.last_answer, row.last_error) == (200, "ok", None)


async def test_a_failure_waits_as_scheduled_and_says_why(database):
    name, now = await insert_one(database), utc_now()
    settled = await settle(database, await claim_one(database, name), BUSY, now=now)

    assert list(settled.due) == [(Due("crm", name, 2), now + WAITS[0])]
    row = await ours.row_of(database, name)
    assert (row.state, row.wake_at, row.leased_until, row.finished_at) == ("waiting", now + WAITS[0], None, None)
    assert (row.last_status, row.last_answer, row.last_error) == (503, "busy", "answered 503")


async def test_eleven_failures_exhaust_it_with_the_reason(database):
    name, now = await insert_one(database), utc_now()
    for attempt in range(1, 12):
        settled = await settle(database, await claim_one(database, name, attempt, now=now), BUSY, now=now)
        now += timedelta(days=1)

    assert settled.due == []
    row = await ours.row_of(database, name)
    assert (row.state, row.attempts, row.wake_at) == ("failed", 11, None)
    assert row.last_error == "no 2xx in 11 attempts; the last: answered 503"
    assert row.finished_at is not None


async def test_a_late_failure_of_a_lost_attempt_changes_nothing(database):
    name, now = await insert_one(database), utc_now()
    lost = await claim_one(database, name, now=now)
    later = await claim_one(database, name, 2, now=now + LEASE)
    for reply in (BUSY, GONE, Reply(None, error="no answer within 15 s")):
        before = await ours.row_of(database, name)
        settled = await settle(database, lost, reply)
        assert not settled.is_ours
        assert settled.due == ()
        assert await ours.row_of(database, name) == before
    await settle(database, later, OK)
    assert not (await settle(database, lost, GONE)).is_ours

    assert (await ours.row_of(database, name)).state == "delivered"


async def test_a_late_success_of_a_lost_attempt_counts_and_no_failure_undoes_it(database):
    name, now = await insert_one(database), utc_now()
    lost = await claim_one(database, name, now=now)
    later = await claim_one(database, name, 2, now=now + LEASE)
    assert (await settle(database, lost, OK)).is_ours
    for reply in (BUSY, GONE):
        assert not (await settle(database, later, reply)).is_ours

    row = await ours.row_of(database, name)
    assert (row.state, row.wake_at, row.last_status) == ("delivered", None, 200)


async def test_a_late_success_counts_although_a_later_attempt_has_failed(database):
    name, now = await insert_one(database), utc_now()
    lost = await claim_one(database, name, now=now)
    await settle(database, await claim_one(database, name, 2, now=now + LEASE), GONE)
    assert (await ours.row_of(database, name)).state == "failed"
    await settle(database, lost, OK)

    row = await ours.row_of(database, name)
    assert (row.state, row.last_error) == ("delivered", None)


async def test_a_failure_settled_twice_is_counted_once(database):
    name, now = await insert_one(database), utc_now()
    claimed = await claim_one(database, name, now=now)
    first = await settle(database, claimed, BUSY, now=now)
    second = await settle(database, claimed, BUSY, now=now + HOUR)

    assert (first.is_ours, second.is_ours) == (True, False)
    assert (await ours.row_of(database, name)).wake_at == now + WAITS[0]


@pytest.mark.parametrize("answer", ["\ufffd\ufffd", "<script>\x1b[31m", "x" * 1024, "Žižek 🎬"])
async def test_what_a_target_answers_is_kept_as_text(database, answer):
    name = await insert_one(database)
    await settle(database, await claim_one(database, name), Reply(500, answer))

    assert (await ours.row_of(database, name)).last_answer == answer


# Given up


async def test_what_has_waited_for_three_days_is_given_up_and_nothing_else(database):
    now = utc_now()
    old = await insert_one(database, received_at=now - GIVE_UP_AFTER)
    leased = await insert_one(database, received_at=now - GIVE_UP_AFTER)
    done = await insert_one(database, received_at=now - GIVE_UP_AFTER)
    recent = await insert_one(database, received_at=now - GIVE_UP_AFTER + HOUR)
    foreign = await insert_one(database, received_at=now - GIVE_UP_AFTER, targets=(FILMS,))
    await claim_one(database, leased, now=now)
    await settle(database, await claim_one(database, done, now=now), OK)
    await ours.give_up(database, now=now)

    found = {row.id: row for row in await ours.rows(database)}
    assert {name for name, row in found.items() if row.state == "failed"} == {old}
    assert found[done].state == "delivered"
    assert {found[name].state for name in (leased, recent, foreign)} == {"waiting"}
    assert found[old].last_error == "no 2xx in 3 days: its target did not answer"
    assert (found[old].wake_at, found[old].finished_at) == (None, now)


async def test_a_lost_lease_of_an_old_delivery_is_given_up(database):
    now = utc_now()
    name = await insert_one(database, received_at=now - GIVE_UP_AFTER)
    await claim_one(database, name, now=now - HOUR)
    await ours.give_up(database, now=now)

    assert (await ours.row_of(database, name)).state == "failed"


async def test_what_a_removed_target_has_left_is_given_up_after_three_days(database):
    now = utc_now()
    old = await insert_one(database, received_at=now - GIVE_UP_AFTER, targets=(FILMS,))
    recent = await insert_one(database, targets=(FILMS,))
    kept = await insert_one(database, received_at=now - GIVE_UP_AFTER)
    await ours.give_up(database, now=now, target=None, known=["crm"])

    found = {row.id: row for row in await ours.rows(database)}
    assert found[old].last_error == "its target is not in the configuration any more"
    assert [found[name].state for name in (old, recent, kept)] == ["failed", "waiting", "waiting"]


async def test_a_success_after_it_was_given_up_counts(database):
    now = utc_now()
    name = await insert_one(database, received_at=now - GIVE_UP_AFTER)
    claimed = await claim_one(database, name, now=now - HOUR)
    await ours.give_up(database, now=now)
    assert not (await settle(database, claimed, BUSY)).is_ours
    await settle(database, claimed, OK)

    assert (await ours.row_of(database, name)).state == "delivered"


async def test_attempts_that_begin_and_end_in_other_orders_do_not_deadlock(database):
    names = [await insert_one(database) for _ in range(30)]
    wanted = [(name, 1) for name in names]
    both = await asyncio.gather(claim(database, *wanted), claim(database, *reversed(wanted)))
    claimed = [one for claims in both for one in claims if one is not None]
    ends = [ours.ended(one, OK) for one in claimed]
    write = partial(delivering.settle_deliveries, now=utc_now())
    await asyncio.gather(*(database.write(partial(write, ended=some)) for some in (ends, ends[::-1])))

    assert sorted(one.id for one in claimed) == sorted(names)
    assert await ours.states(database) == [DeliveryState.DELIVERED] * 30
