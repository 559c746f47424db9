"""Records of generations that are added by their ids: no webhook told of them, and the early look finds the rest."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, func, select

from service.core.asking import check_number
from service.core.generation import UNSEEN, Generation, check_id
from service.core.key import Key
from service.core.retention import Retention
from service.ledger.inserting import Arrival, Receipt
from service.ledger.receiving import receive
from service.ledger.schema import labels

# Who adds with the token that can do nothing else.
APP: Final = "app"


def make_arrival(key: Key, retention: Retention, *, now: datetime, actor: str) -> Arrival:
    """Return what is known of a generation that *actor* adds by its id: nothing else.

    Raises: MalformedError for what can be no id.
    """
    check_id(key.id)
    return Arrival(
        key,
        Generation(id=key.id, status=UNSEEN),
        "",
        retention,
        received_at=now,
        sent_at=now,
        is_adopted=True,
        is_partial=True,
        is_added=True,
        actor=actor,
    )


def add_records(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Store new records, and merge into those that are there as a second webhook does; their labels are added.

    Raises: InvalidOverrideError if a generation would have too many labels.
    """
    receipts = receive(connection, arrivals)
    for arrival, receipt in zip(arrivals, receipts, strict=True):
        if arrival.retention.labels and not receipt.is_new:
            check_number(connection.scalar(select(func.count()).where(labels.c.record == receipt.seq)) or 0)
    return receipts
