"""Required targets: no generation is deleted before they have taken its webhooks, and a failure is visible."""

import asyncio
import json
from datetime import timedelta
from functools import partial

import pytest
from msgspec.structs import replace
from sqlalchemy import event, update

from service.core.forwarding import DeliveryState
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.core.rules import RuleSet
from service.ledger import (
    account_reading,
    batches,
    claiming,
    explanations,
    fulfilling,
    history,
    outlook,
    pausing,
    reading,
    reapplying,
    requiring,
)
from service.ledger.claiming import NotYet, Wanted
from service.ledger.delivery_schema import deliveries
from service.ledger.moving import Grace
from service.ledger.opening import open_database
from service.ledger.outcomes import CopyResult
from service.ledger.pausing import Kind, Pause
from service.ledger.schema import records
from service.ledger.taking import take
from service.ledger.views import find_record, present_full
from tests.support.commands import command
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    LEASE,
    arrival,
    claim,
    claim_one,
    copy,
    deferred,
    end_holds,
    end_lease,
    given_up,
    lose_leases,
    move,
    moves_of,
    row_of,
    settle,
    store,
    utc_now,
)
from tests.support.requiring import (
    CRM,
    ERROR,
    LOG,
    MAIL,
    announce,
    batch_webhook,
    delivered,
    failed,
    put_off,
    replayed,
    requirements_of,
    rows_of_deliveries,
    webhook,
)
from tests.support.webhooks import SECRET

SECOND = timedelta(seconds=1)
MINUTES = timedelta(minutes=9)
GRACE = Grace(timedelta(0), HOUR)


async def claim_by_job(database, key, *, attempt=1):
    wanted = [Wanted(key, attempt)]
    (found,) = await database.write(
        partial(claiming.claim_wanted, account=ACCOUNT, wanted=wanted, now=utc_now(), lease=LEASE, actor=ACTOR)
    )
    return found


async def outlook_of(database, *, until=timedelta(0)):
    now = utc_now()
    read = partial(outlook.read_outlook, account=ACCOUNT, now=now, late=SECOND, since=None, until=now + until, limit=10)
    return await database.read(read)


async def explain(database, key):
    return await database.read(partial(explanations.explain_key, key=key, now=utc_now(), is_dry_run=False))


async def entries_of(database, key):
    row = await row_of(database, key)
    return await database.read(partial(history.read_entries, record=row.seq))


async def only_id(database):
    (only,) = await rows_of_deliveries(database)
    return only.id


# The claim


@pytest.mark.parametrize("by_job", [False, True])
async def test_a_due_record_waits_for_its_target(database, by_job):
    key = await announce(database, CRM)
    before = utc_now()
    granted = await claim_by_job(database, key) if by_job else await claim(database)
    row = await row_of(database, key)

    assert not granted
    assert (row.state, row.waits_for, row.attempts) == (State.SCHEDULED, "crm", 0)
    assert row.wake_at >= before + MINUTES
    assert await moves_of(database, key) == [Move.RECEIVE]


async def test_a_record_that_waits_is_not_overdue(database):
    key = await announce(database, CRM)
    await claim(database)
    backlog = await database.read(partial(reading.read_backlog, now=utc_now()))
    (mine,) = await database.read(partial(account_reading.read_backlogs, configured=[ACCOUNT], now=utc_now()))
    late = await database.read(partial(account_reading.find_overdue, now=utc_now(), than=timedelta(0)))
    found = await outlook_of(database)

    assert (backlog.oldest_overdue, backlog.due, backlog.failed) == (timedelta(0), 0, 0)
    assert (mine.waiting, mine.due, mine.oldest_overdue_seconds) == (1, 0, 0)
    assert late == {}
    assert (found.late, found.near) == ([], [])
    assert (await row_of(database, key)).last_error is None


async def test_a_record_is_not_looked_at_before_the_next_attempt_of_its_delivery(database):
    key = await announce(database, CRM)
    await put_off(database, 5 * HOUR)
    await claim(database)
    (delivery,) = await rows_of_deliveries(database)

    assert (await row_of(database, key)).wake_at == delivery.wake_at


async def test_a_record_is_claimed_once_its_target_has_answered(database):
    key = await announce(database, CRM)
    await claim(database)
    ready = await delivered(database)
    row = await row_of(database, key)

    assert [(one.key, one.attempt) for one in ready] == [(key, 1)]
    assert ready[0].at == row.wake_at <= utc_now()
    assert row.waits_for is None
    assert (await claim_one(database)).attempt == 1


async def test_a_record_that_is_due_later_stays_so_when_its_target_answers(database):
    key = await announce(database, CRM, due_in=HOUR)

    assert await delivered(database) == []
    assert (await row_of(database, key)).wake_at == (await row_of(database, key)).due_at


async def test_a_due_time_that_became_later_meanwhile_counts(database):
    key = await announce(database, CRM, id="g1")
    await claim(database)
    await announce(database, id="g1", due_in=3 * HOUR)
    (ready,) = await delivered(database)

    assert ready.at == (await row_of(database, key)).due_at > utc_now() + 2 * HOUR


async def test_a_target_that_is_not_required_delays_nothing(database):
    await announce(database, LOG)

    assert (await claim_one(database)).attempt == 1


async def test_other_records_are_claimed_while_some_wait(database):
    for _ in range(5):
        await announce(database, CRM, due_in=-2 * HOUR)
    free = await store(database)

    assert [item.key for item in await claim(database, limit=2)] == [free]


async def test_a_probe_of_a_refused_key_is_not_used_up_by_records_that_wait(database):
    for _ in range(3):
        await announce(database, CRM, due_in=-2 * HOUR)
    waits = await announce(database, CRM, due_in=-2 * HOUR)
    free = await store(database)
    paused = Pause(Kind.UNAUTHORIZED, utc_now() - HOUR, ACTOR, "refused", utc_now() - SECOND, ACCOUNT)
    await database.write(partial(pausing.pause, wanted=paused))
    by_job = await claim_by_job(database, waits)

    assert by_job is None
    assert [item.key for item in await claim(database)] == [free]
    assert await claim(database) == []


async def test_a_record_waits_for_each_of_its_targets(database):
    key = await announce(database, CRM, MAIL)
    await claim(database)
    first, second = await rows_of_deliveries(database)

    assert await delivered(database, seq=first.seq) == []
    assert (await row_of(database, key)).waits_for == second.target
    assert await claim(database, now=utc_now() + HOUR) == []
    assert len(await delivered(database, seq=second.seq)) == 1
    assert len(await claim(database)) == 1


async def test_a_second_webhook_with_another_body_counts_as_well(database):
    key = await announce(database, CRM, id="g1")
    await delivered(database)
    await announce(database, CRM, id="g1", outputDuration=3)
    second = (await rows_of_deliveries(database))[1]

    assert await claim(database) == []
    assert [one.key for one in await delivered(database, seq=second.seq)] == [key]
    assert len(await claim(database)) == 1


async def test_the_same_webhook_again_requires_nothing_new(database):
    item = webhook(CRM)
    await database.write(partial(take, webhooks=[item]))
    await delivered(database)
    await database.write(partial(take, webhooks=[item]))

    assert len(await claim(database)) == 1


async def test_a_webhook_that_comes_before_the_copy_stops_the_attempt(database):
    key = await announce(database, id="g1")
    item = await claim_one(database)
    await announce(database, CRM, id="g1", outputDuration=3)

    assert await copy(database, item) is CopyResult.LOST
    row = await row_of(database, key)
    assert (row.state, row.waits_for, row.copied_at) == (State.SCHEDULED, "crm", None)
    assert (await moves_of(database, key))[-1] is Move.LOSE_LEASE
    assert [(one.key, one.attempt) for one in await delivered(database)] == [(key, 2)]


async def test_an_attempt_whose_delivery_has_failed_before_the_copy_fails_the_record(database):
    key = await announce(database, id="g1")
    item = await claim_one(database)
    await announce(database, CRM, id="g1", outputDuration=3)
    await failed(database)
    during = await row_of(database, key)

    assert during.state == State.DELETING
    assert await copy(database, item) is CopyResult.LOST
    assert (await row_of(database, key)).state == State.FAILED
    assert (await moves_of(database, key))[-2:] == [Move.LOSE_LEASE, Move.GIVE_UP]


async def test_the_time_for_which_it_waits_does_not_count_toward_giving_up(database):
    key = await announce(database, id="g1")
    await settle(database, deferred(await claim_one(database)))
    await announce(database, CRM, id="g1", outputDuration=3)
    await claim(database)
    row = await row_of(database, key)

    assert (row.failing_since, row.failures) == (None, 0)


async def test_a_claim_and_a_webhook_with_a_requirement_follow_each_other(postgres_url):
    """A webhook locks the record before it inserts a delivery, so that no claim reads requirements in between."""
    async with open_database(postgres_url) as database:
        await announce(database, id="g1")
        inserted, go_on = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def receive(connection):
            taken = take(connection, [webhook(CRM, id="g1", outputDuration=3)])
            loop.call_soon(inserted.set)
            connection.connection.run_async(lambda _driver: go_on.wait())
            return taken

        coming = asyncio.create_task(database.write(receive))
        await asyncio.wait_for(inserted.wait(), 5)
        during = await claim_by_job(database, Key(ACCOUNT, "g1"))
        go_on.set()
        await coming

        assert isinstance(during, NotYet)
        assert await claim_by_job(database, Key(ACCOUNT, "g1")) is None
        assert (await row_of(database, Key(ACCOUNT, "g1"))).waits_for == "crm"


async def test_the_check_of_a_claim_is_one_statement_that_reads_indexes(sqlite_database):
    plans = []

    def note(_connection, cursor, statement, parameters, _context, _is_many):
        if "requirements" in statement:
            found = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.append("; ".join(row[3] for row in found))

    def claim_noted(connection):
        event.listen(connection, "before_cursor_execute", note)
        return claiming.claim_due(connection, ACCOUNT, now=utc_now(), lease=LEASE, limit=100, actor=ACTOR)

    await sqlite_database.write(partial(take, webhooks=[webhook() for _ in range(100)]))
    claims = await sqlite_database.write(claim_noted)

    assert len(claims) == 100
    assert len(plans) == 1
    assert "SCAN" not in plans[0], plans
    assert "SEARCH requirements USING PRIMARY KEY (account=? AND generation=?)" in plans[0], plans


# Failures, retries and replays


async def test_a_scheduled_record_fails_with_the_reason_when_its_delivery_does(database):
    key = await announce(database, CRM, due_in=HOUR)
    await failed(database)
    row, name = await row_of(database, key), await only_id(database)
    last = (await entries_of(database, key))[-1]

    assert (row.state, row.wake_at, row.waits_for, row.attempts) == (State.FAILED, None, "crm", 0)
    assert row.last_error == (
        f"target crm has not taken its webhook ({ERROR}); mayfly forwards replay {name} sends it again"
    )
    assert (last.move, last.actor) == (Move.GIVE_UP, ACTOR)
    assert last.detail == {"target": "crm", "error": row.last_error}


async def test_a_replay_that_succeeds_retries_the_record(database):
    key = await announce(database, CRM)
    await failed(database)
    await replayed(database)

    assert (await row_of(database, key)).state == State.FAILED

    (ready,) = await delivered(database)
    row, last = await row_of(database, key), (await entries_of(database, key))[-1]

    assert (row.state, row.waits_for, row.last_error) == (State.SCHEDULED, None, None)
    assert (ready.key, ready.attempt, ready.at) == (key, 1, row.wake_at)
    assert (last.move, last.actor) == (Move.RETRY, "forward crm")
    assert len(await claim(database)) == 1


async def test_a_record_that_failed_before_it_was_due_is_due_when_it_was(database):
    key = await announce(database, CRM, due_in=HOUR)
    await failed(database)
    (ready,) = await delivered(database)
    row = await row_of(database, key)

    assert ready.at == row.wake_at == row.due_at


async def test_a_record_is_retried_once_all_its_targets_have_answered(database):
    key = await announce(database, CRM, MAIL)
    for one in await rows_of_deliveries(database):
        await failed(database, seq=one.seq)
    first, second = await rows_of_deliveries(database)
    both = (await row_of(database, key)).last_error
    await delivered(database, seq=first.seq)
    row = await row_of(database, key)

    assert first.id in both
    assert (row.state, row.waits_for) == (State.FAILED, second.target)
    assert second.id in row.last_error
    assert first.id not in row.last_error
    assert [one.key for one in await delivered(database, seq=second.seq)] == [key]


async def test_a_record_that_failed_for_another_reason_is_not_retried(database):
    key = await announce(database, CRM)
    await delivered(database)
    item = await claim_one(database)
    await settle(database, given_up(item))

    assert await delivered(database) == []
    assert (await row_of(database, key)).state == State.FAILED


async def test_a_hold_that_came_meanwhile_counts_when_a_replay_succeeds(database):
    key = await announce(database, CRM, id="g1")
    await failed(database)
    await announce(database, id="g1", hold="legal")

    assert await delivered(database) == []
    assert (await row_of(database, key)).state == State.HELD
    assert (await moves_of(database, key))[-2:] == [Move.RETRY, Move.HOLD]


async def test_a_webhook_that_keeps_it_forever_counts_when_a_replay_succeeds(database):
    key = await announce(database, CRM, id="g1")
    await failed(database)
    await announce(database, id="g1", due_in=None)

    assert await delivered(database) == []
    assert (await row_of(database, key)).state == State.KEPT


@pytest.mark.parametrize("stop", [Move.HOLD, Move.KEEP])
async def test_what_is_held_or_kept_stays_when_its_delivery_fails_and_fails_once_released(database, stop):
    key = await announce(database, CRM)
    await move(database, key, stop)
    await failed(database)
    stopped = await row_of(database, key)
    await move(database, key, Move.RELEASE, grace=GRACE)
    await claim(database, now=utc_now())
    due = update(records).values(due_at=utc_now() - SECOND, wake_at=utc_now() - SECOND)
    if stop is Move.KEEP:
        await database.write(lambda connection: connection.execute(due))
        await claim(database)
    row = await row_of(database, key)

    assert stopped.state in (State.HELD, State.KEPT)
    assert (row.state, row.waits_for) == (State.FAILED, "crm")
    assert "mayfly forwards replay" in row.last_error


async def test_a_held_record_that_waited_is_deleted_only_after_its_target_has_answered(database):
    key = await announce(database, CRM)
    await claim(database)
    await move(database, key, Move.HOLD)
    held = await row_of(database, key)
    await move(database, key, Move.RELEASE, grace=GRACE)

    assert held.waits_for is None
    assert await claim(database) == []
    assert [one.key for one in await delivered(database)] == [key]


async def test_the_end_of_a_hold_meets_the_requirement_as_well(database):
    key = await announce(database, CRM)
    await move(database, key, Move.HOLD, until=utc_now() + timedelta(milliseconds=10))
    await asyncio.sleep(0.02)
    await end_holds(database, min_ttl=timedelta(0))

    assert (await row_of(database, key)).state == State.SCHEDULED
    assert await claim(database) == []


async def test_a_lease_that_ends_meets_the_requirement_as_well(database):
    key = await announce(database, id="g1")
    await claim_one(database)
    await announce(database, CRM, id="g1", outputDuration=3)
    await end_lease(database, key)
    await lose_leases(database)
    await database.write(lambda c: c.execute(update(records).values(wake_at=utc_now() - SECOND)))

    assert await claim(database) == []


async def test_an_operators_retry_sends_the_failed_webhooks_again(database):
    key = await announce(database, CRM)
    await failed(database)
    await move(database, key, Move.RETRY)
    row = await row_of(database, key)
    (again,) = await rows_of_deliveries(database)

    assert (row.state, row.waits_for) == (State.SCHEDULED, None)
    assert (again.state, again.tries, again.finished_at) == (DeliveryState.WAITING, 0, None)
    assert again.since == again.wake_at > utc_now() - HOUR
    assert await claim(database) == []
    assert (await row_of(database, key)).waits_for == "crm"
    assert len(await delivered(database)) == 1


async def test_an_operators_retry_replays_nothing_of_another_generation(database):
    await announce(database, CRM)
    mine = await announce(database, CRM)
    for one in await rows_of_deliveries(database):
        await failed(database, seq=one.seq)
    await move(database, mine, Move.RETRY)

    assert [one.state for one in await rows_of_deliveries(database)] == [DeliveryState.FAILED, DeliveryState.WAITING]


async def test_many_deliveries_that_are_given_up_fail_their_records(database):
    keys = [await announce(database, CRM) for _ in range(5)]
    held = await announce(database, CRM)
    await move(database, held, Move.HOLD)
    seqs = [one.seq for one in await rows_of_deliveries(database)]
    gone = update(deliveries).values(state=str(DeliveryState.FAILED), wake_at=None, last_error="no 2xx in 3 days")

    def give_up(connection):
        fulfilling.lock_required(connection, *seqs)
        connection.execute(gone)
        return fulfilling.fail_requirements(connection, seqs, now=utc_now(), actor=ACTOR)

    assert await database.write(give_up) == 5
    assert {(await row_of(database, key)).state for key in keys} == {State.FAILED}
    assert "(no 2xx in 3 days)" in (await row_of(database, keys[0])).last_error
    assert (await row_of(database, held)).state == State.HELD


async def test_a_success_after_a_deletion_changes_nothing(database):
    key = await announce(database, id="g1")
    item = await claim_one(database)
    await copy(database, item)
    await announce(database, CRM, id="g1", outputDuration=3)
    before = await row_of(database, key)

    assert await failed(database) == []
    assert await delivered(database) == []
    assert await row_of(database, key) == before


async def test_a_retry_by_a_target_is_no_decision_of_an_operator(database):
    await announce(database, CRM, due_in=HOUR)
    await failed(database)
    await delivered(database)
    place = reapplying.Place(State.SCHEDULED)
    found = await database.read(
        partial(reapplying.read_batch, rules=RuleSet(()), place=place, until=utc_now() + SECOND)
    )

    assert [one.existing.is_decided_by_operator for one in found.seen] == [False]


# Batches


async def adopt(database, *ids: str):
    now = utc_now()
    claimed = await database.write(partial(batches.claim_batch, key=Key(ACCOUNT, "b1"), now=now, lease=LEASE))
    arrivals = [arrival(id=one) for one in ids]
    await database.write(partial(batches.adopt_of_batch, claimed=claimed, arrivals=arrivals))
    return [one.key for one in arrivals]


@pytest.mark.parametrize("is_known", [False, True])
async def test_the_generations_of_a_batch_wait_for_its_targets(database, is_known):
    if is_known:
        await announce(database, id="g1")
    await database.write(partial(take, webhooks=[batch_webhook(CRM)]))
    (key,) = await adopt(database, "g1")

    assert await claim(database) == []
    assert (await row_of(database, key)).waits_for == "crm"
    assert [one.key for one in await delivered(database)] == [key]


async def test_a_batch_that_was_delivered_before_its_generations_were_found_delays_none(database):
    await database.write(partial(take, webhooks=[batch_webhook(CRM)]))

    assert await delivered(database) == []
    await adopt(database, "g1", "g2")
    assert len(await claim(database)) == 2


async def test_a_batch_that_failed_before_its_generations_were_found_fails_them_when_due(database):
    await database.write(partial(take, webhooks=[batch_webhook(CRM)]))
    await failed(database)
    keys = await adopt(database, "g1", "g2")

    assert "the record fails once it is due" in (await explain(database, keys[0])).explain
    assert await claim(database) == []
    assert {(await row_of(database, key)).state for key in keys} == {State.FAILED}
    assert len(await delivered(database)) == 2


async def test_another_webhook_of_a_batch_counts_for_the_generations_that_are_known(database):
    first = batch_webhook(CRM)
    await database.write(partial(take, webhooks=[first, batch_webhook(CRM, batch_id="b2")]))
    (key,) = await adopt(database, "g1")
    await delivered(database, seq=(await rows_of_deliveries(database))[0].seq)
    other = await announce(database, id="g2")
    assert first.forwarding is not None
    again = replace(first.forwarding, body=b'{"another": "body"}')
    await database.write(partial(take, webhooks=[replace(first, forwarding=again)]))

    assert [one.key for one in await claim(database)] == [other]
    assert [one.key for one in await delivered(database, seq=(await rows_of_deliveries(database))[-1].seq)] == [key]


async def test_adopting_twice_requires_once(database):
    await database.write(partial(take, webhooks=[batch_webhook(CRM, MAIL)]))
    (key,) = await adopt(database, "g1")
    await database.write(lambda c: requiring.inherit_requirements(c, Key(ACCOUNT, "b1"), [key]))

    assert len(await requirements_of(database, key)) == 2


# What a person sees


async def test_a_record_that_waits_says_for_what(database):
    key = await announce(database, CRM)
    await put_off(database, HOUR)
    await claim(database)
    explained, name = await explain(database, key), await only_id(database)
    found = await database.read(partial(find_record, key=key, now=utc_now(), is_dry_run=False))

    assert "waits for target crm" in explained.explain
    assert f"delivery {name}, 1 attempt, the last: {ERROR}" in explained.explain
    assert "The next attempt is at" not in explained.explain
    assert explained.blocked_by[0].kind == "forward"
    assert present_full(found).waits_for == "crm"


async def test_a_record_that_failed_because_of_its_target_says_what_to_do(database):
    key = await announce(database, CRM)
    await failed(database)
    failed_now, name = await explain(database, key), await only_id(database)
    await replayed(database)
    again = await explain(database, key)

    assert f"mayfly forwards replay {name} sends it again" in failed_now.explain
    assert "Once crm has answered 2xx, it is scheduled again by itself." in failed_now.explain
    assert "waits for target crm" not in failed_now.explain
    assert "waits for target crm" in again.explain


async def test_the_commands_say_what_a_record_waits_for(database, database_url, tmp_path):
    environment = {
        "MAYFLY_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "SYNC_WEBHOOK_SECRET": SECRET,
        "SYNC_API_KEY": "sk-sim",
    }

    async def mayfly(*words: str):
        return await asyncio.to_thread(command, "records", *words, **environment)

    key = await announce(database, CRM)
    await claim(database)
    waiting = [await mayfly(*words) for words in (["list"], ["show", key.id], ["show", key.id, "--json"])]
    await failed(database)
    listed = await mayfly("list")
    retried = await mayfly("retry", key.id)

    assert "waits for target crm" in waiting[0].stdout
    assert "waitsFor" in waiting[1].stdout
    assert "Not deleted now: it waits for target crm" in waiting[1].stdout
    assert json.loads(waiting[2].stdout)["waitsFor"] == "crm"
    assert "needs an operator: target crm has not taken its" in listed.stdout
    assert f"{key.id} is scheduled. Its webhook is sent to target crm again." in retried.stdout
