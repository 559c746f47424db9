"""The day's limit of deletions: counted before each DELETE is sent, so that the first one beyond it never is."""

import contextlib
from datetime import UTC, datetime, time, timedelta

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.ledger import pausing
from service.ledger.pausing import ACCOUNT, Kind, Pause
from service.ledger.schema import tallies


def reserve(connection: Connection, wanted: int, *, limit: int | None, now: datetime, actor: str) -> int:
    """Count up to *wanted* deletions against today's *limit* and return how many may be made; pause at the limit."""
    if limit is None or wanted == 0:
        return wanted
    day = now.astimezone(UTC).date()
    mine = (tallies.c.account == ACCOUNT, tallies.c.day == day)
    count = select(tallies.c.deletes).where(*mine).with_for_update()
    used = connection.scalar(count)
    if used is None:
        # Another worker may count the day's first at this moment.
        with contextlib.suppress(IntegrityError), connection.begin_nested():
            connection.execute(insert(tallies).values(account=ACCOUNT, day=day, deletes=0))
        used = connection.scalar(count) or 0
    allowed = max(0, min(wanted, limit - used))
    connection.execute(update(tallies).where(*mine).values(deletes=tallies.c.deletes + allowed))
    if allowed < wanted:
        reason = f"{limit} deletions were made today"
        pausing.pause(connection, Pause(Kind.DAILY_LIMIT, now, actor, reason, _next_day(now)))
    return allowed


def refund(connection: Connection, count: int, *, now: datetime) -> None:
    """Take back *count* deletions that the API refused to make."""
    if count:
        day = now.astimezone(UTC).date()
        connection.execute(
            update(tallies)
            .where(tallies.c.account == ACCOUNT, tallies.c.day == day, tallies.c.deletes >= count)
            .values(deletes=tallies.c.deletes - count)
        )


def _next_day(now: datetime) -> datetime:
    return datetime.combine(now.astimezone(UTC).date() + timedelta(days=1), time(), UTC)
