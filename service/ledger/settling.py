"""Writes of a worker to the records it has claimed: the copy, and the outcome of the attempt. A fence guards each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Date, Row, bindparam, func, select, update
from sqlalchemy import Text as TextType

from service.core.attempts import Outcome, Step, Verdict
from service.core.generation import choose_body
from service.core.lifecycle import Move, State, state_after
from service.core.retention import Retention
from service.ledger import daily_limit, history, holding, key_history, pausing, requiring
from service.ledger.claiming import Claim
from service.ledger.columns import GENERATION_COLUMNS, generation_values
from service.ledger.history import Entry, append_entries
from service.ledger.key_history import KeyOfAccount
from service.ledger.outcomes import Copy, CopyResult, Settled, Settlement
from service.ledger.pausing import Kind, Pause
from service.ledger.schema import records

_UNKNOWN_TO_KEY = "the API does not know it, nor any other generation yet; check SYNC_API_KEY"


def store_copies(
    connection: Connection, account: str, copies: Sequence[Copy], *, now: datetime, limit: int | None, actor: str
) -> list[CopyResult]:
    """Store what the API showed of *account*'s generations, and count their deletions against the daily *limit*."""
    mine = _lock_claimed(connection, [item.claim for item in copies])
    kept = [item for item in copies if item.claim.seq in mine and item.claim.lease_until > now]
    held = holding.hold_locked(connection, [mine[item.claim.seq] for item in kept], now=now)
    kept = [item for item in kept if item.claim.seq not in held]
    waiting = requiring.keep_waiting(connection, [mine[item.claim.seq] for item in kept], now=now, actor=actor)
    kept = [item for item in kept if item.claim.seq not in waiting]
    if not kept:
        return [CopyResult.LOST] * len(copies)
    today = daily_limit.day_of(now)
    if any(one.kind is Kind.OPERATOR for one in pausing.find_pauses(connection, account)):
        outcomes = {item.claim.seq: CopyResult.PAUSED for item in kept}
    else:
        others = [item.claim.seq for item in kept if mine[item.claim.seq].counted_on != today]
        reserved = daily_limit.reserve_deletes(
            connection, len(others), limit=limit, now=now, actor=actor, account=account
        )
        if limit is not None and reserved:
            connection.execute(_set_counted, [{"b_seq": seq, "b_day": today} for seq in others[:reserved]])
        beyond = set(others[reserved:])
        outcomes = {i.claim.seq: CopyResult.LIMITED if i.claim.seq in beyond else CopyResult.KEPT for i in kept}
    earlier = _read_copies(connection, [item.claim.seq for item in kept])
    connection.execute(
        _copy, [_copy_values(item, earlier.get(item.claim.seq), now, outcomes[item.claim.seq]) for item in kept]
    )
    return [outcomes.get(item.claim.seq, CopyResult.LOST) for item in copies]


def settle_attempts(
    connection: Connection, key: KeyOfAccount, settlements: Sequence[Settlement], *, now: datetime, actor: str
) -> list[Settled]:
    """Write the outcome of each attempt that is still claimed, unless its answer makes *key*, its API key, doubtful."""
    mine = _lock_claimed(connection, [item.claim for item in settlements])
    valid = [item for item in settlements if item.claim.seq in mine]
    doubted = _doubt_unknown(connection, key, valid, now=now, actor=actor)
    valid = [doubted.get(item.claim.seq, item) for item in valid]
    for statement, values in (
        (_confirm, [_confirm_values(item, now) for item in valid if item.step.move is Move.CONFIRM]),
        (_defer, [_defer_values(item) for item in valid if item.step.move is not Move.CONFIRM]),
        (_set_retention, [_retention_values(item, item.retention) for item in valid if item.retention is not None]),
        (_set_status, [{"b_seq": item.claim.seq, "b_status": item.status} for item in valid if item.status]),
        (_clear_delete, [{"b_seq": item.claim.seq} for item in valid if item.is_refund]),
    ):
        if values:
            connection.execute(statement, values)
    append_entries(connection, [entry for item in valid for entry in _entries(item, now, actor)])
    # What came too late for these.
    holding.remove_holds(connection, [item.claim.key for item in valid if item.step.move is Move.CONFIRM])
    counted = [mine[item.claim.seq].counted_on for item in valid if item.is_refund]
    daily_limit.refund_deletes(connection, key.account, [day for day in counted if day is not None])
    _update_pauses(connection, key.account, settlements, now=now, actor=actor)
    return [_outcome(connection, item, mine, doubted) for item in settlements]


def _outcome(
    connection: Connection, item: Settlement, mine: Mapping[int, Row[Any]], doubted: Mapping[int, Settlement]
) -> Settled:
    if item.claim.seq in doubted:
        return Settled.DOUBTED
    return Settled.SETTLED if item.claim.seq in mine else _find_settled(connection, item)


def _find_settled(connection: Connection, item: Settlement) -> Settled:
    """Tell a settlement that was committed before from one that is lost: its move is in the history."""
    for entry in history.read_entries(connection, item.claim.seq):
        detail = entry.detail or {}
        if detail.get("attempt") == item.claim.attempt and entry.move is item.step.move:
            return Settled.ALREADY
        if detail.get("attempt") == item.claim.attempt and detail.get("error") == _UNKNOWN_TO_KEY:
            return Settled.DOUBTED
    return Settled.LOST


def _doubt_unknown(
    connection: Connection, key: KeyOfAccount, settlements: Sequence[Settlement], *, now: datetime, actor: str
) -> dict[int, Settlement]:
    """Return deferrals, by record, instead of what is unknown to a key that may be another organisation's."""
    unknown = [item for item in settlements if item.step.outcome is Outcome.ALREADY_GONE]
    is_shown = any(item.is_shown for item in settlements)
    believed = key_history.note_answers(connection, key, is_shown=is_shown, unknown=len(unknown), now=now, actor=actor)
    return {
        item.claim.seq: replace(
            item, step=Step(Move.DEFER, item.claim.progress, retry_at=now), receipt=None, error=_UNKNOWN_TO_KEY
        )
        for item in unknown[believed:]
    }


_select_claimed = (
    select(*(records.c[name] for name in ("seq", "account", "id", "state", "attempts", "counted_on")))
    .where(records.c.seq.in_(bindparam("seqs", expanding=True)), records.c.state == State.DELETING)
    # In the same order as receive(), to avoid deadlocks.
    .order_by(records.c.account, records.c.id)
    .with_for_update()
)
# The fence of every write after a claim: no row matches once another attempt has begun.
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
        look_at=None,  # this was it
        # The API still shows it, so no earlier DELETE did delete it.
        unanswered_attempt=bindparam("b_unanswered_attempt"),
        # Where the API shows nothing, the webhook's value stays.
        **{
            name: func.coalesce(bindparam(f"b_{name}", type_=records.c[name].type), records.c[name])
            for name in GENERATION_COLUMNS
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
_set_counted = (
    update(records).where(records.c.seq == bindparam("b_seq")).values(counted_on=bindparam("b_day", type_=Date))
)
_set_status = update(records).where(records.c.seq == bindparam("b_seq")).values(status=bindparam("b_status"))
_clear_delete = (
    update(records).where(records.c.seq == bindparam("b_seq")).values(counted_on=None, unanswered_attempt=None)
)
_set_retention = (
    update(records)
    .where(records.c.seq == bindparam("b_seq"))
    .values(
        due_at=bindparam("b_due_at"),
        rule=bindparam("b_rule"),
        ttl_seconds=bindparam("b_ttl_seconds"),
        hold_by=bindparam("b_hold_by"),
        hold_reason=bindparam("b_hold_reason"),
        hold_until=bindparam("b_hold_until", type_=records.c.hold_until.type),
    )
)
_defer = (
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


def _lock_claimed(connection: Connection, claims: Sequence[Claim]) -> dict[int, Row[Any]]:
    rows: Sequence[Any] = connection.execute(_select_claimed, {"seqs": [item.seq for item in claims]}).all()
    attempts = {item.seq: item.attempt for item in claims}
    return {row.seq: row for row in rows if attempts[row.seq] == row.attempts}


def _read_copies(connection: Connection, seqs: Sequence[int]) -> dict[int, str]:
    """Return the copies of early looks, by record."""
    wanted = select(records.c.seq, records.c.copy).where(records.c.seq.in_(seqs), records.c.copy.is_not(None))
    return {row.seq: row.copy for row in connection.execute(wanted)}


def _copy_values(item: Copy, earlier: str | None, now: datetime, result: CopyResult) -> dict[str, Any]:
    columns = {f"b_{name}": value for name, value in generation_values(item.generation).items()}
    return columns | {
        "b_seq": item.claim.seq,
        "b_attempt": item.claim.attempt,
        "b_copy": choose_body(earlier, item.body),
        "b_copied_at": now,
        "b_unanswered_attempt": None if item.is_rehearsal or result is not CopyResult.KEPT else item.claim.attempt,
    }


def _confirm_values(item: Settlement, now: datetime) -> dict[str, Any]:
    return {
        "b_seq": item.claim.seq,
        "b_attempt": item.claim.attempt,
        "b_state": state_after(State.DELETING, Move.CONFIRM),
        "b_outcome": item.step.outcome,
        "b_deleted_at": now,
        "b_receipt": item.receipt,
    }


def _defer_values(item: Settlement) -> dict[str, Any]:
    state = state_after(State.DELETING, *_moves(item))
    return {
        "b_seq": item.claim.seq,
        "b_attempt": item.claim.attempt,
        "b_state": state,
        "b_wake_at": item.step.retry_at if state is State.SCHEDULED else None,
        "b_failing_since": item.step.progress.failing_since,
        "b_failures": item.step.progress.failures,
        "b_refusals": item.step.progress.refusals,
        "b_last_error": item.error,
    }


def _moves(item: Settlement) -> list[Move]:
    """Return the move that ends the attempt, and the one that an override in the API's answer adds."""
    if item.retention is None:
        return [item.step.move]
    if item.retention.hold_reason is not None:
        return [item.step.move, Move.HOLD]
    return [item.step.move, Move.KEEP] if item.retention.due_at is None else [item.step.move]


def _retention_values(item: Settlement, retention: Retention) -> dict[str, Any]:
    return {
        "b_seq": item.claim.seq,
        "b_due_at": retention.due_at,
        "b_rule": retention.rule,
        "b_ttl_seconds": None if retention.ttl is None else int(retention.ttl.total_seconds()),
        "b_hold_by": retention.held_by("override"),
        "b_hold_reason": retention.hold_reason,
        "b_hold_until": retention.hold_until,
    }


def _entries(item: Settlement, now: datetime, actor: str) -> list[Entry]:
    detail: dict[str, Any] = {"attempt": item.claim.attempt, "verdict": item.verdict}
    if item.step.outcome:
        detail["outcome"] = item.step.outcome
    if item.step.detail:
        detail["detail"] = item.step.detail
    if item.step.retry_at:
        detail["retryAt"] = item.step.retry_at
    if item.error:
        detail["error"] = item.error
    if item.retention:
        detail["rule"] = item.retention.rule
    return [Entry(item.claim.seq, now, move, actor, detail) for move in _moves(item)]


def _update_pauses(
    connection: Connection, account: str, settlements: Sequence[Settlement], *, now: datetime, actor: str
) -> None:
    """Pause *account*'s deletions when the API refuses its key, or answers 429; end the first once the key works."""
    # Throttled before unauthorized: in the order of their kinds, see resume().
    if waits := [item.throttle for item in settlements if item.throttle is not None]:
        pausing.throttle(connection, max(waits), now=now, actor=actor, account=account)
    if any(item.verdict is Verdict.UNAUTHORIZED for item in settlements):
        reason = "the API refuses the key"
        pausing.pause(connection, Pause(Kind.UNAUTHORIZED, now, actor, reason, now + pausing.PROBE_EVERY, account))
    elif any(item.is_key_good for item in settlements):
        pausing.resume(connection, [Kind.UNAUTHORIZED], account)
