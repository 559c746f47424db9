"""Helpers on deliveries: as webhooks make them, and as attempts change them."""

import json
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Row, update

from service.core.forwarding import DeliveryState, Reply, Target, judge_reply
from service.core.key import DEFAULT_ACCOUNT, Key
from service.core.secret import Secret
from service.ledger.database import Database
from service.ledger.deliveries import Forwarding, insert_deliveries
from service.ledger.delivering import ClaimedDelivery, Due, Ended, claim_deliveries, settle_deliveries
from service.ledger.delivery_reading import find_delivery
from service.ledger.delivery_schema import deliveries
from tests.support.ledger import LEASE, utc_now
from tests.support.webhooks import notification, signature

URL = "https://app.example.com/hooks?token=not-to-be-shown"
APP = Target("app", Secret(URL))
CRM = replace(APP, id="crm")
CONFIGURED = frozenset({"app", "crm"})
CONFIG = f'[[forward]]\nid = "app"\nurl = "{URL}"\n\n[[forward]]\nid = "crm"\nurl = "{URL}"\nstatuses = ["FAILED"]\n'


async def forward(
    database: Database,
    target: Target = APP,
    *,
    account: str = DEFAULT_ACCOUNT,
    received_at: datetime | None = None,
    **fields: object,
) -> str:
    """Store the delivery of a webhook to *target*, *fields* are the notification's; return its id."""
    said = notification(**fields)
    body, at = json.dumps(said, ensure_ascii=False).encode(), received_at or utc_now()
    form = (body, "application/json", signature(body))
    one = Forwarding(Key(account, str(said["id"])), str(said["status"]), *form, at, (target,), is_final=True)
    (new,) = await database.write(partial(insert_deliveries, webhooks=[one]))
    return new.id


async def delivery_of(database: Database, delivery_id: str) -> Row[Any]:
    """Return the row of a delivery, which is there."""
    row = await database.read(partial(find_delivery, delivery_id=delivery_id))
    assert row is not None
    return row


async def claim_delivery(database: Database, delivery_id: str, *, lease: timedelta = LEASE) -> ClaimedDelivery | None:
    """Begin the next attempt at a delivery, if it is due."""
    row = await delivery_of(database, delivery_id)
    due = Due(row.target, row.id, row.attempts + 1)
    (claimed,) = await database.write(partial(claim_deliveries, wanted=[due], now=utc_now(), lease=lease))
    return claimed


async def attempt(database: Database, delivery_id: str, status: int = 200, *, answer: str = "") -> None:
    """Make an attempt that is answered *status*; 410 lets a delivery fail."""
    claimed = await claim_delivery(database, delivery_id)
    assert claimed is not None
    reply = Reply(status, answer)
    ended = Ended(claimed, reply, judge_reply(reply, attempts=claimed.tries, jitter=0.0))
    await database.write(partial(settle_deliveries, ended=[ended], now=utc_now()))


async def alter(database: Database, delivery_id: str, **values: object) -> None:
    """Change columns of a delivery."""
    statement = update(deliveries).where(deliveries.c.id == delivery_id).values(**values)
    await database.write(lambda connection: connection.execute(statement))


async def failed(database: Database, target: Target = APP, **fields: Any) -> str:  # noqa: ANN401 - handed on
    """Store a delivery that its target does not want; return its id."""
    delivery_id = await forward(database, target, **fields)
    await attempt(database, delivery_id, 410)
    assert (await delivery_of(database, delivery_id)).state == DeliveryState.FAILED
    return delivery_id
