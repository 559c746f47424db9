"""The audit trail: one row per move of a record, appended in the transaction of the move."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from service.ledger.bulk import BulkInsert
from service.ledger.schema import events
from service.ledger.sequence import next_numbers
from service.lifecycle import Move


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One move: of the record with the number *record*, when, by whom, with what beside it (never a body or a URL)."""

    record: int
    at: datetime
    move: Move
    actor: str
    detail: dict[str, Any] | None = None


_insert = BulkInsert(events, ("record", "seq", "at", "move", "actor", "detail"))


def append(connection: Connection, entries: Sequence[Entry]) -> None:
    """Append *entries* in their order."""
    numbers = next_numbers(len(entries))
    _insert(
        connection,
        [
            (entry.record, number, entry.at, str(entry.move), entry.actor, _encoded(entry.detail))
            for entry, number in zip(entries, numbers, strict=True)
        ],
    )


def _encoded(detail: dict[str, Any] | None) -> str | None:
    return msgspec.json.encode(detail).decode() if detail else None


def read(connection: Connection, record: int) -> list[Entry]:
    """Return the moves of *record*, oldest first."""
    statement = select(events).where(events.c.record == record).order_by(events.c.seq)
    return [
        Entry(
            row.record,
            row.at,
            Move(row.move),
            row.actor,
            msgspec.json.decode(row.detail) if row.detail else None,
        )
        for row in connection.execute(statement)
    ]
