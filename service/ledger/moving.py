"""What a person does to a record: hold, release, keep, schedule, retry. The table of moves says what goes when."""

from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Row, select, update

from service.generation import Key
from service.ledger.history import Entry, append
from service.ledger.schema import records
from service.lifecycle import Move, State, after

PERSONAL: Final = frozenset({Move.HOLD, Move.RELEASE, Move.KEEP, Move.RETRY})


def move(
    connection: Connection, key: Key, wanted: Move, *, now: datetime, actor: str, reason: str | None
) -> Row[Any] | None:
    """Make the move *wanted* of a person and return the record as it then is; None where there is no record.

    Raises: IllegalMoveError when the record's state does not have that move, as for one that is being deleted.
    """
    mine = (records.c.account == key.account, records.c.id == key.id)
    row = connection.execute(select(records).where(*mine).with_for_update()).first()
    if row is None:
        return None
    # What was to be kept before it was held is kept again: scheduled without a due time it would wait for ever.
    moves = [wanted, Move.KEEP] if wanted is Move.RELEASE and row.due_at is None else [wanted]
    state = State(row.state)
    for step in moves:
        state = after(state, step)
    connection.execute(
        update(records)
        .where(records.c.seq == row.seq, records.c.state == row.state)
        .values(state=state, **_changes(row, wanted, now=now, actor=actor, reason=reason))
    )
    detail = {"reason": reason} if reason else None
    append(connection, [Entry(row.seq, now, step, actor, detail) for step in moves])
    return connection.execute(select(records).where(records.c.seq == row.seq)).one()


def _changes(row: Row[Any], wanted: Move, *, now: datetime, actor: str, reason: str | None) -> dict[str, Any]:
    """Return the columns that *wanted* changes beside the state."""
    match wanted:
        case Move.HOLD:
            return {"wake_at": None, "hold_by": actor, "hold_reason": reason}
        case Move.RELEASE:
            wake_at = None if row.due_at is None else max(row.due_at, now)
            # Time on hold is no time of failing: it must not make the next failure the last.
            fresh = {"failing_since": None, "failures": 0}
            return {"wake_at": wake_at, "hold_by": None, "hold_reason": None, "hold_until": None, **fresh}
        case Move.KEEP:
            return {"wake_at": None, "due_at": None, "rule": f"kept by {actor}", "ttl_seconds": None}
        case Move.RETRY:
            return {"wake_at": max(row.due_at, now), "failing_since": None, "failures": 0, "refusals": 0}
        case _:
            raise ValueError(f"{wanted} is not a person's move")
