"""MAYFLY_MAX_DELETES_PER_DAY: deletions are counted before the DELETE is sent, so the limit is never exceeded."""

import contextlib
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.ledger import pausing
from service.ledger.pausing import Kind, Pause
from service.ledger.schema import tallies


def reserve_deletes(
    connection: Connection, wanted: int, *, limit: int | None, now: datetime, actor: str, account: str
) -> int:
    """Count up to *wanted* deletions against *account*'s *limit* of today and return how many are allowed.

    At the limit the account's deletions pause.
    """
    if limit is None or wanted == 0:
        return wanted
    day = day_of(now)
    mine = (tallies.c.account == account, tallies.c.day == day)
    count = select(tallies.c.deletes).where(*mine).with_for_update()
    used = connection.scalar(count)
    if used is None:
        # Another worker may insert the day's row at the same time.
        with contextlib.suppress(IntegrityError), connection.begin_nested():
            connection.execute(insert(tallies).values(account=account, day=day, deletes=0))
        used = connection.scalar(count) or 0
    allowed = max(0, min(wanted, limit - used))
    if allowed:
        connection.execute(update(tallies).where(*mine).values(deletes=tallies.c.deletes + allowed))
    if allowed < wanted:
        reason = f"{limit} deletions were started today"
        pausing.pause(connection, Pause(Kind.DAILY_LIMIT, now, actor, reason, _next_day(now), account))
    return allowed


def refund_deletes(connection: Connection, account: str, days: Iterable[date]) -> None:
    """Uncount one deletion of *account* on each of *days*, because the API refused it."""
    for day, count in sorted(Counter(days).items()):
        connection.execute(
            update(tallies)
            .where(tallies.c.account == account, tallies.c.day == day, tallies.c.deletes >= count)
            .values(deletes=tallies.c.deletes - count)
        )


def day_of(now: datetime) -> date:
    """Return the UTC day of *now*."""
    return now.astimezone(UTC).date()


def _next_day(now: datetime) -> datetime:
    return datetime.combine(day_of(now) + timedelta(days=1), time(), UTC)


def end_pause(connection: Connection, account: str, *, limit: int | None, now: datetime) -> bool:
    """End *account*'s pause of the daily limit if today's deletions are below *limit*; return whether there was one."""
    if limit is not None:
        used = connection.scalar(
            select(tallies.c.deletes).where(tallies.c.account == account, tallies.c.day == day_of(now))
        )
        if (used or 0) >= limit:
            return False
    return bool(pausing.resume(connection, [Kind.DAILY_LIMIT], account))
