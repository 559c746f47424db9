"""Claiming what is due, and taking it back from workers that died. Each statement's WHERE decides the race for its row.

A claim gives the row a lease and a new attempt number. Every later write carries that number, so that a worker that
slept past its lease cannot write over its successor.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Interval, Row, bindparam, func, select, update

from service.generation import Key
from service.ledger import pausing
from service.ledger.history import Entry, append
from service.ledger.schema import Instant, records
from service.lifecycle import Move, State, after
from service.retention import Progress, Step, after_lost_lease, waited

LOST_LEASE = "the worker that had it did not finish"


@dataclass(frozen=True, slots=True)
class Claim:
    """A record that this worker alone may delete until *lease_until*."""

    seq: int
    key: Key
    attempt: int  # counts from 1
    due_at: datetime
    lease_until: datetime
    progress: Progress
    rule: str
    ttl: timedelta | None


# Without the bodies: some hundred rows of a megabyte each would be too much at once.
_CLAIMED = tuple(
    records.c[name]
    for name in (
        *("seq", "account", "id", "attempts", "due_at", "wake_at", "rule", "ttl_seconds"),
        *("failing_since", "failures", "refusals"),
    )
)


def _not_after(connection: Connection, now: datetime) -> ColumnElement[Any]:
    """Return the earlier of our clock and the database's: a worker whose clock runs ahead deletes nothing early."""
    if connection.dialect.name == "sqlite":
        return bindparam("now", now, Instant)
    # Not clock_timestamp(): a volatile function is no bound for an index, and all that is scheduled would be read.
    return func.least(bindparam("now", now, Instant), func.statement_timestamp(), type_=Instant)


def _lease_end(connection: Connection, now: datetime, lease: timedelta) -> ColumnElement[Any]:
    """Return the later end by our clock and the database's: a worker whose clock runs behind keeps its whole lease."""
    end = bindparam("b_until", now + lease, Instant)
    if connection.dialect.name == "sqlite":
        return end
    return func.greatest(end, func.statement_timestamp() + bindparam("b_lease", lease, Interval), type_=Instant)


def claim(connection: Connection, *, now: datetime, lease: timedelta, limit: int, actor: str) -> list[Claim]:
    """Claim up to *limit* due records, longest overdue first; rows that another worker is claiming are passed over.

    While deletions are paused nothing is claimed, but for a single probe now and then of a key that was refused.
    """
    limit = min(limit, pausing.allowance(connection, now=now))
    if limit == 0:
        return []
    due = (
        select(*_CLAIMED)
        .where(records.c.wake_at <= _not_after(connection, now), records.c.state == State.SCHEDULED)
        .where(records.c.due_at <= _not_after(connection, now))
        .order_by(records.c.wake_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = connection.execute(due).all()
    if not rows:
        return []
    connection.execute(
        update(records)
        # They are locked. With their state here as well, SQLite would rather read all that are scheduled.
        .where(records.c.seq.in_([row.seq for row in rows]))
        .values(
            state=after(State.SCHEDULED, Move.CLAIM),
            attempts=records.c.attempts + 1,
            wake_at=_lease_end(connection, now, lease),
        )
    )
    append(connection, [Entry(row.seq, now, Move.CLAIM, actor, {"attempt": row.attempts + 1}) for row in rows])
    return [_claimed(row, now=now, until=now + lease) for row in rows]


def _claimed(row: Row[Any], *, now: datetime, until: datetime) -> Claim:
    return Claim(
        row.seq,
        Key(row.account, row.id),
        row.attempts + 1,
        row.due_at,
        until,
        # That it was not tried when it was to be, while all was paused or no worker there, is no time of failing.
        waited(_progress(row), now - row.wake_at),
        row.rule,
        None if row.ttl_seconds is None else timedelta(seconds=row.ttl_seconds),
    )


def lose_leases(connection: Connection, *, now: datetime, limit: int, actor: str) -> int:
    """Take back up to *limit* records whose worker let its lease run out, and return how many."""
    expired = (
        select(*_CLAIMED)
        .where(records.c.wake_at <= _not_after(connection, now), records.c.state == State.DELETING)
        .order_by(records.c.wake_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = connection.execute(expired).all()
    if not rows:
        return 0
    steps = [(row, after_lost_lease(_progress(row), now=now)) for row in rows]
    connection.execute(_take_back, [_taken_back(row, step) for row, step in steps])
    append(connection, [Entry(row.seq, now, Move.LOSE_LEASE, actor, {"attempt": row.attempts}) for row in rows])
    return len(rows)


_take_back = (
    update(records)
    .where(
        records.c.seq == bindparam("b_seq"),
        records.c.attempts == bindparam("b_attempt"),
        records.c.state == State.DELETING,
    )
    .values(
        state=after(State.DELETING, Move.LOSE_LEASE),
        wake_at=bindparam("b_wake_at"),
        failures=bindparam("b_failures"),
        last_error=LOST_LEASE,
    )
)


def _taken_back(row: Row[Any], step: Step) -> dict[str, Any]:
    return {
        "b_seq": row.seq,
        "b_attempt": row.attempts,
        "b_wake_at": step.retry_at,
        "b_failures": step.progress.failures,
    }


def _progress(row: Row[Any]) -> Progress:
    return Progress(row.failing_since, row.failures, row.refusals)
