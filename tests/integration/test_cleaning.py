"""Workers race for records and each record is one worker's alone; who is late writes nothing."""

import asyncio
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, update

from service.core.attempts import MAX_FREE_LOSSES, Outcome, Progress, Verdict
from service.core.lifecycle import IllegalMoveError, Move, State
from service.ledger import claiming, moving, pausing, reading
from service.ledger.opening import open_database
from service.ledger.schema import records
from service.ledger.settling import CopyResult, Settlement
from tests.support.ledger import (
    ACTOR,
    HOUR,
    LEASE,
    arrival,
    claim,
    claim_one,
    confirmed,
    copy,
    deferred,
    end_lease,
    given_up,
    lose_leases,
    moves_of,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)

SECOND = timedelta(seconds=1)


async def test_a_claim_takes_a_due_record_for_the_time_of_its_lease(database):
    key = await store(database)
    now = utc_now()
    item = await claim_one(database, now=now)
    row = await row_of(database, key)

    assert (item.key, item.attempt, item.lease_until) == (key, 1, now + LEASE)
    assert item.progress == Progress(None, 0, 0)
    assert (row.state, row.attempts) == (State.DELETING, 1)
    assert now + LEASE <= row.wake_at < now + LEASE + SECOND
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM]


async def test_what_is_not_due_yet_held_or_kept_is_not_claimed(database):
    await store(database, due_in=HOUR)
    await store(database, due_in=None)
    await store(database, hold="wait")

    assert await claim(database) == []


async def test_claims_read_no_record_but_those_that_are_due(sqlite_database):
    plans: dict[str, str] = {}

    def explain(_connection, cursor, statement, parameters, _context, is_many):
        if statement.startswith(("SELECT", "UPDATE")):
            one = parameters[0] if is_many else parameters
            found = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", one).fetchall()
            plans[statement] = "; ".join(row[3] for row in found)

    def claim_explained(connection):
        event.listen(connection, "before_cursor_execute", explain)
        return claiming.claim_due(connection, now=utc_now(), lease=LEASE, limit=100, actor=ACTOR)

    await receive(sqlite_database, *(arrival() for _ in range(100)))
    claims = await sqlite_database.write(claim_explained)
    used = [plan for statement, plan in plans.items() if "records" in statement]

    assert len(claims) == 100
    assert ["records_state_wake_at" in used[0], "INTEGER PRIMARY KEY" in used[1], len(used)] == [True, True, 2], used


async def test_a_record_is_claimed_once_until_its_lease_ends(database):
    await store(database)
    await claim_one(database)

    assert await claim(database) == []
    assert await claim(database, now=utc_now() + LEASE + SECOND) == []


async def test_the_longest_overdue_are_claimed_first_and_no_more_than_asked_for(database):
    keys = [await store(database, due_in=-number * HOUR) for number in (1, 3, 2)]
    claims = await claim(database, limit=2)

    assert [item.key for item in claims] == [keys[1], keys[2]]
    assert [item.key for item in await claim(database)] == [keys[0]]


async def test_twenty_workers_at_once_claim_each_record_once(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        await receive(one, *(arrival() for _ in range(60)))
        rounds = await asyncio.gather(*(claim(database, limit=5) for database in (one, other) * 10))
        rest = await claim(one, limit=100)

    claimed = [item.key for claims in [*rounds, rest] for item in claims]
    assert len(claimed) == len(set(claimed)) == 60


async def test_a_worker_whose_clock_runs_ahead_claims_nothing_early_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        await store(database, due_in=HOUR)

        assert await claim(database, now=utc_now() + 2 * HOUR) == []


async def test_a_worker_whose_clock_runs_ahead_ends_no_lease_early_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        await store(database)
        await claim_one(database)

        assert await lose_leases(database, now=utc_now() + 2 * HOUR) == 0


async def test_a_worker_whose_clock_runs_behind_keeps_its_whole_lease_on_postgresql(postgres_url):
    async with open_database(postgres_url) as database:
        key = await store(database, due_in=-3 * HOUR)
        item = await claim_one(database, now=utc_now() - HOUR)

        assert item.lease_until < utc_now()  # by the worker's own clock, which it compares it with
        assert await lose_leases(database) == 0
        assert (await row_of(database, key)).wake_at > utc_now() + LEASE - 10 * SECOND


async def test_a_claim_reads_no_more_of_postgresql_than_what_is_due(postgres_url):
    def explain_claim(connection):
        seen: list[Any] = []
        event.listen(connection, "before_cursor_execute", lambda *given: seen.append(given[2:4]))
        claiming.claim_due(connection, now=utc_now(), lease=LEASE, limit=10, actor=ACTOR)
        statement, parameters = next(pair for pair in seen if "SKIP LOCKED" in pair[0])
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # the table is too small to need its index
        return list(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())

    async with open_database(postgres_url) as database:
        plan = await database.write(explain_claim)

    assert any("Index Cond" in line and "wake_at <=" in line for line in plan), plan


async def test_a_confirmed_record_is_deleted_with_its_receipt(database):
    key = await store(database)
    item = await claim_one(database)
    await copy(database, item)
    now = utc_now()

    assert await settle(database, confirmed(item), now=now) == [True]
    row = await row_of(database, key)
    assert (row.state, row.outcome, row.deleted_at) == (State.DELETED, Outcome.DELETED, now)
    assert (row.receipt, row.wake_at, row.last_error) == ('{"status":200}', None, None)
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.CONFIRM]


async def test_a_deferred_record_wakes_again_when_told_and_remembers_its_failures(database):
    key = await store(database)
    retry_at = utc_now() + HOUR
    await settle(database, deferred(await claim_one(database), retry_at=retry_at))
    row = await row_of(database, key)

    assert (row.state, row.wake_at, row.failures, row.last_error) == (
        State.SCHEDULED,
        retry_at,
        1,
        "the API answered 500",
    )
    assert row.failing_since is not None
    assert await claim(database) == []


async def test_the_next_attempt_has_the_next_number_and_the_progress_so_far(database):
    await store(database)
    await settle(database, deferred(await claim_one(database), retry_at=utc_now() - SECOND))
    again = await claim_one(database)

    assert again.attempt == 2
    assert again.progress.failures == 1
    assert again.progress.failing_since is not None


async def test_a_record_given_up_waits_for_a_person(database):
    key = await store(database)
    await settle(database, given_up(await claim_one(database)))
    row = await row_of(database, key)

    assert (row.state, row.wake_at, row.last_error) == (State.FAILED, None, "the API answered 400")
    assert await claim(database, now=utc_now() + 99 * HOUR) == []
    assert await lose_leases(database, now=utc_now() + 99 * HOUR) == 0


async def test_a_copy_keeps_all_that_the_api_shows_and_the_webhooks_body_beside_it(database):
    item = arrival(id="g1", status="COMPLETED")
    await receive(database, item)
    claimed = await claim_one(database)
    fields: dict[str, Any] = {
        "status": "COMPLETED",
        "outputUrl": "https://api.sync.so/result?token=2",
        "synthesizedAudioUrl": "https://api.sync.so/audio?token=3",
        "segmentOutputUrl": "https://api.sync.so/segments?token=4",
        "outputFileName": "take_07",
        "projectId": "612bb64a-e7f4-40c1-977b-3e9797845637",
        "segments": [{"startTime": 0}],
        "novelty": [1],
    }
    now = utc_now()

    assert await copy(database, claimed, now=now, **fields) is CopyResult.KEPT
    row = await row_of(database, item.key)
    assert (row.state, row.copied_at) == (State.DELETING, now)
    assert row.output_url == fields["outputUrl"]
    assert row.synthesized_audio_url == fields["synthesizedAudioUrl"]
    assert row.segment_output_url == fields["segmentOutputUrl"]
    assert row.output_file_name == "take_07"
    assert row.project_id == fields["projectId"]
    assert row.segments == '[{"startTime": 0}]'
    assert row.output_duration == 9.98
    assert '"novelty": [1]' in row.copy
    assert row.notification == item.body


async def test_the_media_url_is_preferred_over_its_deprecated_alias(database):
    key = await store(database)
    await copy(database, await claim_one(database), outputMediaUrl="https://media", outputUrl="https://alias")

    assert (await row_of(database, key)).output_url == "https://media"


async def test_without_the_lease_nothing_is_copied(database):
    key = await store(database)
    item = await claim_one(database)

    assert await copy(database, item, now=item.lease_until) is CopyResult.LOST
    assert (await row_of(database, key)).copied_at is None


@pytest.mark.parametrize("write", ["copy", "settle"])
async def test_a_worker_that_slept_past_its_lease_writes_nothing_over_its_successor(database, write):
    key = await store(database)
    asleep = await claim_one(database)
    await end_lease(database, key)
    await lose_leases(database)
    successor = await claim_one(database)

    if write == "copy":
        assert await copy(database, asleep, outputFileName="of the sleeper") is CopyResult.LOST
    else:
        assert await settle(database, confirmed(asleep)) == [False]
    row = await row_of(database, key)
    assert (row.state, row.attempts, row.copied_at, row.outcome) == (State.DELETING, successor.attempt, None, None)
    assert Move.CONFIRM not in await moves_of(database, key)
    assert await settle(database, confirmed(successor)) == [True]


async def test_an_end_is_written_once(database):
    key = await store(database)
    item = await claim_one(database)
    await settle(database, confirmed(item))

    assert await settle(database, deferred(item)) == [False]
    assert (await row_of(database, key)).state == State.DELETED


async def test_of_a_batch_only_the_lost_one_is_refused(database):
    lost, kept = await store(database, due_in=-2 * HOUR), await store(database)
    claims = await claim(database)
    await end_lease(database, lost)
    await lose_leases(database)

    assert await settle(database, *(confirmed(item) for item in claims)) == [False, True]
    assert (await row_of(database, lost)).state == State.SCHEDULED
    assert (await row_of(database, kept)).state == State.DELETED


async def test_a_record_whose_worker_died_is_taken_back_and_tried_again_at_once(database):
    key = await store(database)
    await claim_one(database)
    await end_lease(database, key)

    assert await lose_leases(database) == 1
    row = await row_of(database, key)
    assert (row.state, row.failures, row.last_error) == (
        State.SCHEDULED,
        1,
        "the worker that had it did not finish",
    )
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.LOSE_LEASE]
    assert (await claim_one(database)).attempt == 2


async def test_a_lease_that_still_holds_is_left_alone(database):
    await store(database)
    await claim_one(database)

    assert await lose_leases(database) == 0


async def test_a_record_that_takes_its_worker_down_each_time_is_tried_more_slowly(database):
    key = await store(database)
    for _ in range(MAX_FREE_LOSSES + 1):
        await claim_one(database)
        await end_lease(database, key)
        await lose_leases(database)

    assert await claim(database) == []
    wake_at = (await row_of(database, key)).wake_at
    assert wake_at > utc_now()


async def test_leases_are_taken_back_in_portions_and_once(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        await receive(one, *(arrival() for _ in range(10)))
        for item in await claim(one, limit=10):
            await end_lease(one, item.key)
        taken = await asyncio.gather(*(lose_leases(database, limit=3) for database in (one, other) * 4))

    assert sum(taken) == 10
    assert max(taken) <= 3


async def test_the_history_tells_who_did_what_when_and_why(database):
    from service.ledger import history

    key = await store(database)
    item = await claim_one(database)
    await settle(database, deferred(item, verdict=Verdict.RUNNING))
    seq = (await row_of(database, key)).seq
    entries = await database.read(lambda connection: history.read_entries(connection, seq))

    assert [(entry.move, entry.actor) for entry in entries] == [
        (Move.RECEIVE, "webhook"),
        (Move.CLAIM, ACTOR),
        (Move.DEFER, ACTOR),
    ]
    assert entries[0].detail == {"rule": "MAYFLY_TTL", "status": "COMPLETED"}
    assert entries[1].detail == {"attempt": 1}
    assert entries[2].detail is not None
    assert entries[2].detail["verdict"] == "running"
    assert entries[0].at <= entries[1].at <= entries[2].at


async def test_the_next_wake_up_is_the_soonest_due_time_attempt_or_lease(database):
    assert await database.read(reading.next_wake) is None
    await store(database, due_in=None)
    await store(database, due_in=HOUR)
    key = await store(database, due_in=-HOUR)

    assert await database.read(reading.next_wake) == (await row_of(database, key)).due_at
    item = await claim_one(database)
    assert item.lease_until <= await database.read(reading.next_wake) < item.lease_until + SECOND


async def test_the_days_limit_is_never_passed_however_many_count_at_once(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        await receive(one, *(arrival() for _ in range(8)))
        claims = await claim(one, limit=8)
        copies = [copy(database, item, limit=3) for database, item in zip((one, other) * 4, claims, strict=True)]
        outcomes = await asyncio.gather(*copies)

        assert sorted(outcomes) == [CopyResult.KEPT] * 3 + [CopyResult.LIMITED] * 5
        assert [pause.kind for pause in await one.read(pausing.find_pauses)] == [pausing.Kind.DAILY_LIMIT]


async def test_a_deletion_that_the_api_refused_is_given_back_to_the_days_limit(database):
    await receive(database, arrival(), arrival())
    first, second = await claim(database)
    assert await copy(database, first, limit=1) is CopyResult.KEPT
    refused = Settlement(first, Verdict.RUNNING, deferred(first).step, is_refund=True)
    await settle(database, refused)

    assert await copy(database, second, limit=1) is CopyResult.KEPT


async def test_a_record_counts_once_a_day_however_many_attempts_it_takes(database):
    await receive(database, arrival(), arrival())
    first, second = await claim(database)
    for _ in range(3):  # the DELETE is answered 500 each time: nobody knows what it did
        assert await copy(database, first, limit=1) is CopyResult.KEPT
        await settle(database, deferred(first))
        (first,) = [item for item in await claim(database) if item.key == first.key]

    assert await copy(database, second, limit=1) is CopyResult.LIMITED
    assert await copy(database, first, limit=1) is CopyResult.KEPT


async def test_a_refund_after_midnight_is_the_day_befores(database):
    evening = utc_now().replace(hour=23, minute=59, second=55, microsecond=0) - timedelta(days=1)
    morning = evening + timedelta(seconds=20)
    await receive(database, *(arrival(due_in=-72 * HOUR) for _ in range(4)))
    claims = await claim(database, now=evening)
    assert await copy(database, claims[0], limit=2, now=evening) is CopyResult.KEPT
    refused = Settlement(claims[0], Verdict.RUNNING, deferred(claims[0]).step, is_refund=True)
    assert await copy(database, claims[1], limit=2, now=morning) is CopyResult.KEPT
    await settle(database, refused, now=morning)

    assert await copy(database, claims[2], limit=2, now=morning) is CopyResult.KEPT
    assert await copy(database, claims[3], limit=2, now=morning) is CopyResult.LIMITED


async def test_time_in_which_nothing_could_be_tried_is_no_time_of_failing(database):
    key = await store(database)
    await settle(database, deferred(await claim_one(database)))
    past = utc_now() - timedelta(days=7)
    put_back = update(records).values(wake_at=past, failing_since=past - HOUR)
    await database.write(lambda connection: connection.execute(put_back))
    (again,) = await claim(database)

    assert again.key == key
    assert again.progress.failing_since is not None
    assert abs(again.progress.failing_since - (utc_now() - HOUR)) < timedelta(minutes=1)


async def test_a_claim_reads_no_bodies(database):
    statements: list[str] = []

    def claim_and_listen(connection):
        event.listen(connection, "before_cursor_execute", lambda *given: statements.append(given[2]))
        claiming.claim_due(connection, now=utc_now(), lease=LEASE, limit=10, actor=ACTOR)
        claiming.end_expired_leases(connection, now=utc_now(), limit=10, actor=ACTOR)

    await store(database)
    await database.write(claim_and_listen)

    assert not [one for one in statements if "notification" in one or "records.copy" in one]


async def test_a_person_who_holds_and_a_worker_that_copies_at_once_never_both_succeed(database_url):
    async def hold(database, key):
        wanted = partial(moving.move_record, key=key, wanted=Move.HOLD, now=utc_now(), actor="operator", reason="wait")
        try:
            await database.write(wanted)
        except IllegalMoveError:
            return False
        return True

    async def claim_and_copy(database):
        for item in await claim(database):
            return await copy(database, item)
        return None

    async with open_database(database_url) as one, open_database(database_url) as other:
        for _ in range(10):
            key = await store(one)
            is_held, copied = await asyncio.gather(hold(one, key), claim_and_copy(other))
            state = (await row_of(one, key)).state

            assert (is_held, copied, state) in [
                (True, None, State.HELD),
                (True, CopyResult.LOST, State.HELD),
                (False, CopyResult.KEPT, State.DELETING),
            ]


async def test_attempts_that_end_while_their_generations_are_announced_again_never_wait_for_each_other(postgres_url):
    async with open_database(postgres_url) as one, open_database(postgres_url) as other:
        for _ in range(5):
            arrivals = [arrival() for _ in range(200)]
            await receive(one, *arrivals)
            claims = sorted(await claim(one, limit=200), key=lambda item: item.key.id, reverse=True)
            ends = settle(other, *(confirmed(item) for item in claims))
            results = await asyncio.gather(receive(one, *arrivals), ends, receive(one, *arrivals))

            assert results[1] == [True] * 200
