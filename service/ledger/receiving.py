"""Writing what webhooks announce: one record per account and generation, however often it is announced."""

from collections.abc import Collection, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Text, bindparam, func, select, update

from service.generation import Generation, Key
from service.ledger import keys
from service.ledger.bulk import BulkInsert
from service.ledger.database import ConflictError
from service.ledger.history import Entry, append
from service.ledger.schema import records
from service.ledger.sequence import next_numbers
from service.lifecycle import Move, State, after, interrupted
from service.retention import Retention

ACTOR = "webhook"


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A proven notification of a terminal generation, and what the policy makes of it."""

    key: Key
    generation: Generation
    body: str
    retention: Retention
    received_at: datetime


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """How the ledger stands after an arrival."""

    seq: int
    state: State
    due_at: datetime | None
    attempts: int
    is_new: bool
    is_moved: bool  # its due time or state changed, so that it needs another wake-up
    is_conflict: bool  # the same generation was announced before with another body; the first is kept


_select_known = (
    select(
        records.c.seq,
        records.c.account,
        records.c.id,
        records.c.state,
        records.c.due_at,
        records.c.wake_at,
        records.c.attempts,
        records.c.copied_attempt,
        records.c.hold_reason,
        records.c.notification,
    )
    .order_by(records.c.account, records.c.id)
    .with_for_update()
)
# What else the webhook says stays in its body until the copy is made: two thirds of the bytes of each insert saved.
_USUAL_COLUMNS = (
    "seq",
    "account",
    "id",
    "state",
    "status",
    "notification",
    "received_at",
    "due_at",
    "wake_at",
    "rule",
    "ttl_seconds",
)
_ODD_COLUMNS = ("project_id", "hold_by", "hold_reason")
_NONE_YET = {"attempts": 0, "failures": 0, "refusals": 0}
_insert_records = BulkInsert(records, (*_USUAL_COLUMNS, *_ODD_COLUMNS), constants=_NONE_YET)
# On SQLite without what is NULL in nearly all: its driver looks for a way to adapt each NULL, 3 000 instructions that
# lead to nothing.
_insert_usual_records = BulkInsert(records, _USUAL_COLUMNS, constants=_NONE_YET)
_USUAL = len(_USUAL_COLUMNS)
_NO_ODD = (None,) * len(_ODD_COLUMNS)
_change = (
    update(records)
    .where(
        records.c.seq == bindparam("b_seq"),
        records.c.state == bindparam("b_before"),
        records.c.attempts == bindparam("b_attempts"),
    )
    .values(
        state=bindparam("b_state"),
        due_at=bindparam("b_due_at"),
        wake_at=bindparam("b_wake_at"),
        rule=bindparam("b_rule"),
        ttl_seconds=bindparam("b_ttl_seconds"),
        # A hold that is in force stays in force.
        hold_by=func.coalesce(bindparam("b_hold_by", type_=Text), records.c.hold_by),
        hold_reason=func.coalesce(bindparam("b_hold_reason", type_=Text), records.c.hold_reason),
    )
)


def insert(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Write *arrivals* as records that are all new, the usual case: on PostgreSQL nothing is looked up.

    On SQLite, where looking costs next to nothing, it is receive() at once.

    Raises: ConflictError, by itself or from the database's unique key, when one of them is known or is there twice;
    receive() then sorts them out.
    """
    if connection.dialect.name == "sqlite":
        return receive(connection, arrivals)
    if len({arrival.key for arrival in arrivals}) < len(arrivals):
        raise ConflictError("a generation is announced twice at once")
    batch = _Batch([], [], [], [])
    numbers = next_numbers(len(arrivals))
    receipts = [_first(arrival, seq, batch) for arrival, seq in zip(arrivals, numbers, strict=True)]
    _write(connection, batch)
    return receipts


def receive(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Write *arrivals* in one transaction and return how each one stands, in their order.

    A generation that is known keeps its first body. Of two announcements the later due time wins, and a hold wins
    over both, as long as no DELETE may be under way; nothing is ever shortened.
    """
    receipts: dict[int, Receipt] = {}
    waiting = dict(enumerate(arrivals))
    while waiting:
        # Each generation once in a round, so that the second of two meets what the first has written.
        firsts = {arrival.key: index for index, arrival in reversed(waiting.items())}
        indices = sorted(firsts.values())
        known = _find_known(connection, firsts.keys())
        batch = _Batch([], [], [], [])
        for index, seq in zip(indices, next_numbers(len(indices)), strict=True):
            arrival = waiting.pop(index)
            before = known.get(arrival.key)
            receipts[index] = _first(arrival, seq, batch) if before is None else _again(arrival, before, batch)
        _write(connection, batch)
    return [receipts[index] for index in range(len(arrivals))]


class _Batch(msgspec.Struct, frozen=True, gc=False):
    keys: list[tuple[Key, int]]  # of the records to insert, with their numbers
    inserts: list[tuple[Any, ...]]
    updates: list[dict[str, Any]]
    entries: list[Entry]


def _write(connection: Connection, batch: _Batch) -> None:
    keys.add(connection, batch.keys)
    _insert(connection, batch.inserts)
    if batch.updates:
        connection.execute(_change, batch.updates)
    append(connection, batch.entries)


def _insert(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    if connection.dialect.name != "sqlite":
        # In the order of their keys, as _select_known locks them: two processes with the same ones in different orders
        # would each wait for the other.
        _insert_records(connection, sorted(rows, key=itemgetter(1, 2)))
        return
    # In the order of their numbers, which fills the pages: a tenth fewer are written.
    usual = [row[:_USUAL] for row in rows if row[_USUAL:] == _NO_ODD]
    _insert_usual_records(connection, usual)
    if len(usual) < len(rows):
        _insert_records(connection, [row for row in rows if row[_USUAL:] != _NO_ODD])


def _find_known(connection: Connection, wanted: Collection[Key]) -> dict[Key, Row[Any]]:
    condition = keys.are_perhaps_of(connection, wanted)
    if condition is None:
        return {}
    rows: Sequence[Any] = connection.execute(_select_known.where(condition)).all()
    return {Key(row.account, row.id): row for row in rows}


_FIRST = {move: after(None, move) for move in (Move.RECEIVE, Move.KEEP)}


def _first(arrival: Arrival, seq: int, batch: _Batch) -> Receipt:
    """Add a new record to *batch*: scheduled, kept, or scheduled and at once held."""
    retention = arrival.retention
    detail = {"rule": retention.rule, "status": arrival.generation.status}
    move = Move.RECEIVE if retention.due_at or retention.hold_reason else Move.KEEP
    state = _FIRST[move]
    batch.entries.append(Entry(seq, arrival.received_at, move, ACTOR, detail))
    if retention.hold_reason:
        state = after(state, Move.HOLD)
        batch.entries.append(Entry(seq, arrival.received_at, Move.HOLD, ACTOR, {"reason": retention.hold_reason}))
    batch.keys.append((arrival.key, seq))
    batch.inserts.append(_columns(arrival, seq, state))
    return Receipt(seq, state, retention.due_at, 0, is_new=True, is_moved=True, is_conflict=False)


def _again(arrival: Arrival, before: Row[Any], batch: _Batch) -> Receipt:
    """Decide what another announcement of a known generation changes, and add that to *batch*."""
    retention = arrival.retention
    due_at = retention.due_at if retention.is_later_than(before.due_at) else before.due_at
    moves = _moves(arrival, before, due_at)
    state = after(State(before.state), *(moves or ()))
    if moves is not None:
        # An attempt that was put off, by the API's Retry-After perhaps, is not made sooner.
        put_off = before.wake_at if before.state == State.SCHEDULED else None
        wake_at = max(due_at, put_off or due_at) if state is State.SCHEDULED and due_at else None
        batch.updates.append(_changed(before, state, due_at, wake_at, retention))
        detail = {"rule": retention.rule, "announced": "again"}
        told = moves or [Move.RECEIVE]  # it moved the due time alone
        batch.entries.extend(Entry(before.seq, arrival.received_at, move, ACTOR, detail) for move in told)
    return Receipt(
        before.seq,
        state,
        before.due_at if moves is None else due_at,
        before.attempts,
        is_new=False,
        is_moved=moves is not None,
        is_conflict=before.notification != arrival.body,
    )


def _moves(arrival: Arrival, before: Row[Any], due_at: datetime | None) -> list[Move] | None:
    """Return the moves that another announcement makes: none where the due time alone changes, None for no change."""
    state, is_copied = State(before.state), before.copied_attempt == before.attempts
    is_hold = arrival.retention.hold_reason is not None and before.hold_reason is None
    if state in (State.DELETED, State.KEPT) or not (is_hold or due_at != before.due_at):
        return None
    if state in (State.HELD, State.FAILED):
        return []  # it counts once a person has released it or has it tried again
    stopped = interrupted(state, is_copied=is_copied)
    if state is State.DELETING and (not stopped or not (is_hold or due_at is None or due_at > arrival.received_at)):
        return None  # too late, or due all the same
    if is_hold:
        return [*stopped, Move.HOLD]
    return [*stopped, Move.KEEP] if due_at is None else stopped


def _changed(
    before: Row[Any], state: State, due_at: datetime | None, wake_at: datetime | None, retention: Retention
) -> dict[str, Any]:
    return {
        "b_seq": before.seq,
        "b_before": before.state,
        "b_attempts": before.attempts,
        "b_state": state,
        "b_due_at": due_at,
        "b_wake_at": wake_at,
        "b_rule": retention.rule,
        "b_ttl_seconds": _seconds(retention),
        "b_hold_by": ACTOR if retention.hold_reason else None,
        "b_hold_reason": retention.hold_reason,
    }


def _columns(arrival: Arrival, seq: int, state: State) -> tuple[Any, ...]:
    """Return the new record's values in the order of _insert_records."""
    retention = arrival.retention
    return (
        seq,
        arrival.key.account,
        arrival.key.id,
        str(state),  # the driver looks long for a way to adapt what is only nearly a text
        arrival.generation.status,
        arrival.body,
        arrival.received_at,
        retention.due_at,
        retention.due_at if state is State.SCHEDULED else None,
        retention.rule,
        _seconds(retention),
        arrival.generation.project_id,
        ACTOR if retention.hold_reason else None,
        retention.hold_reason,
    )


def _seconds(retention: Retention) -> int | None:
    return None if retention.ttl is None else int(retention.ttl.total_seconds())
