"""Holds of generations without a record, and the end of holds. The row of such a hold counts until a record has it.

A hold that a webhook brings while the DELETE of its record may be in progress waits here, too, for another attempt.
On PostgreSQL a hold and the first webhook may be committed at once, neither having seen the other. So claims and copies
look for such holds, too. Whoever locks records as well locks them first, to avoid deadlocks.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from service.core.holding import ENDED, NO_REASON, Hold
from service.core.key import Key
from service.core.lifecycle import Move, State, state_after
from service.ledger import pausing
from service.ledger.history import Entry, append_entries
from service.ledger.schema import group_by_account, holds, records

_OF_ACCOUNT = and_(holds.c.account == bindparam("account"), holds.c.id.in_(bindparam("ids", expanding=True)))
_select_holds = select(holds).where(_OF_ACCOUNT)
_delete_holds = delete(holds).where(_OF_ACCOUNT)
_set_held = (
    update(records)
    .where(records.c.seq == bindparam("b_seq"), records.c.state == bindparam("b_before"))
    .values(
        state=State.HELD,
        wake_at=None,
        waits_for=None,
        hold_by=bindparam("b_by"),
        hold_reason=bindparam("b_reason"),
        hold_until=bindparam("b_until", type_=holds.c.until.type),
    )
)
_select_ended = (
    select(records.c.seq, records.c.due_at, records.c.hold_until)
    .where(
        records.c.hold_until <= bindparam("b_at", type_=records.c.hold_until.type),
        records.c.state == State.HELD,
        records.c.account == bindparam("b_account"),
    )
    .order_by(records.c.hold_until)
)
_set_released = (
    update(records)
    .where(records.c.seq == bindparam("b_seq"), records.c.state == State.HELD)
    # Time on hold does not count toward MAYFLY_GIVE_UP_AFTER.
    .values(
        state=bindparam("b_state"),
        due_at=bindparam("b_due_at", type_=records.c.due_at.type),
        wake_at=bindparam("b_due_at", type_=records.c.due_at.type),
        hold_by=None,
        hold_reason=None,
        hold_until=None,
        waits_for=None,
        failing_since=None,
        failures=0,
        refusals=0,
    )
)


def find_holds(connection: Connection, keys: Iterable[Key]) -> dict[Key, Hold]:
    """Return the holds of *keys* that no record has yet; one statement per account."""
    return {
        Key(row.account, row.id): Hold(row.actor, row.reason, row.until)
        for mine in group_by_account(keys)
        for row in connection.execute(_select_holds, mine)
    }


def find_hold(connection: Connection, key: Key) -> Hold | None:
    """Return the hold of *key* that no record has yet; None without one."""
    return find_holds(connection, [key]).get(key)


def remove_holds(connection: Connection, keys: Iterable[Key]) -> int:
    """Remove the holds of *keys* that no record has, and return how many there were."""
    return sum(connection.execute(_delete_holds, mine).rowcount for mine in group_by_account(keys))


def hold_unseen(connection: Connection, key: Key, hold: Hold, *, now: datetime) -> Hold:
    """Store the hold of a generation without a record; of two the longer one counts. Returns the one in force."""
    values = {"at": now, "actor": hold.by, "reason": hold.reason or NO_REASON, "until": hold.until}
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(holds).values(account=key.account, id=key.id, **values)
    # Where both are there, the row with the later end stays; NULL is no end.
    is_longer = and_(
        holds.c.until.is_not(None), (statement.excluded.until > holds.c.until) | statement.excluded.until.is_(None)
    )
    connection.execute(statement.on_conflict_do_update(index_elements=["account", "id"], set_=values, where=is_longer))
    return find_hold(connection, key) or hold


def release_unseen(connection: Connection, key: Key) -> Hold | None:
    """Remove the hold of a generation without a record, and return it; None without one."""
    found = find_hold(connection, key)
    return found if remove_holds(connection, [key]) else None


def hold_locked(connection: Connection, rows: Sequence[Row[Any]], *, now: datetime) -> set[int]:
    """Hold those of *rows* whose hold no record has yet, and return their numbers.

    *rows* are locked, and have ``seq``, ``account``, ``id`` and ``state``: scheduled, or deleting without a DELETE yet.
    """
    found = find_holds(connection, [Key(row.account, row.id) for row in rows])
    if not found:
        return set()
    held = [(row, found[Key(row.account, row.id)]) for row in rows if Key(row.account, row.id) in found]
    connection.execute(_set_held, [_held_values(row, hold) for row, hold in held])
    append_entries(connection, [entry for row, hold in held for entry in _held_entries(row, hold, now)])
    remove_holds(connection, found)
    return {row.seq for row, _ in held}


def _held_values(row: Row[Any], hold: Hold) -> dict[str, Any]:
    return {
        "b_seq": row.seq,
        "b_before": row.state,
        "b_by": hold.by,
        "b_reason": hold.reason,
        "b_until": hold.until,
    }


def _held_entries(row: Row[Any], hold: Hold, now: datetime) -> list[Entry]:
    moves = [Move.LOSE_LEASE, Move.HOLD] if row.state == State.DELETING else [Move.HOLD]
    return [Entry(row.seq, now, move, hold.by, hold_detail(hold)) for move in moves]


def hold_of(row: Row[Any]) -> Hold | None:
    """Return the hold of a record that is held, or that will be once an operator retries it."""
    return None if row.hold_by is None else Hold(row.hold_by, row.hold_reason, row.hold_until)


def hold_detail(hold: Hold) -> dict[str, Any] | None:
    """Return what the history says of a hold."""
    detail: dict[str, Any] = {"reason": hold.reason} if hold.reason else {}
    return (detail | ({"until": hold.until} if hold.until else {})) or None


def has_ended(connection: Connection, account: str, *, now: datetime) -> bool:
    """Whether any hold of *account* has reached its end; it reads the index of the ends alone."""
    at = pausing.earlier_clock(connection, now)
    return connection.execute(_select_ended.limit(1), {"b_account": account, "b_at": at}).first() is not None


def end_holds(connection: Connection, account: str, *, now: datetime, min_ttl: timedelta, limit: int) -> int:
    """End up to *limit* holds of *account* that have reached their end, and return how many.

    Their records are due when they were, and not before *min_ttl* has passed; those without a due time are kept. A
    clock that is ahead of the database's ends no hold early, and one that is behind makes nothing due early.
    """
    at = pausing.earlier_clock(connection, now)
    statement = _select_ended.limit(limit).with_for_update(skip_locked=True)
    rows: Sequence[Any] = connection.execute(statement, {"b_account": account, "b_at": at}).all()
    if not rows:
        return 0
    due_from = _database_clock(connection, now) + min_ttl
    connection.execute(_set_released, [_released_values(row, due_from) for row in rows])
    append_entries(connection, [entry for row in rows for entry in _released_entries(row, due_from, now)])
    return len(rows)


def _released_values(row: Row[Any], due_from: datetime) -> dict[str, Any]:
    return {
        "b_seq": row.seq,
        "b_state": state_after(State.HELD, *_release_moves(row)),
        "b_due_at": row.due_at and max(row.due_at, due_from),
    }


def _released_entries(row: Row[Any], due_from: datetime, now: datetime) -> list[Entry]:
    detail = {"until": row.hold_until} | ({"dueAt": max(row.due_at, due_from)} if row.due_at else {})
    return [Entry(row.seq, now, move, ENDED, detail) for move in _release_moves(row)]


def _release_moves(row: Row[Any]) -> list[Move]:
    """Return the moves of a release: a scheduled record without a due time would wait forever."""
    return [Move.RELEASE] if row.due_at else [Move.RELEASE, Move.KEEP]


def _database_clock(connection: Connection, now: datetime) -> datetime:
    """Return the clock that no claim is ahead of: the database's, or *now* on SQLite."""
    if connection.dialect.name == "sqlite":
        return now
    return connection.scalar(select(func.statement_timestamp())) or now
