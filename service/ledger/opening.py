"""Opening the ledger on the kind of database that its URL names."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import URL

from service.ledger.database import WRITE_TIMEOUT_SECONDS, Database


@asynccontextmanager
async def open_database(url: URL, *, write_seconds: float = WRITE_TIMEOUT_SECONDS) -> AsyncIterator[Database]:
    """Open the database at *url*, ``sqlite`` or ``postgresql``; it connects at the first statement.

    A write may take *write_seconds*.
    """
    database = _of_kind(url, write_seconds)
    try:
        yield database
    finally:
        await database.close()


def _of_kind(url: URL, write_seconds: float) -> Database:
    # Loaded where it is used: asyncpg takes 8 MB that SQLite has no use for.
    if url.get_backend_name() == "sqlite":
        from service.ledger.sqlite import SqliteDatabase  # noqa: PLC0415

        return SqliteDatabase(url, write_seconds)
    from service.ledger.postgres import PostgresDatabase  # noqa: PLC0415

    return PostgresDatabase(url, write_seconds)
