"""Forgetting records: what is personal is removed, and what proves the deletion stays, so that the id is known.

A late webhook of a forgotten generation finds its record. It makes no new one and brings nothing back. What was passed
on to targets is removed, too, and cannot be replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, bindparam, delete, select, update

from service.core.key import Key
from service.core.lifecycle import Move, State, state_after
from service.ledger import delivery_forgetting, pausing
from service.ledger.history import Entry, append_entries
from service.ledger.schema import events, labels, records

# The columns that are emptied; its labels are removed, the receipt loses the API's body, each event its free text.
EMPTIED: Final = (
    *("input", "options", "segments", "notification", "copy"),
    *("output_url", "output_media_url", "segment_output_url", "synthesized_audio_url", "webhook_url"),
    *("output_file_name", "error", "last_error", "hold_by", "hold_reason", "hold_until", "waits_for"),
    "look_at",  # nothing more is to be learnt of it
)
# What stays of a receipt, and of the details of events: no reason and no error, which may quote anything.
_RECEIPT: Final = frozenset({"method", "status", "at", "detail"})
_DETAILS: Final = frozenset(
    {
        *("attempt", "verdict", "outcome", "status", "rule", "announced"),
        *("retryAt", "dueAt", "oldRule", "oldDueAt", "deletedAt", "receipt", "detail", "target"),
    }
)
# So many receipts or details are in memory at once; each may have the body of an answer.
_READ_AT_ONCE: Final = 20

_empty = (
    update(records)
    .where(records.c.seq.in_(bindparam("seqs", expanding=True)))
    .values(**dict.fromkeys(EMPTIED), forgotten_at=bindparam("b_at"))
)
_set_receipt = update(records).where(records.c.seq == bindparam("b_seq")).values(receipt=bindparam("b_receipt"))
_set_detail = (
    update(events)
    .where(events.c.record == bindparam("b_record"), events.c.seq == bindparam("b_seq"))
    .values(detail=bindparam("b_detail"))
)


@dataclass(frozen=True, slots=True)
class Forgotten:
    """One batch: how many records were forgotten, and when the last of them was deleted, None without any."""

    number: int
    last_deleted_at: datetime | None


def forget_record(connection: Connection, key: Key, *, now: datetime, actor: str, reason: str | None) -> bool:
    """Forget the record of *key*, at an operator's word; False if there is none.

    A record that is forgotten already stays as it is. One that had failed is kept: it needs no operator any more, and
    its generation is not deleted.

    Raises: IllegalMoveError for a record that is scheduled, held or deleting.
    """
    mine = (records.c.account == key.account, records.c.id == key.id)
    columns = (records.c.seq, records.c.state, records.c.forgotten_at)
    row = connection.execute(select(*columns).where(*mine).with_for_update()).first()
    if row is None or row.forgotten_at is not None:
        return row is not None
    before = State(row.state)
    state = state_after(before, Move.FORGET)
    if state is not before:
        kept = {"due_at": None, "ttl_seconds": None, "rule": f"forgotten by {actor}"}
        connection.execute(update(records).where(records.c.seq == row.seq).values(state=state, **kept))
    _forget(connection, [row.seq], now=now, actor=actor, reason=reason)
    return True


def find_rules(connection: Connection) -> list[str]:
    """Return the rules of the records that are deleted and not forgotten; each costs one entry of an index."""
    found: list[str] = []
    mine = (records.c.deleted_at.is_not(None), records.c.forgotten_at.is_(None))
    while (
        rule := connection.scalar(
            select(records.c.rule)
            .where(records.c.rule > (found[-1] if found else ""), *mine)
            .order_by(records.c.rule)
            .limit(1)
        )
    ) is not None:
        found.append(rule)
    return found


def forget_deleted(
    connection: Connection, rule: str, *, ttl: timedelta, after: datetime | None, now: datetime, limit: int, actor: str
) -> Forgotten:
    """Forget up to *limit* records of *rule* whose generations have been gone for *ttl*, the longest first.

    *after* is the last_deleted_at of the batch before, which saves reading again what is forgotten. Records that
    another worker has locked are left to it, and those with a webhook on its way to a target to a later run.
    """
    # The earlier clock: one that is ahead forgets nothing early.
    conditions = [records.c.deleted_at <= pausing.earlier_clock(connection, now) - ttl]
    if after is not None:
        conditions.append(records.c.deleted_at >= after)
    rows: Sequence[Any] = connection.execute(
        select(records.c.seq, records.c.deleted_at)
        # Only deleted records have a deleted_at. With the state in here, SQLite reads all of them instead.
        .where(records.c.rule == rule, *conditions, records.c.forgotten_at.is_(None))
        .where(~delivery_forgetting.IS_ON_ITS_WAY)
        .order_by(records.c.deleted_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    if not rows:
        return Forgotten(0, None)
    _forget(connection, [row.seq for row in rows], now=now, actor=actor, reason=None)
    return Forgotten(len(rows), rows[-1].deleted_at)


def _forget(connection: Connection, seqs: list[int], *, now: datetime, actor: str, reason: str | None) -> None:
    """Remove what is personal from the records *seqs*, which are locked, and note it in their history."""
    receipts = _stripped_receipts(connection, seqs)
    details = _stripped_details(connection, seqs)
    connection.execute(_empty, {"seqs": seqs, "b_at": now})
    connection.execute(delete(labels).where(labels.c.record.in_(seqs)))
    delivery_forgetting.forget_of_records(connection, seqs)
    for statement, values in ((_set_receipt, receipts), (_set_detail, details)):
        if values:
            connection.execute(statement, values)
    detail = {"reason": reason} if reason else None
    append_entries(connection, [Entry(seq, now, Move.FORGET, actor, detail) for seq in seqs])


def _stripped_receipts(connection: Connection, seqs: list[int]) -> list[dict[str, Any]]:
    statement = select(records.c.seq, records.c.receipt).where(records.c.seq.in_(seqs), records.c.receipt.is_not(None))
    rows = connection.execute(statement, execution_options={"yield_per": _READ_AT_ONCE})
    return [{"b_seq": row.seq, "b_receipt": _strip(row.receipt, _RECEIPT)} for row in rows]


def _stripped_details(connection: Connection, seqs: list[int]) -> list[dict[str, Any]]:
    """Return the details that have something to lose."""
    statement = select(events.c.record, events.c.seq, events.c.detail).where(
        events.c.record.in_(seqs), events.c.detail.is_not(None)
    )
    rows = connection.execute(statement, execution_options={"yield_per": _READ_AT_ONCE})
    return [
        {"b_record": row.record, "b_seq": row.seq, "b_detail": stripped}
        for row in rows
        if (stripped := _strip(row.detail, _DETAILS)) != row.detail
    ]


def _strip(text: str, names: frozenset[str]) -> str | None:
    """Return the JSON object *text* with the fields *names* alone, each as it was; None without any."""
    fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    left = {name: value for name, value in fields.items() if name in names}
    return msgspec.json.encode(left).decode() if left else None
