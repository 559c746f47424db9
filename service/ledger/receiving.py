"""Storing webhooks: one record per account and generation, however many webhooks arrive for it."""

from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Row, Text, bindparam, select, update

from service.core.holding import Hold
from service.core.key import Key
from service.core.lifecycle import Move, State, interrupting_moves, state_after
from service.ledger import completing, holding
from service.ledger.completing import has_ended, is_first_webhook
from service.ledger.history import Entry, append_entries
from service.ledger.inserting import ACTOR, Arrival, Receipt, insert_new, receipt_of_new, ttl_seconds
from service.ledger.schema import KEYS_OF_ACCOUNT, group_by_account, records

__all__ = ["ACTOR", "Arrival", "Receipt", "receive"]

_LATE: Final = "a later due time was announced while its DELETE was in progress"
_select_known = (
    select(
        records.c.seq,
        records.c.account,
        records.c.id,
        records.c.state,
        records.c.due_at,
        records.c.wake_at,
        records.c.attempts,
        records.c.copied_attempt,
        records.c.hold_by,
        records.c.hold_reason,
        records.c.forgotten_at,
        records.c.hold_until,
        records.c.notification,
        records.c.status,
        records.c.sent_at,
        records.c.rule,
        records.c.ttl_seconds,
    )
    .where(KEYS_OF_ACCOUNT)
    .order_by(records.c.account, records.c.id)
    .with_for_update()
)
_update_record = (
    update(records)
    .where(
        records.c.seq == bindparam("b_seq"),
        records.c.state == bindparam("b_before"),
        records.c.attempts == bindparam("b_attempts"),
    )
    .values(
        state=bindparam("b_state"),
        due_at=bindparam("b_due_at"),
        wake_at=bindparam("b_wake_at"),
        rule=bindparam("b_rule"),
        ttl_seconds=bindparam("b_ttl_seconds"),
        sent_at=bindparam("b_sent_at", type_=records.c.sent_at.type),
        hold_by=bindparam("b_hold_by", type_=Text),
        hold_reason=bindparam("b_hold_reason", type_=Text),
        hold_until=bindparam("b_hold_until", type_=records.c.hold_until.type),
    )
)


def receive(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Store *arrivals* in one transaction and return a receipt for each, in their order.

    A known generation keeps its first body; a record that no webhook told of yet gets it, with its labels. Of two
    webhooks the later due time wins, and a hold wins over both; while a DELETE may be in progress, they count once that
    has not succeeded. A due time never becomes earlier. Of two holds the longer one wins, also of those that came
    before the first webhook.
    """
    receipts: dict[int, Receipt] = {}
    waiting = dict(enumerate(arrivals))
    while waiting:
        # Each generation once per round, so that the second of two sees what the first has written. Sorted by key:
        # two processes that lock the same rows in different orders would deadlock.
        firsts = {arrival.key: index for index, arrival in reversed(waiting.items())}
        indices = [firsts[key] for key in sorted(firsts, key=attrgetter("account", "id"))]
        received = _receive_once(connection, [waiting.pop(index) for index in indices])
        receipts.update(zip(indices, received, strict=True))
    return [receipts[index] for index in range(len(arrivals))]


class _Changes(msgspec.Struct, frozen=True, gc=False):
    updates: list[dict[str, Any]]
    entries: list[Entry]
    late: list[tuple[Arrival, Hold]]


def _receive_once(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt]:
    """Store *arrivals*, one per generation: insert the new ones, then lock and update the others."""
    inserted = insert_new(connection, arrivals)
    new, holds = inserted.new, inserted.holds
    known = _lock_known(connection, [arrival.key for arrival in arrivals if arrival.key not in new])
    changes = _Changes([], [], [])
    receipts = [
        receipt_of_new(arrival, inserted, changes.entries)
        if arrival.key in new
        else _receipt_of_known(arrival, known[arrival.key], holds.get(arrival.key), changes)
        for arrival in arrivals
    ]
    moved = [arrival.key for arrival, receipt in zip(arrivals, receipts, strict=True) if receipt.is_moved]
    holding.remove_holds(connection, [key for key in moved if key in inserted.found])
    if changes.updates:
        connection.execute(_update_record, changes.updates)
    completing.complete_records(connection, [(one, known[one.key]) for one in arrivals if one.key in known])
    append_entries(connection, changes.entries)
    for arrival, hold in changes.late:
        holding.hold_unseen(connection, arrival.key, hold, now=arrival.received_at)
    return receipts


def _lock_known(connection: Connection, keys: Sequence[Key]) -> dict[Key, Row[Any]]:
    """Lock the records of *keys*, which are sorted."""
    if not keys:
        return {}
    rows: list[Any] = [row for mine in group_by_account(keys) for row in connection.execute(_select_known, mine).all()]
    return {Key(row.account, row.id): row for row in rows}


def _receipt_of_known(arrival: Arrival, before: Row[Any], hold: Hold | None, changes: _Changes) -> Receipt:
    """Decide what another webhook for a known generation changes, and add that to *changes*."""
    retention = arrival.retention
    due_at = retention.due_at if retention.is_later_than(before.due_at) else before.due_at
    existing = holding.hold_of(before)
    hold = None if hold is not None and existing is not None and not hold.is_longer_than(existing) else hold
    moves = _moves(arrival, before, due_at, is_hold=hold is not None)
    state = state_after(State(before.state), *(moves or ()))
    if moves is not None:
        # A deferred attempt, because of a Retry-After for example, is not made earlier.
        deferred_to = before.wake_at if before.state == State.SCHEDULED else None
        wake_at = max(due_at, deferred_to or due_at) if state is State.SCHEDULED and due_at else None
        changes.updates.append(_update_values(before, state, due_at, wake_at, arrival, hold or existing))
    elif (late := _late_hold(arrival, before, due_at, hold)) is not None:
        changes.late.append((arrival, late))
    if moves is not None or is_first_webhook(arrival, before):
        detail = {"rule": retention.rule, "announced": "again"}
        recorded = moves or [Move.RECEIVE]  # only the due time changed, or the record is completed
        changes.entries.extend(Entry(before.seq, arrival.received_at, move, arrival.actor, detail) for move in recorded)
    return Receipt(
        before.seq,
        state,
        before.due_at if moves is None else due_at,
        before.attempts,
        is_new=False,
        is_moved=moves is not None,
        is_conflict=_is_conflict(arrival, before),
    )


def _is_conflict(arrival: Arrival, before: Row[Any]) -> bool:
    has_other = before.forgotten_at is None and before.notification not in (None, arrival.body)
    return has_other and not arrival.is_adopted


def _late_hold(arrival: Arrival, before: Row[Any], due_at: datetime | None, hold: Hold | None) -> Hold | None:
    """Return what holds the record before its next attempt: its DELETE, which nothing can stop, may not succeed.

    A policy can schedule what is kept, and then its hold counts, too.
    """
    if hold is not None:
        return hold if before.state in (State.DELETING, State.KEPT) else None
    if before.state != State.DELETING:
        return None
    is_later = due_at != before.due_at and (due_at is None or due_at > arrival.received_at)
    return Hold(arrival.actor, _LATE, due_at) if is_later else None


def _moves(arrival: Arrival, before: Row[Any], due_at: datetime | None, *, is_hold: bool) -> list[Move] | None:
    """Return the moves that another webhook makes: an empty list if only the due time changes, None for no change."""
    state, is_copied = State(before.state), before.copied_attempt == before.attempts
    if state is State.FAILED and is_first_webhook(arrival, before) and not has_ended(before):
        return _moves_again(before, due_at, is_hold=is_hold)
    if state in (State.DELETED, State.KEPT) or not (is_hold or due_at != before.due_at):
        return None
    if state in (State.HELD, State.FAILED):
        return []  # it takes effect when an operator releases or retries the record
    stopped = interrupting_moves(state, is_copied=is_copied)
    if state is State.DELETING and (not stopped or not (is_hold or due_at is None or due_at > arrival.received_at)):
        return None  # too late, or still due
    if is_hold:
        return [*stopped, Move.HOLD]
    return [*stopped, Move.KEEP] if due_at is None else stopped


def _moves_again(before: Row[Any], due_at: datetime | None, *, is_hold: bool) -> list[Move]:
    """Return the moves of a record that was given up before its generation was seen: its webhook proves that it is."""
    if is_hold or before.hold_reason is not None:
        return [Move.RETRY, Move.HOLD]
    return [Move.RETRY, Move.KEEP] if due_at is None else [Move.RETRY]


def _update_values(  # noqa: PLR0917 - the columns of one row
    before: Row[Any],
    state: State,
    due_at: datetime | None,
    wake_at: datetime | None,
    arrival: Arrival,
    hold: Hold | None,
) -> dict[str, Any]:
    retention = arrival.retention
    is_later = retention.is_later_than(before.due_at)
    is_its_rule = is_later or hold is not None
    return {
        "b_seq": before.seq,
        "b_before": before.state,
        "b_attempts": before.attempts,
        "b_state": state,
        "b_due_at": due_at,
        "b_wake_at": wake_at,
        "b_rule": retention.rule if is_its_rule else before.rule,
        "b_ttl_seconds": ttl_seconds(retention) if is_its_rule else before.ttl_seconds,
        # Where the ttl is the arrival's, so is its start: otherwise it would look as if an operator had moved it.
        "b_sent_at": arrival.sent_at if before.notification is None and is_later else before.sent_at,
        "b_hold_by": hold and hold.by,
        "b_hold_reason": hold and hold.reason,
        "b_hold_until": hold and hold.until,
    }
