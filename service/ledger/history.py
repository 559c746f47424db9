"""The audit trail: one row per move of a record, written in the transaction of the move."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, bindparam, func, insert, select

from service.core.lifecycle import Move
from service.ledger.schema import events


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One move of the record with the number *record*; *detail* never has a body or a URL."""

    record: int
    at: datetime
    move: Move
    actor: str
    detail: dict[str, Any] | None = None


_next = select(func.coalesce(func.max(events.c.seq), 0) + 1).where(events.c.record == bindparam("record"))
_append = insert(events).values(
    {name: bindparam(name) for name in ("record", "at", "move", "actor", "detail")} | {"seq": _next.scalar_subquery()}
)


def append_entries(connection: Connection, entries: Sequence[Entry]) -> None:
    """Append *entries* in order; the caller has inserted or locked their records, so that each number is unique."""
    if entries:
        connection.execute(_append, [_entry_values(entry) for entry in entries])


def _entry_values(entry: Entry) -> dict[str, Any]:
    return {
        "record": entry.record,
        "at": entry.at,
        "move": str(entry.move),
        "actor": entry.actor,
        "detail": msgspec.json.encode(entry.detail).decode() if entry.detail else None,
    }


def read_first(connection: Connection, record: int) -> Entry | None:
    """Return the first move of *record*."""
    row = connection.execute(select(events).where(events.c.record == record, events.c.seq == 1)).first()
    return None if row is None else _entry_of(row)


def read_entries(connection: Connection, record: int) -> list[Entry]:
    """Return the moves of *record*, oldest first."""
    statement = select(events).where(events.c.record == record).order_by(events.c.seq)
    return [_entry_of(row) for row in connection.execute(statement)]


def _entry_of(row: Row[Any]) -> Entry:
    detail = msgspec.json.decode(row.detail) if row.detail else None
    return Entry(row.record, row.at, Move(row.move), row.actor, detail)
