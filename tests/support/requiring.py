"""Helpers for required targets: webhooks that are passed on, and what became of their deliveries."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Row, select, update

from service.core.batch import read_batch
from service.core.forwarding import DeliveryState, Target
from service.core.generation import read_generation
from service.core.key import Key
from service.core.secret import Secret
from service.ledger import fulfilling
from service.ledger.batches import BatchArrival
from service.ledger.database import Database
from service.ledger.deliveries import Forwarding
from service.ledger.delivery_schema import deliveries, requirements
from service.ledger.fulfilling import Ready
from service.ledger.taking import Webhook, take
from tests.support.ledger import ACCOUNT, ACTOR, arrival, utc_now
from tests.support.webhooks import batch

CRM = Target("crm", Secret("https://crm.example.com/hook"), is_required=True)
MAIL = Target("mail", Secret("https://mail.example.com/hook"), is_required=True)
LOG = Target("log", Secret("https://log.example.com/hook"))
ERROR = "answered 500"


def webhook(*targets: Target, **options: Any) -> Webhook:  # noqa: ANN401 - handed on
    """Return a webhook for *targets*, made of the arguments of arrival()."""
    item = arrival(**options)
    return Webhook(item, None, forwarding_of(item.key, item.generation.status, item.body, targets))


def batch_webhook(*targets: Target, batch_id: str = "b1") -> Webhook:
    """Return the webhook of a finished batch for *targets*."""
    body = json.dumps(batch() | {"id": batch_id})
    generation, key, now = read_generation(body.encode()), Key(ACCOUNT, batch_id), utc_now()
    came = BatchArrival(key, read_batch(generation, body.encode()), body, now, now)
    return Webhook(None, came, forwarding_of(key, generation.status, body, targets))


def forwarding_of(key: Key, status: str, body: str, targets: Sequence[Target]) -> Forwarding:
    """Return what *targets* get of the webhook of a generation or batch that has ended."""
    form = (body.encode(), "application/json", "t=1,v1=00")
    return Forwarding(key, status, *form, utc_now(), tuple(targets), is_final=True)


async def announce(database: Database, *targets: Target, **options: Any) -> Key:  # noqa: ANN401 - handed on
    """Store a webhook of a generation as the web side does, and return its key."""
    item = webhook(*targets, **options)
    await database.write(partial(take, webhooks=[item]))
    assert item.arrival is not None
    return item.arrival.key


async def rows_of_deliveries(database: Database) -> Sequence[Row[Any]]:
    """Return all deliveries, oldest first."""
    return await database.read(
        lambda connection: connection.execute(select(deliveries).order_by(deliveries.c.seq)).all()
    )


async def requirements_of(database: Database, key: Key) -> list[int]:
    """Return the numbers of the deliveries that *key* waits for."""
    mine = (requirements.c.account == key.account, requirements.c.generation == key.id)
    wanted = select(requirements.c.delivery).where(*mine).order_by(requirements.c.delivery)
    return await database.read(lambda connection: list(connection.scalars(wanted)))


async def end(
    database: Database,
    state: DeliveryState,
    *,
    seq: int | None = None,
    now: datetime | None = None,
    error: str | None = ERROR,
) -> list[Ready]:
    """Let the delivery *seq*, or the only one, end in *state*, as a worker does."""
    if seq is None:
        (only,) = await rows_of_deliveries(database)
        seq = only.seq
    at = now or utc_now()

    def write(connection: Any) -> list[Ready]:  # noqa: ANN401 - a connection
        fulfilling.lock_required(connection, seq)
        row = connection.execute(select(deliveries).where(deliveries.c.seq == seq)).one()
        is_over = state is not DeliveryState.WAITING
        ended = {"state": str(state), "wake_at": None if is_over else at, "finished_at": at if is_over else None}
        failed = {"last_error": None if state is DeliveryState.DELIVERED else error}
        counted = {"attempts": row.attempts + is_over}
        connection.execute(update(deliveries).where(deliveries.c.seq == seq).values(ended | failed | counted))
        return fulfilling.settle_requirement(
            connection, delivery=seq, state=state, target=row.target, error=error, now=at, actor=ACTOR
        )

    return await database.write(write)


async def delivered(database: Database, **options: Any) -> list[Ready]:  # noqa: ANN401 - handed on
    """Let a delivery succeed."""
    return await end(database, DeliveryState.DELIVERED, error=None, **options)


async def failed(database: Database, **options: Any) -> list[Ready]:  # noqa: ANN401 - handed on
    """Let a delivery fail for good."""
    return await end(database, DeliveryState.FAILED, **options)


async def replayed(database: Database, **options: Any) -> list[Ready]:  # noqa: ANN401 - handed on
    """Let a delivery wait for another attempt."""
    return await end(database, DeliveryState.WAITING, error=None, **options)


async def put_off(database: Database, wait: timedelta) -> None:
    """Let each delivery that waits be tried again after *wait* only."""
    waiting = update(deliveries).where(deliveries.c.wake_at.is_not(None))
    values = {"wake_at": utc_now() + wait, "attempts": deliveries.c.attempts + 1, "last_error": ERROR}
    await database.write(lambda connection: connection.execute(waiting.values(values)))
