"""The ledger as the API and the command line show it: records with their history, pages, statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from service.core.batch import BatchState
from service.core.durations import format_duration
from service.core.holding import Hold
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.core.obstacles import Obstacle
from service.ledger import batches, explanations, heartbeats, history, holding, pausing, reading
from service.ledger.account_reading import AccountBacklog, read_backlogs
from service.ledger.columns import GENERATION_COLUMNS
from service.ledger.explanations import Explanation
from service.ledger.history import Entry
from service.ledger.labelling import read_labels
from service.ledger.pausing import ALL_ACCOUNTS, Kind
from service.ledger.reading import Page


class PauseShown(msgspec.Struct, frozen=True):
    """One pause of an *account*, None for all: *until* is its end or its next probe, None without either."""

    account: str | None
    kind: Kind
    since: datetime
    actor: str
    reason: str
    until: datetime | None


class Stats(msgspec.Struct, rename="camel", frozen=True):
    """Statistics of the ledger."""

    records: dict[State, int]
    oldest_overdue_seconds: float
    due: int
    pauses: list[PauseShown]
    worker_seen_at: datetime | None
    batches: dict[BatchState, int]
    accounts: list[AccountBacklog]


def read_stats(connection: Connection, accounts: Sequence[str], *, now: datetime) -> Stats:
    """Read the ledger's statistics; *accounts* are those that are configured."""
    backlog = reading.read_backlog(connection, now=now)
    counts = reading.count_by_state(connection)
    seen_at = heartbeats.last_beat(connection, heartbeats.WORKER)
    overdue, found = backlog.oldest_overdue.total_seconds(), batches.count_batches(connection)
    apart = read_backlogs(connection, accounts, now=now)
    return Stats(counts, overdue, backlog.due, _read_pauses(connection), seen_at, found, apart)


def _read_pauses(connection: Connection) -> list[PauseShown]:
    return [
        PauseShown(None if p.account == ALL_ACCOUNTS else p.account, p.kind, p.since, p.actor, p.reason, p.until)
        for p in pausing.find_pauses(connection)
    ]


class Event(msgspec.Struct, rename="camel", frozen=True):
    """One move in a record's history."""

    at: datetime
    move: Move
    actor: str
    detail: dict[str, Any] | None


class RecordRetention(msgspec.Struct, frozen=True):
    """The rule that decided how long the generation is kept; *ttl* in the form of MAYFLY_TTL, None for forever."""

    rule: str
    ttl: str | None


class Record(msgspec.Struct, rename="camel", frozen=True, kw_only=True, omit_defaults=False):
    """A record: the generation under sync.so's field names, and Mayfly's own fields.

    *input*, *options* and *segments* are as they came; one that JSON readers cannot read is a text. *waits_for* is the
    target that has not taken the webhook: the record is not deleted before, or has failed because of that.
    """

    account: str
    id: str
    state: State
    outcome: str | None
    status: str
    model: str | None
    created_at: str | None
    input: Any
    options: Any
    segments: Any
    output_url: str | None
    output_media_url: str | None
    segment_output_url: str | None
    synthesized_audio_url: str | None
    output_duration: float | None
    output_file_name: str | None
    project_id: str | None
    source: str | None
    webhook_url: str | None
    error: str | None
    error_code: str | None
    received_at: datetime
    due_at: datetime | None
    copied_at: datetime | None
    deleted_at: datetime | None
    forgotten_at: datetime | None
    attempts: int
    next_attempt_at: datetime | None
    waits_for: str | None
    last_error: str | None
    retention: RecordRetention
    labels: dict[str, str]
    hold: Hold | None
    archived: list[str]
    receipt: dict[str, Any] | None


class FullRecord(Record, rename="camel", frozen=True, kw_only=True, omit_defaults=False):
    """A record with its history and the bodies as they came: the webhook's, and the API's after the copy.

    *explain* says in plain words what becomes of it and why, *blocked_by* what blocks its deletion now.
    """

    notification: Any
    copy: Any
    events: list[Event]
    explain: str
    blocked_by: list[Obstacle]


class RecordPage(msgspec.Struct, rename="camel", frozen=True):
    """Records, newest first; *next_cursor* is None on the last page."""

    items: list[Record]
    next_cursor: str | None


def present_page(page: Page) -> RecordPage:
    """Convert a page of rows; up to 4 MiB take some 20 ms."""
    return RecordPage([present_record(row, page.labels.get(row.seq)) for row in page.rows], page.next_cursor)


def present_record(row: Row[Any], labels: Mapping[str, str] | None = None) -> Record:
    """Convert a row of a page to a Record."""
    return Record(**_record_fields(row, labels))


@dataclass(frozen=True, slots=True)
class Found:
    """What the ledger has about one record."""

    row: Row[Any]
    labels: Mapping[str, str] | None
    entries: Sequence[Entry]
    explained: Explanation


def find_record(connection: Connection, *, key: Key, now: datetime, is_dry_run: bool) -> Found | None:
    """Read one record with its history, its bodies and its explanation; None if there is none."""
    row = reading.find_row(connection, key)
    if row is None:
        return None
    labels = read_labels(connection, [row.seq]).get(row.seq)
    explained = explanations.explain_row(connection, row, now=now, is_dry_run=is_dry_run)
    return Found(row, labels, history.read_entries(connection, row.seq), explained)


def present_full(found: Found) -> FullRecord:
    """Convert what find_record() returned; with bodies of megabytes it takes tens of milliseconds."""
    row = found.row
    return FullRecord(
        **_record_fields(row, found.labels),
        notification=_as_received(row.notification),
        copy=_as_received(row.copy),
        events=[Event(e.at, e.move, e.actor, e.detail) for e in found.entries],
        explain=found.explained.explain,
        blocked_by=found.explained.blocked_by,
    )


def _record_fields(row: Row[Any], labels: Mapping[str, str] | None) -> dict[str, Any]:
    ttl = None if row.ttl_seconds is None else format_duration(row.ttl_seconds)
    return {name: getattr(row, name) for name in _COLUMNS} | {
        "state": State(row.state),
        "input": _as_received(row.input),
        "options": _as_received(row.options),
        "segments": _as_received(row.segments),
        "next_attempt_at": row.wake_at if row.state == State.SCHEDULED else None,
        "waits_for": row.waits_for if row.state in (State.SCHEDULED, State.FAILED) else None,
        "retention": RecordRetention(row.rule, ttl),
        "labels": dict(labels or {}),
        "hold": holding.hold_of(row) if row.state == State.HELD else None,
        "archived": [],
        "receipt": msgspec.json.decode(row.receipt) if row.receipt else None,
    }


# Columns that are shown unchanged.
_COLUMNS = (
    *("account", "id", "outcome", "status", *GENERATION_COLUMNS),
    *("received_at", "due_at", "copied_at", "deleted_at", "forgotten_at", "attempts", "last_error"),
)


def _as_received(text: str | None) -> msgspec.Raw | str | None:
    """Return the JSON *text* to be embedded as it is, or as a text where a reader could not read it."""
    if text is None:
        return None
    raw = text.encode()
    try:
        msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):  # such as 1e999, which is valid JSON and not a float
        return text
    return msgspec.Raw(raw)
