"""Holds and releases of all records that match a filter, in bounded steps; each record moves as a single one does."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

import msgspec
from sqlalchemy import Connection, func, select

from service.core.errors import ExplainedError
from service.core.holding import Hold
from service.core.key import Key
from service.core.lifecycle import IllegalMoveError, Move, State
from service.ledger import moving, reading
from service.ledger.database import Database
from service.ledger.moving import Grace
from service.ledger.reading import SEARCHED, Filter
from service.ledger.schema import records

# How many records one transaction moves: some 50 ms, for which webhooks of these generations wait.
BATCH: Final = 50
# The states that a move concerns; all other records stay as they are.
CONCERNED: Final = {
    Move.HOLD: (State.SCHEDULED, State.DELETING, State.FAILED, State.HELD),
    Move.RELEASE: (State.HELD,),
}


class ExpectationError(ExplainedError):
    """Another number of records matches than the one that was expected; nothing was moved."""


class Moved(msgspec.Struct, rename="camel", frozen=True):
    """What a move by filter did: *already* were in that state, *too_late* are deleted, or their DELETE is in progress.

    *is_complete* is False if the time was over first: the same call again does the rest.
    """

    moved: int
    already: int
    too_late: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """A move of all records that *chosen* matches; *by* says who, why and until when.

    *grace_of* returns the grace of an account's records, for a release.
    """

    move: Move
    chosen: Filter
    by: Hold
    grace_of: Callable[[str], Grace] | None = None


def count_matching(connection: Connection, chosen: Filter) -> dict[State, int]:
    """Return how many records in each state match."""
    conditions = reading.filter_records(chosen, is_sqlite=connection.dialect.name == "sqlite")
    rows = connection.execute(select(records.c.state, func.count()).where(*conditions).group_by(records.c.state))
    found = {State(state): number for state, number in rows}
    return {state: found.get(state, 0) for state in State}


async def move_matching(
    database: Database,
    wanted: Wanted,
    *,
    now: Callable[[], datetime],
    expected: int | None = None,
    seconds: float = float("inf"),
) -> Moved:
    """Move all records that match, for *seconds* at most.

    A release needs the number *expected* of records that it moves, and moves no more.

    Raises: ExpectationError if another number matches; LedgerUnavailableError, with the steps before it committed.
    """
    counts = await database.read(partial(count_matching, chosen=wanted.chosen))
    found = sum(counts[state] for state in CONCERNED[wanted.move])
    if wanted.move is not Move.HOLD and found != expected:
        raise ExpectationError(f"{found} records match, not {expected}: nothing was moved, look at the count again")
    left, deadline = found if wanted.move is not Move.HOLD else None, time.monotonic() + seconds
    total, after, is_complete = _Total(too_late=counts[State.DELETED] if wanted.move is Move.HOLD else 0), 0, False
    while not is_complete and time.monotonic() < deadline:
        size = BATCH if left is None else min(BATCH, left - total.moved)
        step = await database.read(partial(_read_step, wanted=wanted, after=after, limit=size)) if size else _Step()
        if step.keys:
            write = partial(_move_step, wanted=wanted, keys=step.keys, now=now())
            total = total.plus(await database.write(write))
        after, is_complete = step.after, step.is_last
    return Moved(total.moved, total.already, total.too_late, is_complete)


@dataclass(frozen=True, slots=True)
class _Total:
    moved: int = 0
    already: int = 0
    too_late: int = 0

    def plus(self, other: "_Total") -> "_Total":
        return _Total(self.moved + other.moved, self.already + other.already, self.too_late + other.too_late)


@dataclass(frozen=True, slots=True)
class _Step:
    keys: Sequence[Key] = ()
    after: int = 0
    is_last: bool = True


def _read_step(connection: Connection, *, wanted: Wanted, after: int, limit: int) -> _Step:
    """Return the next keys after the record number *after*; it reads SEARCHED records at most."""
    until = after + SEARCHED
    conditions = reading.filter_records(wanted.chosen, is_sqlite=connection.dialect.name == "sqlite")
    statement = (
        select(records.c.seq, records.c.account, records.c.id)
        .where(*conditions, records.c.state.in_(CONCERNED[wanted.move]))
        .where(records.c.seq > after, records.c.seq <= until)
        .order_by(records.c.seq)
        .limit(limit)
    )
    rows = connection.execute(statement).all()
    end = rows[-1].seq if len(rows) == limit else until
    newest = connection.scalar(select(func.max(records.c.seq))) or 0
    return _Step([Key(row.account, row.id) for row in rows], end, end >= newest)


def _move_step(connection: Connection, *, wanted: Wanted, keys: Sequence[Key], now: datetime) -> _Total:
    moved = already = too_late = 0
    # In the same order as receive(), to avoid deadlocks.
    for key in sorted(keys, key=lambda one: (one.account, one.id)):
        before = reading.find_row(connection, key)
        try:
            after = moving.move_record(
                connection,
                key,
                wanted.move,
                now=now,
                actor=wanted.by.by,
                reason=wanted.by.reason,
                until=wanted.by.until,
                grace=wanted.grace_of(key.account) if wanted.grace_of else None,
            )
        except IllegalMoveError:
            too_late += 1
            continue
        is_same = (
            before is None or after is None or (before.state, before.hold_until) == (after.state, after.hold_until)
        )
        already += is_same
        moved += not is_same
    return _Total(moved, already, too_late)
