"""Deliveries are removed with their record, or a month after they ended; what a record still needs stays."""

import asyncio
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import insert, select, update

from service.core.forwarding import DeliveryState
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.core.record_ttls import RecordTtls
from service.ledger import batches, forgetting
from service.ledger.delivery_schema import deliveries, requirements
from service.ledger.schema import batches as table
from service.ledger.schema import records
from service.ledger.taking import take
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    claim_one,
    confirmed,
    copy,
    move,
    row_of,
    settle,
    store,
    utc_now,
)
from tests.support.requiring import (
    CRM,
    LOG,
    announce,
    batch_webhook,
    delivered,
    failed,
    requirements_of,
    rows_of_deliveries,
)
from workers.hygiene import BATCH, KEEP_DELIVERIES, Hygiene

MONTH = timedelta(days=31)


@pytest.fixture
def run_hygiene(database, metrics):
    """Run the hygiene of a worker: ``run_hygiene(ttl)``; None keeps records forever."""

    async def run(ttl=None, *, now=utc_now):
        hygiene = Hygiene(database, RecordTtls(ttl, {}), now=now, metrics=metrics, stopping=asyncio.Event())
        return await hygiene.run()

    return run


async def delete(database, *, ago=2 * HOUR):
    """Delete the generation of the one record that is due."""
    item = await claim_one(database)
    await copy(database, item)
    await settle(database, confirmed(item), now=utc_now() - ago)


async def forget(database, key):
    write = partial(forgetting.forget_record, key=key, now=utc_now(), actor=ACTOR, reason=None)
    return await database.write(write)


async def all_requirements(database):
    return await database.read(lambda connection: connection.execute(select(requirements)).all())


async def age(database, *, by=MONTH):
    """Let what has ended have ended *by* ago."""
    ended = update(deliveries).where(deliveries.c.finished_at.is_not(None)).values(finished_at=utc_now() - by)
    await database.write(lambda connection: connection.execute(ended))


# With the record


async def test_a_forgotten_record_takes_its_deliveries_and_requirements_with_it(database, run_hygiene):
    key, other = await announce(database, CRM, LOG), await announce(database, CRM, due_in=HOUR)
    for one in (await rows_of_deliveries(database))[:2]:
        await delivered(database, seq=one.seq)
    await delete(database)

    assert await run_hygiene(HOUR) == 1
    assert await requirements_of(database, key) == []
    assert [row.generation for row in await rows_of_deliveries(database)] == [other.id]
    assert len(await requirements_of(database, other)) == 1


async def test_a_record_is_not_forgotten_while_a_webhook_is_on_its_way(database, run_hygiene):
    key = await announce(database, LOG)
    await delete(database)

    assert await run_hygiene(HOUR) == 0
    assert len(await rows_of_deliveries(database)) == 1

    await delivered(database)

    assert await run_hygiene(HOUR) == 1
    assert await rows_of_deliveries(database) == []
    assert (await row_of(database, key)).forgotten_at is not None


async def test_an_operators_forget_takes_what_is_on_its_way(database):
    key = await announce(database, LOG)
    await delete(database)

    assert await forget(database, key)
    assert await rows_of_deliveries(database) == []


async def test_to_forget_a_record_that_failed_because_of_its_target_settles_it(database):
    key = await announce(database, CRM)
    await failed(database)
    await forget(database, key)
    row = await row_of(database, key)

    assert (row.state, row.waits_for, row.last_error) == (State.KEPT, None, None)
    assert await rows_of_deliveries(database) == []
    assert await requirements_of(database, key) == []


# After a month


@pytest.mark.parametrize("end", [delivered, failed])
async def test_what_ended_a_month_ago_is_removed_though_records_stay_forever(database, run_hygiene, end):
    await announce(database, LOG)
    await end(database)
    await run_hygiene()
    before = await rows_of_deliveries(database)
    await age(database)
    await run_hygiene()

    assert len(before) == 1
    assert await rows_of_deliveries(database) == []
    assert timedelta(days=30) == KEEP_DELIVERIES


async def test_what_waits_is_not_removed(database, run_hygiene):
    await announce(database, CRM)
    await run_hygiene(now=lambda: utc_now() + 2 * MONTH)

    assert len(await rows_of_deliveries(database)) == 1


async def test_the_requirement_goes_with_a_delivery_that_succeeded(database, run_hygiene):
    await announce(database, CRM, due_in=HOUR)
    await delivered(database)
    await age(database)
    await run_hygiene()

    assert await rows_of_deliveries(database) == []
    assert await all_requirements(database) == []


@pytest.mark.parametrize("state", [State.FAILED, State.HELD, State.KEPT, State.DELETED])
async def test_a_failed_delivery_stays_while_its_record_may_still_be_deleted(database, run_hygiene, state):
    key = await announce(database, CRM)
    await failed(database)
    if state in (State.HELD, State.KEPT):
        await move(database, key, Move.HOLD if state is State.HELD else Move.KEEP)
    await age(database)
    if state is State.DELETED:
        gone = {"state": "deleted", "outcome": "already_gone", "deleted_at": utc_now()}
        await database.write(
            lambda connection: connection.execute(update(records).where(records.c.id == key.id).values(gone))
        )
    await run_hygiene()

    assert len(await rows_of_deliveries(database)) == (state is not State.DELETED)
    assert len(await requirements_of(database, key)) == (state is not State.DELETED)


async def test_a_failed_delivery_of_a_batch_stays_until_its_generations_are_known(database, run_hygiene):
    await database.write(partial(take, webhooks=[batch_webhook(CRM)]))
    await failed(database)
    await age(database)
    await run_hygiene()
    before = await rows_of_deliveries(database)
    await database.write(lambda connection: connection.execute(update(table).values(state="resolved", look_at=None)))
    await run_hygiene()

    assert len(before) == 1
    assert await rows_of_deliveries(database) == []


async def test_a_failed_delivery_of_a_batch_stays_while_one_of_its_records_needs_it(database, run_hygiene):
    await database.write(partial(take, webhooks=[batch_webhook(CRM)]))
    await failed(database)
    key = await store(database)
    (row,) = await rows_of_deliveries(database)
    theirs = insert(requirements).values(account=key.account, generation=key.id, delivery=row.seq)
    await database.write(lambda connection: connection.execute(theirs))
    await database.write(lambda connection: connection.execute(update(table).values(state="resolved", look_at=None)))
    await age(database)
    await run_hygiene()

    assert len(await rows_of_deliveries(database)) == 1
    assert await database.read(partial(batches.find_batch, key=Key(ACCOUNT, "b1"))) is not None


async def test_more_than_one_batch_is_removed_in_one_run(database, run_hygiene):
    await announce(database, LOG)
    (row,) = await rows_of_deliveries(database)
    ended = {"state": str(DeliveryState.DELIVERED), "wake_at": None, "finished_at": utc_now() - MONTH}
    values = [
        row._asdict() | ended | {"seq": number, "id": f"d{number}", "generation": f"g{number}"}
        for number in range(100, 100 + BATCH + 5)
    ]
    await database.write(lambda connection: connection.execute(insert(deliveries), values))
    await run_hygiene()

    assert [one.seq for one in await rows_of_deliveries(database)] == [row.seq]
