"""The facts behind an explanation: what the ledger knows of a record, and what concerns all records now."""

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, func, select

from service.core.durations import format_duration
from service.core.explaining import (
    MAX_AHEAD,
    WAITING,
    Facts,
    Surroundings,
    explain_record,
    explain_unseen,
    find_obstacles,
)
from service.core.holding import Hold
from service.core.key import Key, describe_missing
from service.core.lifecycle import State
from service.core.obstacles import Obstacle
from service.ledger import heartbeats, history, holding, pausing, reading, requiring
from service.ledger.account_reading import find_others
from service.ledger.schema import records


class Explanation(msgspec.Struct, rename="camel", frozen=True):
    """Why a generation is or is not deleted; *state* is None if there is no record of it."""

    account: str
    id: str
    state: State | None
    hold: Hold | None
    explain: str
    blocked_by: list[Obstacle]


def explain_key(connection: Connection, *, key: Key, now: datetime, is_dry_run: bool) -> Explanation:
    """Explain a generation, also one without a record."""
    row = reading.find_row(connection, key)
    if row is not None:
        return explain_row(connection, row, now=now, is_dry_run=is_dry_run)
    hold = holding.find_hold(connection, key)
    text, others = explain_unseen(key.id, hold), find_others(connection, key)
    if others:
        missing = describe_missing(key, others)
        unused = f" It is also on hold before its first webhook in account {key.account}." if hold else ""
        text = f"{missing[0].upper()}{missing[1:]}: ask for that account.{unused}"
    return Explanation(key.account, key.id, None, hold, text, [])


def explain_row(connection: Connection, row: Row[Any], *, now: datetime, is_dry_run: bool) -> Explanation:
    """Explain a record."""
    facts = _facts_of(connection, row)
    around = _read_surroundings(connection, row, now=now, is_dry_run=is_dry_run)
    obstacles = find_obstacles(facts, around)
    text = explain_record(facts, obstacles, around)
    return Explanation(row.account, row.id, State(row.state), facts.hold, text, obstacles)


def _facts_of(connection: Connection, row: Row[Any]) -> Facts:
    first = history.read_first(connection, row.seq)
    added_by = first.actor if first is not None and (first.detail or {}).get("added") else None
    hold = holding.hold_of(row) if row.state == State.HELD else None
    key = Key(row.account, row.id)
    required = (
        requiring.find_open(connection, [key]).get(key, ()) if row.state in (State.SCHEDULED, State.FAILED) else ()
    )
    if row.state in WAITING:  # it came before the first webhook, and no claim has seen it yet
        hold = holding.find_hold(connection, key)
    return Facts(
        id=row.id,
        state=State(row.state),
        status=row.status,
        rule=row.rule,
        ttl=None if row.ttl_seconds is None else format_duration(row.ttl_seconds),
        due_at=row.due_at,
        wake_at=row.wake_at,
        attempts=row.attempts,
        is_copied=row.copied_attempt == row.attempts,
        has_copy=row.copied_at is not None,
        outcome=row.outcome,
        deleted_at=row.deleted_at,
        last_error=row.last_error,
        hold=hold,
        look_at=row.look_at,
        looks=row.looks,
        is_adopted=row.notification is None and row.forgotten_at is None,
        is_of_batch=first is not None and first.actor == "batch",
        added_by=added_by,
        waits_for=row.waits_for,
        required=required,
    )


def _read_surroundings(connection: Connection, row: Row[Any], *, now: datetime, is_dry_run: bool) -> Surroundings:
    if row.state not in WAITING:
        return Surroundings(now, (), is_dry_run, None, 0)
    pauses = [
        Obstacle(p.kind, p.since, p.actor, p.reason, p.until) for p in pausing.find_pauses(connection, row.account)
    ]
    seen_at = heartbeats.last_beat(connection, heartbeats.WORKER)
    return Surroundings(now, pauses, is_dry_run, seen_at, _count_ahead(connection, row, now))


def _count_ahead(connection: Connection, row: Row[Any], now: datetime) -> int:
    """Count the records of the account that are due before *row*, up to MAX_AHEAD."""
    if row.state != State.SCHEDULED or row.wake_at is None or row.wake_at > now:
        return 0
    earlier = (
        select(records.c.seq)
        .where(records.c.account == row.account, records.c.state == State.SCHEDULED)
        .where(records.c.wake_at < row.wake_at)
        .limit(MAX_AHEAD)
    )
    return connection.scalar(select(func.count()).select_from(earlier.subquery())) or 0
