"""The moves of an operator: hold, release, keep, retry, reopen. The table in core.lifecycle says which are legal."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, select, update

from service.core.attempts import Outcome
from service.core.generation import check_id
from service.core.holding import Hold, longer_hold
from service.core.key import Key
from service.core.lifecycle import IllegalMoveError, Move, State, operator_moves, retry_moves, state_after
from service.ledger import holding, requiring
from service.ledger.database import Database
from service.ledger.history import Entry, append_entries
from service.ledger.schema import records


@dataclass(frozen=True, slots=True)
class Grace:
    """What a released record waits at least: *held* for one that was held, *fresh* for one that was kept or deleted."""

    held: timedelta
    fresh: timedelta

    @classmethod
    def of(cls, wanted: timedelta, min_ttl: timedelta) -> "Grace":
        """Return the grace *wanted*; *min_ttl* is the least for a record without a due time of its own."""
        return cls(wanted, max(wanted, min_ttl))


def move_record(
    connection: Connection,
    key: Key,
    wanted: Move,
    *,
    now: datetime,
    actor: str,
    reason: str | None,
    grace: Grace | None = None,
    until: datetime | None = None,
) -> Row[Any] | None:
    """Make the operator's move *wanted* and return the record after it; None if there is no record.

    A record that is in the state already stays as it is, but of two holds the longer one counts. *until* is the end of
    a hold. Without *grace* a held record is due when it was. A retry sends the required webhooks again that failed.

    Raises: IllegalMoveError when the record's state does not allow it, as while its DELETE may be in progress.
    """
    mine = (records.c.account == key.account, records.c.id == key.id)
    row = connection.execute(select(records).where(*mine).with_for_update()).first()
    if row is None:
        return None
    moves = _moves(row, wanted)
    hold = _end_unseen(connection, row, wanted, Hold(actor, reason, until))
    if not moves:
        return _prolong(connection, row, hold, now=now) if wanted is Move.HOLD else row
    state = state_after(State(row.state), *moves)
    if wanted is Move.RETRY:
        requiring.replay_failed(connection, key, now=now)
    changes = _changes(wanted, hold) | _due(row, wanted, now=now, actor=actor, grace=grace)
    due_at = changes.get("due_at", row.due_at)
    wake_at = max(due_at, now) if state is State.SCHEDULED else None
    connection.execute(
        update(records)
        .where(records.c.seq == row.seq, records.c.state == row.state)
        .values(state=state, wake_at=wake_at, waits_for=None, **changes)
    )
    detail = holding.hold_detail(hold) if wanted is Move.HOLD else _detail(row, wanted, reason=reason, due_at=due_at)
    append_entries(connection, [Entry(row.seq, now, step, actor, detail) for step in moves])
    return connection.execute(select(records).where(records.c.seq == row.seq)).one()


def _end_unseen(connection: Connection, row: Row[Any], wanted: Move, hold: Hold) -> Hold:
    """Remove a hold that the record's webhook did not see, and return the longest of all where *hold* is wanted."""
    if wanted not in (Move.HOLD, Move.RELEASE, Move.KEEP):
        return hold
    found = holding.release_unseen(connection, Key(row.account, row.id))
    if wanted is not Move.HOLD:
        return hold
    return longer_hold(longer_hold(hold, found), holding.hold_of(row)) or hold


async def move_generation(
    database: Database, key: Key, wanted: Move, by: Hold, *, now: datetime, grace: Grace | None = None
) -> Row[Any] | Hold | None:
    """Make the operator's move *wanted*: see move_record(). *by* says who and why, and until when for a hold.

    A generation without a record can be held, and released again: then the result is the hold that was stored or
    removed. A hold that was returned is in force. None: there is neither a record nor a hold.

    Raises: IllegalMoveError when it is too late; MalformedError for what can be no id; LedgerUnavailableError.
    """
    move = partial(
        move_record, key=key, wanted=wanted, now=now, actor=by.by, reason=by.reason, grace=grace, until=by.until
    )
    if (row := await database.write(move)) is not None or wanted not in (Move.HOLD, Move.RELEASE):
        return row
    if wanted is Move.HOLD:
        check_id(key.id)
        held: Hold | None = await database.write(partial(holding.hold_unseen, key=key, hold=by, now=now))
    else:
        held = await database.write(partial(holding.release_unseen, key=key))
    try:
        # A webhook that was committed at the same time may have seen no hold, or the one before. From now on all do.
        return await database.write(move) or held
    except IllegalMoveError:
        await database.write(partial(holding.remove_holds, keys=[key]))
        raise


def _prolong(connection: Connection, row: Row[Any], hold: Hold, *, now: datetime) -> Row[Any]:
    """Replace the hold of a record by *hold* if that is longer; return the record after it."""
    before = holding.hold_of(row)
    if before is not None and not hold.is_longer_than(before):
        return row
    connection.execute(update(records).where(records.c.seq == row.seq).values(**_hold_values(hold)))
    append_entries(connection, [Entry(row.seq, now, Move.HOLD, hold.by, holding.hold_detail(hold))])
    return connection.execute(select(records).where(records.c.seq == row.seq)).one()


def _hold_values(hold: Hold | None) -> dict[str, Any]:
    return {
        "hold_by": hold and hold.by,
        "hold_reason": hold and hold.reason,
        "hold_until": hold and hold.until,
    }


def _moves(row: Row[Any], wanted: Move) -> list[Move]:
    """Return *wanted* with the moves that must come before it, and those that a later webhook announced."""
    is_unseen = row.outcome == Outcome.ALREADY_GONE and row.copied_at is None
    is_copied = row.copied_attempt == row.attempts
    moves = operator_moves(State(row.state), wanted, is_copied=is_copied, is_unseen=is_unseen)
    if moves == [Move.RETRY]:
        return retry_moves(is_held=row.hold_reason is not None, has_due=row.due_at is not None)
    # A scheduled record without a due time would wait forever. Only one that was kept gets a new one.
    has_due = row.due_at is not None or row.state == State.KEPT
    return [wanted, Move.KEEP] if not has_due and moves == [Move.RELEASE] else moves


def _changes(wanted: Move, hold: Hold) -> dict[str, Any]:
    """Return the columns that *wanted* changes, without the state and the times at which it is due."""
    # Time on hold does not count toward MAYFLY_GIVE_UP_AFTER, and a failed record may come by a hold.
    fresh = {"failing_since": None, "failures": 0, "refusals": 0}
    # A forgotten record that is to be deleted gets a copy, which has personal data.
    remembered = {"forgotten_at": None}
    match wanted:
        case Move.HOLD:
            return _hold_values(hold)
        case Move.RELEASE:
            return {**_hold_values(None), **fresh, **remembered}
        case Move.KEEP:
            return {**_hold_values(None), "due_at": None, "rule": f"kept by {hold.by}", "ttl_seconds": None}
        case Move.RETRY:
            return fresh
        case Move.REOPEN:
            return {"outcome": None, "deleted_at": None, "receipt": None, **fresh, **remembered}
        case _:
            raise ValueError(f"{wanted} is not a move of an operator")


def _due(row: Row[Any], wanted: Move, *, now: datetime, actor: str, grace: Grace | None) -> dict[str, Any]:
    """Return the columns that say when a released or reopened record is due.

    A record that was kept is due by the operator's word alone, which then is its rule. Others keep their rule, so that
    an override that only the API shows still counts.
    """
    if wanted is Move.RELEASE and row.state == State.HELD:
        return {"due_at": max(row.due_at, now + grace.held)} if grace and row.due_at else {}
    if wanted not in (Move.RELEASE, Move.REOPEN):
        return {}
    if grace is None:
        raise ValueError(f"{wanted} needs a grace")
    due = {"due_at": now + grace.fresh}
    if wanted is Move.REOPEN:
        return due
    return {**due, "rule": f"released by {actor}", "ttl_seconds": int(grace.fresh.total_seconds())}


def _detail(row: Row[Any], wanted: Move, *, reason: str | None, due_at: datetime | None) -> dict[str, Any] | None:
    """Return what the history says about the move: from now on it has a reopened record's receipt, without the body."""
    detail: dict[str, Any] = {"reason": reason} if reason else {}
    if due_at is not None and due_at != row.due_at:
        detail["dueAt"] = due_at
    if wanted is Move.REOPEN:
        receipt = msgspec.json.decode(row.receipt, type=dict[str, Any]) if row.receipt else {}
        detail |= {"outcome": row.outcome, "deletedAt": row.deleted_at}
        detail["receipt"] = {name: receipt[name] for name in ("method", "status", "at") if name in receipt}
    return detail or None
