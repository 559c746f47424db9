"""New records, of webhooks and of generations that a sweep adopts: one per account and generation."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, insert
from sqlalchemy.dialects import postgresql, sqlite

from service.core.generation import Generation
from service.core.holding import Hold, longer_hold
from service.core.key import Key
from service.core.lifecycle import Move, State, state_after
from service.core.retention import Retention
from service.ledger import holding
from service.ledger.columns import generation_values
from service.ledger.history import Entry
from service.ledger.schema import labels, records

ACTOR = "webhook"


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A terminal generation, and its retention; *sent_at* is where the ttl begins.

    *body* is that of the verified webhook or, with *is_adopted*, the API's own: such a record wants no early look.
    With *is_partial*, an adopted one of a batch, the body is not kept, and the early look brings the API's own. With
    *is_added* as well there is no more than the id, and whether it has ended is not known. *actor* is who brought it;
    *hold* is one beside those of the retention.
    """

    key: Key
    generation: Generation
    body: str
    retention: Retention
    received_at: datetime
    sent_at: datetime
    is_adopted: bool = False
    is_partial: bool = False
    is_added: bool = False
    actor: str = ACTOR
    hold: Hold | None = None


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The record after an arrival."""

    seq: int
    state: State
    due_at: datetime | None
    attempts: int
    is_new: bool
    is_moved: bool  # its due time or state changed, so that it needs another job
    is_conflict: bool  # an earlier webhook for this generation had another body, which is kept


# One statement per database: SQLAlchemy has no ON CONFLICT that is common to both.
_insert = {
    dialect.name: statement(records)
    .on_conflict_do_nothing(index_elements=["account", "id"])
    .returning(records.c.seq, records.c.account, records.c.id)
    for dialect, statement in ((sqlite.dialect, sqlite.insert), (postgresql.dialect, postgresql.insert))
}


class Inserted(msgspec.Struct, frozen=True, gc=False):
    """The numbers of the *new* records, the holds *found* before there was one, and the *holds* in force."""

    new: Mapping[Key, int]
    found: Mapping[Key, Hold]
    holds: Mapping[Key, Hold]


def insert_new(connection: Connection, arrivals: Sequence[Arrival]) -> Inserted:
    """Insert those of *arrivals* that have no record, with their labels and holds."""
    found = holding.find_holds(connection, [arrival.key for arrival in arrivals])
    holds = _add_overrides(found, arrivals)
    values = [_insert_values(arrival, holds.get(arrival.key)) for arrival in arrivals]
    rows = connection.execute(_insert[connection.dialect.name], values)
    new = {Key(account, name): seq for seq, account, name in rows}
    if any(arrival.retention.labels for arrival in arrivals):
        _insert_labels(connection, arrivals, new)
    return Inserted(new, found, holds)


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
        override = None if by is None else Hold(by, reason, arrival.retention.hold_until)
        if (hold := longer_hold(longer_hold(found.get(arrival.key), override), arrival.hold)) is not None:
            holds[arrival.key] = hold
    return holds


def _first_moves(retention: Retention, hold: Hold | None) -> list[Move]:
    """Return the moves of a new record: it is scheduled, kept, or scheduled and held."""
    if hold is not None:
        return [Move.RECEIVE, Move.HOLD]
    return [Move.RECEIVE if retention.due_at else Move.KEEP]


def receipt_of_new(arrival: Arrival, inserted: Inserted, entries: list[Entry]) -> Receipt:
    """Add the history of a new record to *entries*."""
    retention, seq, hold = arrival.retention, inserted.new[arrival.key], inserted.holds.get(arrival.key)
    moves = _first_moves(retention, hold)
    detail: dict[str, Any] = {"rule": retention.rule, "status": arrival.generation.status}
    if arrival.is_added:
        detail["added"] = True
    entries.append(Entry(seq, arrival.received_at, moves[0], arrival.actor, detail))
    if hold is not None:
        entries.append(Entry(seq, arrival.received_at, Move.HOLD, hold.by, holding.hold_detail(hold)))
    return Receipt(seq, state_after(None, *moves), retention.due_at, 0, is_new=True, is_moved=True, is_conflict=False)


def _insert_values(arrival: Arrival, hold: Hold | None) -> dict[str, Any]:
    """Return the values of a new record."""
    retention = arrival.retention
    state = state_after(None, *_first_moves(retention, hold))
    return generation_values(arrival.generation) | {
        "account": arrival.key.account,
        "id": arrival.key.id,
        "state": str(state),  # SQLite's driver is slow to adapt a subclass of str
        "notification": None if arrival.is_adopted else arrival.body,
        "copy": arrival.body if arrival.is_adopted and not arrival.is_partial else None,
        "received_at": arrival.received_at,
        "sent_at": arrival.sent_at,
        "due_at": retention.due_at,
        "wake_at": retention.due_at if state is State.SCHEDULED else None,
        "look_at": None if arrival.is_adopted and not arrival.is_partial else arrival.received_at,
        "rule": retention.rule,
        "ttl_seconds": ttl_seconds(retention),
        "hold_by": hold and hold.by,
        "hold_reason": hold and hold.reason,
        "hold_until": hold and hold.until,
    }


def ttl_seconds(retention: Retention) -> int | None:
    return None if retention.ttl is None else int(retention.ttl.total_seconds())
