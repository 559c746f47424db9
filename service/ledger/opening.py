"""Opening the ledger on SQLite or PostgreSQL, by its URL."""

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
    # Imported on demand: asyncpg takes 8 MB that SQLite does not need.
    if url.get_backend_name() == "sqlite":
        from service.ledger.sqlite import SqliteDatabase  # noqa: PLC0415

        return SqliteDatabase(url, write_seconds)
    from service.ledger.postgres import PostgresDatabase  # noqa: PLC0415

    return PostgresDatabase(url, write_seconds)
