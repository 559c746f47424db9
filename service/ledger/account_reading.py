"""What the ledger has of each account, also of those that are no longer configured."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import Connection, func, select

from service.core.errors import ExplainedError
from service.core.key import Key
from service.ledger.reading import WATCHED, find_accounts, find_row
from service.ledger.schema import records


class UnknownAccountError(ExplainedError):
    """An account that is neither configured nor has records."""


class AccountBacklog(msgspec.Struct, rename="camel", frozen=True):
    """What waits in one account. If it is not *configured*, no worker deletes for it.

    *waiting* are the scheduled records and those of attempts in progress, *due* those of them that are due.
    """

    account: str
    configured: bool
    waiting: int
    due: int
    oldest_overdue_seconds: float


def read_backlogs(connection: Connection, configured: Sequence[str], *, now: datetime) -> list[AccountBacklog]:
    """Return what waits in each of the *configured* accounts, in their order, and then in the others with records."""
    others = [one for one in find_accounts(connection) if one not in configured]
    return [_read_backlog(connection, one, one in configured, now) for one in (*configured, *others)]


def _read_backlog(connection: Connection, account: str, configured: bool, now: datetime) -> AccountBacklog:  # noqa: FBT001 - a column
    mine = (records.c.account == account, records.c.state.in_(WATCHED))
    waiting = connection.scalar(select(func.count()).where(*mine)) or 0
    due = connection.scalar(select(func.count()).where(*mine, records.c.wake_at <= now)) or 0
    first = _next_wake(connection, account) if due else None
    overdue = timedelta(0) if first is None else max(now - first, timedelta(0))
    return AccountBacklog(account, configured, waiting, due, overdue.total_seconds())


def find_overdue(connection: Connection, *, now: datetime, than: timedelta) -> dict[str, timedelta]:
    """Return for how long the most overdue record of each account is, of those overdue for more than *than*."""
    found = {account: _next_wake(connection, account) for account in find_accounts(connection)}
    return {account: now - at for account, at in found.items() if at is not None and now - at > than}


def _next_wake(connection: Connection, account: str) -> datetime | None:
    # Each reads one entry of the index (account, state, wake_at).
    first = [
        connection.scalar(
            select(records.c.wake_at)
            .where(records.c.account == account, records.c.state == state, records.c.wake_at.is_not(None))
            .order_by(records.c.wake_at)
            .limit(1)
        )
        for state in WATCHED
    ]
    return min((wake_at for wake_at in first if wake_at is not None), default=None)


def find_others(connection: Connection, key: Key) -> list[str]:
    """Return the other accounts that have a record of the id of *key*."""
    accounts = find_accounts(connection)
    return [one for one in accounts if one != key.account and find_row(connection, Key(one, key.id)) is not None]


def require_account(connection: Connection, name: str, configured: Sequence[str]) -> None:
    """Raise UnknownAccountError unless *name* is one of *configured*, or has records."""
    known = [*configured, *(one for one in find_accounts(connection) if one not in configured)]
    if name not in known:
        raise UnknownAccountError(f"there is no account {name[:64]!a}: there is {', '.join(known)}")
