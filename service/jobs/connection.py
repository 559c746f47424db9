"""The connection to Redis that web and worker share, and the checks of how Redis is set up."""

import asyncio
from datetime import timedelta
from typing import Any, Final, cast

import msgspec
import redis.asyncio as redis
from arq.connections import ArqRedis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff

from service.config.redis_url import read_sentinel_url
from service.core.errors import ExplainedError
from service.core.secret import Secret

QUEUE: Final = "mayfly:v1"
# How long a job outlives its due time in Redis; a worker that was away longer finds the record in the ledger.
_EXPIRES_EXTRA: Final = timedelta(days=30)

# A Redis that refuses connections raises OSError, which is in neither of the other two.
_RETRIED: Final = [redis.ConnectionError, redis.TimeoutError, OSError]
QUEUE_ERRORS: Final = (redis.RedisError, OSError, TimeoutError)


def is_wrong_type(error: Exception) -> bool:
    """Whether *error* is Redis's about a key of another type than ours: no trouble of Redis, and it will not pass."""
    # In a pipeline the command stands before it.
    return isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error)


class QueueError(ExplainedError):
    """Redis is set up so that jobs would be lost."""


def connect(url: Secret, *, retries: int) -> ArqRedis:
    """Return the pool that web and worker alike use, so that both write and read jobs in one form; it connects late.

    *retries* per command: few where somebody waits for an answer, many in a worker. For *url* see config/redis_url.py.
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
        options["ssl_check_hostname"] = True  # the library's default takes any certificate that is valid for anyone
    return redis.BlockingConnectionPool.from_url(text, max_connections=30, timeout=5, **options)


def _sentinel_pool(text: str, options: dict[str, Any]) -> redis.ConnectionPool:
    """Build the pool through master_for: arq's own Sentinel mode drops retries and timeouts."""
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
    """Return warnings about how Redis is set up.

    Raises: QueueError if it would throw jobs away when it is full; one of QUEUE_ERRORS if it cannot be reached.
    """
    async with asyncio.timeout(5):
        await pool.ping()
        try:
            config = await pool.config_get("maxmemory-policy") | await pool.config_get("appendonly")
        except redis.ResponseError:
            return ["Redis does not show its configuration: check maxmemory-policy noeviction and appendonly yes"]
    policy = config.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        raise QueueError(f"Redis has maxmemory-policy {policy} and would drop jobs: set it to noeviction")
    if config.get("appendonly") == "no":
        return ["Redis has appendonly no: after its restart deletions start from the ledger"]
    return []
