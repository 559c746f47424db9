"""Pauses of all deletions. They are rows, so that every worker sees them and a restart does not end them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from operator import attrgetter
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.ledger.schema import pauses

UNLIMITED: Final = 1_000_000
# How often one record tests whether a refused key works again.
PROBE_EVERY: Final = timedelta(minutes=1)
# All accounts share the pauses until accounts have their own keys.
ACCOUNT: Final = "default"


class Kind(StrEnum):
    """What paused the deletions."""

    OPERATOR = "operator"  # until an operator resumes
    UNAUTHORIZED = "unauthorized"  # the API refused the key; until a probe succeeds
    DAILY_LIMIT = "daily_limit"  # MAYFLY_MAX_DELETES_PER_DAY is reached; until midnight UTC
    WRONG_ORGANISATION = "wrong_organisation"  # the key knows no generation; until it shows one or an operator resumes
    THROTTLED = "throttled"  # the API answered 429; for as long as it asked


@dataclass(frozen=True, slots=True)
class Pause:
    """One pause: *until* is its end or its next probe, None without either."""

    kind: Kind
    since: datetime
    actor: str
    reason: str
    until: datetime | None


_select_pauses = select(pauses).where(pauses.c.account == ACCOUNT).order_by(pauses.c.since)


def find_pauses(connection: Connection) -> list[Pause]:
    """Return the pauses in force, oldest first."""
    rows = connection.execute(_select_pauses)
    return [Pause(Kind(row.kind), row.since, row.actor, row.reason, row.until) for row in rows]


def pause(connection: Connection, wanted: Pause) -> bool:
    """Pause; False when that kind of pause exists already, which keeps its first reason and time."""
    if any(one.kind is wanted.kind for one in find_pauses(connection)):
        return False
    values = {"account": ACCOUNT, "kind": wanted.kind, "since": wanted.since, "actor": wanted.actor}
    try:
        with connection.begin_nested():
            connection.execute(insert(pauses).values(values | {"reason": wanted.reason, "until": wanted.until}))
    except IntegrityError:  # another process inserted it after find_pauses()
        return False
    return True


def resume(connection: Connection, kinds: Sequence[Kind]) -> list[Kind]:
    """End the pauses of *kinds* and return those that were in force."""
    gone = sorted(one.kind for one in find_pauses(connection) if one.kind in kinds)
    # One by one, in the order of their kinds, as all do who take several: in another each could wait for the other.
    for kind in gone:
        connection.execute(delete(pauses).where(pauses.c.account == ACCOUNT, pauses.c.kind == kind))
    return gone


def throttle(connection: Connection, wait: timedelta, *, now: datetime, actor: str) -> None:
    """Let no record be claimed for so long, nor for less than was asked before."""
    until = earlier_clock(connection, now) + wait
    wanted = Pause(Kind.THROTTLED, now, actor, "the API answered 429, too many requests", until)
    if pause(connection, wanted):
        return
    mine = (pauses.c.account == ACCOUNT, pauses.c.kind == Kind.THROTTLED, pauses.c.until < until)
    if connection.execute(update(pauses).where(*mine).values(until=until)).rowcount == 0:
        pause(connection, wanted)  # unless it is longer already: another has ended it meanwhile


def take_allowance(connection: Connection, *, now: datetime) -> int:
    """Return how many records may be claimed now: all, none, or one as a probe of a refused key.

    Pauses that are over end, and the probe is taken.
    """
    found = find_pauses(connection)
    if not found:
        return UNLIMITED
    at = earlier_clock(connection, now)
    over = [one for one in found if one.until is not None and one.until <= at]
    if len(over) < len(found):
        return 0
    allowed = UNLIMITED
    for one in sorted(over, key=attrgetter("kind")):  # as resume() takes them
        if one.kind is not Kind.UNAUTHORIZED:
            if not _end_pause(connection, one):
                return take_allowance(connection, now=now)
        elif _take_probe(connection, one, at):
            allowed = 1
        else:
            return 0
    return allowed


def peek_allowance(connection: Connection, *, now: datetime) -> int:
    """Return what take_allowance() would, without ending a pause or taking the probe."""
    found = find_pauses(connection)
    at = earlier_clock(connection, now) if found else now
    if any(one.until is None or one.until > at for one in found):
        return 0
    return 1 if any(one.kind is Kind.UNAUTHORIZED for one in found) else UNLIMITED


def _end_pause(connection: Connection, one: Pause) -> bool:
    """End a pause that is over; False when another was first, or made it longer."""
    mine = (pauses.c.account == ACCOUNT, pauses.c.kind == one.kind, pauses.c.until == one.until)
    return connection.execute(delete(pauses).where(*mine)).rowcount == 1


def _take_probe(connection: Connection, one: Pause, at: datetime) -> bool:
    """Take the next probe for this worker alone; False when another was first."""
    taken = connection.execute(
        update(pauses)
        .where(pauses.c.account == ACCOUNT, pauses.c.kind == one.kind, pauses.c.until == one.until)
        .values(until=at + PROBE_EVERY)
    )
    return taken.rowcount == 1


def earlier_clock(connection: Connection, now: datetime) -> datetime:
    """Return the earlier of the worker's clock and the database's: a clock that is ahead must not delay all others."""
    if connection.dialect.name == "sqlite":
        return now
    return min(now, connection.scalar(select(func.statement_timestamp())) or now)
