"""Helpers on the ledger: records as webhooks make them, claims and outcomes as workers make them."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Row, update

from service.core.attempts import Outcome, Progress, Step, Verdict
from service.core.generation import Generation, read_generation
from service.core.holding import Hold
from service.core.key import DEFAULT_ACCOUNT, Key
from service.core.lifecycle import Move
from service.core.retention import Retention
from service.ledger import claiming, history, holding, moving, reading, receiving, settling
from service.ledger.claiming import Claim
from service.ledger.database import Database
from service.ledger.key_history import KeyOfAccount
from service.ledger.moving import Grace
from service.ledger.outcomes import Copy, CopyResult, Settled, Settlement
from service.ledger.receiving import Arrival, Receipt
from service.ledger.schema import records
from tests.support.webhooks import notification

ACCOUNT = DEFAULT_ACCOUNT
KEY = KeyOfAccount(ACCOUNT, "a-key")
ACTOR = "worker of a test"
LEASE = timedelta(seconds=60)
HOUR = timedelta(hours=1)


def utc_now() -> datetime:
    """Return the present moment, aware."""
    return datetime.now(UTC)


def arrival(
    *, due_in: timedelta | None = -HOUR, hold: str | None = None, received_at: datetime | None = None, **fields: object
) -> Arrival:
    """Return a verified webhook, due *due_in* from now (None: never); *fields* are the notification's."""
    now = received_at or utc_now()
    body = json.dumps(notification(**fields), ensure_ascii=False)
    generation = read_generation(body.encode())
    retention = Retention("MAYFLY_TTL", due_in, None if due_in is None else now + due_in, hold)
    return Arrival(Key(ACCOUNT, generation.id), generation, body, retention, now, now)


async def receive(database: Database, *arrivals: Arrival) -> list[Receipt]:
    """Write *arrivals* as the web side does."""
    return await database.write(partial(receiving.receive, arrivals=arrivals))


async def store(database: Database, **options: Any) -> Key:  # noqa: ANN401 - handed on
    """Write one new record, made of the arguments of arrival(), and return its key."""
    item = arrival(**options)
    await receive(database, item)
    return item.key


async def claim(
    database: Database, *, limit: int = 10, now: datetime | None = None, lease: timedelta = LEASE
) -> list[Claim]:
    """Claim due records."""
    at = now or utc_now()
    return await database.write(
        partial(claiming.claim_due, account=ACCOUNT, now=at, lease=lease, limit=limit, actor=ACTOR)
    )


async def claim_one(database: Database, **options: Any) -> Claim:  # noqa: ANN401 - handed on
    """Claim the one record that is due."""
    (only,) = await claim(database, **options)
    return only


async def copy(
    database: Database, item: Claim, *, now: datetime | None = None, limit: int | None = None, **fields: object
) -> CopyResult:
    """Keep a copy of the generation as the API would show it."""
    body = json.dumps(notification(id=item.key.id, **fields), ensure_ascii=False)
    copies = [Copy(item, read_generation(body.encode()), body)]
    write = partial(
        settling.store_copies, account=ACCOUNT, copies=copies, now=now or utc_now(), limit=limit, actor=ACTOR
    )
    (copied,) = await database.write(write)
    return copied


async def settle(database: Database, *items: Settlement, now: datetime | None = None) -> list[Settled]:
    """Write how attempts ended."""
    write = partial(settling.settle_attempts, key=KEY, settlements=items, now=now or utc_now(), actor=ACTOR)
    return await database.write(write)


def confirmed(item: Claim, *, receipt: str = '{"status":200}') -> Settlement:
    """Return the end of an attempt that deleted."""
    step = Step(Move.CONFIRM, item.progress, outcome=Outcome.DELETED)
    return Settlement(item, Verdict.DONE, step, receipt=receipt)


def gone_already(item: Claim) -> Settlement:
    """Return the end of an attempt whose generation the API did not know."""
    step = Step(Move.CONFIRM, item.progress, outcome=Outcome.ALREADY_GONE)
    return Settlement(item, Verdict.DONE, step, receipt='{"status":404}')


def deferred(item: Claim, *, verdict: Verdict = Verdict.RETRY, retry_at: datetime | None = None) -> Settlement:
    """Return the end of an attempt that is to be repeated."""
    progress = Progress(utc_now(), item.progress.failures + 1, 0)
    step = Step(Move.DEFER, progress, retry_at=retry_at or utc_now())
    return Settlement(item, verdict, step, error="the API answered 500")


def given_up(item: Claim) -> Settlement:
    """Return the end of an attempt that was the last."""
    return Settlement(item, Verdict.REFUSED, Step(Move.GIVE_UP, item.progress), error="the API answered 400")


async def lose_leases(database: Database, *, now: datetime | None = None, limit: int = 100) -> int:
    """Take back records whose lease ran out."""
    return await database.write(
        partial(claiming.end_expired_leases, account=ACCOUNT, now=now or utc_now(), limit=limit, actor=ACTOR)
    )


async def move(
    database: Database,
    key: Key,
    wanted: Move,
    *,
    by: str = "ann",
    reason: str | None = "why",
    until: datetime | None = None,
    grace: Grace | None = None,
) -> Row[Any] | Hold | None:
    """Make an operator's move."""
    return await moving.move_generation(database, key, wanted, Hold(by, reason, until), now=utc_now(), grace=grace)


async def end_holds(
    database: Database, *, now: datetime | None = None, min_ttl: timedelta = HOUR, limit: int = 100
) -> int:
    """End holds that have reached their end."""
    write = partial(holding.end_holds, account=ACCOUNT, now=now or utc_now(), min_ttl=min_ttl, limit=limit)
    return await database.write(write)


async def row_of(database: Database, key: Key) -> Row[Any]:
    """Return the record of *key*, which is there."""
    row = await database.read(partial(reading.find_row, key=key))
    assert row is not None
    return row


async def moves_of(database: Database, key: Key) -> list[Move]:
    """Return the moves of the record of *key*, oldest first."""
    row = await row_of(database, key)
    return [entry.move for entry in await database.read(partial(history.read_entries, record=row.seq))]


async def count(database: Database) -> int:
    """Return how many records there are."""
    return sum((await database.read(reading.count_by_state)).values())


async def end_lease(database: Database, key: Key) -> None:
    """Let the lease of a record have run out, as if its worker had died a while ago."""
    past = utc_now() - timedelta(seconds=1)
    await database.write(
        lambda connection: connection.execute(update(records).where(records.c.id == key.id).values(wake_at=past))
    )


def ids(rows: Sequence[Any]) -> list[str]:
    """Return the ids of *rows*."""
    return [row.id for row in rows]


def generation_of(**fields: object) -> Generation:
    """Return a generation as it is read from the wire."""
    return read_generation(json.dumps(notification(**fields)).encode())
