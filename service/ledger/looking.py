"""Early looks: soon after its receipt the API shows of each generation what its webhook lacks.

A record wants a look as long as it has a look_at. Whatever is lost, the ledger finds it by that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum, auto
from typing import Any

from sqlalchemy import Connection, Row, select, update

from service.core.attempts import describe_unknown_id, is_wrong_id
from service.core.generation import UNSEEN, Generation
from service.core.key import Key
from service.core.lifecycle import Move, State, state_after
from service.core.retention import Retention
from service.ledger import key_history, pausing
from service.ledger.columns import generation_values
from service.ledger.completing import has_ended
from service.ledger.history import Entry, append_entries
from service.ledger.key_history import KeyOfAccount
from service.ledger.labelling import read_labels
from service.ledger.pausing import Kind
from service.ledger.schema import records

# While an attempt has the record, it looks itself; and a deleted record is not looked at.
_WANTED = (records.c.look_at.is_not(None), records.c.state.in_([State.SCHEDULED, State.HELD, State.KEPT, State.FAILED]))
_COLUMNS = (
    *("seq", "account", "state", "status", "attempts", "rule", "due_at", "wake_at", "ttl_seconds", "sent_at", "looks"),
    "received_at",
)


_CLOSED = (Kind.UNAUTHORIZED, Kind.WRONG_ORGANISATION, Kind.THROTTLED)


@dataclass(frozen=True, slots=True)
class Known:
    """What the record says of its retention when the API shows its generation; *ttl* is None for forever.

    *has_ended* is false for one that was added by its id, until its generation is seen to have ended. *labels* are
    those that the signed webhook or the app gave it; the API may show another webhookUrl, or none.
    """

    state: State
    rule: str
    due_at: datetime | None
    ttl: timedelta | None
    sent_at: datetime
    labels: Mapping[str, str]
    has_ended: bool = True


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

    *decide* is asked for scheduled records alone: one that is held or kept stays so, unless it was added by its id and
    is decided only now. Where the API shows nothing, the webhook's value stays.
    """
    row = _lock(connection, key)
    if row is None:
        return None
    # Records before keys, as settle_attempts() locks them.
    key_history.note_answers(connection, used, is_shown=True, unknown=0, now=now, actor=actor)
    is_asked = row.state == State.SCHEDULED or (not has_ended(row) and row.state in (State.HELD, State.KEPT))
    found = decide(_known(row, read_labels(connection, [row.seq]))) if is_asked else None
    shown = {name: value for name, value in generation_values(generation).items() if value is not None}
    changes = {} if found is None else _retention_changes(row, found)
    values = {**shown, "copy": body, "copied_at": now, "look_at": None, **changes}
    connection.execute(update(records).where(records.c.seq == row.seq).values(values))
    if found is None:
        return Looked(row.attempts, None)
    detail = {"rule": found.rule, "dueAt": found.due_at} | ({"reason": found.hold_reason} if found.hold_reason else {})
    append_entries(connection, [Entry(row.seq, now, move, actor, detail) for move in _moves(row, found)])
    is_waiting = changes["state"] == State.SCHEDULED
    return Looked(row.attempts, changes["wake_at"] if is_waiting else None)


def put_off_look(
    connection: Connection,
    key: Key,
    wait: Callable[[int], timedelta],
    throttle: timedelta | None,
    shown: Generation | None,
    *,
    now: datetime,
    actor: str,
) -> None:
    """Let the look wait for what *wait* returns for the number of failed looks, from 1.

    *throttle* is for how long the API wants no calls at all: deletions and other workers obey it, too. *shown* is a
    generation that has not ended: a record that was added by its id says from now on that there is one.
    """
    row = _lock(connection, key)
    if row is not None:
        later = {"looks": row.looks + 1, "look_at": now + wait(row.looks + 1)}
        if shown is not None and not has_ended(row):
            later |= {name: value for name, value in generation_values(shown).items() if value is not None}
        connection.execute(update(records).where(records.c.seq == row.seq).values(later))
    if throttle is not None:
        pausing.throttle(connection, throttle, now=now, actor=actor, account=key.account)


class Ended(StrEnum):
    """What became of a look whose generation the API does not know."""

    ENDED = auto()  # the attempt at the due time asks again
    PUT_OFF = auto()  # a generation that was just created may not be shown yet
    WRONG_ID = auto()  # the record is given up, or held or kept with this error


def end_look(
    connection: Connection, key: Key, error: str, wait: Callable[[int], timedelta], *, now: datetime, actor: str
) -> Ended:
    """Want no look any more, because the API knows no such generation.

    One that was added by its id, and that nothing has ever shown, is looked for a little longer. Then its id is wrong:
    its record is given up, as there is nothing to delete and nothing that is known to be gone.
    """
    row = _lock(connection, key)
    if row is None:
        return Ended.ENDED
    values: dict[str, Any] = {"look_at": None, "last_error": error}
    if row.status == UNSEEN and not is_wrong_id(row.received_at, now=now):
        values, ended = {"looks": row.looks + 1, "look_at": now + wait(row.looks + 1)}, Ended.PUT_OFF
    elif row.status == UNSEEN:
        values["last_error"], ended = describe_unknown_id(row.account), Ended.WRONG_ID
        if row.state == State.SCHEDULED:
            values |= {"state": state_after(State.SCHEDULED, Move.GIVE_UP), "wake_at": None}
            detail = {"error": values["last_error"]}
            append_entries(connection, [Entry(row.seq, now, Move.GIVE_UP, actor, detail)])
    else:
        ended = Ended.ENDED
    connection.execute(update(records).where(records.c.seq == row.seq).values(values))
    return ended


def _is(key: Key) -> tuple[Any, ...]:
    return records.c.account == key.account, records.c.id == key.id


def _lock(connection: Connection, key: Key) -> Row[Any] | None:
    wanted = select(*(records.c[name] for name in _COLUMNS)).where(*_is(key), *_WANTED).with_for_update()
    return connection.execute(wanted).first()


def _known(row: Row[Any], labels: Mapping[int, Mapping[str, str]]) -> Known:
    ttl = None if row.ttl_seconds is None else timedelta(seconds=row.ttl_seconds)
    mine = labels.get(row.seq, {})
    return Known(State(row.state), row.rule, row.due_at, ttl, row.sent_at, mine, has_ended=has_ended(row))


def _moves(row: Row[Any], found: Retention) -> list[Move]:
    """Return the moves that *found* makes; for what is held, or kept still, only the words change."""
    is_held, is_kept = found.hold_reason is not None, found.due_at is None
    if row.state == State.HELD or (row.state == State.KEPT and is_kept and not is_held):
        return []
    then = Move.HOLD if is_held else Move.KEEP if is_kept else Move.RESCHEDULE
    if row.state == State.KEPT:
        return [Move.RELEASE, Move.HOLD] if is_held else [Move.RELEASE]
    return [then]


def _retention_changes(row: Row[Any], found: Retention) -> dict[str, Any]:
    """Return the columns that *found* changes; a hold that is there stays."""
    state = state_after(State(row.state), *_moves(row, found))
    # An attempt that was deferred, because of a Retry-After for example, is not made earlier.
    deferred_to = row.wake_at if row.attempts else None
    wake_at = max(found.due_at, deferred_to or found.due_at) if found.due_at and state is State.SCHEDULED else None
    hold = {"hold_by": found.held_by("webhook"), "hold_reason": found.hold_reason, "hold_until": found.hold_until}
    return ({} if row.state == State.HELD else hold) | {
        "state": state,
        "rule": found.rule,
        "due_at": found.due_at,
        "wake_at": wake_at,
        "ttl_seconds": None if found.ttl is None else int(found.ttl.total_seconds()),
    }
