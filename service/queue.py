"""The queue: delayed arq jobs in Redis, one for the next attempt at each scheduled record.

A job can be lost, late, doubled or early, and no record depends on it: the ledger decides what is due, and the worker's
safety net enqueues again what is missing.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
import redis.asyncio as redis
from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from arq.jobs import serialize_job
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff

from service.generation import Key
from service.values import Secret

QUEUE: Final = "mayfly:v1"
FUNCTION: Final = "cleanup"

# An enqueue that takes longer is given up: the record is durable, and the worker's safety net enqueues it again.
ENQUEUE_TIMEOUT_SECONDS: Final = 2.0
# How long a job outlives its due time in Redis; a worker that was away longer finds the record in the ledger.
_EXPIRES_EXTRA: Final = timedelta(days=30)
_JOBS_AT_ONCE: Final = 1000
# Written before any job, so that a Redis that takes no writes shows it, and one that was emptied shows that as well.
_WRITTEN: Final = f"{QUEUE}:written"

# A Redis that refuses connections raises OSError, which is in neither of the other two.
_RETRIED: Final = [redis.ConnectionError, redis.TimeoutError, OSError]
QUEUE_ERRORS: Final = (redis.RedisError, OSError, TimeoutError)


def is_of_odd_key(error: Exception) -> bool:
    """Whether *error* is Redis's about a key of another type than ours: no trouble of Redis, and it will not pass."""
    # In a pipeline the command stands before it.
    return isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error)


class QueueError(Exception):
    """Redis is set up so that jobs would be lost."""


class CleanupJob(msgspec.Struct, frozen=True, gc=False):
    """One attempt at the record of *key*, counted from 1, to be started at the aware instant *at*."""

    key: Key
    attempt: int
    at: datetime

    @property
    def id(self) -> str:
        """The job's id, the same each time: two jobs for one attempt are one."""
        return f"{self.key.account}:{self.key.id}:{self.attempt}"

    @property
    def arguments(self) -> tuple[str, str, int]:
        """What the job's function is called with."""
        return self.key.account, self.key.id, self.attempt


def connect(url: Secret, *, retries: int) -> ArqRedis:
    """Return the pool that web and worker alike use, so that both write and read jobs in one form; it connects late.

    *retries* per command: few where somebody waits for an answer, many in a worker. For *url* see check_url().
    """
    return ArqRedis(
        _pool(url.reveal(), retries),
        job_serializer=msgspec.msgpack.encode,
        job_deserializer=msgspec.msgpack.decode,
        default_queue_name=QUEUE,
        expires_extra_ms=int(_EXPIRES_EXTRA.total_seconds() * 1000),
    )


def check_url(text: str) -> None:
    """Return if *text* is a URL of a Redis, without connecting to it.

    ``redis://``, ``rediss://`` or ``unix://``, as redis-py has them, or
    ``sentinel://user:password@host:port,host:port/service/db``, where the login is the master's. That one takes
    ``?sentinel_username=`` and ``&sentinel_password=`` where the Sentinels want one, and for TLS with both
    ``&ssl=true``, ``&ssl_ca_certs=/path`` and ``&ssl_check_hostname=false``.

    Raises: ValueError, which repeats nothing of *text*.
    """
    parts = urlsplit(text)
    database = parts.path.rpartition("/")[2] if parts.scheme == "sentinel" else parts.path.strip("/")
    if parts.scheme in ("redis", "rediss") and database and not database.isdecimal():
        raise ValueError("the path of a Redis URL is the number of its database")
    try:
        _pool(text, 0).make_connection()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - the library has no error of its own for it, and its texts show the password
        raise ValueError("not a URL of a Redis") from None


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
    parts = urlsplit(text)
    login, _, places = parts.netloc.rpartition("@")
    hosts = [host.rpartition(":") for host in places.split(",")]
    service, _, database = parts.path.strip("/").partition("/")
    username, _, password = login.partition(":")
    query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    sentinel_login = {name: query.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    tls: dict[str, Any] = {}
    if query.pop("ssl", "false") == "true":
        is_checked = query.pop("ssl_check_hostname", "true") == "true"
        tls = {"ssl": True, "ssl_ca_certs": query.pop("ssl_ca_certs", None), "ssl_check_hostname": is_checked}
    if query:
        raise ValueError("a Sentinel URL does not take all of that")
    sentinel = Sentinel(  # type: ignore[no-untyped-call] # the library has no types here
        [(host or port, int(port) if host else 26379) for host, _, port in hosts],
        sentinel_kwargs={"socket_timeout": 2, **tls, **sentinel_login},
        db=int(database or 0),
        username=unquote(username) or None,
        password=unquote(password) or None,
        **tls,
        **options,
    )
    return cast("redis.ConnectionPool", sentinel.master_for(service or "mymaster").connection_pool)


async def enqueue_job(pool: ArqRedis, job: CleanupJob, *, now: datetime) -> None:
    """Enqueue *job*; one that is there already stays as it is.

    Raises: one of QUEUE_ERRORS, after at most ENQUEUE_TIMEOUT_SECONDS; the job may be there all the same.
    """
    async with asyncio.timeout(ENQUEUE_TIMEOUT_SECONDS):
        wait = max(job.at - now, timedelta(0))
        # What it returns proves nothing: None may stand for a job that is there, or for a lost connection.
        await pool.enqueue_job(FUNCTION, *job.arguments, _job_id=job.id, _defer_by=wait)


async def enqueue_jobs(pool: ArqRedis, jobs: Sequence[CleanupJob], *, now: datetime) -> bool:
    """Enqueue many *jobs* in few round trips and return whether Redis still has what was written to it before.

    A job that is there already is brought forward if it is later than its new time, which arq's own enqueue_job()
    refuses, else left alone. The keys are arq's: a test has arq read them.

    Raises: one of QUEUE_ERRORS, after at most ENQUEUE_TIMEOUT_SECONDS; some of the jobs may be there.
    """
    is_kept = True
    async with asyncio.timeout(ENQUEUE_TIMEOUT_SECONDS):
        for start in range(0, len(jobs) or 1, _JOBS_AT_ONCE):
            is_kept &= await _enqueue(pool, jobs[start : start + _JOBS_AT_ONCE], now)
    return is_kept


# A job that has begun is still in the sorted set, until arq removes it: LT leaves its time as it is.
_ENQUEUE = """
local written = redis.call('SET', KEYS[2], ARGV[2], 'GET')
for i = 3, #ARGV, 4 do
  redis.call('SET', ARGV[1] .. ARGV[i], ARGV[i + 1], 'PX', ARGV[i + 2])
  redis.call('ZADD', KEYS[1], 'LT', ARGV[i + 3], ARGV[i])
end
return written and 1 or 0
"""


async def _enqueue(pool: ArqRedis, jobs: Sequence[CleanupJob], now: datetime) -> bool:
    now_ms = _milliseconds(now)
    arguments: list[str | bytes | int] = [job_key_prefix, now_ms]
    for job in jobs:
        payload = serialize_job(FUNCTION, job.arguments, {}, None, now_ms, serializer=pool.job_serializer)
        # Rounded up: within the due millisecond it could find the record not due yet.
        at_ms = max(now_ms, _milliseconds(job.at) + 1)
        arguments += [job.id, payload, at_ms - now_ms + pool.expires_extra_ms, at_ms]
    return bool(await pool.register_script(_ENQUEUE)(keys=[QUEUE, _WRITTEN], args=arguments))


async def remove_due_jobs(pool: ArqRedis, *, now: datetime) -> None:
    """Remove the jobs whose time has come, whoever enqueued them and whatever their ids are.

    Raises: one of QUEUE_ERRORS, after at most ENQUEUE_TIMEOUT_SECONDS.
    """
    async with asyncio.timeout(ENQUEUE_TIMEOUT_SECONDS):
        ids: list[bytes] = await pool.zrangebyscore(QUEUE, "-inf", _milliseconds(now), start=0, num=_JOBS_AT_ONCE)
        if ids:
            await pool.zrem(QUEUE, *ids)
            await pool.delete(*(job_key_prefix.encode() + job_id for job_id in ids))


async def check(pool: ArqRedis) -> list[str]:
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


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)
