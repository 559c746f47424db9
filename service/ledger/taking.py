"""Taking webhooks: all that one brings, a record or a batch and its deliveries, is committed in one transaction."""

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection

from service.ledger.batches import BatchArrival, receive_batch
from service.ledger.deliveries import Forwarding, NewDelivery, insert_deliveries
from service.ledger.receiving import Arrival, Receipt, receive
from service.ledger.requiring import inherit_again


class Webhook(msgspec.Struct, frozen=True, gc=False):
    """A verified webhook: of a generation that has ended, of a finished batch, or of neither, for targets alone."""

    arrival: Arrival | None = None
    batch: BatchArrival | None = None
    forwarding: Forwarding | None = None


class Taken(msgspec.Struct, frozen=True, gc=False):
    """What was stored of some webhooks: for each its record, and whether its batch is new; and all new *deliveries*."""

    receipts: Sequence[Receipt | None]
    are_new_batches: Sequence[bool]
    deliveries: Sequence[NewDelivery]


def take(connection: Connection, webhooks: Sequence[Webhook]) -> Taken:
    """Store *webhooks* in one transaction; the results have their order."""
    received = iter(receive(connection, [one.arrival for one in webhooks if one.arrival is not None]))
    receipts = [None if one.arrival is None else next(received) for one in webhooks]
    are_new = [one.batch is not None and receive_batch(connection, one.batch)[1] for one in webhooks]
    deliveries = insert_deliveries(connection, [one.forwarding for one in webhooks if one.forwarding is not None])
    for one, is_new in zip(webhooks, are_new, strict=True):
        if one.batch is not None and not is_new:
            inherit_again(connection, one.batch.key)
    return Taken(receipts, are_new, deliveries)
