"""What a process holds open for as long as it runs: the ledger and the queue, opened from the settings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from arq.connections import ArqRedis
from sqlalchemy import URL

from service.config.settings import Settings
from service.core.secret import Secret
from service.jobs import connection
from service.jobs.embedded_redis import embedded_redis, prepare_data_dir
from service.ledger import migrating
from service.ledger.database import MIGRATION_SECONDS, Database
from service.ledger.opening import open_database

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Resources:
    """The open ledger, and where the queue is."""

    database: Database
    redis_url: Secret


@asynccontextmanager
async def open_resources(settings: Settings, *, is_migrating: bool = False) -> AsyncIterator[Resources]:
    """Open what *settings* name and check that it can be worked with.

    SQLite's tables are brought to this release's form; PostgreSQL's only when *is_migrating*, because there
    processes of several releases share them.

    Raises: LedgerUnavailableError, SchemaError, QueueError, EmbeddedRedisError, OSError.
    """
    prepare_data_dir(settings.data_dir)
    async with open_database(settings.ledger_url) as database:
        is_ours = is_migrating or settings.ledger_url.get_backend_name() == "sqlite"
        if is_ours and await database.read(migrating.current) != migrating.HEAD:
            await _migrate(settings.ledger_url)
        await database.read(migrating.check)
        if settings.redis_url is not None:
            yield Resources(database, settings.redis_url)
            return
        async with embedded_redis(settings.data_dir) as url:
            yield Resources(database, url)


@asynccontextmanager
async def open_queue(url: Secret, *, retries: int) -> AsyncIterator[ArqRedis]:
    """Connect to Redis and look at how it is set up; one that is away only delays wake-ups.

    Raises: QueueError for a Redis that would drop jobs.
    """
    pool = connection.connect(url, retries=retries)
    try:
        try:
            for warning in await connection.check_config(pool):
                log.warning("queue.checked", warning=warning)
        except connection.QUEUE_ERRORS as error:
            log.warning(
                "queue.unreachable",
                error=type(error).__name__,
                what_now="deletions are started from the ledger instead",
            )
        yield pool
    finally:
        await pool.aclose(close_connection_pool=True)  # not done by itself for a pool that it was given


async def _migrate(url: URL) -> None:
    async with open_database(url, write_seconds=MIGRATION_SECONDS) as database:
        await database.write(migrating.migrate)
