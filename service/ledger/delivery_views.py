"""Deliveries as the API and the command line show them."""

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from service.core.forwarding import DeliveryState
from service.ledger.delivery_reading import DeliveryFilter, find_delivery, read_delivery_page


class Delivery(msgspec.Struct, rename="camel", frozen=True, kw_only=True):
    """A webhook for one target: *generation* and *status* are the id in it, also of a batch, and what it says of that.

    *attempts* counts all of them, over replays. It waits for *next_attempt_at*; while an attempt is made, until
    *leased_until* at most. *behind* is the earlier delivery of the same generation that must end first.
    """

    id: str
    target: str
    account: str
    generation: str
    status: str
    is_required: bool
    state: DeliveryState
    attempts: int
    received_at: datetime
    since: datetime
    next_attempt_at: datetime | None
    leased_until: datetime | None
    behind: str | None
    finished_at: datetime | None
    last_status: int | None
    last_error: str | None


class FullDelivery(Delivery, frozen=True, kw_only=True):
    """A delivery with what its target gets, as it came, and how the target's last answer began."""

    content_type: str
    signature: str
    last_answer: str | None
    body: str


class DeliveriesPage(msgspec.Struct, rename="camel", frozen=True):
    """Deliveries, newest first; *next_cursor* is None on the last page."""

    items: list[Delivery]
    next_cursor: str | None


def list_deliveries(
    connection: Connection, *, wanted: DeliveryFilter, limit: int, cursor: str | None
) -> DeliveriesPage:
    """Read a page.

    Raises: CursorError.
    """
    page = read_delivery_page(connection, wanted, limit=limit, cursor=cursor)
    return DeliveriesPage([Delivery(**_fields(row)) for row in page.rows], page.next_cursor)


def show_delivery(connection: Connection, *, delivery_id: str) -> FullDelivery | None:
    """Read one delivery as a whole; None if there is none."""
    row = find_delivery(connection, delivery_id)
    if row is None:
        return None
    whole = {name: getattr(row, name) for name in ("content_type", "signature", "last_answer")}
    return FullDelivery(**_fields(row), **whole, body=row.body.decode(errors="backslashreplace"))


def _fields(row: Row[Any]) -> dict[str, Any]:
    names = (field.name for field in msgspec.structs.fields(Delivery))
    found = {name: getattr(row, name) for name in names if name not in ("state", "next_attempt_at")}
    is_attempted = row.leased_until is not None
    return found | {"state": DeliveryState(row.state), "next_attempt_at": None if is_attempted else row.wake_at}
