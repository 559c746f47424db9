"""Storing webhooks, and generations that a sweep adopts: one record per account and generation, however many arrive."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Text, bindparam, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from service.core.generation import Generation
from service.core.holding import Hold, longer_hold
from service.core.key import Key
from service.core.lifecycle import Move, State, interrupting_moves, state_after
from service.core.retention import Retention
from service.ledger import holding
from service.ledger.columns import generation_values
from service.ledger.history import Entry, append_entries
from service.ledger.schema import KEYS_OF_ACCOUNT, group_by_account, labels, records

ACTOR = "webhook"


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A terminal generation, and its retention; *sent_at* is where the ttl begins.

    *body* is that of the verified webhook, None for one that is adopted; that one has a *copy*, as the API shows it,
    and wants no early look. *actor* is who brought it.
    """

    key: Key
    generation: Generation
    body: str | None
    retention: Retention
    received_at: datetime
    sent_at: datetime
    copy: str | None = None
    actor: str = ACTOR


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The record after an arrival."""

    seq: int
    state: State
    due_at: datetime | None
    attempts: int
    is_new: bool
    is_moved: bool  # its due time or state changed, so that it needs another job
    is_conflict: bool  # an earlier webhook for this generation had another body, which is kept


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
        records.c.hold_by,
        records.c.hold_reason,
        records.c.forgotten_at,
        records.c.hold_until,
        records.c.notification,
    )
    .where(KEYS_OF_ACCOUNT)
    .order_by(records.c.account, records.c.id)
    .with_for_update()
)
# One statement per database: SQLAlchemy has no ON CONFLICT that is common to both.
_insert = {
    dialect.name: statement(records)
    .on_conflict_do_nothing(index_elements=["account", "id"])
    .returning(records.c.seq, records.c.account, records.c.id)
    for dialect, statement in ((sqlite.dialect, sqlite.insert), (postgresql.dialect, postgresql.insert))
}
_update_record = (
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
        hold_by=bindparam("b_hold_by", type_=Text),
        hold_reason=bindparam("b_hold_reason", type_=Text),
        hold_until=bindparam("b_hold_until", type_=records.c.hold_until.type),
    )
)


def receive(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Store *arrivals* in one transaction and return a receipt for each, in their order.

    A known generation keeps its first body. Of two webhooks the later due time wins, and a hold wins over both, as
    long as no DELETE may be in progress. A due time never becomes earlier. Of two holds the longer one wins, also of
    those that came before the first webhook.
    """
    receipts: dict[int, Receipt] = {}
    waiting = dict(enumerate(arrivals))
    while waiting:
        # Each generation once per round, so that the second of two sees what the first has written. Sorted by key:
        # two processes that lock the same rows in different orders would deadlock.
        firsts = {arrival.key: index for index, arrival in reversed(waiting.items())}
        indices = [firsts[key] for key in sorted(firsts, key=attrgetter("account", "id"))]
        received = _receive_once(connection, [waiting.pop(index) for index in indices])
        receipts.update(zip(indices, received, strict=True))
    return [receipts[index] for index in range(len(arrivals))]


def adopt(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt | None]:
    """Store those of *arrivals*, one per generation, that have no record, and return a receipt or None for each.

    A record stays as it is, whatever its state: what was deleted, held or kept is not adopted again.
    """
    ordered = sorted(arrivals, key=lambda arrival: (arrival.key.account, arrival.key.id))  # as in receive()
    inserted, entries = _insert_new(connection, ordered), list[Entry]()
    receipts = {
        arrival.key: _receipt_of_new(arrival, inserted, entries) for arrival in ordered if arrival.key in inserted.new
    }
    holding.remove_holds(connection, [key for key in receipts if key in inserted.found])
    append_entries(connection, entries)
    return [receipts.get(arrival.key) for arrival in arrivals]


class _Inserted(msgspec.Struct, frozen=True, gc=False):
    """The numbers of the *new* records, the holds *found* before there was one, and the *holds* in force."""

    new: Mapping[Key, int]
    found: Mapping[Key, Hold]
    holds: Mapping[Key, Hold]


class _Changes(msgspec.Struct, frozen=True, gc=False):
    updates: list[dict[str, Any]]
    entries: list[Entry]


def _receive_once(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Store *arrivals*, one per generation: insert the new ones, then lock and update the others."""
    inserted = _insert_new(connection, arrivals)
    new, holds = inserted.new, inserted.holds
    known = _lock_known(connection, [arrival.key for arrival in arrivals if arrival.key not in new])
    changes = _Changes([], [])
    receipts = [
        _receipt_of_new(arrival, inserted, changes.entries)
        if arrival.key in new
        else _receipt_of_known(arrival, known[arrival.key], holds.get(arrival.key), changes)
        for arrival in arrivals
    ]
    moved = [arrival.key for arrival, receipt in zip(arrivals, receipts, strict=True) if receipt.is_moved]
    holding.remove_holds(connection, [key for key in moved if key in inserted.found])
    if changes.updates:
        connection.execute(_update_record, changes.updates)
    append_entries(connection, changes.entries)
    return receipts


def _insert_new(connection: Connection, arrivals: Sequence[Arrival]) -> _Inserted:
    """Insert those of *arrivals* that have no record, with their labels and holds."""
    found = holding.find_holds(connection, [arrival.key for arrival in arrivals])
    holds = _add_overrides(found, arrivals)
    values = [_insert_values(arrival, holds.get(arrival.key)) for arrival in arrivals]
    rows = connection.execute(_insert[connection.dialect.name], values)
    new = {Key(account, name): seq for seq, account, name in rows}
    if any(arrival.retention.labels for arrival in arrivals):
        _insert_labels(connection, arrivals, new)
    return _Inserted(new, found, holds)


def _insert_labels(connection: Connection, arrivals: Sequence[Arrival], new: Mapping[Key, int]) -> None:
    """Store the labels of new records; a known one keeps those of its first webhook."""
    rows = [
        {"record": seq, "name": name, "value": value}
        for arrival in arrivals
        if (seq := new.get(arrival.key)) is not None
        for name, value in arrival.retention.labels.items()
    ]
    if rows:
        connection.execute(insert(labels), rows)


def _add_overrides(found: Mapping[Key, Hold], arrivals: Sequence[Arrival]) -> dict[Key, Hold]:
    """Return the hold of each arrival that has one: *found* before its first webhook, or by its own override."""
    holds = dict(found)
    for arrival in arrivals:
        reason = arrival.retention.hold_reason
        by = arrival.retention.held_by(arrival.actor)
        override = None if by is None else Hold(by, reason, None)
        if (hold := longer_hold(found.get(arrival.key), override)) is not None:
            holds[arrival.key] = hold
    return holds


def _lock_known(connection: Connection, keys: Sequence[Key]) -> dict[Key, Row[Any]]:
    """Lock the records of *keys*, which are sorted."""
    if not keys:
        return {}
    rows: list[Any] = [row for mine in group_by_account(keys) for row in connection.execute(_select_known, mine).all()]
    return {Key(row.account, row.id): row for row in rows}


def _first_moves(retention: Retention, hold: Hold | None) -> list[Move]:
    """Return the moves of a new record: it is scheduled, kept, or scheduled and held."""
    if hold is not None:
        return [Move.RECEIVE, Move.HOLD]
    return [Move.RECEIVE if retention.due_at else Move.KEEP]


def _receipt_of_new(arrival: Arrival, inserted: _Inserted, entries: list[Entry]) -> Receipt:
    """Add the history of a new record to *entries*."""
    retention, seq, hold = arrival.retention, inserted.new[arrival.key], inserted.holds.get(arrival.key)
    moves = _first_moves(retention, hold)
    detail = {"rule": retention.rule, "status": arrival.generation.status}
    entries.append(Entry(seq, arrival.received_at, moves[0], arrival.actor, detail))
    if hold is not None:
        entries.append(Entry(seq, arrival.received_at, Move.HOLD, hold.by, holding.hold_detail(hold)))
    return Receipt(seq, state_after(None, *moves), retention.due_at, 0, is_new=True, is_moved=True, is_conflict=False)


def _receipt_of_known(arrival: Arrival, before: Row[Any], hold: Hold | None, changes: _Changes) -> Receipt:
    """Decide what another webhook for a known generation changes, and add that to *changes*."""
    retention = arrival.retention
    due_at = retention.due_at if retention.is_later_than(before.due_at) else before.due_at
    existing = holding.hold_of(before)
    hold = None if hold is not None and existing is not None and not hold.is_longer_than(existing) else hold
    moves = _moves(arrival, before, due_at, is_hold=hold is not None)
    state = state_after(State(before.state), *(moves or ()))
    if moves is not None:
        # A deferred attempt, because of a Retry-After for example, is not made earlier.
        deferred_to = before.wake_at if before.state == State.SCHEDULED else None
        wake_at = max(due_at, deferred_to or due_at) if state is State.SCHEDULED and due_at else None
        changes.updates.append(_update_values(before, state, due_at, wake_at, retention, hold or existing))
        detail = {"rule": retention.rule, "announced": "again"}
        recorded = moves or [Move.RECEIVE]  # only the due time changed
        changes.entries.extend(Entry(before.seq, arrival.received_at, move, ACTOR, detail) for move in recorded)
    return Receipt(
        before.seq,
        state,
        before.due_at if moves is None else due_at,
        before.attempts,
        is_new=False,
        is_moved=moves is not None,
        is_conflict=before.forgotten_at is None and before.notification not in (None, arrival.body),
    )


def _moves(arrival: Arrival, before: Row[Any], due_at: datetime | None, *, is_hold: bool) -> list[Move] | None:
    """Return the moves that another webhook makes: an empty list if only the due time changes, None for no change."""
    state, is_copied = State(before.state), before.copied_attempt == before.attempts
    if state in (State.DELETED, State.KEPT) or not (is_hold or due_at != before.due_at):
        return None
    if state in (State.HELD, State.FAILED):
        return []  # it takes effect when an operator releases or retries the record
    stopped = interrupting_moves(state, is_copied=is_copied)
    if state is State.DELETING and (not stopped or not (is_hold or due_at is None or due_at > arrival.received_at)):
        return None  # too late, or still due
    if is_hold:
        return [*stopped, Move.HOLD]
    return [*stopped, Move.KEEP] if due_at is None else stopped


def _update_values(  # noqa: PLR0917 - the columns of one row
    before: Row[Any],
    state: State,
    due_at: datetime | None,
    wake_at: datetime | None,
    retention: Retention,
    hold: Hold | None,
) -> dict[str, Any]:
    return {
        "b_seq": before.seq,
        "b_before": before.state,
        "b_attempts": before.attempts,
        "b_state": state,
        "b_due_at": due_at,
        "b_wake_at": wake_at,
        "b_rule": retention.rule,
        "b_ttl_seconds": _ttl_seconds(retention),
        "b_hold_by": hold and hold.by,
        "b_hold_reason": hold and hold.reason,
        "b_hold_until": hold and hold.until,
    }


def _insert_values(arrival: Arrival, hold: Hold | None) -> dict[str, Any]:
    """Return the values of a new record."""
    retention = arrival.retention
    state = state_after(None, *_first_moves(retention, hold))
    return generation_values(arrival.generation) | {
        "account": arrival.key.account,
        "id": arrival.key.id,
        "state": str(state),  # SQLite's driver is slow to adapt a subclass of str
        "notification": arrival.body,
        "copy": arrival.copy,
        "received_at": arrival.received_at,
        "sent_at": arrival.sent_at,
        "due_at": retention.due_at,
        "wake_at": retention.due_at if state is State.SCHEDULED else None,
        "look_at": None if arrival.body is None else arrival.received_at,
        "rule": retention.rule,
        "ttl_seconds": _ttl_seconds(retention),
        "hold_by": hold and hold.by,
        "hold_reason": hold and hold.reason,
        "hold_until": hold and hold.until,
    }


def _ttl_seconds(retention: Retention) -> int | None:
    return None if retention.ttl is None else int(retention.ttl.total_seconds())
