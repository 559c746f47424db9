"""What a worker's safety net needs to know of the ledger: ended leases, pauses, and which records wait."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, bindparam, select

from service.core.key import Key
from service.core.lifecycle import State
from service.ledger import pausing
from service.ledger.claiming import Wanted, in_state
from service.ledger.instant import Instant
from service.ledger.schema import records

_expired = (
    select(records.c.seq)
    .where(
        records.c.account == bindparam("b_account"),
        records.c.state == State.DELETING,
        records.c.wake_at <= bindparam("b_until", type_=Instant),
    )
    .limit(1)
)


def find_waiting(
    connection: Connection, account: str, *, since: datetime | None, until: datetime, limit: int
) -> list[tuple[Wanted, datetime]]:
    """Return up to *limit* scheduled records of *account* that wake between *since* and *until*, with that time.

    The soonest are first.
    """
    bounds = [] if since is None else [records.c.wake_at > since]
    rows = connection.execute(
        select(records.c.account, records.c.id, records.c.attempts, records.c.wake_at)
        .where(*in_state(account, State.SCHEDULED), records.c.wake_at <= until, *bounds)
        .order_by(records.c.wake_at)
        .limit(limit)
    )
    return [(Wanted(Key(row.account, row.id), row.attempts + 1), row.wake_at) for row in rows]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the safety net needs to know: whether leases have ended, what the pauses allow, and which records wait."""

    has_expired_leases: bool
    allowed: int
    late: Sequence[tuple[Wanted, datetime]]
    near: Sequence[tuple[Wanted, datetime]]


def read_outlook(
    connection: Connection,
    account: str,
    *,
    now: datetime,
    late: timedelta,
    since: datetime | None,
    until: datetime,
    limit: int,
) -> Outlook:
    """Read in one snapshot what is overdue by more than *late*, and what is due after *since* (or then) until *until*.

    Only records of *account*; each list has *limit* records at most, and none while deletions are paused.
    """
    expired = connection.execute(_expired, {"b_account": account, "b_until": now}).first()
    allowed = pausing.peek_allowance(connection, account, now=now)
    if not allowed:
        return Outlook(expired is not None, 0, (), ())
    late_at = now - late
    return Outlook(
        expired is not None,
        allowed,
        find_waiting(connection, account, since=None, until=late_at, limit=min(allowed, limit)),
        find_waiting(connection, account, since=since or late_at, until=until, limit=limit),
    )
