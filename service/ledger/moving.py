"""The moves of an operator: hold, release, keep, schedule, retry. The table in core.lifecycle says which are legal."""

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select, update

from service.core.key import Key
from service.core.lifecycle import Move, State, interrupting_moves, state_after
from service.ledger.history import Entry, append_entries
from service.ledger.schema import records


def move_record(
    connection: Connection, key: Key, wanted: Move, *, now: datetime, actor: str, reason: str | None
) -> Row[Any] | None:
    """Make the operator's move *wanted* and return the record after it; None if there is no record.

    Raises: IllegalMoveError when the record's state does not allow it, as while its DELETE may be in progress.
    """
    mine = (records.c.account == key.account, records.c.id == key.id)
    row = connection.execute(select(records).where(*mine).with_for_update()).first()
    if row is None:
        return None
    moves = _moves(row, wanted)
    state = state_after(State(row.state), *moves)
    wake_at = max(row.due_at, now) if state is State.SCHEDULED else None
    connection.execute(
        update(records)
        .where(records.c.seq == row.seq, records.c.state == row.state)
        .values(state=state, wake_at=wake_at, **_changes(wanted, actor=actor, reason=reason))
    )
    detail = {"reason": reason} if reason else None
    append_entries(connection, [Entry(row.seq, now, step, actor, detail) for step in moves])
    return connection.execute(select(records).where(records.c.seq == row.seq)).one()


def _moves(row: Row[Any], wanted: Move) -> list[Move]:
    """Return *wanted* with the moves that must come before it, and those that a later webhook announced."""
    if wanted in (Move.HOLD, Move.KEEP):
        return [*interrupting_moves(State(row.state), is_copied=row.copied_attempt == row.attempts), wanted]
    if wanted is Move.RETRY and row.hold_reason is not None:
        return [wanted, Move.HOLD]
    # A scheduled record without a due time would wait forever.
    return [wanted, Move.KEEP] if row.due_at is None else [wanted]


def _changes(wanted: Move, *, actor: str, reason: str | None) -> dict[str, Any]:
    """Return the columns that *wanted* changes, without state and wake_at."""
    # Time on hold does not count toward MAYFLY_GIVE_UP_AFTER.
    fresh = {"failing_since": None, "failures": 0}
    match wanted:
        case Move.HOLD:
            return {"hold_by": actor, "hold_reason": reason}
        case Move.RELEASE:
            return {"hold_by": None, "hold_reason": None, **fresh}
        case Move.KEEP:
            return {"due_at": None, "rule": f"kept by {actor}", "ttl_seconds": None}
        case Move.RETRY:
            return {"refusals": 0, **fresh}
        case _:
            raise ValueError(f"{wanted} is not a move of an operator")
