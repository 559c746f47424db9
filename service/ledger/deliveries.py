"""New deliveries: one per webhook and target, committed together with what else the webhook brings."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import Connection, insert
from sqlalchemy.dialects import postgresql, sqlite

from service.core.forwarding import DeliveryState, Target
from service.core.key import Key
from service.ledger.delivery_schema import deliveries, requirements


class Forwarding(msgspec.Struct, frozen=True, gc=False):
    """A verified webhook for *targets*: its *body*, *content_type* and *signature* as they came.

    *key* has the id in it, of a generation or a batch. It *is_final* if that has ended: then nothing is deleted before
    the targets that are required have it.
    """

    key: Key
    status: str
    body: bytes
    content_type: str
    signature: str
    received_at: datetime
    targets: tuple[Target, ...]
    is_final: bool


class NewDelivery(msgspec.Struct, frozen=True, gc=False):
    """A delivery of which no attempt has been made."""

    id: str
    target: str
    received_at: datetime


# One statement per database: SQLAlchemy has no ON CONFLICT that is common to both.
_insert = {
    dialect.name: statement(deliveries)
    .on_conflict_do_nothing(index_elements=["target", "account", "generation", "digest"])
    .returning(
        *(deliveries.c[name] for name in ("seq", "id", "target", "received_at", "account", "generation", "is_required"))
    )
    for dialect, statement in ((sqlite.dialect, sqlite.insert), (postgresql.dialect, postgresql.insert))
}


def insert_deliveries(connection: Connection, webhooks: Sequence[Forwarding]) -> list[NewDelivery]:
    """Store a delivery of each of *webhooks* for each of its targets, and return the new ones.

    A target gets a webhook of the same body for the same generation once, however often it is received.
    """
    values = [_values(webhook, target) for webhook in webhooks for target in webhook.targets]
    if not values:
        return []
    rows = connection.execute(_insert[connection.dialect.name], values).all()
    require(connection, [(Key(row.account, row.generation), row.seq) for row in rows if row.is_required])
    return [NewDelivery(row.id, row.target, row.received_at) for row in rows]


def require(connection: Connection, pairs: Iterable[tuple[Key, int]]) -> None:
    """Let each generation wait for the delivery of that seq; such a pair must be new."""
    rows = [{"account": key.account, "generation": key.id, "delivery": seq} for key, seq in pairs]
    if rows:
        connection.execute(insert(requirements), rows)


def _values(webhook: Forwarding, target: Target) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "target": target.id,
        "account": webhook.key.account,
        "generation": webhook.key.id,
        "status": webhook.status,
        "is_required": target.is_required and webhook.is_final,
        "state": str(DeliveryState.WAITING),
        "received_at": webhook.received_at,
        "since": webhook.received_at,
        "wake_at": webhook.received_at,
        "content_type": webhook.content_type,
        "signature": webhook.signature,
        "digest": sha256(webhook.body).digest(),
        "body": webhook.body,
    }
