"""Requirements: no generation is deleted before the targets that are required have taken its webhooks.

The claim of a record reads them, and the copy before its DELETE once more. Both have locked the record by then, and a
webhook locks or inserts it before it inserts its deliveries. So each requirement is either committed before it is read
here, or its webhook waits until the claim or the copy is committed; it then counts for what comes next. Whoever locks
deliveries as well locks the records first.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Row, Text, and_, bindparam, select, update
from sqlalchemy.dialects import postgresql, sqlite

from service.core.forwarding import DeliveryState
from service.core.key import Key
from service.core.lifecycle import Move, State, state_after
from service.core.requiring import OpenDelivery, describe_failed, find_failed
from service.ledger.delivery_schema import deliveries, requirements
from service.ledger.history import Entry, append_entries
from service.ledger.schema import group_by_account, records

# Whoever retries a record because its target has taken the webhook after all; the target's id follows.
ACTOR_PREFIX: Final = "forward "
# When a record is looked at again that waits for its target. It is only a net: the target's 2xx brings it forward.
_AGAIN: Final = timedelta(minutes=10)

_select_open = (
    select(
        requirements.c.account,
        requirements.c.generation,
        *(deliveries.c[name] for name in ("seq", "id", "target", "state", "received_at", "attempts", "wake_at")),
        deliveries.c.last_error,
    )
    .join(deliveries, deliveries.c.seq == requirements.c.delivery)
    .where(
        requirements.c.account == bindparam("account"),
        requirements.c.generation.in_(bindparam("ids", expanding=True)),
        deliveries.c.state != DeliveryState.DELIVERED,
    )
    .order_by(deliveries.c.seq)
)
_of_row = and_(records.c.seq == bindparam("b_seq"), records.c.state == bindparam("b_before"))
_set_waiting = (
    update(records)
    .where(_of_row)
    .values(
        state=State.SCHEDULED,
        wake_at=bindparam("b_wake_at"),
        waits_for=bindparam("b_target"),
        # The time for which it waits does not count toward MAYFLY_GIVE_UP_AFTER.
        failing_since=None,
        failures=0,
        refusals=0,
    )
)
_set_failed = (
    update(records)
    .where(_of_row)
    .values(
        state=State.FAILED, wake_at=None, waits_for=bindparam("b_target"), last_error=bindparam("b_error", type_=Text)
    )
)
_inherit = {
    dialect.name: statement(requirements).on_conflict_do_nothing()
    for dialect, statement in ((sqlite.dialect, sqlite.insert), (postgresql.dialect, postgresql.insert))
}


def find_open(connection: Connection, keys: Iterable[Key]) -> dict[Key, list[OpenDelivery]]:
    """Return the required deliveries of *keys* that have not succeeded, oldest first; one statement per account."""
    found: dict[Key, list[OpenDelivery]] = {}
    for mine in group_by_account(keys):
        rows: Sequence[Any] = connection.execute(_select_open, mine).all()
        for row in rows:
            found.setdefault(Key(row.account, row.generation), []).append(_read_open(row))
    return found


def _read_open(row: Row[Any]) -> OpenDelivery:
    return OpenDelivery(
        row.seq,
        row.id,
        row.target,
        DeliveryState(row.state),
        row.received_at,
        row.attempts,
        row.wake_at,
        row.last_error,
    )


def keep_waiting(connection: Connection, rows: Sequence[Row[Any]], *, now: datetime, actor: str) -> set[int]:
    """Let those of *rows* wait whose target has not taken the webhook, and return their numbers.

    *rows* are locked, and have ``seq``, ``account``, ``id``, ``state`` and ``attempts``: scheduled, or deleting without
    a DELETE yet. A record whose delivery has failed is given up.
    """
    found = find_open(connection, [Key(row.account, row.id) for row in rows])
    if not found:
        return set()
    blocked = [(row, found[Key(row.account, row.id)]) for row in rows if Key(row.account, row.id) in found]
    waiting = [(row, theirs) for row, theirs in blocked if not find_failed(theirs)]
    if waiting:
        connection.execute(_set_waiting, [_waiting_values(row, theirs, now) for row, theirs in waiting])
    append_entries(connection, [entry for row, theirs in waiting for entry in _lost(row, theirs, now, actor)])
    fail_records(connection, [(row, theirs) for row, theirs in blocked if find_failed(theirs)], now=now, actor=actor)
    return {row.seq for row, _ in blocked}


def fail_records(
    connection: Connection, failed: Sequence[tuple[Row[Any], Sequence[OpenDelivery]]], *, now: datetime, actor: str
) -> None:
    """Give up records, which are locked, because of deliveries that have failed."""
    reasons = [(row, find_failed(theirs)) for row, theirs in failed]
    entries = []
    for row, theirs in reasons:
        stopped = [Move.LOSE_LEASE] if row.state == State.DELETING else []
        state_after(State(row.state), *stopped, Move.GIVE_UP)
        entries += _lost(row, theirs, now, actor)
        detail = {"target": theirs[0].target, "error": describe_failed(theirs)}
        entries.append(Entry(row.seq, now, Move.GIVE_UP, actor, detail))
    if reasons:
        connection.execute(_set_failed, [_failed_values(row, theirs) for row, theirs in reasons])
    append_entries(connection, entries)


def _waiting_values(row: Row[Any], theirs: Sequence[OpenDelivery], now: datetime) -> dict[str, Any]:
    # Before the next attempt at the delivery that is tried last nothing can change.
    again = max((one.next_at for one in theirs if one.next_at is not None), default=now)
    target = theirs[0].target
    return {"b_seq": row.seq, "b_before": row.state, "b_wake_at": max(again, now + _AGAIN), "b_target": target}


def _failed_values(row: Row[Any], theirs: Sequence[OpenDelivery]) -> dict[str, Any]:
    error = describe_failed(theirs)
    return {"b_seq": row.seq, "b_before": row.state, "b_target": theirs[0].target, "b_error": error}


def _lost(row: Row[Any], theirs: Sequence[OpenDelivery], now: datetime, actor: str) -> list[Entry]:
    """Return what the history says of a claim that ends before its DELETE; a record that only waits does not move."""
    if row.state != State.DELETING:
        return []
    return [Entry(row.seq, now, Move.LOSE_LEASE, actor, {"attempt": row.attempts, "target": theirs[0].target})]


def inherit_requirements(connection: Connection, batch: Key, keys: Sequence[Key]) -> None:
    """Let the generations of *keys* wait for what their *batch* waits for."""
    mine = (requirements.c.account == batch.account, requirements.c.generation == batch.id)
    theirs = list(connection.scalars(select(requirements.c.delivery).where(*mine)))
    rows = [{"account": key.account, "generation": key.id, "delivery": one} for key in keys for one in theirs]
    if rows:
        connection.execute(_inherit[connection.dialect.name], rows)


def inherit_again(connection: Connection, batch: Key) -> None:
    """Let the generations that wait for a webhook of *batch* wait for all of them: another one came."""
    mine = (requirements.c.account == batch.account, requirements.c.generation == batch.id)
    theirs = select(requirements.c.generation).where(
        requirements.c.account == batch.account,
        requirements.c.generation != batch.id,
        requirements.c.delivery.in_(select(requirements.c.delivery).where(*mine)),
    )
    inherit_requirements(connection, batch, [Key(batch.account, one) for one in connection.scalars(theirs.distinct())])


def replay_failed(connection: Connection, key: Key, *, now: datetime) -> int:
    """Begin anew with the failed deliveries that the record of *key*, which is locked, waits for; return how many."""
    required = select(requirements.c.delivery).where(
        requirements.c.account == key.account, requirements.c.generation == key.id
    )
    failed = (
        select(deliveries.c.seq)
        .where(deliveries.c.seq.in_(required), deliveries.c.state == DeliveryState.FAILED)
        # In the order of settle_deliveries(), to avoid deadlocks.
        .order_by(deliveries.c.id)
        .with_for_update()
    )
    seqs = list(connection.scalars(failed))
    if seqs:
        again = {"state": str(DeliveryState.WAITING), "since": now, "wake_at": now, "finished_at": None}
        fresh = {"tries": 0, "leased_until": None}
        connection.execute(update(deliveries).where(deliveries.c.seq.in_(seqs)).values(again | fresh))
    return len(seqs)
