"""Settling attempts: copies, outcomes, the daily limit and the history; a lost lease writes nothing."""

import asyncio
import contextlib
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from service.core.attempts import Outcome, Verdict
from service.core.lifecycle import IllegalMoveError, Move, State
from service.ledger import moving, pausing
from service.ledger.database import RowLockedError
from service.ledger.opening import open_database
from service.ledger.outcomes import CopyResult, Settled, Settlement
from tests.support.ledger import (
    ACTOR,
    HOUR,
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


async def test_a_confirmed_record_is_deleted_with_its_receipt(database):
    key = await store(database)
    item = await claim_one(database)
    await copy(database, item)
    now = utc_now()

    assert await settle(database, confirmed(item), now=now) == [Settled.SETTLED]
    row = await row_of(database, key)
    assert (row.state, row.outcome, row.deleted_at) == (State.DELETED, Outcome.DELETED, now)
    assert (row.receipt, row.wake_at, row.last_error) == ('{"status":200}', None, None)
    assert await moves_of(database, key) == [Move.RECEIVE, Move.CLAIM, Move.CONFIRM]


async def test_a_deferred_record_stores_the_time_of_its_retry_and_its_failures(database):
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


async def test_a_record_given_up_needs_an_operator(database):
    key = await store(database)
    await settle(database, given_up(await claim_one(database)))
    row = await row_of(database, key)

    assert (row.state, row.wake_at, row.last_error) == (State.FAILED, None, "the API answered 400")
    assert await claim(database, now=utc_now() + 99 * HOUR) == []
    assert await lose_leases(database, now=utc_now() + 99 * HOUR) == 0


async def test_a_copy_stores_all_that_the_api_shows_and_keeps_the_webhooks_body(database):
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


async def test_no_copy_is_stored_without_a_lease(database):
    key = await store(database)
    item = await claim_one(database)

    assert await copy(database, item, now=item.lease_until) is CopyResult.LOST
    assert (await row_of(database, key)).copied_at is None


@pytest.mark.parametrize("write", ["copy", "settle"])
async def test_an_attempt_after_its_lease_writes_nothing(database, write):
    key = await store(database)
    asleep = await claim_one(database)
    await end_lease(database, key)
    await lose_leases(database)
    successor = await claim_one(database)

    if write == "copy":
        assert await copy(database, asleep, outputFileName="of the sleeper") is CopyResult.LOST
    else:
        assert await settle(database, confirmed(asleep)) == [Settled.LOST]
    row = await row_of(database, key)
    assert (row.state, row.attempts, row.copied_at, row.outcome) == (State.DELETING, successor.attempt, None, None)
    assert Move.CONFIRM not in await moves_of(database, key)
    assert await settle(database, confirmed(successor)) == [Settled.SETTLED]


async def test_an_attempt_is_settled_once(database):
    key = await store(database)
    item = await claim_one(database)
    await settle(database, confirmed(item))

    assert await settle(database, deferred(item)) == [Settled.LOST]
    assert (await row_of(database, key)).state == State.DELETED


async def test_a_lost_lease_in_a_batch_does_not_affect_the_others(database):
    lost, kept = await store(database, due_in=-2 * HOUR), await store(database)
    claims = await claim(database)
    await end_lease(database, lost)
    await lose_leases(database)

    assert await settle(database, *(confirmed(item) for item in claims)) == [Settled.LOST, Settled.SETTLED]
    assert (await row_of(database, lost)).state == State.SCHEDULED
    assert (await row_of(database, kept)).state == State.DELETED


async def test_the_history_has_time_move_actor_and_detail(database):
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


async def limited(database, claim):
    """Copy with a daily limit of three, again while another transaction counts, as a group commit does."""
    while True:
        with contextlib.suppress(RowLockedError):
            return await copy(database, claim, limit=3)


async def test_concurrent_workers_never_exceed_the_daily_limit(database_url):
    async with open_database(database_url) as one, open_database(database_url) as other:
        await receive(one, *(arrival() for _ in range(8)))
        claims = await claim(one, limit=8)
        copies = [limited(database, item) for database, item in zip((one, other) * 4, claims, strict=True)]
        outcomes = await asyncio.gather(*copies)

        assert sorted(outcomes) == [CopyResult.KEPT] * 3 + [CopyResult.LIMITED] * 5
        assert [pause.kind for pause in await one.read(pausing.find_pauses)] == [pausing.Kind.DAILY_LIMIT]


async def test_a_deletion_that_the_api_refused_does_not_count_against_the_daily_limit(database):
    await receive(database, arrival(), arrival())
    first, second = await claim(database)
    assert await copy(database, first, limit=1) is CopyResult.KEPT
    refused = Settlement(first, Verdict.RUNNING, deferred(first).step, is_refund=True)
    await settle(database, refused)

    assert await copy(database, second, limit=1) is CopyResult.KEPT


async def test_a_record_counts_once_a_day_whatever_its_number_of_attempts(database):
    await receive(database, arrival(), arrival())
    first, second = await claim(database)
    for _ in range(3):  # the DELETE is answered 500 each time: nobody knows what it did
        assert await copy(database, first, limit=1) is CopyResult.KEPT
        await settle(database, deferred(first))
        (first,) = [item for item in await claim(database) if item.key == first.key]

    assert await copy(database, second, limit=1) is CopyResult.LIMITED
    assert await copy(database, first, limit=1) is CopyResult.KEPT


async def test_a_refund_after_midnight_belongs_to_the_previous_day(database):
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


async def test_a_hold_and_a_copy_at_once_never_both_succeed(database_url):
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


async def test_settling_attempts_never_deadlocks_with_webhooks_for_their_generations(postgres_url):
    async with open_database(postgres_url) as one, open_database(postgres_url) as other:
        for _ in range(5):
            arrivals = [arrival() for _ in range(200)]
            await receive(one, *arrivals)
            claims = sorted(await claim(one, limit=200), key=lambda item: item.key.id, reverse=True)
            ends = settle(other, *(confirmed(item) for item in claims))
            results = await asyncio.gather(receive(one, *arrivals), ends, receive(one, *arrivals))

            assert results[1] == [Settled.SETTLED] * 200
