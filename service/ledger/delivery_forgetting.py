"""Removing deliveries: those of a record that is forgotten, and those that ended long ago. Their bodies are personal.

Records are locked before deliveries.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, and_, delete, exists, or_, select

from service.core.batch import BatchState
from service.core.forwarding import DeliveryState
from service.core.key import Key
from service.core.lifecycle import State
from service.ledger import pausing
from service.ledger.delivery_schema import deliveries, requirements
from service.ledger.schema import batches, group_by_account, records

_IS_OF_RECORD = and_(deliveries.c.account == records.c.account, deliveries.c.generation == records.c.id)
# Of a record: a webhook of it has not ended at its target, which has days for that.
IS_ON_ITS_WAY: Final = exists().where(_IS_OF_RECORD, deliveries.c.wake_at.is_not(None))
# Of a failed delivery: a record may still be deleted because of its replay, or must not be because of its failure.
_IS_REQUIRED = exists().where(
    requirements.c.delivery == deliveries.c.seq,
    records.c.account == requirements.c.account,
    records.c.id == requirements.c.generation,
    records.c.state != State.DELETED,
)
# The same for records that a batch has not got yet.
_IS_OF_OPEN_BATCH = exists().where(
    requirements.c.delivery == deliveries.c.seq,
    batches.c.account == requirements.c.account,
    batches.c.id == requirements.c.generation,
    batches.c.state != BatchState.RESOLVED,
)


def forget_of_records(connection: Connection, seqs: Sequence[int]) -> None:
    """Remove the deliveries and the requirements of the records *seqs*, which are locked, whatever their state."""
    rows = connection.execute(select(records.c.account, records.c.id).where(records.c.seq.in_(seqs)))
    for mine in group_by_account(Key(row.account, row.id) for row in rows):
        theirs = (deliveries.c.account == mine["account"], deliveries.c.generation.in_(mine["ids"]))
        # In the order of settle_deliveries(), to avoid deadlocks.
        found = select(deliveries.c.seq).where(*theirs).order_by(deliveries.c.id).with_for_update()
        if gone := list(connection.scalars(found)):
            connection.execute(delete(deliveries).where(deliveries.c.seq.in_(gone)))
        required = (requirements.c.account == mine["account"], requirements.c.generation.in_(mine["ids"]))
        connection.execute(delete(requirements).where(*required))


def forget_finished(connection: Connection, *, after: timedelta, now: datetime, limit: int) -> int:
    """Remove up to *limit* deliveries that ended longer ago than *after*, and return how many.

    A failed one stays as long as a record needs it that is not deleted, or a batch that has not all of its records.
    """
    is_needed = and_(deliveries.c.state != DeliveryState.DELIVERED, or_(_IS_REQUIRED, _IS_OF_OPEN_BATCH))
    old = (
        select(deliveries.c.seq)
        # The earlier clock: one that is ahead forgets nothing early.
        .where(deliveries.c.finished_at < pausing.earlier_clock(connection, now) - after, ~is_needed)
        .order_by(deliveries.c.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    gone = list(connection.scalars(old))
    if gone:
        connection.execute(delete(requirements).where(requirements.c.delivery.in_(gone)))
        connection.execute(delete(deliveries).where(deliveries.c.seq.in_(gone)))
    return len(gone)
