"""Pauses of an account's deletions, or of all. They are rows, so that every worker sees them, also after a restart."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from operator import attrgetter
from typing import Final

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.ledger.schema import pauses

UNLIMITED: Final = 1_000_000
# How often one record tests whether a refused key works again.
PROBE_EVERY: Final = timedelta(minutes=1)
# In the place of an account: the pause is of all accounts.
ALL_ACCOUNTS: Final = "*"


class Kind(StrEnum):
    """What paused the deletions."""

    OPERATOR = "operator"  # until an operator resumes
    UNAUTHORIZED = "unauthorized"  # the API refused the key; until a probe succeeds
    DAILY_LIMIT = "daily_limit"  # MAYFLY_MAX_DELETES_PER_DAY is reached; until midnight UTC
    WRONG_ORGANISATION = "wrong_organisation"  # the key knows no generation; until it shows one or an operator resumes
    THROTTLED = "throttled"  # the API answered 429; for as long as it asked


@dataclass(frozen=True, slots=True)
class Pause:
    """One pause: *until* is its end or its next probe, None without either; *account* is one or ALL_ACCOUNTS."""

    kind: Kind
    since: datetime
    actor: str
    reason: str
    until: datetime | None
    account: str = ALL_ACCOUNTS


# The order in which those who take several pauses lock them.
_ORDER: Final = attrgetter("account", "kind")
_select_pauses = select(pauses).order_by(pauses.c.since)
_select_of_account = _select_pauses.where(pauses.c.account.in_([bindparam("account"), ALL_ACCOUNTS]))


def find_pauses(connection: Connection, account: str | None = None) -> list[Pause]:
    """Return the pauses that *account* must obey, oldest first; those of every account for None."""
    rows = (
        connection.execute(_select_pauses)
        if account is None
        else connection.execute(_select_of_account, {"account": account})
    )
    return [Pause(Kind(row.kind), row.since, row.actor, row.reason, row.until, row.account) for row in rows]


def pause(connection: Connection, wanted: Pause) -> bool:
    """Pause; False when that pause exists already, which keeps its first reason and time."""
    if any((one.account, one.kind) == (wanted.account, wanted.kind) for one in find_pauses(connection)):
        return False
    values = {"account": wanted.account, "kind": wanted.kind, "since": wanted.since, "actor": wanted.actor}
    try:
        with connection.begin_nested():
            connection.execute(insert(pauses).values(values | {"reason": wanted.reason, "until": wanted.until}))
    except IntegrityError:  # another process inserted it after find_pauses()
        return False
    return True


def resume(connection: Connection, kinds: Sequence[Kind], account: str | None = None) -> list[Kind]:
    """End the pauses of *kinds*, of *account* alone or, for None, of all, and return the kinds that were in force."""
    gone = [one for one in find_pauses(connection) if one.kind in kinds and (account is None or one.account == account)]
    # One by one in this order, as all do who take several: in another each could wait for the other.
    for one in sorted(gone, key=_ORDER):
        connection.execute(delete(pauses).where(pauses.c.account == one.account, pauses.c.kind == one.kind))
    return sorted({one.kind for one in gone})


def throttle(connection: Connection, wait: timedelta, *, now: datetime, actor: str, account: str) -> None:
    """Let no record of *account* be claimed for so long, nor for less than was asked before."""
    until = earlier_clock(connection, now) + wait
    wanted = Pause(Kind.THROTTLED, now, actor, "the API answered 429, too many requests", until, account)
    if pause(connection, wanted):
        return
    mine = (pauses.c.account == account, pauses.c.kind == Kind.THROTTLED, pauses.c.until < until)
    if connection.execute(update(pauses).where(*mine).values(until=until)).rowcount == 0:
        pause(connection, wanted)  # unless it is longer already: another has ended it meanwhile


def find_closing(connection: Connection, account: str, *, now: datetime) -> Pause | None:
    """Return the pause for which the API is not even read: its key is refused or another's, or it wants no calls.

    A refused key is tried again from its next probe on.
    """
    at = earlier_clock(connection, now)
    closing = (Kind.UNAUTHORIZED, Kind.WRONG_ORGANISATION, Kind.THROTTLED)
    found = (one for one in find_pauses(connection, account) if one.kind in closing)
    return next((one for one in found if one.until is None or one.until > at), None)


def take_allowance(connection: Connection, account: str, *, now: datetime) -> int:
    """Return how many records of *account* may be claimed now: all, none, or one as a probe of a refused key.

    Pauses that are over end, and the probe is taken.
    """
    found = find_pauses(connection, account)
    if not found:
        return UNLIMITED
    at = earlier_clock(connection, now)
    over = [one for one in found if one.until is not None and one.until <= at]
    if len(over) < len(found):
        return 0
    allowed = UNLIMITED
    for one in sorted(over, key=_ORDER):  # as resume() takes them
        if one.kind is not Kind.UNAUTHORIZED:
            if not _end_pause(connection, one):
                return take_allowance(connection, account, now=now)
        elif _take_probe(connection, one, at):
            allowed = 1
        else:
            return 0
    return allowed


def peek_allowance(connection: Connection, account: str, *, now: datetime) -> int:
    """Return what take_allowance() would, without ending a pause or taking the probe."""
    found = find_pauses(connection, account)
    at = earlier_clock(connection, now) if found else now
    if any(one.until is None or one.until > at for one in found):
        return 0
    return 1 if any(one.kind is Kind.UNAUTHORIZED for one in found) else UNLIMITED


def _end_pause(connection: Connection, one: Pause) -> bool:
    """End a pause that is over; False when another was first, or made it longer."""
    mine = (pauses.c.account == one.account, pauses.c.kind == one.kind, pauses.c.until == one.until)
    return connection.execute(delete(pauses).where(*mine)).rowcount == 1


def _take_probe(connection: Connection, one: Pause, at: datetime) -> bool:
    """Take the next probe for this worker alone; False when another was first."""
    taken = connection.execute(
        update(pauses)
        .where(pauses.c.account == one.account, pauses.c.kind == one.kind, pauses.c.until == one.until)
        .values(until=at + PROBE_EVERY)
    )
    return taken.rowcount == 1


def earlier_clock(connection: Connection, now: datetime) -> datetime:
    """Return the earlier of the worker's clock and the database's: a clock that is ahead must not delay all others."""
    if connection.dialect.name == "sqlite":
        return now
    return min(now, connection.scalar(select(func.statement_timestamp())) or now)


def later_clock(connection: Connection, now: datetime) -> datetime:
    """Return the later of *now* and the database's clock: a clock that is behind must make nothing due early."""
    if connection.dialect.name == "sqlite":
        return now
    return max(now, connection.scalar(select(func.statement_timestamp())) or now)
