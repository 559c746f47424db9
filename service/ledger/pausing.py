"""Why deletions wait: pauses are rows, so that every worker sees them and none forgets one over a restart."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.ledger.schema import pauses

UNLIMITED: Final = 1_000_000
# How often one record tries whether a refused key works again.
PROBE_EVERY: Final = timedelta(minutes=1)
# Every account shares the pauses until there are accounts with keys of their own.
ACCOUNT: Final = "default"


class Kind(StrEnum):
    """What paused the deletions."""

    OPERATOR = "operator"  # a person; until a person resumes
    UNAUTHORIZED = "unauthorized"  # the API refused the key; a probe resumes
    DAILY_LIMIT = "daily_limit"  # MAYFLY_MAX_DELETES_PER_DAY is reached; midnight UTC resumes
    THROTTLED = "throttled"  # the API had too many calls; the time that it asked for resumes


@dataclass(frozen=True, slots=True)
class Pause:
    """One reason to wait: *until* is the next probe, or the end, where there is one."""

    kind: Kind
    since: datetime
    actor: str
    reason: str
    until: datetime | None


def find_pauses(connection: Connection) -> list[Pause]:
    """Return the pauses in force, oldest first."""
    rows = connection.execute(select(pauses).where(pauses.c.account == ACCOUNT).order_by(pauses.c.since))
    return [Pause(Kind(row.kind), row.since, row.actor, row.reason, row.until) for row in rows]


def pause(connection: Connection, wanted: Pause) -> bool:
    """Pause; False when that kind is in force already, which keeps its first reason and time."""
    if any(one.kind is wanted.kind for one in find_pauses(connection)):
        return False
    values = {"account": ACCOUNT, "kind": wanted.kind, "since": wanted.since, "actor": wanted.actor}
    try:
        with connection.begin_nested():
            connection.execute(insert(pauses).values(values | {"reason": wanted.reason, "until": wanted.until}))
    except IntegrityError:  # another process was first, between our look and our insert
        return False
    return True


def resume(connection: Connection, kinds: Sequence[Kind]) -> list[Kind]:
    """End the pauses of *kinds* and return those that were in force."""
    gone = [one.kind for one in find_pauses(connection) if one.kind in kinds]
    # One by one, in the order in which allowance() takes them.
    for kind in gone:
        connection.execute(delete(pauses).where(pauses.c.account == ACCOUNT, pauses.c.kind == kind))
    return gone


def throttle(connection: Connection, wait: timedelta, *, now: datetime, actor: str) -> None:
    """Let no record be claimed for so long, nor for less than was asked before."""
    until = earlier_clock(connection, now) + wait
    if not pause(connection, Pause(Kind.THROTTLED, now, actor, "the API has had too many calls", until)):
        mine = (pauses.c.account == ACCOUNT, pauses.c.kind == Kind.THROTTLED, pauses.c.until < until)
        connection.execute(update(pauses).where(*mine).values(until=until))


def take_allowance(connection: Connection, *, now: datetime) -> int:
    """Return how many records may be claimed now: all, none, or one that probes a refused key."""
    found = find_pauses(connection)
    if not found:
        return UNLIMITED
    at = earlier_clock(connection, now)
    over = [one for one in found if one.until is not None and one.until <= at]
    if len(over) < len(found):
        return 0
    allowed = UNLIMITED
    for one in over:  # in the order in which resume() takes them: in another each could wait for the other
        if one.kind is not Kind.UNAUTHORIZED:
            resume(connection, [one.kind])
        elif _take_probe(connection, one, at):
            allowed = 1
        else:
            return 0
    return allowed


def peek_allowance(connection: Connection, *, now: datetime) -> int:
    """Return what allowance() would, without ending a pause or taking a probe."""
    found = find_pauses(connection)
    at = earlier_clock(connection, now) if found else now
    if any(one.until is None or one.until > at for one in found):
        return 0
    return 1 if any(one.kind is Kind.UNAUTHORIZED for one in found) else UNLIMITED


def _take_probe(connection: Connection, one: Pause, at: datetime) -> bool:
    """Take the next probe for this worker alone; False when another was first."""
    taken = connection.execute(
        update(pauses)
        .where(pauses.c.account == ACCOUNT, pauses.c.kind == one.kind, pauses.c.until == one.until)
        .values(until=at + PROBE_EVERY)
    )
    return taken.rowcount == 1


def earlier_clock(connection: Connection, now: datetime) -> datetime:
    """Return the earlier of our clock and the database's: one that runs ahead must not make all others wait for it."""
    if connection.dialect.name == "sqlite":
        return now
    return min(now, connection.scalar(select(func.statement_timestamp())) or now)
