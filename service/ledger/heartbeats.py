"""Rows that say when something was last seen: a worker, and the write of the readiness check."""

from datetime import datetime
from typing import Final

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from service.ledger.schema import heartbeats

WORKER: Final = "worker"
READINESS: Final = "readiness"


def record_beat(connection: Connection, name: str, *, now: datetime) -> None:
    """Store that *name* was seen at *now*; this always changes a page, so that a full disk shows."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(heartbeats).values(name=name, at=now)
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"at": now}))


def last_beat(connection: Connection, name: str) -> datetime | None:
    """Return when *name* was last seen; None if never."""
    return connection.scalar(select(heartbeats.c.at).where(heartbeats.c.name == name))
