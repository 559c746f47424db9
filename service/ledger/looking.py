"""Early looks: soon after its receipt the API shows of each generation what its webhook lacks.

A record wants a look as long as it has a look_at. Whatever is lost, the ledger finds it by that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, select, update

from service.core.generation import Generation
from service.core.key import Key
from service.core.lifecycle import Move, State, state_after
from service.core.retention import Retention
from service.ledger import key_history, pausing
from service.ledger.columns import generation_values
from service.ledger.history import Entry, append_entries
from service.ledger.key_history import KeyOfAccount
from service.ledger.labelling import read_labels
from service.ledger.pausing import Kind
from service.ledger.schema import records

# While an attempt has the record, it looks itself; and a deleted record is not looked at.
_WANTED = (records.c.look_at.is_not(None), records.c.state.in_([State.SCHEDULED, State.HELD, State.KEPT, State.FAILED]))
_COLUMNS = ("seq", "state", "attempts", "rule", "due_at", "wake_at", "ttl_seconds", "sent_at", "looks")


_CLOSED = (Kind.UNAUTHORIZED, Kind.WRONG_ORGANISATION, Kind.THROTTLED)


@dataclass(frozen=True, slots=True)
class Known:
    """What the record says of its retention when the API shows its generation; *ttl* is None for forever.

    *labels* are those that the signed webhook gave it; the API may show another webhookUrl, or none.
    """

    state: State
    rule: str
    due_at: datetime | None
    ttl: timedelta | None
    sent_at: datetime
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Looked:
    """The record after its look; *due_at* is set where a job must start at another time than before."""

    attempts: int
    due_at: datetime | None


def find_due_looks(connection: Connection, account: str, *, now: datetime, limit: int) -> Sequence[Key]:
    """Return up to *limit* records of *account* whose look is due, the longest waiting first.

    None while the API refuses the account's key or wants no calls; a pause of deletions alone keeps nothing from
    being looked at.
    """
    if _is_closed(connection, account):
        return []
    due = (
        select(records.c.account, records.c.id)
        .where(records.c.account == account, records.c.look_at <= now, *_WANTED)
        .order_by(records.c.look_at)
        .limit(limit)
    )
    return [Key(row.account, row.id) for row in connection.execute(due)]


def is_wanted(connection: Connection, key: Key) -> bool:
    """Whether the record of *key* still wants its look, and its account may ask the API."""
    if _is_closed(connection, key.account):
        return False
    return connection.scalar(select(records.c.seq).where(*_is(key), *_WANTED)) is not None


def _is_closed(connection: Connection, account: str) -> bool:
    return any(one.kind in _CLOSED for one in pausing.find_pauses(connection, account))


def store_look(  # noqa: PLR0917 - what was seen, by whom, with which key
    connection: Connection,
    key: Key,
    used: KeyOfAccount,
    generation: Generation,
    body: str,
    decide: Callable[[Known], Retention | None],
    *,
    now: datetime,
    actor: str,
) -> Looked | None:
    """Store what the API showed with the key *used*, and the retention that follows; None if no look is wanted now.

    *decide* is asked for scheduled records alone: one that is held or kept stays so. Where the API shows nothing, the
    webhook's value stays.
    """
    row = _lock(connection, key)
    if row is None:
        return None
    # Records before keys, as settle_attempts() locks them.
    key_history.note_answers(connection, used, is_shown=True, unknown=0, now=now, actor=actor)
    found = decide(_known(row, read_labels(connection, [row.seq]))) if row.state == State.SCHEDULED else None
    shown = {name: value for name, value in generation_values(generation).items() if value is not None}
    changes = {} if found is None else _retention_changes(row, found)
    values = {**shown, "copy": body, "copied_at": now, "look_at": None, **changes}
    connection.execute(update(records).where(records.c.seq == row.seq).values(values))
    if found is None:
        return Looked(row.attempts, None)
    detail = {"rule": found.rule, "dueAt": found.due_at} | ({"reason": found.hold_reason} if found.hold_reason else {})
    append_entries(connection, [Entry(row.seq, now, _move(found), actor, detail)])
    is_waiting = changes["state"] == State.SCHEDULED
    return Looked(row.attempts, changes["wake_at"] if is_waiting else None)


def put_off_look(
    connection: Connection,
    key: Key,
    wait: Callable[[int], timedelta],
    throttle: timedelta | None,
    *,
    now: datetime,
    actor: str,
) -> None:
    """Let the look wait for what *wait* returns for the number of failed looks, from 1.

    *throttle* is for how long the API wants no calls at all: deletions and other workers obey it, too.
    """
    row = _lock(connection, key)
    if row is not None:
        later = {"looks": row.looks + 1, "look_at": now + wait(row.looks + 1)}
        connection.execute(update(records).where(records.c.seq == row.seq).values(later))
    if throttle is not None:
        pausing.throttle(connection, throttle, now=now, actor=actor, account=key.account)


def end_look(connection: Connection, key: Key, error: str) -> None:
    """Want no look any more, because the API knows no such generation; the attempt at the due time asks again."""
    row = _lock(connection, key)
    if row is not None:
        values = {"look_at": None, "last_error": error}
        connection.execute(update(records).where(records.c.seq == row.seq).values(values))


def _is(key: Key) -> tuple[Any, ...]:
    return records.c.account == key.account, records.c.id == key.id


def _lock(connection: Connection, key: Key) -> Row[Any] | None:
    wanted = select(*(records.c[name] for name in _COLUMNS)).where(*_is(key), *_WANTED).with_for_update()
    return connection.execute(wanted).first()


def _known(row: Row[Any], labels: Mapping[int, Mapping[str, str]]) -> Known:
    ttl = None if row.ttl_seconds is None else timedelta(seconds=row.ttl_seconds)
    return Known(State(row.state), row.rule, row.due_at, ttl, row.sent_at, labels.get(row.seq, {}))


def _move(found: Retention) -> Move:
    if found.hold_reason is not None:
        return Move.HOLD
    return Move.KEEP if found.due_at is None else Move.RESCHEDULE


def _retention_changes(row: Row[Any], found: Retention) -> dict[str, Any]:
    """Return the columns of a scheduled record that *found* changes."""
    state = state_after(State.SCHEDULED, _move(found))
    # An attempt that was deferred, because of a Retry-After for example, is not made earlier.
    deferred_to = row.wake_at if row.attempts else None
    wake_at = max(found.due_at, deferred_to or found.due_at) if found.due_at and state is State.SCHEDULED else None
    return {
        "state": state,
        "rule": found.rule,
        "due_at": found.due_at,
        "wake_at": wake_at,
        "ttl_seconds": None if found.ttl is None else int(found.ttl.total_seconds()),
        "hold_by": found.held_by("webhook"),
        "hold_reason": found.hold_reason,
    }
