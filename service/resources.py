"""What a process keeps open while it runs: the ledger and the queue."""

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
from service.runtime.causes import describe_cause

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Resources:
    """The open ledger, and the URL of the queue."""

    database: Database
    redis_url: Secret


@asynccontextmanager
async def open_resources(settings: Settings, *, is_migrating: bool = False) -> AsyncIterator[Resources]:
    """Open what *settings* name and check that it is usable.

    SQLite's tables are migrated to this release. PostgreSQL's are migrated only when *is_migrating*, because
    processes of several releases may share them.

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
    """Connect to Redis and check its configuration; one that is unreachable only delays jobs.

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
                error=describe_cause(error),
                what_now="the ledger starts deletions instead",
            )
        yield pool
    finally:
        await pool.aclose(close_connection_pool=True)  # redis-py does not close a pool that it did not make


async def _migrate(url: URL) -> None:
    async with open_database(url, write_seconds=MIGRATION_SECONDS) as database:
        await database.write(migrating.migrate)
