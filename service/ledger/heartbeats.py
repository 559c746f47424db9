"""Rows that say when something was last seen: a worker, the write of the readiness check, the sweeps of an account."""

from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from service.core.explaining import WORKER_GONE_AFTER
from service.ledger.schema import heartbeats

WORKER: Final = "worker"
READINESS: Final = "readiness"


def record_beat(connection: Connection, name: str, *, now: datetime) -> None:
    """Store that *name* was seen at *now*; this always changes a page, so that a full disk shows."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(heartbeats).values(name=name, at=now)
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"at": now}))


def take_turn(connection: Connection, name: str, *, now: datetime, every: timedelta) -> bool:
    """Store that *name* was seen at *now*, unless it was within *every*; then return False.

    Of several workers one gets the turn.
    """
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(heartbeats).values(name=name, at=now)
    is_over = ~heartbeats.c.at.between(now - every, now)  # a time that is still to come is a clock's error
    upsert = statement.on_conflict_do_update(index_elements=["name"], set_={"at": now}, where=is_over)
    return connection.execute(upsert.returning(heartbeats.c.at)).first() is not None


def last_beat(connection: Connection, name: str) -> datetime | None:
    """Return when *name* was last seen; None if never."""
    return connection.scalar(select(heartbeats.c.at).where(heartbeats.c.name == name))


def describe_worker(seen_at: datetime | None, *, now: datetime) -> tuple[bool, str]:
    """Return whether a worker runs as far as the ledger knows, and a sentence about it."""
    if seen_at is None:
        return False, "no worker has been seen"
    seconds = max(0, int((now - seen_at).total_seconds()))
    return (
        now - seen_at < WORKER_GONE_AFTER,
        f"a worker was last seen {seconds} s ago, at {seen_at:%Y-%m-%d %H:%M:%S} UTC",
    )
