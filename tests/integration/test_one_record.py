"""One record per generation, also when several processes store its webhooks and some writes are rolled back."""

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack
from functools import partial
from uuid import uuid4

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from service.ledger import receiving
from service.ledger.opening import open_database
from service.ledger.schema import events, records
from tests.support.ledger import HOUR, arrival, receive

PROCESSES = 3
# A write: by which process, which generations (some of them twice), due in how many hours, and whether it is undone.
WRITES = st.tuples(
    st.integers(0, PROCESSES - 1),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), min_size=1, max_size=12),
    st.sampled_from([False, False, False, True]),
)
# Writes of a round are made at once, rounds one after the other.
ROUNDS = st.lists(st.lists(WRITES, min_size=1, max_size=6), min_size=1, max_size=4)


class UndoneError(Exception):
    """A write that changed its mind."""


def receive_and_raise(connection, arrivals):
    receiving.receive(connection, arrivals)
    raise UndoneError


async def announce(database, items, *, is_undone):
    """Announce *items* and return what was told of each; nothing of a write that is undone."""
    if not is_undone:
        return list(zip(items, await receive(database, *items), strict=True))
    try:
        await database.write(partial(receive_and_raise, arrivals=items))
    except UndoneError:
        return []
    raise AssertionError("it was not undone")


async def play(databases, rounds):
    """Play *rounds*, and return what was told by generation, and which due times were announced."""
    name, told, due = uuid4().hex, defaultdict(list), defaultdict(list)
    for writes in rounds:
        batches = [
            (who, [arrival(id=f"{name}-{number}", due_in=hours * HOUR) for number, hours in wanted], is_undone)
            for who, wanted, is_undone in writes
        ]
        ended = await asyncio.gather(
            *(announce(databases[who], items, is_undone=is_undone) for who, items, is_undone in batches)
        )
        for item, receipt in (pair for pairs in ended for pair in pairs):
            told[item.key.id].append(receipt)
            due[item.key.id].append(item.retention.due_at)
    return name, told, due


async def check(databases, rounds):
    name, told, due = await play(databases, rounds)
    mine = select(records.c.id, records.c.seq, records.c.due_at).where(records.c.id.startswith(name))
    rows = await databases[0].read(lambda connection: connection.execute(mine).all())

    assert sorted(row.id for row in rows) == sorted(told)
    for row in rows:
        receipts = told[row.id]
        numbers = select(events.c.seq).where(events.c.record == row.seq).order_by(events.c.seq)
        moves = await databases[0].read(lambda connection, statement=numbers: connection.scalars(statement).all())
        assert {receipt.seq for receipt in receipts} == {row.seq}
        assert [receipt.is_new for receipt in receipts].count(True) == 1
        assert row.due_at == max(due[row.id])
        assert list(moves) == list(range(1, 1 + sum(receipt.is_moved for receipt in receipts)))


def test_concurrent_webhooks_for_a_generation_make_one_record(database_url):
    async def play_one(rounds):
        async with AsyncExitStack() as stack:
            databases = [await stack.enter_async_context(open_database(database_url)) for _ in range(PROCESSES)]
            await check(databases, rounds)

    @settings(max_examples=40, deadline=None, database=None)
    @given(ROUNDS)
    def play_any(rounds):
        asyncio.run(play_one(rounds))

    play_any()
