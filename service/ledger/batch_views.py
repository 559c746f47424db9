"""Finished batches as the API and the command line show them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from service.core.batch import BatchState
from service.core.key import Key
from service.ledger import batches


class BatchShown(msgspec.Struct, rename="camel", frozen=True):
    """A finished batch. *expected* is how many generations it says that it has, None if it does not.

    *scheduled* got their record from it, *known* had one already, *errors* were never made, and nothing is known yet
    of *unresolved*, None before the first look. *source* is where they were found.
    """

    id: str
    account: str
    state: BatchState
    status: str
    created_at: datetime | None
    received_at: datetime
    sent_at: datetime
    webhook_url: str | None
    expected: int | None
    scheduled: int
    known: int
    errors: int
    unresolved: int | None
    source: str | None
    tries: int
    next_look_at: datetime | None
    resolved_at: datetime | None
    last_error: str | None


class FullBatch(BatchShown, frozen=True):
    """A finished batch with its notification as it came."""

    notification: msgspec.Raw


class BatchPage(msgspec.Struct, frozen=True):
    """Finished batches, the newest first."""

    items: list[BatchShown]


def list_batches(connection: Connection, *, state: BatchState | None, limit: int) -> BatchPage:
    """Read up to *limit* batches, in *state* unless it is None."""
    rows: Sequence[Row[Any]] = batches.read_batches(connection, state=state, limit=limit)
    return BatchPage([BatchShown(**_fields(row)) for row in rows])


def show_batch(connection: Connection, *, key: Key) -> FullBatch | None:
    """Read one batch; None if there is none."""
    row = batches.find_batch(connection, key)
    return None if row is None else FullBatch(**_fields(row), notification=msgspec.Raw(row.notification.encode()))


def retry_and_show(connection: Connection, *, key: Key, now: datetime) -> FullBatch | None:
    """Let a batch be looked at again now, and read it; None if there is none."""
    return show_batch(connection, key=key) if batches.retry_batch(connection, key, now=now) else None


def _fields(row: Row[Any]) -> dict[str, Any]:
    names = (field.name for field in msgspec.structs.fields(BatchShown))
    found = {name: getattr(row, name) for name in names if name not in ("state", "next_look_at")}
    return found | {"state": BatchState(row.state), "next_look_at": row.look_at}
