"""What a worker does to records: claim, copy, settle. Each statement's WHERE decides the race for its row.

A claim gives the row a lease and a new attempt number. Every later write carries that number, so that a worker that
slept past its lease cannot write over its successor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Interval, Row, bindparam, func, select, update
from sqlalchemy import Text as TextType

from service.generation import Generation, Key
from service.ledger import limiting, pausing
from service.ledger.describing import DESCRIBED, described
from service.ledger.history import Entry, append
from service.ledger.pausing import Kind, Pause
from service.ledger.schema import Instant, records
from service.lifecycle import Move, State, after
from service.retention import Progress, Step, Verdict, after_lost_lease

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


@dataclass(frozen=True, slots=True)
class Copy:
    """The generation as the API showed it, to be kept before it is deleted."""

    claim: Claim
    generation: Generation
    body: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an attempt ended: *receipt* is the API's answer to the DELETE as JSON, *error* a sentence without secrets."""

    claim: Claim
    verdict: Verdict
    step: Step
    receipt: str | None = None
    error: str | None = None
    is_refund: bool = False  # it was counted against the day's limit, and the API did not delete


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
        select(records)
        .where(records.c.wake_at <= _not_after(connection, now), records.c.state == State.SCHEDULED)
        .where(records.c.due_at <= _not_after(connection, now))
        .order_by(records.c.wake_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = connection.execute(due).all()
    if not rows:
        return []
    until = now + lease
    connection.execute(
        update(records)
        .where(records.c.seq.in_([row.seq for row in rows]), records.c.state == State.SCHEDULED)
        .values(
            state=after(State.SCHEDULED, Move.CLAIM),
            attempts=records.c.attempts + 1,
            wake_at=_lease_end(connection, now, lease),
        )
    )
    append(connection, [Entry(row.seq, now, Move.CLAIM, actor, {"attempt": row.attempts + 1}) for row in rows])
    return [
        Claim(row.seq, Key(row.account, row.id), row.attempts + 1, row.due_at, until, _progress(row)) for row in rows
    ]


def lose_leases(connection: Connection, *, now: datetime, limit: int, actor: str) -> int:
    """Take back up to *limit* records whose worker let its lease run out, and return how many."""
    expired = (
        select(records)
        .where(records.c.wake_at <= _not_after(connection, now), records.c.state == State.DELETING)
        .order_by(records.c.wake_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = connection.execute(expired).all()
    if not rows:
        return 0
    steps = [(row, after_lost_lease(_progress(row), now=now)) for row in rows]
    connection.execute(_settle, [_settled(row.seq, row.attempts, step, LOST_LEASE) for row, step in steps])
    append(connection, [Entry(row.seq, now, Move.LOSE_LEASE, actor, {"attempt": row.attempts}) for row in rows])
    return len(rows)


class Copied(StrEnum):
    """What became of a copy, and so whether the DELETE may be sent."""

    KEPT = "kept"  # durable: it may
    LOST = "lost"  # the lease is no longer the claim's: its successor decides
    LIMITED = "limited"  # durable, but the day's limit of deletions is reached
    PAUSED = "paused"  # durable, but a person paused all deletions after the claim


def copy(
    connection: Connection, copies: Sequence[Copy], *, now: datetime, limit: int | None, actor: str
) -> list[Copied]:
    """Keep what the API showed of each generation, and count the deletions to come against the day's *limit*."""
    mine = _still_mine(connection, [item.claim for item in copies])
    kept = [item for item in copies if item.claim.seq in mine and item.claim.lease_until > now]
    if kept:
        connection.execute(_copy, [_copied(item, now) for item in kept])
    if kept and any(one.kind is Kind.OPERATOR for one in pausing.find(connection)):
        allowed, beyond = 0, Copied.PAUSED
    else:
        allowed, beyond = limiting.reserve(connection, len(kept), limit=limit, now=now, actor=actor), Copied.LIMITED
    outcomes = {item.claim.seq: Copied.KEPT if index < allowed else beyond for index, item in enumerate(kept)}
    return [outcomes.get(item.claim.seq, Copied.LOST) for item in copies]


def settle(connection: Connection, settlements: Sequence[Settlement], *, now: datetime, actor: str) -> list[bool]:
    """Write how each attempt ended; False where the lease is no longer the claim's, and its successor decides."""
    mine = _still_mine(connection, [item.claim for item in settlements])
    valid = [item for item in settlements if item.claim.seq in mine]
    confirmed = [item for item in valid if item.step.move is Move.CONFIRM]
    others = [item for item in valid if item.step.move is not Move.CONFIRM]
    if confirmed:
        connection.execute(_confirm, [_confirmed(item, now) for item in confirmed])
    if others:
        connection.execute(_settle, [_settled(i.claim.seq, i.claim.attempt, i.step, i.error) for i in others])
    append(connection, [_entry(item, now, actor) for item in valid])
    limiting.refund(connection, sum(item.is_refund for item in valid), now=now)
    _note_key(connection, settlements, now, actor)
    return [item.claim.seq in mine for item in settlements]


_select_mine = (
    select(records.c.seq, records.c.attempts)
    .where(records.c.seq.in_(bindparam("seqs", expanding=True)), records.c.state == State.DELETING)
    # As receive() locks them: in another order each would wait for the other when they are announced again.
    .order_by(records.c.account, records.c.id)
    .with_for_update()
)
# The fence of every write behind a claim.
_fence = (
    records.c.seq == bindparam("b_seq"),
    records.c.attempts == bindparam("b_attempt"),
    records.c.state == State.DELETING,
)
_copy = (
    update(records)
    .where(*_fence)
    .values(
        status=bindparam("b_status"),
        copy=bindparam("b_copy"),
        copied_at=bindparam("b_copied_at"),
        copied_attempt=bindparam("b_attempt"),
        # What the webhook said stands where the API shows nothing.
        **{
            name: func.coalesce(bindparam(f"b_{name}", type_=records.c[name].type), records.c[name])
            for name in DESCRIBED
        },
    )
)
_confirm = (
    update(records)
    .where(*_fence)
    .values(
        state=bindparam("b_state"),
        outcome=bindparam("b_outcome"),
        deleted_at=bindparam("b_deleted_at"),
        receipt=bindparam("b_receipt", type_=TextType),
        wake_at=None,
        last_error=None,
    )
)
_settle = (
    update(records)
    .where(*_fence)
    .values(
        state=bindparam("b_state"),
        wake_at=bindparam("b_wake_at"),
        failing_since=bindparam("b_failing_since"),
        failures=bindparam("b_failures"),
        refusals=bindparam("b_refusals"),
        last_error=bindparam("b_last_error"),
    )
)


def _still_mine(connection: Connection, claims: Sequence[Claim]) -> set[int]:
    rows = connection.execute(_select_mine, {"seqs": [item.seq for item in claims]}).all()
    attempts = {row.seq: row.attempts for row in rows}
    return {item.seq for item in claims if attempts.get(item.seq) == item.attempt}


def _progress(row: Row[Any]) -> Progress:
    return Progress(row.failing_since, row.failures, row.refusals)


def _copied(item: Copy, now: datetime) -> dict[str, Any]:
    columns = {f"b_{name}": value for name, value in described(item.generation).items()}
    return columns | {
        "b_seq": item.claim.seq,
        "b_attempt": item.claim.attempt,
        "b_copy": item.body,
        "b_copied_at": now,
    }


def _confirmed(item: Settlement, now: datetime) -> dict[str, Any]:
    return {
        "b_seq": item.claim.seq,
        "b_attempt": item.claim.attempt,
        "b_state": after(State.DELETING, Move.CONFIRM),
        "b_outcome": item.step.outcome,
        "b_deleted_at": now,
        "b_receipt": item.receipt,
    }


def _settled(seq: int, attempt: int, step: Step, error: str | None) -> dict[str, Any]:
    return {
        "b_seq": seq,
        "b_attempt": attempt,
        "b_state": after(State.DELETING, step.move),
        "b_wake_at": step.retry_at,
        "b_failing_since": step.progress.failing_since,
        "b_failures": step.progress.failures,
        "b_refusals": step.progress.refusals,
        "b_last_error": error,
    }


def _entry(item: Settlement, now: datetime, actor: str) -> Entry:
    detail: dict[str, Any] = {"attempt": item.claim.attempt, "verdict": item.verdict}
    if item.step.outcome:
        detail["outcome"] = item.step.outcome
    if item.step.retry_at:
        detail["retryAt"] = item.step.retry_at
    if item.error:
        detail["error"] = item.error
    return Entry(item.claim.seq, now, item.step.move, actor, detail)


def _note_key(connection: Connection, settlements: Sequence[Settlement], now: datetime, actor: str) -> None:
    """Pause deletions when the API refuses our key, and end that pause once it takes it again."""
    verdicts = {item.verdict for item in settlements}
    if Verdict.UNAUTHORIZED in verdicts:
        reason = "the API refuses the key"
        pausing.pause(connection, Pause(Kind.UNAUTHORIZED, now, actor, reason, now + pausing.PROBE_EVERY))
    elif verdicts & _PROVE_KEY:
        pausing.resume(connection, [Kind.UNAUTHORIZED])


# Answers that only a good key gets.
_PROVE_KEY = frozenset({Verdict.DONE, Verdict.GONE, Verdict.RUNNING})
