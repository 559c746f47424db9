"""The connection to Redis, the same for web and worker, and the check of Redis's configuration."""

import asyncio
from datetime import timedelta
from typing import Any, Final, cast

import msgspec
import redis.asyncio as redis
from arq.connections import ArqRedis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff

from service.config.redis_url import checks_host, read_sentinel_url
from service.core.errors import ExplainedError
from service.core.secret import Secret

QUEUE: Final = "mayfly:v1"
# How long a job outlives its due time in Redis; after a longer stop the worker finds the record in the ledger.
_EXPIRES_EXTRA: Final = timedelta(days=30)

# A refused connection raises OSError, which is no subclass of the other two.
_RETRIED: Final = [redis.ConnectionError, redis.TimeoutError, OSError]
QUEUE_ERRORS: Final = (redis.RedisError, OSError, TimeoutError)


def is_wrong_type(error: Exception) -> bool:
    """Whether *error* says that a key has another type than Mayfly's: Redis works, and a retry does not help."""
    # In a pipeline the message begins with the command.
    return isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error)


class QueueError(ExplainedError):
    """With this configuration Redis would lose jobs."""


def connect(url: Secret, *, retries: int) -> ArqRedis:
    """Return a pool with the serializer that web and worker share; it connects at the first command.

    *retries* is per command: few where a client waits for the answer, many in a worker. For *url* see
    config/redis_url.py.
    """
    return ArqRedis(
        _pool(url.reveal(), retries),
        job_serializer=msgspec.msgpack.encode,
        job_deserializer=msgspec.msgpack.decode,
        default_queue_name=QUEUE,
        expires_extra_ms=int(_EXPIRES_EXTRA.total_seconds() * 1000),
    )


def _pool(text: str, retries: int) -> redis.ConnectionPool:
    options: dict[str, Any] = {
        "socket_timeout": 2,
        "socket_connect_timeout": 2,
        "health_check_interval": 15,
        "retry": Retry(cast("Any", ExponentialBackoff(cap=2, base=0.1)), retries),
        "retry_on_error": _RETRIED,
    }
    if text.startswith("sentinel://"):
        return _sentinel_pool(text, options)
    if text.startswith("rediss://"):
        options["ssl_check_hostname"] = checks_host(text)
    return redis.BlockingConnectionPool.from_url(text, max_connections=30, timeout=5, **options)


def _sentinel_pool(text: str, options: dict[str, Any]) -> redis.ConnectionPool:
    """Make the pool with master_for: arq's own Sentinel mode drops retries and timeouts."""
    url = read_sentinel_url(text)
    tls = {"ssl": True, "ssl_ca_certs": url.ca_file, "ssl_check_hostname": url.is_host_checked} if url.is_tls else {}
    login = {"username": url.sentinel_username, "password": url.sentinel_password}
    sentinel = Sentinel(  # type: ignore[no-untyped-call] # the library has no types here
        [*url.hosts],
        sentinel_kwargs={"socket_timeout": 2, **tls, **login},
        db=url.database,
        username=url.username,
        password=url.password,
        **tls,
        **options,
    )
    return cast("redis.ConnectionPool", sentinel.master_for(url.service).connection_pool)


async def check_config(pool: ArqRedis) -> list[str]:
    """Return warnings about Redis's configuration.

    Raises: QueueError if a full Redis would evict jobs; one of QUEUE_ERRORS if it cannot be reached.
    """
    async with asyncio.timeout(5):
        await pool.ping()
        try:
            config = await pool.config_get("maxmemory-policy") | await pool.config_get("appendonly")
        except redis.ResponseError:
            return ["Redis refuses CONFIG GET: check that it has maxmemory-policy noeviction and appendonly yes"]
    policy = config.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        raise QueueError(f"Redis has maxmemory-policy {policy} and would drop jobs: set it to noeviction")
    if config.get("appendonly") == "no":
        return ["Redis has appendonly no: it loses its jobs at a restart, and the ledger starts the deletions"]
    return []
