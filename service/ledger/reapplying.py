"""A changed policy on records that exist: read in batches, and changed only while they are as they were seen.

No record moves without this. A worker's safety net makes the job of one that is due earlier, within five seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Text, bindparam, case, literal, or_, select, tuple_, update

from service.core.generation import TERMINAL
from service.core.holding import ENDED
from service.core.lifecycle import Move, State, state_after
from service.core.matchers import Facts
from service.core.reapplying import Change, Effect, Existing, reapply_policy
from service.core.retention import DEFAULT_RULE, Policy
from service.core.rules import RULE_PREFIX, RuleSet, read_input_types
from service.ledger import pausing, requiring
from service.ledger.history import Entry, append_entries
from service.ledger.labelling import read_labels
from service.ledger.schema import events, records

# How the actor of these moves begins, so that they are not taken for an operator's decision about one record.
ACTOR_PREFIX: Final = "policy apply by "
# The states of records that a policy can change, in the order in which they are read.
STATES: Final = (State.KEPT, State.SCHEDULED)
# The inputs, which may be large, are read only if a rule asks about them.
_READ_AT_ONCE: Final = 1000
_INPUTS_AT_ONCE: Final = 200

_PLACE = (records.c.received_at, records.c.seq)
# By these an operator has decided about the record, though its rule does not say so; not by the end of a hold.
_DECISIONS = (Move.RELEASE, Move.RETRY, Move.REOPEN)
_select_decided = (
    select(events.c.record)
    .distinct()
    .where(
        events.c.record.in_(bindparam("seqs", expanding=True)),
        events.c.move.in_(_DECISIONS),
        events.c.actor != ENDED,
        ~events.c.actor.startswith(ACTOR_PREFIX),
        # A target has taken its webhook after all.
        ~events.c.actor.startswith(requiring.ACTOR_PREFIX),
    )
)
_COLUMNS = (
    *(records.c[name] for name in ("seq", "account", "id", "state", "rule", "due_at", "wake_at", "ttl_seconds")),
    *(records.c[name] for name in ("attempts", "failing_since", "failures", "refusals", "received_at", "sent_at")),
    *(records.c[name] for name in ("copied_at", "forgotten_at", "webhook_url", "status", "model", "error_code")),
    *(records.c[name] for name in ("project_id", "source", "output_file_name", "output_duration")),
    records.c.notification.is_not(None).label("has_webhook"),
    records.c.copy.is_not(None).label("has_copy"),
)
# What a forgotten record has lost may be what protects it.
_OF_POLICY = (
    records.c.forgotten_at.is_(None),
    or_(records.c.rule == DEFAULT_RULE, records.c.rule.startswith(RULE_PREFIX)),
)


class Place(NamedTuple):
    """Where a batch begins: among the records in *state*, behind the one received at *after* with the number *seq*."""

    state: State
    after: datetime | None = None
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A record that the policy had decided, as it was read; *row* has what must still be the same to change it."""

    row: Row[Any]
    existing: Existing


@dataclass(frozen=True, slots=True)
class Batch:
    """Some records, and where the next batch begins; None: there is no other."""

    seen: Sequence[Seen]
    next_place: Place | None


FIRST: Final = Place(STATES[0])


def read_batch(connection: Connection, rules: RuleSet, place: Place, *, until: datetime) -> Batch:
    """Return the next records that are scheduled or kept because the policy said so, received before *until*.

    Begin with FIRST. Each batch is a snapshot of its own, and an index is read in its order.
    """
    limit = _INPUTS_AT_ONCE if "input_type" in rules.asks_for else _READ_AT_ONCE
    after = [] if place.after is None else [tuple_(*_PLACE) > _bound(place.after, place.seq)]
    statement = (
        select(*_columns(rules))
        .where(records.c.state == place.state, records.c.received_at < until, *after, *_OF_POLICY)
        .order_by(*_PLACE)
        .limit(limit)
    )
    rows = connection.execute(statement).all()
    return Batch(_see(connection, rules, rows), _next_place(place.state, rows, limit))


def _next_place(state: State, rows: Sequence[Row[Any]], limit: int) -> Place | None:
    if len(rows) == limit:
        return Place(state, rows[-1].received_at, rows[-1].seq)
    later = STATES[STATES.index(state) + 1 :]
    return Place(later[0]) if later else None


def _bound(*values: object) -> ColumnElement[Any]:
    return tuple_(*(literal(value, column.type) for value, column in zip(values, _PLACE, strict=True)))


def _find_decided(connection: Connection, seqs: Sequence[int]) -> set[int]:
    """Return those of the records *seqs* that an operator has released, retried or reopened."""
    return {*connection.scalars(_select_decided, {"seqs": seqs})} if seqs else set()


def _columns(rules: RuleSet) -> tuple[ColumnElement[Any], ...]:
    return (*_COLUMNS, records.c.input) if "input_type" in rules.asks_for else _COLUMNS


def _see(connection: Connection, rules: RuleSet, rows: Sequence[Row[Any]]) -> list[Seen]:
    asks_for_labels = any(name.startswith("label.") for name in rules.asks_for)
    labels = read_labels(connection, [row.seq for row in rows]) if asks_for_labels else {}
    decided = _find_decided(connection, [row.seq for row in rows])
    return [Seen(row, _existing(row, labels.get(row.seq, {}), is_decided=row.seq in decided)) for row in rows]


def _existing(row: Row[Any], labels: Mapping[str, str], *, is_decided: bool) -> Existing:
    facts = Facts(
        account=row.account,
        status=row.status if row.status in TERMINAL else None,  # not known yet of one that was added by its id
        model=row.model,
        error_code=row.error_code,
        project=row.project_id,
        source=row.source,
        output_file_name=row.output_file_name,
        input_types=read_input_types((row.input or "null").encode()) if "input" in row._fields else (),
        output_duration=row.output_duration,
        labels=labels,
        # What a sweep adopted has the list's own words as its copy; what the results of a batch name may lack one.
        is_complete=row.has_copy,
    )
    return Existing(
        State(row.state),
        row.rule,
        row.due_at,
        None if row.ttl_seconds is None else timedelta(seconds=row.ttl_seconds),
        row.sent_at,
        row.webhook_url,
        facts,
        has_webhook=row.has_webhook,
        is_decided_by_operator=is_decided,
    )


def apply_policy(connection: Connection, policy: Policy, seen: Sequence[Seen], *, now: datetime, user: str) -> int:
    """Change what *policy* changes of *seen*, and return the number of records.

    A record that is not as it was seen stays as it is, and so does one that another has locked. Nothing becomes due
    before min_ttl has passed from now on, by the later of two clocks.
    """
    at = pausing.later_clock(connection, now)
    wanted = {one.row.seq: one for one in seen}
    locked = connection.execute(
        select(*_columns(policy.rules))
        .where(records.c.seq.in_([*wanted]))
        # In the same order as receive(), to avoid deadlocks.
        .order_by(records.c.account, records.c.id)
        .with_for_update(skip_locked=True)
    ).all()
    same = [wanted[row.seq] for row in locked if row == wanted[row.seq].row]
    decided = _find_decided(connection, [one.row.seq for one in same])
    found = [(one.row, reapply_policy(policy, one.existing, now=at)) for one in same if one.row.seq not in decided]
    changes = [(row, change) for row, change in found if isinstance(change, Change)]
    if changes:
        connection.execute(_change, [_changed_values(row, change) for row, change in changes])
        actor = f"{ACTOR_PREFIX}{user}"
        append_entries(connection, [entry for row, change in changes for entry in _entries(row, change, now, actor)])
    return len(changes)


_change = (
    update(records)
    .where(
        records.c.seq == bindparam("b_seq"),
        records.c.state == bindparam("b_before"),
        records.c.attempts == bindparam("b_attempts"),
    )
    .values(
        state=bindparam("b_state"),
        rule=bindparam("b_rule"),
        due_at=bindparam("b_due_at"),
        wake_at=bindparam("b_wake_at"),
        ttl_seconds=bindparam("b_ttl_seconds"),
        hold_by=bindparam("b_hold_by", type_=Text),
        hold_reason=bindparam("b_hold_reason", type_=Text),
        # One that was kept waits for nothing; one that waits goes on.
        waits_for=case((records.c.state == State.SCHEDULED, records.c.waits_for)),
        failing_since=bindparam("b_failing_since"),
        failures=bindparam("b_failures"),
        refusals=bindparam("b_refusals"),
    )
)


def _changed_values(row: Row[Any], change: Change) -> dict[str, Any]:
    found = change.retention
    state = state_after(State(row.state), *change.moves(State(row.state)))
    # The time until it is due again does not count toward MAYFLY_GIVE_UP_AFTER.
    is_fresh = change.effect is not Effect.SAME_TIME
    return {
        "b_seq": row.seq,
        "b_before": row.state,
        "b_attempts": row.attempts,
        "b_state": str(state),
        "b_rule": found.rule,
        "b_due_at": found.due_at,
        "b_wake_at": _wake_at(row, found.due_at) if state is State.SCHEDULED else None,
        "b_ttl_seconds": None if found.ttl is None else int(found.ttl.total_seconds()),
        "b_hold_by": found.held_by("policy"),
        "b_hold_reason": found.hold_reason,
        "b_failing_since": None if is_fresh else row.failing_since,
        "b_failures": 0 if is_fresh else row.failures,
        "b_refusals": 0 if is_fresh else row.refusals,
    }


def _wake_at(row: Row[Any], due_at: datetime | None) -> datetime | None:
    """Return the time of the next attempt: an attempt that was deferred, by a Retry-After, is not made earlier."""
    is_deferred = row.wake_at is not None and row.due_at is not None and row.wake_at > row.due_at
    return max(due_at, row.wake_at) if is_deferred and due_at is not None else due_at


def _entries(row: Row[Any], change: Change, now: datetime, actor: str) -> list[Entry]:
    found = change.retention
    detail = {"rule": found.rule, "dueAt": found.due_at, "oldRule": row.rule, "oldDueAt": row.due_at}
    if found.hold_reason is not None:
        detail["reason"] = found.hold_reason
    return [Entry(row.seq, now, move, actor, detail) for move in change.moves(State(row.state))]
