"""The queues: delayed arq jobs in Redis, for the next attempt at each scheduled record, its early look, batches, and
the next attempt at each delivery.

A job may be lost, late, duplicated or early, and nothing depends on it: the ledger decides what is due, and the
worker's safety nets enqueue what is missing.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import uuid4

import msgspec
import structlog
from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from arq.jobs import serialize_job

from service.core.key import DEFAULT_ACCOUNT, Key
from service.jobs.connection import QUEUE, QUEUE_ERRORS
from service.runtime.causes import describe_cause
from service.runtime.metrics import Metrics

log = structlog.get_logger()

CLEANUP: Final = "cleanup"
COPY: Final = "copy"
BATCH: Final = "batch"
FORWARD: Final = "forward"

# A slower enqueue is abandoned: the record is durable, and the safety net enqueues its job.
ENQUEUE_TIMEOUT_SECONDS: Final = 2.0
_JOBS_AT_ONCE: Final = 1000
# Jobs that may wait for a slow Redis; further ones are left to the safety net.
_MAX_WAITING: Final = 10_000
_GATHER_SECONDS: Final = 0.05
# Written before any job, so that a Redis that takes no writes shows it. Whoever writes first gives it its value, which
# stays: all others see by another one that Redis was emptied. No account and no target can be called that: their
# queues have names as this key has.
_MARK: Final = "_mark"


def queue_of(account: str) -> str:
    """Return the name of *account*'s queue. Each has its own: an account that must wait keeps no job of another."""
    return QUEUE if account == DEFAULT_ACCOUNT else f"{QUEUE}:{account}"


def queue_of_target(target: str) -> str:
    """Return the name of *target*'s queue. A target that is slow or away keeps no job of another, and no deletion."""
    return f"{QUEUE}:forward:{target}"


class CleanupJob(msgspec.Struct, frozen=True, gc=False):
    """Attempt number *attempt*, from 1, at the record of *key*, to start at the aware instant *at*."""

    key: Key
    attempt: int
    at: datetime

    @property
    def id(self) -> str:
        """The job's id. It is deterministic, so that an attempt has one job."""
        return f"{self.key.account}:{self.key.id}:{self.attempt}"

    @property
    def queue(self) -> str:
        """The name of the queue that it is in."""
        return queue_of(self.key.account)

    @property
    def function(self) -> str:
        """The name of the job's function."""
        return CLEANUP

    @property
    def arguments(self) -> tuple[str, str, int]:
        """The arguments of the job's function."""
        return self.key.account, self.key.id, self.attempt


class CopyJob(msgspec.Struct, frozen=True, gc=False):
    """The early look at the generation of *key*, to start at the aware instant *at*."""

    key: Key
    at: datetime

    @property
    def id(self) -> str:
        """The job's id; a generation has one look at a time."""
        return f"{self.key.account}:{self.key.id}:copy"

    @property
    def queue(self) -> str:
        """The name of the queue that it is in."""
        return queue_of(self.key.account)

    @property
    def function(self) -> str:
        """The name of the job's function."""
        return COPY

    @property
    def arguments(self) -> tuple[str, str]:
        """The arguments of the job's function."""
        return self.key.account, self.key.id


class BatchJob(msgspec.Struct, frozen=True, gc=False):
    """The look at the finished batch of *key*, to start at the aware instant *at*."""

    key: Key
    at: datetime

    @property
    def id(self) -> str:
        """The job's id; a batch has one look at a time."""
        return f"{self.key.account}:{self.key.id}:batch"

    @property
    def queue(self) -> str:
        """The name of the queue that it is in."""
        return queue_of(self.key.account)

    @property
    def function(self) -> str:
        """The name of the job's function."""
        return BATCH

    @property
    def arguments(self) -> tuple[str, str]:
        """The arguments of the job's function."""
        return self.key.account, self.key.id


class ForwardJob(msgspec.Struct, frozen=True, gc=False):
    """Attempt number *attempt*, from 1, at the *delivery* of that id to *target*, to start at the instant *at*."""

    target: str
    delivery: str
    attempt: int
    at: datetime

    @property
    def id(self) -> str:
        """The job's id. It is deterministic, so that an attempt has one job."""
        return f"forward:{self.delivery}:{self.attempt}"

    @property
    def queue(self) -> str:
        """The name of the queue that it is in."""
        return queue_of_target(self.target)

    @property
    def function(self) -> str:
        """The name of the job's function."""
        return FORWARD

    @property
    def arguments(self) -> tuple[str, int]:
        """The arguments of the job's function."""
        return self.delivery, self.attempt


Job = CleanupJob | CopyJob | BatchJob | ForwardJob


async def enqueue_job(pool: ArqRedis, job: Job, *, now: datetime) -> None:
    """Enqueue *job*, unless a job with its id exists.

    Raises: one of QUEUE_ERRORS, after at most ENQUEUE_TIMEOUT_SECONDS; the job may be enqueued nevertheless.
    """
    async with asyncio.timeout(ENQUEUE_TIMEOUT_SECONDS):
        wait = max(job.at - now, timedelta(0))
        # The result says nothing: None may mean an existing job or a lost connection.
        await pool.enqueue_job(job.function, *job.arguments, _job_id=job.id, _queue_name=job.queue, _defer_by=wait)


async def enqueue_jobs(pool: ArqRedis, queue: str, jobs: Sequence[Job], *, now: datetime) -> str:
    """Enqueue many *jobs* of *queue* in few round trips and return the mark of the queue.

    It is another one once Redis was emptied.

    An existing job is brought forward if its time is later than the new one, which arq's enqueue_job() does not do,
    else it is unchanged. The keys are arq's; a test checks them with arq itself.

    Raises: one of QUEUE_ERRORS, after at most ENQUEUE_TIMEOUT_SECONDS; some of the jobs may be enqueued.
    """
    mark = ""
    async with asyncio.timeout(ENQUEUE_TIMEOUT_SECONDS):
        for start in range(0, len(jobs) or 1, _JOBS_AT_ONCE):
            mark = await _enqueue_batch(pool, queue, jobs[start : start + _JOBS_AT_ONCE], now)
    return mark


# A running job stays in the sorted set until arq removes it; LT does not postpone it.
_ENQUEUE = """
local mark = redis.call('GET', KEYS[2]) or ARGV[2]
redis.call('SET', KEYS[2], mark)
for i = 3, #ARGV, 4 do
  redis.call('SET', ARGV[1] .. ARGV[i], ARGV[i + 1], 'PX', ARGV[i + 2])
  redis.call('ZADD', KEYS[1], 'LT', ARGV[i + 3], ARGV[i])
end
return mark
"""


async def _enqueue_batch(pool: ArqRedis, queue: str, jobs: Sequence[Job], now: datetime) -> str:
    now_ms = _milliseconds(now)
    arguments: list[str | bytes | int] = [job_key_prefix, uuid4().hex]
    for job in jobs:
        payload = serialize_job(job.function, job.arguments, {}, None, now_ms, serializer=pool.job_serializer)
        # Rounded up: within the due millisecond the record may not be due yet.
        at_ms = max(now_ms, _milliseconds(job.at) + 1)
        arguments += [job.id, payload, at_ms - now_ms + pool.expires_extra_ms, at_ms]
    mark: bytes = await pool.register_script(_ENQUEUE)(keys=[queue, f"{queue}:{_MARK}"], args=arguments)
    return mark.decode()


async def remove_due_jobs(pool: ArqRedis, queue: str, *, now: datetime) -> None:
    """Remove the jobs of *queue* that are due, whatever their ids are and whoever enqueued them.

    Raises: one of QUEUE_ERRORS, after at most ENQUEUE_TIMEOUT_SECONDS.
    """
    async with asyncio.timeout(ENQUEUE_TIMEOUT_SECONDS):
        ids: list[bytes] = await pool.zrangebyscore(queue, "-inf", _milliseconds(now), start=0, num=_JOBS_AT_ONCE)
        if ids:
            await pool.zrem(queue, *ids)
            await pool.delete(*(job_key_prefix.encode() + job_id for job_id in ids))


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


class Enqueuer:
    """Enqueues jobs in the background, after the response: a slow or unreachable Redis delays no response."""

    def __init__(self, pool: ArqRedis, *, horizon: timedelta, now: Callable[[], datetime], metrics: Metrics) -> None:
        self._pool = pool
        self._horizon = horizon
        self._now = now
        self._metrics = metrics
        self._waiting: list[Job] = []
        self._runner: asyncio.Task[None] | None = None

    def enqueue(self, jobs: Sequence[Job]) -> None:
        """Enqueue those of *jobs* that are due within the horizon; the others stay in the ledger."""
        horizon = self._now() + self._horizon
        self._waiting += [job for job in jobs if job.at <= horizon]
        if self._waiting and self._runner is None:
            self._runner = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Enqueue what waits, within ENQUEUE_TIMEOUT_SECONDS."""
        if self._runner is not None:
            await asyncio.wait([self._runner], timeout=ENQUEUE_TIMEOUT_SECONDS)

    async def _run(self) -> None:
        try:
            while self._waiting:
                # The earliest due time is seconds ahead, so there is time to collect jobs for one round trip.
                await asyncio.sleep(_GATHER_SECONDS)
                jobs, left_out = self._waiting[:_MAX_WAITING], max(0, len(self._waiting) - _MAX_WAITING)
                self._waiting = []
                self._metrics.enqueue_failures.inc(left_out)
                for queue, mine in _by_queue(jobs).items():
                    await self._try(queue, mine)
        finally:
            self._runner = None

    async def _try(self, queue: str, jobs: Sequence[Job]) -> None:
        try:
            await enqueue_jobs(self._pool, queue, jobs, now=self._now())
        except QUEUE_ERRORS as error:
            self._metrics.enqueue_failures.inc(len(jobs))
            what_now = "the worker will find in the ledger what these jobs are about"
            log.warning("enqueue.failed", jobs=len(jobs), error=describe_cause(error), what_now=what_now)


def _by_queue(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    grouped: dict[str, list[Job]] = {}
    for job in jobs:
        grouped.setdefault(job.queue, []).append(job)
    return grouped
