"""Writing what webhooks announce: one record per account and generation, however often it is announced."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import Any, Protocol

from sqlalchemy import Connection, Text, bindparam, func, select, update

from service.generation import Generation, Key
from service.ledger.bulk import BulkInsert
from service.ledger.history import Entry, append
from service.ledger.schema import records
from service.ledger.sequence import next_number
from service.lifecycle import Move, State, after
from service.retention import Retention

ACTOR = "webhook"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A proven notification of a terminal generation, and what the policy makes of it."""

    key: Key
    generation: Generation
    body: str
    retention: Retention
    received_at: datetime


@dataclass(frozen=True, slots=True)
class Receipt:
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
        records.c.notification,
    )
    .where(records.c.account.in_(bindparam("accounts", expanding=True)))
    .where(records.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(records.c.account, records.c.id)
    .with_for_update()
)
# What else the webhook says stays in its body until the copy is made: two thirds of the bytes of each insert saved.
_insert_records = BulkInsert(
    records,
    (
        "seq",
        "account",
        "id",
        "state",
        "status",
        "project_id",
        "notification",
        "received_at",
        "due_at",
        "wake_at",
        "attempts",
        "failures",
        "refusals",
        "rule",
        "ttl_seconds",
        "hold_by",
        "hold_reason",
    ),
)
# The states in which a later announcement still counts: no worker has begun, and nobody has decided otherwise.
_OPEN = (State.SCHEDULED, State.HELD)
_postpone = (
    update(records)
    .where(records.c.seq == bindparam("b_seq"), records.c.state.in_(_OPEN))
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
    """Write *arrivals* as records that are all new, the usual case: nothing is looked up.

    Raises: ConflictError, from the database's unique key, when one of them is known; receive() then sorts them out.
    """
    return _write(connection, arrivals, {})


def receive(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Write *arrivals* in one transaction and return how each one stands, in their order.

    A generation that is known keeps its first body. Of two announcements the later due time wins, and a hold wins
    over both, as long as no worker has begun; nothing is ever shortened.
    """
    return _write(connection, arrivals, _find_known(connection, arrivals))


def _write(connection: Connection, arrivals: Sequence[Arrival], known: dict[Key, "_Known"]) -> list[Receipt]:
    batch = _Batch([], [], [])
    receipts = []
    for arrival in arrivals:
        before = known.get(arrival.key)
        receipt = _first(arrival, batch) if before is None else _again(arrival, before, batch)
        known[arrival.key] = receipt
        receipts.append(receipt)
    # In the order of their keys, as _select_known locks them: two processes with the same ones in different orders
    # would each wait for the other.
    _insert_records(connection, sorted(batch.inserts, key=itemgetter(1, 2)))
    if batch.updates:
        connection.execute(_postpone, batch.updates)
    append(connection, batch.entries)
    return receipts


class _Known(Protocol):
    """How a record stands before an arrival: a row of the ledger, or the receipt of an earlier arrival."""

    @property
    def seq(self) -> int: ...
    @property
    def state(self) -> State: ...
    @property
    def due_at(self) -> datetime | None: ...
    @property
    def attempts(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Batch:
    inserts: list[tuple[Any, ...]]
    updates: list[dict[str, Any]]
    entries: list[Entry]


def _find_known(connection: Connection, arrivals: Sequence[Arrival]) -> dict[Key, _Known]:
    keys = {"accounts": list({a.key.account for a in arrivals}), "ids": [a.key.id for a in arrivals]}
    return {Key(row.account, row.id): row for row in connection.execute(_select_known, keys)}


def _first(arrival: Arrival, batch: _Batch) -> Receipt:
    """Add a new record to *batch*: scheduled, kept, or scheduled and at once held."""
    retention, seq = arrival.retention, next_number()
    detail = {"rule": retention.rule, "status": arrival.generation.status}
    move = Move.RECEIVE if retention.due_at or retention.hold_reason else Move.KEEP
    state = after(None, move)
    batch.entries.append(Entry(seq, arrival.received_at, move, ACTOR, detail))
    if retention.hold_reason:
        state = after(state, Move.HOLD)
        batch.entries.append(Entry(seq, arrival.received_at, Move.HOLD, ACTOR, {"reason": retention.hold_reason}))
    batch.inserts.append(_columns(arrival, seq, state))
    return Receipt(seq, state, retention.due_at, 0, is_new=True, is_moved=True, is_conflict=False)


def _again(arrival: Arrival, before: _Known, batch: _Batch) -> Receipt:
    """Decide what another announcement of a known generation changes."""
    # A Receipt stands for an earlier arrival of the same transaction, whose body is not compared.
    is_conflict = getattr(before, "notification", arrival.body) != arrival.body
    state, retention = State(before.state), arrival.retention
    is_later = retention.is_later_than(before.due_at)
    is_hold = retention.hold_reason is not None and state is State.SCHEDULED
    if state not in _OPEN or not (is_later or is_hold):
        return Receipt(
            before.seq,
            state,
            before.due_at,
            before.attempts,
            is_new=False,
            is_moved=False,
            is_conflict=is_conflict,
        )
    due_at = retention.due_at if is_later else before.due_at
    move = Move.HOLD if is_hold else Move.KEEP if due_at is None and state is State.SCHEDULED else None
    state = after(state, move) if move else state
    # An attempt that was put off, by the API's Retry-After perhaps, is not made sooner.
    put_off: datetime | None = getattr(before, "wake_at", None)
    wake_at = max(due_at, put_off or due_at) if state is State.SCHEDULED and due_at else None
    batch.updates.append(_change(before.seq, state, due_at, wake_at, retention))
    detail = {"rule": retention.rule, "announced": "again"}
    batch.entries.append(Entry(before.seq, arrival.received_at, move or Move.RECEIVE, ACTOR, detail))
    return Receipt(before.seq, state, due_at, before.attempts, is_new=False, is_moved=True, is_conflict=is_conflict)


def _change(
    seq: int, state: State, due_at: datetime | None, wake_at: datetime | None, retention: Retention
) -> dict[str, Any]:
    return {
        "b_seq": seq,
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
        state,
        arrival.generation.status,
        arrival.generation.project_id,
        arrival.body,
        arrival.received_at,
        retention.due_at,
        retention.due_at if state is State.SCHEDULED else None,
        0,
        0,
        0,
        retention.rule,
        _seconds(retention),
        ACTOR if retention.hold_reason else None,
        retention.hold_reason,
    )


def _seconds(retention: Retention) -> int | None:
    return None if retention.ttl is None else int(retention.ttl.total_seconds())
