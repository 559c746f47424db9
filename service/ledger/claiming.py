"""Claiming what is due, and taking it back from workers that died. Each statement's WHERE decides the race for its row.

A claim gives the row a lease and a new attempt number. Every later write carries that number, so that a worker that
slept past its lease cannot write over its successor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Interval, Row, bindparam, func, select, update

from service.core.attempts import Progress, Step, after_lost_lease, waited
from service.core.key import Key
from service.core.lifecycle import Move, State, after
from service.ledger import pausing
from service.ledger.history import Entry, append
from service.ledger.schema import ARE_ASKED_FOR, Instant, by_account, records

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


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """What a job asks for: the attempt with this number, from 1, at the record of *key*."""

    key: Key
    attempt: int


@dataclass(frozen=True, slots=True)
class NotYet:
    """The record waits for this very attempt, and its time comes after *wait*, by the clock that counts.

    Or another has it locked, and who asks again after *wait* is told more.
    """

    wait: timedelta


# What another has locked is asked for again after this. It may take long: a process that froze in the middle of its
# transaction, or whose machine died, would hold up the claims of all records.
_LOCKED_WAIT = timedelta(seconds=1)
# Their state is looked at afterwards: with it in here, SQLite would rather read all that are scheduled.
_by_key = (
    select(*_CLAIMED, records.c.state)
    .where(ARE_ASKED_FOR)
    .order_by(records.c.account, records.c.id)
    .with_for_update(skip_locked=True)
)
_are_there = select(records.c.account, records.c.id).where(ARE_ASKED_FOR)
_UNTIL = bindparam("b_until", type_=Instant)
# The later end by our clock and the database's: a worker whose clock runs behind keeps its whole lease.
_LATER_UNTIL = func.greatest(_UNTIL, func.statement_timestamp() + bindparam("b_lease", type_=Interval), type_=Instant)
_expired = select(records.c.seq).where(records.c.wake_at <= _UNTIL, records.c.state == State.DELETING).limit(1)
_claim = {
    dialect: update(records)
    # They are locked. With their state here as well, SQLite would rather read all that are scheduled.
    .where(records.c.seq.in_(bindparam("b_seqs", expanding=True)))
    .values(state=after(State.SCHEDULED, Move.CLAIM), attempts=records.c.attempts + 1, wake_at=until)
    for dialect, until in (("sqlite", _UNTIL), ("postgresql", _LATER_UNTIL))
}


def _not_after(connection: Connection, now: datetime) -> ColumnElement[Any]:
    """Return the earlier of our clock and the database's: a worker whose clock runs ahead deletes nothing early."""
    if connection.dialect.name == "sqlite":
        return bindparam("now", now, Instant)
    # Not clock_timestamp(): a volatile function is no bound for an index, and all that is scheduled would be read.
    return func.least(bindparam("now", now, Instant), func.statement_timestamp(), type_=Instant)


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
    return _lease(connection, connection.execute(due).all(), now=now, lease=lease, actor=actor)


def claim_wanted(
    connection: Connection, wanted: Sequence[Wanted], *, now: datetime, lease: timedelta, actor: str
) -> list[Claim | NotYet | None]:
    """Claim the records that jobs ask for, each at the attempt that it asks for; answers in the order of *wanted*.

    None: held, gone, paused, or at another attempt; the job has nothing to do.
    """
    at = pausing.by_both_clocks(connection, now)
    asked = by_account(item.key for item in wanted)
    rows: dict[Key, Any] = {
        Key(row.account, row.id): row for mine in asked for row in connection.execute(_by_key, mine).all()
    }
    locked = _find_locked(connection, asked, rows)
    found = [
        NotYet(_LOCKED_WAIT) if item.key in locked else _found(rows.get(item.key), item.attempt, at) for item in wanted
    ]
    due = {row.seq: row for row in found if isinstance(row, Row)}
    allowed = pausing.allowance(connection, now=now) if due else 0
    leased = _lease(connection, [*due.values()][:allowed], now=now, lease=lease, actor=actor)
    claims = {claim.seq: claim for claim in leased}
    # Of two jobs for one attempt the first has it.
    return [claims.pop(row.seq, None) if isinstance(row, Row) else row for row in found]


def _find_locked(connection: Connection, asked: Sequence[dict[str, Any]], rows: Mapping[Key, Row[Any]]) -> set[Key]:
    """Return the keys of those records *asked* for that are there, and not among the *rows*."""
    if sum(len(mine["ids"]) for mine in asked) == len(rows) or connection.dialect.name == "sqlite":
        return set()
    there = [Key(row.account, row.id) for mine in asked for row in connection.execute(_are_there, mine)]
    return {key for key in there if key not in rows}


def _found(row: Row[Any] | None, attempt: int, at: datetime) -> Row[Any] | NotYet | None:
    """Return the *row* if *attempt* at it can begin at the instant *at*."""
    if row is None or row.state != State.SCHEDULED or row.attempts + 1 != attempt:
        return None
    wait: timedelta = max(row.due_at, row.wake_at) - at
    return row if wait <= timedelta(0) else NotYet(wait)


def find_waiting(
    connection: Connection, *, since: datetime | None, until: datetime, limit: int
) -> list[tuple[Wanted, datetime]]:
    """Return up to *limit* scheduled records with their times, soonest first, of those after *since* up to *until*."""
    bounds = [] if since is None else [records.c.wake_at > since]
    rows = connection.execute(
        select(records.c.account, records.c.id, records.c.attempts, records.c.wake_at)
        .where(records.c.state == State.SCHEDULED, records.c.wake_at <= until, *bounds)
        .order_by(records.c.wake_at)
        .limit(limit)
    )
    return [(Wanted(Key(row.account, row.id), row.attempts + 1), row.wake_at) for row in rows]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the safety net has to know: whether leases have run out, what the pauses allow, and what waits."""

    has_expired_leases: bool
    allowed: int
    late: Sequence[tuple[Wanted, datetime]]
    near: Sequence[tuple[Wanted, datetime]]


def look_ahead(
    connection: Connection, *, now: datetime, late: timedelta, since: datetime | None, until: datetime, limit: int
) -> Outlook:
    """Read in one view what is due for longer than *late*, and what comes after *since* (or then) up to *until*.

    Each has *limit* records at most, and none while deletions are paused.
    """
    expired = connection.execute(_expired, {"b_until": now}).first()
    allowed = pausing.peek(connection, now=now)
    if not allowed:
        return Outlook(expired is not None, 0, (), ())
    late_at = now - late
    return Outlook(
        expired is not None,
        allowed,
        find_waiting(connection, since=None, until=late_at, limit=min(allowed, limit)),
        find_waiting(connection, since=since or late_at, until=until, limit=limit),
    )


def _lease(
    connection: Connection, rows: Sequence[Row[Any]], *, now: datetime, lease: timedelta, actor: str
) -> list[Claim]:
    """Claim *rows*, which are locked, scheduled and due."""
    if not rows:
        return []
    values = {"b_seqs": [row.seq for row in rows], "b_until": now + lease}
    clock = {} if connection.dialect.name == "sqlite" else {"b_lease": lease}
    connection.execute(_claim[connection.dialect.name], values | clock)
    append(connection, [Entry(row.seq, now, Move.CLAIM, actor, {"attempt": row.attempts + 1}) for row in rows])
    return [_claimed(row, now=now, until=now + lease) for row in rows]


def _claimed(row: Row[Any], *, now: datetime, until: datetime) -> Claim:
    return Claim(
        row.seq,
        Key(row.account, row.id),
        row.attempts + 1,
        row.due_at,
        until,
        # Time spent paused or without a worker does not count toward MAYFLY_GIVE_UP_AFTER.
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
