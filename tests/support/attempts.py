"""Helpers on deliveries: webhooks for targets as the web side stores them, attempts as workers make them."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import uuid4

from sqlalchemy import Row, select

from service.core.forwarding import DeliveryState, Outcome, Reply, Target, judge_reply
from service.core.key import DEFAULT_ACCOUNT, Key
from service.core.secret import Secret
from service.ledger import deliveries, delivering
from service.ledger.database import Database
from service.ledger.deliveries import Forwarding, NewDelivery
from service.ledger.delivering import ClaimedDelivery, Due, Ended, Settlement
from service.ledger.delivery_schema import deliveries as table
from tests.support.ledger import utc_now

LEASE = timedelta(seconds=45)
CRM = Target("crm", Secret("http://127.0.0.1:9/hooks"))
FILMS = Target("films", Secret("http://127.0.0.1:9/films"))


def forwarding(
    generation: str | None = None,
    *,
    targets: Sequence[Target] = (CRM,),
    body: bytes | None = None,
    status: str = "COMPLETED",
    received_at: datetime | None = None,
    account: str = DEFAULT_ACCOUNT,
) -> Forwarding:
    """Return a webhook for *targets*; without a *body* it has one of its own."""
    generation = generation or str(uuid4())
    raw = body if body is not None else json.dumps({"id": generation, "status": status, "n": str(uuid4())}).encode()
    form = (raw, "application/json", "t=1,v1=00")
    return Forwarding(Key(account, generation), status, *form, received_at or utc_now(), tuple(targets), is_final=True)


async def insert(database: Database, *webhooks: Forwarding) -> list[NewDelivery]:
    """Store the deliveries of *webhooks*."""
    return await database.write(partial(deliveries.insert_deliveries, webhooks=webhooks))


async def insert_one(database: Database, generation: str | None = None, **options: Any) -> str:  # noqa: ANN401
    """Store one delivery, made of the arguments of forwarding(), and return its id."""
    (new,) = await insert(database, forwarding(generation, **options))
    return new.id


async def claim(
    database: Database, *wanted: tuple[str, int], now: datetime | None = None, lease: timedelta = LEASE
) -> list[ClaimedDelivery | None]:
    """Claim deliveries by their ids and attempts."""
    due = [Due(CRM.id, name, attempt) for name, attempt in wanted]
    return await database.write(partial(delivering.claim_deliveries, wanted=due, now=now or utc_now(), lease=lease))


async def claim_one(database: Database, name: str, attempt: int = 1, **options: Any) -> ClaimedDelivery:  # noqa: ANN401
    """Claim a delivery that is due."""
    (claimed,) = await claim(database, (name, attempt), **options)
    assert claimed is not None
    return claimed


def ended(claimed: ClaimedDelivery, reply: Reply, outcome: Outcome | None = None) -> Ended:
    """Return the end of an attempt."""
    return Ended(claimed, reply, outcome or judge_reply(reply, attempts=claimed.tries, jitter=0.0))


async def settle(
    database: Database, claimed: ClaimedDelivery, reply: Reply, *, now: datetime | None = None
) -> Settlement:
    """Store what an attempt led to."""
    write = partial(delivering.settle_deliveries, ended=[ended(claimed, reply)], now=now or utc_now())
    (settled,) = await database.write(write)
    return settled


async def find_due(
    database: Database, *, target: str = CRM.id, now: datetime | None = None, limit: int = 100
) -> list[Due]:
    """Return what the net of *target* would find."""
    read = partial(delivering.find_due_deliveries, target=target, now=now or utc_now(), limit=limit)
    return await database.read(read)


async def give_up(
    database: Database, *, now: datetime, target: str | None = CRM.id, known: Sequence[str] = (CRM.id,)
) -> list[int]:
    """End what has waited for days."""
    return await database.write(partial(delivering.give_up, now=now, limit=100, target=target, known=known))


async def rows(database: Database) -> list[Row[Any]]:
    """Return all deliveries in the order of their receipt."""
    return await database.read(lambda connection: list(connection.execute(select(table).order_by(table.c.seq))))


async def row_of(database: Database, name: str) -> Row[Any]:
    """Return the delivery of that id."""
    return next(row for row in await rows(database) if row.id == name)


async def states(database: Database) -> list[DeliveryState]:
    """Return the states of all deliveries in the order of their receipt."""
    return [DeliveryState(row.state) for row in await rows(database)]
