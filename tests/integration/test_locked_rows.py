"""A row that another transaction holds delays its own webhook or outcome alone (PostgreSQL; SQLite locks no rows)."""

import asyncio
import time
from contextlib import asynccontextmanager
from functools import partial

import asyncpg
import pytest

from service.ledger import claiming, group_commit, heartbeats, receiving, settling
from service.ledger.claiming import Claim, NotYet, Wanted
from service.ledger.database import RowLockedError, translate_error
from service.ledger.delivery_reading import DeliveryFilter
from service.ledger.group_commit import GroupCommit
from service.ledger.opening import open_database
from service.ledger.outcomes import Settled
from service.ledger.replaying import WantedReplay, replay_matching
from tests.support import deliveries
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    KEY,
    LEASE,
    arrival,
    claim,
    claim_one,
    confirmed,
    count,
    receive,
    row_of,
    store,
    utc_now,
)
from tests.support.webhooks import webhook

SOON_SECONDS = 2.0


@pytest.fixture
async def ledger(postgres_url):
    async with open_database(postgres_url) as opened:
        yield opened


@pytest.fixture
def holding(postgres_url):
    """Hold locks as a process that froze in its transaction does, until the block ends."""

    @asynccontextmanager
    async def hold(statement: str, *arguments: object):
        host = postgres_url.query.get("host") or postgres_url.host
        other = await asyncpg.connect(user=postgres_url.username, host=host, database=postgres_url.database)
        transaction = other.transaction()
        await transaction.start()
        try:
            await other.execute(statement, *arguments)
            yield
        finally:
            await transaction.rollback()
            await other.close()

    return hold


LOCK_RECORD = "SELECT seq FROM records WHERE id = $1 FOR UPDATE"


def settling_group(ledger):
    async def commit(items):
        write = partial(settling.settle_attempts, key=KEY, settlements=items, now=utc_now(), actor=ACTOR)
        return await ledger.write(write)

    return GroupCommit(commit)


async def test_a_locked_record_delays_its_own_webhook_alone(ledger, open_client, holding):
    async with open_client(ledger) as client:
        sent = [webhook() for _ in range(10)]
        locked = sent[4]
        post = partial(_post, client)
        assert await post(locked) == 202
        async with holding(LOCK_RECORD, locked.id):
            begun = time.monotonic()
            late = asyncio.create_task(post(locked))
            others = await asyncio.gather(*(post(one) for one in sent if one is not locked))
            took = time.monotonic() - begun
            ready = await client.get("/health/ready")
            assert not late.done()
        assert await late == 202

    assert others == [202] * 9
    assert took < SOON_SECONDS
    assert ready.status_code == 200
    assert await count(ledger) == 10


async def _post(client, sent):
    return (await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)).status_code


async def test_webhooks_that_come_meanwhile_do_not_wait_for_locked_records(ledger, open_client, holding):
    async with open_client(ledger) as client:
        locked = [webhook() for _ in range(12)]
        await asyncio.gather(*(_post(client, one) for one in locked))
        async with holding("SELECT seq FROM records FOR UPDATE"):
            late = [asyncio.create_task(_post(client, one)) for one in locked]
            await asyncio.sleep(0.6)  # they are all waiting for their rows now
            begun = time.monotonic()
            fresh = await asyncio.gather(*(_post(client, webhook()) for _ in range(5)))
            took = time.monotonic() - begun

        assert fresh == [202] * 5
        assert took < SOON_SECONDS
        assert await asyncio.gather(*late) == [202] * 12


async def test_a_record_that_another_inserts_delays_its_own_webhook_alone(ledger, holding):
    async def commit(items):
        return await ledger.write(partial(receiving.receive, arrivals=items))

    group = GroupCommit(commit)
    items = [arrival() for _ in range(10)]
    template = await store(ledger)
    columns = "account, state, status, notification, received_at, sent_at, rule"
    insert = f"INSERT INTO records (id, {columns}) SELECT $1, {columns} FROM records WHERE id = $2"  # noqa: S608
    async with holding(insert, items[0].key.id, template.id):
        late = asyncio.create_task(group.submit(items[0]))
        async with asyncio.timeout(SOON_SECONDS):
            await asyncio.gather(*(group.submit(one) for one in items[1:]))
        assert not late.done()

    assert (await late).is_new
    assert await count(ledger) == 11


async def test_a_locked_record_delays_its_own_outcome_alone(ledger, holding):
    await receive(ledger, *(arrival() for _ in range(10)))
    claims = await claim(ledger)
    group = settling_group(ledger)
    async with holding(LOCK_RECORD, claims[3].key.id):
        late = asyncio.create_task(group.submit(confirmed(claims[3])))
        async with asyncio.timeout(SOON_SECONDS):
            others = await asyncio.gather(*(group.submit(confirmed(one)) for one in claims if one is not claims[3]))
        assert not late.done()
        assert (await row_of(ledger, claims[3].key)).state == "deleting"

    assert others == [Settled.SETTLED] * 9
    assert await late is Settled.SETTLED


async def test_an_outcome_whose_record_stays_locked_fails_in_the_end(ledger, holding, monkeypatch):
    monkeypatch.setattr(group_commit, "_LOCKED_SECONDS", 1.0)
    await receive(ledger, arrival())
    only = await claim_one(ledger)
    group = settling_group(ledger)
    async with holding(LOCK_RECORD, only.key.id):
        with pytest.raises(RowLockedError, match="another transaction has locked"):
            await group.submit(confirmed(only))

    assert await group.submit(confirmed(only)) is Settled.SETTLED


async def test_a_claim_of_a_locked_record_is_told_to_come_again(ledger, holding):
    keys = [await store(ledger) for _ in range(10)]

    async def commit(items):
        return await ledger.write(
            partial(claiming.claim_wanted, account=ACCOUNT, wanted=items, now=utc_now(), lease=LEASE, actor=ACTOR)
        )

    group = GroupCommit(commit)
    async with holding(LOCK_RECORD, keys[0].id), asyncio.timeout(SOON_SECONDS):
        found = await asyncio.gather(*(group.submit(Wanted(key, 1)) for key in keys))

    assert isinstance(found[0], NotYet)
    assert all(isinstance(one, Claim) for one in found[1:])


async def test_readiness_of_one_process_does_not_depend_on_another_that_froze(ledger, open_client, holding):
    await ledger.write(partial(heartbeats.record_beat, name=heartbeats.READINESS, now=utc_now()))
    async with (
        holding("SELECT 1 FROM heartbeats WHERE name = $1 FOR UPDATE", heartbeats.READINESS),
        open_client(ledger) as client,
    ):
        ready = await client.get("/health/ready")

    assert ready.status_code == 200


async def test_a_deadlock_is_retried_item_by_item():
    calls = []

    async def commit(items):
        calls.append(len(items))
        if len(calls) == 1:
            raise translate_error(asyncpg.DeadlockDetectedError("deadlock detected"))
        return items

    group = GroupCommit(commit)

    assert [*await asyncio.gather(group.submit("a"), group.submit("b"))] == ["a", "b"]
    assert calls == [2, 1, 1]


async def test_a_replay_by_filter_does_not_wait_for_a_locked_delivery(ledger, holding):
    made = [await deliveries.failed(ledger) for _ in range(3)]
    wanted = WantedReplay.of(DeliveryFilter(target="app"), deliveries.CONFIGURED)
    async with holding("SELECT seq FROM deliveries WHERE id = $1 FOR UPDATE", made[1]), asyncio.timeout(3):
        during = await replay_matching(ledger, wanted, now=utc_now, expected=3)
    after = await replay_matching(ledger, wanted, now=utc_now, expected=1)

    assert (during.replayed, during.is_complete, after.replayed) == (2, True, 1)
