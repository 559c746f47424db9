"""Claiming due records, and ending the leases of workers that died. The WHERE of each statement decides the race.

A claim gives the row a lease and a new attempt number. Every later write carries that number, so that a worker that
was frozen beyond its lease cannot overwrite its successor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Interval, Row, bindparam, func, select, update

from service.core.attempts import Progress, Step, after_lost_lease, exclude_wait
from service.core.generation import TERMINAL, UNSEEN
from service.core.key import Key
from service.core.lifecycle import Move, State, state_after
from service.ledger import holding, pausing, requiring
from service.ledger.history import Entry, append_entries
from service.ledger.instant import Instant
from service.ledger.labelling import read_labels
from service.ledger.schema import KEYS_OF_ACCOUNT, group_by_account, records

LOST_LEASE = "its worker did not finish"
# The last_error of a record that a dry run has rehearsed.
DRY_RUN = "dry run: it would have been deleted"


@dataclass(frozen=True, slots=True)
class Claim:
    """A record that only this worker may delete until *lease_until*."""

    seq: int
    key: Key
    attempt: int  # counts from 1
    due_at: datetime
    lease_until: datetime
    progress: Progress
    rule: str
    ttl: timedelta | None
    has_unanswered_delete: bool  # an earlier attempt may have sent its DELETE, and its answer is not known
    labels: Mapping[str, str] = field(default_factory=dict)  # those of its signed webhook
    # Of one that was added by its id: whether it was seen to have ended, and since when it waits to be seen at all.
    has_ended: bool = True
    sent_at: datetime | None = None
    unseen_since: datetime | None = None


# Without the bodies: hundreds of rows of a megabyte each would need too much memory.
_CLAIM_COLUMNS = tuple(
    records.c[name]
    for name in (
        *("seq", "account", "id", "state", "attempts", "due_at", "wake_at", "rule", "ttl_seconds"),
        *("failing_since", "failures", "refusals", "unanswered_attempt", "status", "sent_at", "received_at"),
    )
)


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """What a job asks for: attempt number *attempt*, from 1, at the record of *key*."""

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
# How often due records are read until one of them may be claimed: many may wait for a target that is down.
_ROUNDS = 20
# Their state is looked at afterwards: with it in here, SQLite would rather read all that are scheduled.
_select_wanted = (
    select(*_CLAIM_COLUMNS)
    .where(KEYS_OF_ACCOUNT)
    .order_by(records.c.account, records.c.id)
    .with_for_update(skip_locked=True)
)
_select_keys = select(records.c.account, records.c.id).where(KEYS_OF_ACCOUNT)
_UNTIL = bindparam("b_until", type_=Instant)
# The later end by the worker's clock and the database's: with a slow clock a lease keeps its length.
_LATER_UNTIL = func.greatest(_UNTIL, func.statement_timestamp() + bindparam("b_lease", type_=Interval), type_=Instant)
_set_claimed = {
    dialect: update(records)
    # The rows are locked. With the state in the WHERE, SQLite reads all scheduled rows instead.
    .where(records.c.seq.in_(bindparam("b_seqs", expanding=True)))
    .values(
        state=state_after(State.SCHEDULED, Move.CLAIM),
        attempts=records.c.attempts + 1,
        wake_at=until,
        waits_for=None,
    )
    for dialect, until in (("sqlite", _UNTIL), ("postgresql", _LATER_UNTIL))
}


def in_state(account: str, state: State) -> tuple[ColumnElement[bool], ...]:
    """Match the records of *account* in *state*; with a bound of wake_at this reads the index, and nothing else."""
    return records.c.account == account, records.c.state == state


def _not_after(connection: Connection, now: datetime) -> ColumnElement[Any]:
    """Return the earlier of the worker's clock and the database's: a clock that is ahead deletes nothing early."""
    if connection.dialect.name == "sqlite":
        return bindparam("now", now, Instant)
    # Not clock_timestamp(): it is volatile, so PostgreSQL would read all scheduled rows instead of using the index.
    return func.least(bindparam("now", now, Instant), func.statement_timestamp(), type_=Instant)


def claim_due(
    connection: Connection, account: str, *, now: datetime, lease: timedelta, limit: int, actor: str
) -> list[Claim]:
    """Claim up to *limit* due records of *account*, most overdue first; rows locked by another worker are skipped.

    While deletions are paused nothing is claimed, except a probe each minute of a key that was refused. It is not taken
    for a record that is held, or waits for its target, instead.
    """
    limit = min(limit, pausing.peek_allowance(connection, account, now=now))
    due = (
        select(*_CLAIM_COLUMNS)
        .where(*in_state(account, State.SCHEDULED), records.c.wake_at <= _not_after(connection, now))
        .where(records.c.due_at <= _not_after(connection, now))
        .order_by(records.c.wake_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows: Sequence[Row[Any]] = []
    for _ in range(_ROUNDS if limit else 0):
        found = connection.execute(due).all()
        rows = _keep_back(connection, found, now=now, actor=actor)
        if rows or len(found) < limit:
            break
    allowed = pausing.take_allowance(connection, account, now=now) if rows else 0
    return _lease_rows(connection, rows[:allowed], now=now, lease=lease, actor=actor)


def claim_wanted(
    connection: Connection, account: str, wanted: Sequence[Wanted], *, now: datetime, lease: timedelta, actor: str
) -> list[Claim | NotYet | None]:
    """Claim the records of *account* that jobs ask for; the result has the order of *wanted*.

    None: the record is held, deleted, paused or at another attempt, and the job has nothing to do.
    """
    at = pausing.earlier_clock(connection, now)
    asked = group_by_account(item.key for item in wanted)
    rows: dict[Key, Any] = {
        Key(row.account, row.id): row for mine in asked for row in connection.execute(_select_wanted, mine).all()
    }
    locked = _find_locked(connection, asked, rows)
    found = [
        NotYet(_LOCKED_WAIT) if item.key in locked else _check_wanted(rows.get(item.key), item.attempt, at)
        for item in wanted
    ]
    due = {row.seq: row for row in found if isinstance(row, Row)}
    free = _keep_back(connection, [*due.values()], now=now, actor=actor)
    allowed = pausing.take_allowance(connection, account, now=now) if free else 0
    leased = _lease_rows(connection, free[:allowed], now=now, lease=lease, actor=actor)
    claims = {claim.seq: claim for claim in leased}
    # Of two jobs for one attempt the first gets the claim.
    return [claims.pop(row.seq, None) if isinstance(row, Row) else row for row in found]


def _find_locked(connection: Connection, asked: Sequence[dict[str, Any]], rows: Mapping[Key, Row[Any]]) -> set[Key]:
    """Return the keys of those records *asked* for that are there, and not among the *rows*."""
    if sum(len(mine["ids"]) for mine in asked) == len(rows) or connection.dialect.name == "sqlite":
        return set()
    there = [Key(row.account, row.id) for mine in asked for row in connection.execute(_select_keys, mine)]
    return {key for key in there if key not in rows}


def _check_wanted(row: Row[Any] | None, attempt: int, at: datetime) -> Row[Any] | NotYet | None:
    """Return the *row* if *attempt* at it can begin at the instant *at*."""
    if row is None or row.state != State.SCHEDULED or row.attempts + 1 != attempt:
        return None
    wait: timedelta = max(row.due_at, row.wake_at) - at
    return row if wait <= timedelta(0) else NotYet(wait)


def _keep_back(connection: Connection, rows: Sequence[Row[Any]], *, now: datetime, actor: str) -> Sequence[Row[Any]]:
    """Return those of *rows*, which are locked, scheduled and due, that may be deleted.

    Those with a hold that no record has yet are held, and those whose target has not taken the webhook wait or fail.
    """
    if rows:
        held = holding.hold_locked(connection, rows, now=now)
        rows = [row for row in rows if row.seq not in held]
    if rows:
        waiting = requiring.keep_waiting(connection, rows, now=now, actor=actor)
        rows = [row for row in rows if row.seq not in waiting]
    return rows


def _lease_rows(
    connection: Connection, rows: Sequence[Row[Any]], *, now: datetime, lease: timedelta, actor: str
) -> list[Claim]:
    """Claim *rows*, which are locked, scheduled and due, and were not kept back."""
    if not rows:
        return []
    seqs = [row.seq for row in rows]
    values = {"b_seqs": seqs, "b_until": now + lease}
    clock = {} if connection.dialect.name == "sqlite" else {"b_lease": lease}
    connection.execute(_set_claimed[connection.dialect.name], values | clock)
    append_entries(connection, [Entry(row.seq, now, Move.CLAIM, actor, {"attempt": row.attempts + 1}) for row in rows])
    labels = read_labels(connection, seqs)
    return [_claim_from_row(row, labels.get(row.seq, {}), now=now, until=now + lease) for row in rows]


def _claim_from_row(row: Row[Any], labels: Mapping[str, str], *, now: datetime, until: datetime) -> Claim:
    return Claim(
        row.seq,
        Key(row.account, row.id),
        row.attempts + 1,
        row.due_at,
        until,
        # Time spent paused or without a worker does not count toward MAYFLY_GIVE_UP_AFTER.
        exclude_wait(_progress_from_row(row), now - row.wake_at),
        row.rule,
        None if row.ttl_seconds is None else timedelta(seconds=row.ttl_seconds),
        row.unanswered_attempt is not None,
        labels,
        row.status in TERMINAL,
        row.sent_at,
        row.received_at if row.status == UNSEEN else None,
    )


def end_expired_leases(connection: Connection, account: str, *, now: datetime, limit: int, actor: str) -> int:
    """End up to *limit* leases of *account* that have run out: their records are scheduled again. Return how many."""
    expired = (
        select(*_CLAIM_COLUMNS)
        .where(*in_state(account, State.DELETING), records.c.wake_at <= _not_after(connection, now))
        .order_by(records.c.wake_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = connection.execute(expired).all()
    if not rows:
        return 0
    steps = [(row, after_lost_lease(_progress_from_row(row), now=now)) for row in rows]
    connection.execute(_set_lease_lost, [_lost_lease_values(row, step) for row, step in steps])
    append_entries(connection, [Entry(row.seq, now, Move.LOSE_LEASE, actor, {"attempt": row.attempts}) for row in rows])
    return len(rows)


_set_lease_lost = (
    update(records)
    .where(
        records.c.seq == bindparam("b_seq"),
        records.c.attempts == bindparam("b_attempt"),
        records.c.state == State.DELETING,
    )
    .values(
        state=state_after(State.DELETING, Move.LOSE_LEASE),
        wake_at=bindparam("b_wake_at"),
        failures=bindparam("b_failures"),
        last_error=LOST_LEASE,
    )
)


def _lost_lease_values(row: Row[Any], step: Step) -> dict[str, Any]:
    return {
        "b_seq": row.seq,
        "b_attempt": row.attempts,
        "b_wake_at": step.retry_at,
        "b_failures": step.progress.failures,
    }


def _progress_from_row(row: Row[Any]) -> Progress:
    return Progress(row.failing_since, row.failures, row.refusals)


def bring_forward_rehearsed(connection: Connection, account: str, *, now: datetime) -> int:
    """Make due what a dry run of *account* has rehearsed and put off, and return the number of records."""
    put_off = (*in_state(account, State.SCHEDULED), records.c.wake_at > now, records.c.last_error == DRY_RUN)
    # What a changed policy or another webhook has made due later meanwhile waits for that.
    is_due = records.c.due_at <= now
    return connection.execute(update(records).where(*put_off, is_due).values(wake_at=now)).rowcount
