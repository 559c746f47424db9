"""The queue: delayed arq jobs in Redis, one for the next attempt at each scheduled record.

A job can be lost, late, doubled or early, and no record depends on it: the ledger decides what is due, and the worker's
safety net enqueues again what is missing.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec
import structlog
from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from arq.jobs import serialize_job

from service.core.key import Key
from service.jobs.connection import QUEUE, QUEUE_ERRORS
from service.runtime.metrics import Metrics

log = structlog.get_logger()

FUNCTION: Final = "cleanup"

# An enqueue that takes longer is given up: the record is durable, and the worker's safety net enqueues it again.
ENQUEUE_TIMEOUT_SECONDS: Final = 2.0
_JOBS_AT_ONCE: Final = 1000
# Jobs that wait for a slow Redis; what is beyond them is left to the worker's safety net.
_MAX_WAITING: Final = 10_000
_GATHER_SECONDS: Final = 0.05
# Written before any job, so that a Redis that takes no writes shows it, and one that was emptied shows that as well.
_WRITTEN: Final = f"{QUEUE}:written"


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
            is_kept &= await _enqueue_batch(pool, jobs[start : start + _JOBS_AT_ONCE], now)
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


async def _enqueue_batch(pool: ArqRedis, jobs: Sequence[CleanupJob], now: datetime) -> bool:
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


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


class Enqueuer:
    """Enqueues jobs in the background, after the response: a slow or unreachable Redis never delays one."""

    def __init__(self, pool: ArqRedis, *, horizon: timedelta, now: Callable[[], datetime], metrics: Metrics) -> None:
        self._pool = pool
        self._horizon = horizon
        self._now = now
        self._metrics = metrics
        self._waiting: list[CleanupJob] = []
        self._runner: asyncio.Task[None] | None = None

    def enqueue(self, jobs: Sequence[CleanupJob]) -> None:
        """Enqueue those of *jobs* that are due within the horizon; the ledger alone keeps the others."""
        horizon = self._now() + self._horizon
        self._waiting += [job for job in jobs if job.at <= horizon]
        if self._waiting and self._runner is None:
            self._runner = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Enqueue what waits, for as long as one round trip may take."""
        if self._runner is not None:
            await asyncio.wait([self._runner], timeout=ENQUEUE_TIMEOUT_SECONDS)

    async def _run(self) -> None:
        try:
            while self._waiting:
                # No job is urgent, the soonest due time is seconds away: many in one round trip cost less.
                await asyncio.sleep(_GATHER_SECONDS)
                jobs, left_out = self._waiting[:_MAX_WAITING], max(0, len(self._waiting) - _MAX_WAITING)
                self._waiting = []
                self._metrics.enqueue_failures.inc(left_out)
                try:
                    await enqueue_jobs(self._pool, jobs, now=self._now())
                except QUEUE_ERRORS as error:
                    self._metrics.enqueue_failures.inc(len(jobs))
                    what_now = "the worker finds these records in the ledger"
                    log.warning("enqueue.failed", records=len(jobs), error=type(error).__name__, what_now=what_now)
        finally:
            self._runner = None
