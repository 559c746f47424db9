"""Holds and releases of all records that match a filter: counted first, in bounded steps."""

import asyncio
from datetime import timedelta
from functools import partial

import pytest

from service.core.holding import Hold
from service.core.lifecycle import Move, State
from service.ledger import bulk
from service.ledger.bulk import ExpectationError, Wanted
from service.ledger.moving import Grace
from service.ledger.reading import Filter
from tests.conftest import API_TOKEN
from tests.support.ledger import (
    HOUR,
    arrival,
    claim,
    confirmed,
    copy,
    move,
    moves_of,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)

FILM = Filter(project_id="film")
HEADERS = {"Authorization": f"Bearer {API_TOKEN}"}
HELD = Hold("ann", "audit", None)


async def hold_all(database, chosen=FILM, *, by=HELD, seconds=float("inf")):
    return await bulk.move_matching(database, Wanted(Move.HOLD, chosen, by), now=utc_now, seconds=seconds)


async def release_all(database, expected, *, grace=HOUR, chosen=FILM):
    wanted = Wanted(Move.RELEASE, chosen, HELD, lambda _account: Grace(grace, grace))
    return await bulk.move_matching(database, wanted, now=utc_now, expected=expected)


async def store_film(database, number, **fields):
    arrivals = [arrival(projectId="film", **fields) for _ in range(number)]
    await receive(database, *arrivals)
    return [item.key for item in arrivals]


async def test_all_that_match_are_held_in_steps_and_the_others_are_not(database):
    keys = await store_film(database, 2 * bulk.BATCH + 3, due_in=HOUR)
    other = await store(database, due_in=HOUR)
    first = await hold_all(database)
    again = await hold_all(database)

    assert (first.moved, first.already, first.too_late, first.is_complete) == (len(keys), 0, 0, True)
    assert (again.moved, again.already, again.is_complete) == (0, len(keys), True)
    assert {(await row_of(database, key)).state for key in keys} == {State.HELD}
    assert (await row_of(database, other)).state == State.SCHEDULED
    assert await moves_of(database, keys[0]) == [Move.RECEIVE, Move.HOLD]


async def test_what_came_too_late_is_counted_and_a_worker_without_a_copy_is_stopped(database):
    deleted, deleting, stopped = await store_film(database, 3)
    items = {item.key: item for item in await claim(database)}
    await copy(database, items[deleted])
    await settle(database, confirmed(items[deleted]))
    await copy(database, items[deleting])
    result = await hold_all(database)

    assert (result.moved, result.already, result.too_late) == (1, 0, 2)
    assert (await row_of(database, stopped)).state == State.HELD


async def test_a_hold_by_filter_prolongs_a_shorter_one(database):
    (key,) = await store_film(database, 1, due_in=HOUR)
    await move(database, key, Move.HOLD, until=utc_now() + HOUR)

    assert (await hold_all(database)).moved == 1
    assert (await row_of(database, key)).hold_until is None


async def test_a_hold_by_filter_that_ran_out_of_time_goes_on_when_it_is_asked_again(sqlite_database):
    await store_film(sqlite_database, 3, due_in=HOUR)
    first = await hold_all(sqlite_database, seconds=0)

    assert (first.moved, first.is_complete) == (0, False)
    assert (await hold_all(sqlite_database)).moved == 3


async def test_a_release_by_filter_needs_the_number_that_matches(database):
    keys = await store_film(database, 3, hold="legal")
    await store_film(database, 1, due_in=HOUR)
    for expected in (2, 4, None):
        with pytest.raises(ExpectationError, match="3 records match"):
            await release_all(database, expected)
    released = await release_all(database, 3)

    assert (released.moved, released.is_complete) == (3, True)
    assert {(await row_of(database, key)).state for key in keys} == {State.SCHEDULED}
    assert min([(await row_of(database, key)).due_at for key in keys]) > utc_now() + HOUR - timedelta(minutes=1)
    assert await claim(database) == []


async def test_a_hold_by_filter_while_workers_claim_deletes_nothing_held(database):
    keys = await store_film(database, 60)

    async def work():
        kept = []
        for _ in range(6):
            for item in await claim(database, limit=10):
                if (await copy(database, item)).value == "kept":
                    await settle(database, confirmed(item))
                    kept.append(item.key)
        return set(kept)

    result, first, second = await asyncio.gather(hold_all(database), work(), work())
    states = {key: (await row_of(database, key)).state for key in keys}

    assert {key for key, state in states.items() if state == State.DELETED} == first | second
    assert result.moved == sum(state == State.HELD for state in states.values())


async def test_the_count_before_a_move_is_by_state(database):
    await store_film(database, 2, due_in=HOUR)
    await store_film(database, 1, hold="legal")
    counts = await database.read(partial(bulk.count_matching, chosen=FILM))

    assert {state.value: number for state, number in counts.items() if number} == {"scheduled": 2, "held": 1}


# The routes


async def post(client, path, **body):
    return await client.post(f"/api/records/{path}", json=body, headers=HEADERS)


async def test_the_route_counts_holds_and_releases_what_matches(app_client, database):
    keys = await store_film(database, 3, due_in=HOUR)
    chosen = {"projectId": "film"}
    counted = await post(app_client, "hold", filter=chosen, reason="audit", dryRun=True)
    held = await post(app_client, "hold", filter=chosen, reason="audit", until="30d")
    row = await row_of(database, keys[0])
    refused = await post(app_client, "release", filter=chosen, reason="over", expected=2)
    released = await post(app_client, "release", filter=chosen, reason="over", expected=3)

    assert (counted.json()["matched"]["scheduled"], counted.json()["result"]) == (3, None)
    assert held.json()["result"] == {"moved": 3, "already": 0, "tooLate": 0, "isComplete": True}
    assert timedelta(days=29) < row.hold_until - utc_now() < timedelta(days=31)
    assert (refused.status_code, refused.json()["detail"]) == (
        409,
        "3 records match, not 2: nothing was moved, look at the count again",
    )
    assert released.json()["result"]["moved"] == 3
    assert (await row_of(database, keys[0])).state == State.SCHEDULED


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("hold", {"filter": {}, "reason": "x"}, "filter needs one of"),
        ("hold", {"filter": {"project": "film"}, "reason": "x"}, "project"),
        ("hold", {"filter": {"q": "x"}, "reason": "x", "until": "tomorrow"}, "until: it accepts"),
        ("hold", {"filter": {"q": "x"}}, "reason"),
        ("release", {"filter": {"q": "x"}, "reason": "x"}, "expected"),
    ],
)
async def test_a_move_by_filter_that_is_incomplete_is_400(sqlite_database, open_client, path, body, told):
    async with open_client(sqlite_database) as client:
        answer = await post(client, path, **body)

    assert answer.status_code == 400
    assert told in answer.json()["detail"]
