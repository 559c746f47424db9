"""Reading the ledger: one record, pages of records, and the backlog."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum, auto
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    bindparam,
    case,
    func,
    literal,
    literal_column,
    or_,
    select,
    tuple_,
)

from service.core.key import Key
from service.core.lifecycle import State
from service.core.retention import INVALID_RULE
from service.ledger.cursors import Place, make_cursor, read_cursor
from service.ledger.labelling import has_labels, read_labels
from service.ledger.schema import records

MAX_PAGE = 500
# A page ends before the record that would make it larger; a single record may be.
MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
# What a record adds to its texts: the names of its fields, times and numbers.
_RECORD_BYTES: Final = 1200
# So many records are read at first, then as many as there may be room for.
_READ_AT_ONCE, _MOST_AT_ONCE = 16, 128
# How many records one page of a search reads: some 15 ms.
SEARCHED = 10_000
# The states in which a record has a wake_at.
WATCHED = (State.SCHEDULED, State.DELETING)


class Span(NamedTuple):
    """From *since* on and before *until*; None is no bound."""

    since: datetime | None = None
    until: datetime | None = None

    def conditions(self, column: ColumnElement[datetime | None]) -> list[ColumnElement[bool]]:
        """Return what *column* must fulfil to be within."""
        found: list[ColumnElement[bool]] = []
        if self.since is not None:
            found.append(column >= self.since)
        if self.until is not None:
            found.append(column < self.until)
        return found


_ALL: Final = Span()


@dataclass(frozen=True, slots=True)
class Filter:
    """What a page is filtered by; None, and a span without bounds, filter nothing.

    *status* is one of sync.so's, in any case. *due* is when the record is or was due, whatever its state is now.
    """

    state: State | None = None
    status: str | None = None
    project_id: str | None = None
    received: Span = _ALL
    due: Span = _ALL
    deleted: Span = _ALL
    text: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    account: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Records without their bodies, newest first, and the cursor of the next page, None on the last one.

    *size* is about how many bytes they have in JSON; *is_full*: one more would be beyond a limit.
    """

    rows: Sequence[Row[Any]]
    labels: Mapping[int, Mapping[str, str]]  # by the seq of the record
    next_cursor: str | None
    size: int
    is_full: bool


def find_row(connection: Connection, key: Key) -> Row[Any] | None:
    """Return the record of *key*, None if there is none."""
    return connection.execute(select(records).where(records.c.account == key.account, records.c.id == key.id)).first()


# Without the bodies: each of 500 rows could have a megabyte.
_LISTED = [column for column in records.c if column.name not in {"notification", "copy"}]
_select_listed = select(*_LISTED).where(records.c.seq.in_(bindparam("seqs", expanding=True)))
# The order of pages: a record that arrives between two requests does not shift the others.
_PLACE = (records.c.received_at, records.c.seq)
_NEWEST_FIRST = tuple(column.desc() for column in _PLACE)


def read_page(
    connection: Connection, wanted: Filter, *, limit: int, cursor: str | None, room: int = MAX_PAGE_BYTES
) -> Page:
    """Return the page of up to *limit* records after *cursor*, or fewer: they have about *room* bytes in JSON.

    A search for a text reads SEARCHED records at most, so that a large ledger does not make it slow. Its page may be
    short or empty; the next page continues after the last record that was read.

    Raises: CursorError.
    """
    after = [] if cursor is None else [tuple_(*_PLACE) < _bound(read_cursor(cursor))]
    conditions = filter_records(wanted, is_sqlite=connection.dialect.name == "sqlite") + after
    last = None if wanted.text is None else _last_searched(connection, wanted, after)
    if last is not None:
        conditions.append(tuple_(*_PLACE) >= _bound(last))
    places = connection.execute(select(*_PLACE).where(*conditions).order_by(*_NEWEST_FIRST).limit(limit + 1)).all()
    rows, size = _read_rows(connection, [row.seq for row in places[:limit]], room=room)
    if is_full := len(rows) < len(places):
        last = (rows[-1].received_at, rows[-1].seq)
    labels = read_labels(connection, [row.seq for row in rows])
    return Page(rows, labels, None if last is None else make_cursor(last), size, is_full)


def _read_rows(connection: Connection, seqs: Sequence[int], *, room: int) -> tuple[list[Row[Any]], int]:
    """Return the records *seqs*, in their order, that fit into *room* bytes, one at least; and their size.

    They are read a few at a time: what does not fit is not in memory, and no database sorts it.
    """
    rows: list[Row[Any]] = []
    size, at_once = 0, _READ_AT_ONCE
    while len(rows) < len(seqs):
        wanted = seqs[len(rows) : len(rows) + at_once]
        found = {row.seq: row for row in connection.execute(_select_listed, {"seqs": wanted})}
        for seq in wanted:
            row = found[seq]
            added = _RECORD_BYTES + sum(len(value.encode()) for value in row if isinstance(value, str))
            if rows and size + added > room:
                return rows, size
            rows.append(row)
            size += added
        at_once = min(_MOST_AT_ONCE, 1 + (room - size) * len(rows) // size)
    return rows, size


def _last_searched(connection: Connection, wanted: Filter, after: Sequence[ColumnElement[bool]]) -> Place | None:
    """Return the place of the last record that a search reads; None if it reads all that are left."""
    bounds = (*wanted.received.conditions(records.c.received_at), *after)
    statement = select(*_PLACE).where(*bounds).order_by(*_NEWEST_FIRST)
    row = connection.execute(statement.offset(SEARCHED - 1).limit(1)).first()
    return None if row is None else (row.received_at, row.seq)


def _bound(place: Place) -> ColumnElement[Any]:
    return tuple_(*(literal(value, column.type) for value, column in zip(place, _PLACE, strict=True)))


def find_accounts(connection: Connection) -> list[str]:
    """Return the accounts that have records, sorted."""
    found: list[str] = []
    after = ""
    # One entry of the index (account, id) each; a DISTINCT would read all of it.
    while (
        account := connection.scalar(select(func.min(records.c.account)).where(records.c.account > after))
    ) is not None:
        found.append(account)
        after = account
    return found


def next_wake(connection: Connection) -> datetime | None:
    """Return the earliest wake_at; None if no record waits."""
    # Each reads one entry of the index (account, state, wake_at).
    first = [
        connection.scalar(
            select(records.c.wake_at)
            .where(records.c.account == account, records.c.state == state, records.c.wake_at.is_not(None))
            .order_by(records.c.wake_at)
            .limit(1)
        )
        for account in find_accounts(connection)
        for state in WATCHED
    ]
    return min((wake_at for wake_at in first if wake_at is not None), default=None)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits for a worker or an operator; *oldest_overdue* is the first number to show that nothing is deleted.

    A deferred record is overdue after the time of its next attempt, a claimed one after the end of its lease.
    """

    oldest_overdue: timedelta
    due: int
    failed: int


def read_backlog(connection: Connection, *, now: datetime) -> Backlog:
    """Count what is due at *now* and what was given up."""
    first = next_wake(connection)
    overdue = max(now - first, timedelta(0)) if first is not None else timedelta(0)
    accounts = find_accounts(connection)  # so that the index (account, state, wake_at) serves
    due = select(func.count()).where(
        records.c.account.in_(accounts), records.c.state.in_(WATCHED), records.c.wake_at <= now
    )
    failed = select(func.count()).where(records.c.state == State.FAILED)
    return Backlog(overdue, connection.scalar(due) or 0, connection.scalar(failed) or 0)


class HeldCause(StrEnum):
    """What holds a record."""

    OPERATOR = auto()
    OVERRIDE = auto()
    POLICY = auto()
    INVALID_OVERRIDE = auto()  # nobody asked for this hold, so an operator must look at it


# Who puts an override's hold on a record: the webhook, that of its batch, an app, or an attempt that the API showed it.
_BY_OVERRIDE = ("webhook", "batch", "sweep", "override", "app")


def count_held(connection: Connection) -> dict[HeldCause, int]:
    """Return how many records are held for each cause."""
    is_override = records.c.hold_by.in_(_BY_OVERRIDE)
    cause = case(
        (and_(is_override, records.c.hold_reason.startswith(INVALID_RULE)), HeldCause.INVALID_OVERRIDE.value),
        (is_override, HeldCause.OVERRIDE.value),
        (records.c.hold_by == "policy", HeldCause.POLICY.value),
        else_=HeldCause.OPERATOR.value,
    ).label("cause")
    rows = connection.execute(select(cause, func.count()).where(records.c.state == State.HELD).group_by(cause))
    found = {HeldCause(name): number for name, number in rows}
    return {one: found.get(one, 0) for one in HeldCause}


def count_by_state(connection: Connection) -> dict[State, int]:
    """Return how many records are in each state."""
    rows = connection.execute(select(records.c.state, func.count()).group_by(records.c.state))
    found = {State(state): number for state, number in rows}
    return {state: found.get(state, 0) for state in State}


def filter_records(wanted: Filter, *, is_sqlite: bool) -> list[ColumnElement[bool]]:
    """Return the conditions of *wanted*."""
    status = wanted.status and wanted.status.upper()
    equal = (
        (records.c.account, wanted.account),
        (records.c.state, wanted.state),
        (records.c.status, status),
        (records.c.project_id, wanted.project_id),
    )
    conditions: list[ColumnElement[bool]] = [column == value for column, value in equal if value is not None]
    if status not in (None, "COMPLETED"):
        conditions.append(records.c.status != literal_column("'COMPLETED'"))  # as in the partial index, to match it
    conditions += wanted.received.conditions(records.c.received_at)
    spans = [*wanted.due.conditions(records.c.due_at), *wanted.deleted.conditions(records.c.deleted_at)]
    if is_sqlite:
        # Without statistics it takes these for likely, and would rather read all records in the order of a page.
        spans = [func.likelihood(condition, literal_column("0.001")) for condition in spans]
    conditions += [*spans, *has_labels(wanted.labels)]
    if wanted.text is not None:
        names = ("id", "output_file_name", "model", "error", "error_code")
        columns = (records.c[name] for name in names)
        conditions.append(or_(*(column.icontains(wanted.text, autoescape=True) for column in columns)))
    return conditions
