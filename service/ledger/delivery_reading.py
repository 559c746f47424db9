"""Reading deliveries: pages, one as a whole, and what the metrics count."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, func, literal, select, tuple_

from service.core.forwarding import DeliveryState
from service.ledger.cursors import Place, make_cursor, read_cursor
from service.ledger.delivery_schema import deliveries
from service.ledger.reading import SEARCHED, Span

# How far the metrics count: a scrape must not take longer because a target does not answer.
COUNTED: Final = 5_000
_ALL: Final = Span()


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """What deliveries are filtered by; None, and a span without bounds, filter nothing.

    *generation* is its id, or that of a batch. *status* is one of sync.so's, in any case.
    """

    target: str | None = None
    state: DeliveryState | None = None
    generation: str | None = None
    account: str | None = None
    status: str | None = None
    received: Span = _ALL


@dataclass(frozen=True, slots=True)
class DeliveryPage:
    """Deliveries without their bodies, newest first, and the cursor of the next page, None on the last one."""

    rows: Sequence[Row[Any]]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Open:
    """How many deliveries of a target wait and have failed, and since when the oldest one waits."""

    waiting: int = 0
    failed: int = 0
    waiting_since: datetime | None = None


_PLACE: Final = (deliveries.c.received_at, deliveries.c.seq)
_NEWEST_FIRST: Final = tuple(column.desc() for column in _PLACE)
_is_waiting: Final = deliveries.c.wake_at.is_not(None)
_earlier: Final = deliveries.alias("earlier")
# The delivery that must end first: a target gets the webhooks of one generation in their order.
_behind: Final = (
    select(_earlier.c.id)
    .where(*(_earlier.c[name] == deliveries.c[name] for name in ("target", "account", "generation")))
    .where(_earlier.c.seq < deliveries.c.seq, _earlier.c.wake_at.is_not(None), _is_waiting)
    .order_by(_earlier.c.seq)
    .limit(1)
    .correlate(deliveries)
    .scalar_subquery()
    .label("behind")
)
# Each of 500 bodies could have a megabyte.
_UNLISTED: Final = frozenset({"body", "last_answer", "digest"})
_LISTED: Final[list[ColumnElement[Any]]] = [*(one for one in deliveries.c if one.name not in _UNLISTED), _behind]


def find_delivery(connection: Connection, delivery_id: str) -> Row[Any] | None:
    """Return the delivery of that id, with its body and what it is *behind*; None if there is none."""
    return connection.execute(select(deliveries, _behind).where(deliveries.c.id == delivery_id)).first()


def read_delivery_page(
    connection: Connection, wanted: DeliveryFilter, *, limit: int, cursor: str | None
) -> DeliveryPage:
    """Return the page of up to *limit* deliveries after *cursor*, each with what it is *behind*.

    A filter by account or status reads SEARCHED deliveries at most: its page may be short or empty, and the next one
    continues after the last that was read.

    Raises: CursorError.
    """
    after = [] if cursor is None else [tuple_(*_PLACE) < _bound(read_cursor(cursor))]
    last = _last_searched(connection, wanted, after)
    bounds = after if last is None else [*after, tuple_(*_PLACE) >= _bound(last)]
    places = _find_places(connection, wanted, bounds, limit + 1)
    if len(places) > limit:
        places = places[:limit]
        last = places[-1]
    seqs = [seq for _, seq in places]
    found = connection.execute(select(*_LISTED).where(deliveries.c.seq.in_(seqs)).order_by(*_NEWEST_FIRST))
    return DeliveryPage(found.all(), None if last is None else make_cursor(last))


def _find_places(
    connection: Connection, wanted: DeliveryFilter, bounds: Sequence[ColumnElement[bool]], limit: int
) -> list[Place]:
    """Return up to *limit* places, newest first.

    Those of one target or state are read for each target and state, of which there are few, and merged: no index has
    to be in the order of pages for each combination of filters.
    """
    statement = select(*_PLACE).where(*filter_deliveries(wanted), *bounds).order_by(*_NEWEST_FIRST).limit(limit)
    if wanted.generation is not None or (wanted.target is None and wanted.state is None):
        return [(row.received_at, row.seq) for row in connection.execute(statement)]
    targets = [wanted.target] if wanted.target is not None else find_targets(connection)
    states = [wanted.state] if wanted.state is not None else list(DeliveryState)
    found = [
        (row.received_at, row.seq)
        for target in targets
        for state in states
        for row in connection.execute(statement.where(deliveries.c.target == target, deliveries.c.state == state))
    ]
    return sorted(found, reverse=True)[:limit]


def _last_searched(
    connection: Connection, wanted: DeliveryFilter, after: Sequence[ColumnElement[bool]]
) -> Place | None:
    """Return the place of the last delivery that a page reads; None if it reads all that are left."""
    if wanted.generation is not None or (wanted.account is None and wanted.status is None):
        return None
    bounds = (*wanted.received.conditions(deliveries.c.received_at), *after)
    statement = select(*_PLACE).where(*bounds).order_by(*_NEWEST_FIRST)
    row = connection.execute(statement.offset(SEARCHED - 1).limit(1)).first()
    return None if row is None else (row.received_at, row.seq)


def _bound(place: Place) -> ColumnElement[Any]:
    return tuple_(*(literal(value, column.type) for value, column in zip(place, _PLACE, strict=True)))


def filter_deliveries(wanted: DeliveryFilter) -> list[ColumnElement[bool]]:
    """Return the conditions of *wanted*."""
    equal = (
        (deliveries.c.target, wanted.target),
        (deliveries.c.state, wanted.state),
        (deliveries.c.generation, wanted.generation),
        (deliveries.c.account, wanted.account),
        (deliveries.c.status, wanted.status and wanted.status.upper()),
    )
    conditions: list[ColumnElement[bool]] = [column == value for column, value in equal if value is not None]
    return conditions + wanted.received.conditions(deliveries.c.received_at)


def find_targets(connection: Connection) -> list[str]:
    """Return the targets that have deliveries, sorted; also those that are not configured any more."""
    found: list[str] = []
    after = ""
    # One entry of an index each; a DISTINCT would read all of it.
    while (
        target := connection.scalar(select(func.min(deliveries.c.target)).where(deliveries.c.target > after))
    ) is not None:
        found.append(target)
        after = target
    return found


def count_open(connection: Connection) -> dict[str, Open]:
    """Count what waits and what has failed of each target that has deliveries, COUNTED of each at most."""
    return {target: _count_open(connection, target) for target in find_targets(connection)}


def _count_open(connection: Connection, target: str) -> Open:
    mine = deliveries.c.target == target
    since = select(deliveries.c.since).where(mine, _is_waiting).order_by(deliveries.c.since).limit(1)
    waiting = _count(connection, mine, _is_waiting)
    failed = _count(connection, mine, deliveries.c.state == DeliveryState.FAILED)
    return Open(waiting, failed, connection.scalar(since))


def _count(connection: Connection, *conditions: ColumnElement[bool]) -> int:
    some = select(deliveries.c.target).where(*conditions).limit(COUNTED).subquery()
    return connection.scalar(select(func.count()).select_from(some)) or 0
