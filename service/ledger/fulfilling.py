"""What the outcome of a required delivery does to the records that wait for it, in the transaction of that outcome.

The claim decides in the end: see requiring. What is done here spares a record the wait until it is looked at again.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Row, bindparam, select, update

from service.core.forwarding import DeliveryState
from service.core.key import Key
from service.core.lifecycle import State, retry_moves, state_after
from service.core.requiring import OpenDelivery, describe_failed, find_failed
from service.ledger.delivery_schema import requirements
from service.ledger.history import Entry, append_entries
from service.ledger.requiring import ACTOR_PREFIX, fail_records, find_open
from service.ledger.schema import KEYS_OF_ACCOUNT, group_by_account, records

# How many ids one statement has; SQLite takes 32 766 parameters.
_IDS_AT_ONCE: Final = 1000


class Ready(msgspec.Struct, frozen=True, gc=False):
    """Attempt number *attempt*, from 1, at the record of *key* can start at the aware instant *at*."""

    key: Key
    attempt: int
    at: datetime


_select_required = (
    select(
        *(records.c[name] for name in ("seq", "account", "id", "state", "due_at", "wake_at", "attempts")),
        *(records.c[name] for name in ("hold_reason", "waits_for", "last_error")),
    )
    .where(KEYS_OF_ACCOUNT)
    # In the same order as receive(), to avoid deadlocks.
    .order_by(records.c.account, records.c.id)
    .with_for_update()
)
_set_ready = (
    update(records)
    .where(records.c.seq == bindparam("b_seq"), records.c.state == bindparam("b_before"))
    .values(
        state=bindparam("b_state"),
        wake_at=bindparam("b_wake_at", type_=records.c.wake_at.type),
        waits_for=None,
        last_error=bindparam("b_last_error", type_=records.c.last_error.type),
        failing_since=None,
        failures=0,
        refusals=0,
    )
)
_set_other = (
    update(records)
    .where(records.c.seq == bindparam("b_seq"), records.c.state == bindparam("b_before"))
    .values(waits_for=bindparam("b_target"), last_error=bindparam("b_last_error", type_=records.c.last_error.type))
)


def lock_required(connection: Connection, *deliveries: int) -> Sequence[Row[Any]]:
    """Lock the records that wait for those *deliveries*, and return them, sorted by key.

    To be called before the deliveries are locked or changed.
    """
    if not deliveries:
        return []
    wanted = select(requirements.c.account, requirements.c.generation).where(requirements.c.delivery.in_(deliveries))
    keys = sorted({(row.account, row.generation) for row in connection.execute(wanted)})
    return [
        row
        for start in range(0, len(keys), _IDS_AT_ONCE)
        for mine in group_by_account(Key(*key) for key in keys[start : start + _IDS_AT_ONCE])
        for row in connection.execute(_select_required, mine).all()
    ]


def settle_requirement(
    connection: Connection,
    *,
    delivery: int,
    state: DeliveryState,
    target: str,
    error: str | None,
    now: datetime,
    actor: str,
) -> list[Ready]:
    """Let the records that wait for *delivery* know its outcome; return those whose attempt can start.

    Delivered: what waited is due, and what had failed because of a delivery is retried, once nothing else that it waits
    for is open. Failed, because of *error*: what is scheduled is given up by *actor*; what is held or kept stays, and a
    claim fails it once it is released. Whether the delivery's own row says so already does not matter.
    """
    if state is DeliveryState.FAILED:
        fail_requirements(connection, [delivery], error=error, now=now, actor=actor)
    if state is not DeliveryState.DELIVERED:
        return []
    rows = [row for row in lock_required(connection, delivery) if _waits(row)]
    found = find_open(connection, [_key(row) for row in rows])
    others = {key: [one for one in theirs if one.seq != delivery] for key, theirs in found.items()}
    _name_others(connection, rows, others)
    return _make_ready(connection, [row for row in rows if not others.get(_key(row))], target, now)


def fail_requirements(
    connection: Connection, deliveries: Sequence[int], *, error: str | None = None, now: datetime, actor: str
) -> int:
    """Give up the scheduled records that wait for *deliveries*, which have failed; return how many.

    The reason is *error*, or that of their rows.
    """
    rows = [row for row in lock_required(connection, *deliveries) if row.state == State.SCHEDULED]
    found = find_open(connection, [_key(row) for row in rows])
    ended = set(deliveries)
    failed = []
    for row in rows:
        theirs = [_as_failed(one, error) if one.seq in ended else one for one in found.get(_key(row), ())]
        if find_failed(theirs):
            failed.append((row, theirs))
    fail_records(connection, failed, now=now, actor=actor)
    return len(failed)


def _as_failed(one: OpenDelivery, error: str | None) -> OpenDelivery:
    return msgspec.structs.replace(one, state=DeliveryState.FAILED, next_at=None, error=error or one.error)


def _key(row: Row[Any]) -> Key:
    return Key(row.account, row.id)


def _waits(row: Row[Any]) -> bool:
    """Whether a claim has met the requirement, or an outcome has failed the record because of it."""
    return row.waits_for is not None and row.state in (State.SCHEDULED, State.FAILED)


def _name_others(
    connection: Connection, rows: Sequence[Row[Any]], others: Mapping[Key, Sequence[OpenDelivery]]
) -> None:
    """Say of records that still wait for what."""
    values = []
    for row in rows:
        if theirs := others.get(_key(row)):
            failed = find_failed(theirs)
            error = describe_failed(failed) if failed and row.state == State.FAILED else row.last_error
            target = (failed or theirs)[0].target
            values.append({"b_seq": row.seq, "b_before": row.state, "b_target": target, "b_last_error": error})
    if values:
        connection.execute(_set_other, values)


def _make_ready(connection: Connection, rows: Sequence[Row[Any]], target: str, now: datetime) -> list[Ready]:
    """Let the next attempt at *rows* start when it is due."""
    values, entries, ready = list[dict[str, Any]](), list[Entry](), list[Ready]()
    for row in rows:
        is_failed = row.state == State.FAILED
        moves = retry_moves(is_held=row.hold_reason is not None, has_due=row.due_at is not None) if is_failed else []
        state = state_after(State(row.state), *moves)
        at = max(row.due_at, now) if state is State.SCHEDULED else None
        error = None if is_failed else row.last_error
        values.append(
            {"b_seq": row.seq, "b_before": row.state, "b_state": str(state), "b_wake_at": at, "b_last_error": error}
        )
        entries += [Entry(row.seq, now, move, f"{ACTOR_PREFIX}{target}", {"target": target}) for move in moves]
        if at is not None:
            ready.append(Ready(_key(row), row.attempts + 1, at))
    if values:
        connection.execute(_set_ready, values)
    append_entries(connection, entries)
    return ready
