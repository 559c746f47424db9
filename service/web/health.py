"""How the service is: alive, ready, and in numbers."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Literal

import msgspec
from arq.connections import ArqRedis
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.jobs.connection import QUEUE_ERRORS
from service.ledger import migrating, pausing, reading
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.migrating import SchemaError
from service.ledger.pausing import Kind, Pause
from service.runtime.metrics import Metrics
from service.runtime.tasks import run_within

_TEXT = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")  # Litestar adds that itself
_CHECK_SECONDS = 0.9
# Longer than a backlog, a restart or a lease takes.
LATE = timedelta(minutes=10)


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one part is: *detail* says what fails and what that means."""

    status: Literal["ok", "failing", "paused", "late"]
    detail: str | None = None


class Health(msgspec.Struct, frozen=True):
    """How the whole is: *degraded* takes webhooks and keeps them safe, but deletions wait or are late."""

    status: Literal["ok", "degraded", "failing"]
    parts: dict[str, Part]


@get("/health/live", tags=["health"], summary="Is the process alive?")
async def live() -> Health:
    """Answer 200 for as long as the process can answer at all."""
    return Health("ok", {})


@get(
    "/health/ready",
    tags=["health"],
    summary="Can it take webhooks?",
    responses={503: ResponseSpec(Health, generate_examples=False, description="it cannot: the parts say why")},
)
async def ready(
    database: NamedDependency[Database],
    queue_pool: NamedDependency[ArqRedis],
    now: NamedDependency[Callable[[], datetime]],
    is_dry_run: NamedDependency[bool],
) -> Response[Health]:
    """Answer 200 while webhooks can be stored, else 503; either way with the parts that fail.

    A Redis that is away makes deletions late, not lost: sync.so does not send a webhook twice, so turning webhooks
    away for it would be the greater harm.
    """
    ledger, redis, deletions = await asyncio.gather(
        _check_ledger(database), _check_redis(queue_pool), _check_deletions(database, now(), is_dry_run=is_dry_run)
    )
    parts = {"ledger": ledger, "redis": redis, "deletions": deletions}
    if parts["ledger"].status == "failing":
        return Response(Health("failing", parts), status_code=503)
    is_well = all(part.status == "ok" for part in parts.values())
    return Response(Health("ok" if is_well else "degraded", parts))


async def _check_ledger(database: Database) -> Part:
    try:
        await run_within(_CHECK_SECONDS, database.write(migrating.check_writable))
    except SchemaError as error:
        return Part("failing", str(error))
    except (LedgerUnavailableError, TimeoutError):
        return Part("failing", "the database takes no writes: webhooks are refused with 503 until it does")
    return Part("ok")


async def _check_redis(queue_pool: ArqRedis) -> Part:
    try:
        await run_within(_CHECK_SECONDS, queue_pool.ping())
    except QUEUE_ERRORS:
        return Part("failing", "Redis does not answer: webhooks are stored, deletions are started from the ledger")
    return Part("ok")


async def _check_deletions(database: Database, now: datetime, *, is_dry_run: bool) -> Part:
    try:
        pauses, next_wake = await run_within(
            _CHECK_SECONDS,
            database.read(lambda connection: (pausing.find_pauses(connection), reading.next_wake(connection))),
        )
    except (LedgerUnavailableError, TimeoutError):
        return Part("failing", "the database does not answer")
    if pauses:
        return Part("paused", "; ".join(_explain_pause(pause) for pause in pauses))
    if is_dry_run:
        return Part("paused", "MAYFLY_DRY_RUN is on: nothing is deleted")
    if next_wake is not None and now - next_wake > LATE:
        minutes = (now - next_wake) // timedelta(minutes=1)
        return Part("late", f"the oldest is {minutes} min overdue: see that a worker runs and what its log says")
    return Part("ok")


def _explain_pause(pause: Pause) -> str:
    advice = {
        Kind.OPERATOR: "mayfly resume ends it",
        Kind.UNAUTHORIZED: "see to SYNC_API_KEY; one record a minute tries it again",
        Kind.DAILY_LIMIT: "MAYFLY_MAX_DELETES_PER_DAY is reached; it ends at midnight UTC",
        Kind.THROTTLED: "it ends when the time is over that the API asked for",
    }
    return f"since {pause.since:%Y-%m-%d %H:%M:%S} UTC by {pause.actor}: {pause.reason}; {advice[pause.kind]}"


@get("/metrics", tags=["health"], summary="Prometheus metrics", media_type=_TEXT)
async def show_metrics(
    database: NamedDependency[Database], metrics: NamedDependency[Metrics], now: NamedDependency[Callable[[], datetime]]
) -> Response[bytes]:
    """Answer the counters of this process, and what the ledger says of all."""
    await _read_gauges(database, metrics, now())
    return Response(generate_latest(metrics.registry), media_type=_TEXT)


async def _read_gauges(database: Database, metrics: Metrics, now: datetime) -> None:
    """Read the ledger's gauges; without a ledger they keep still, and mayfly_ledger_up says so."""
    try:
        backlog, pauses = await run_within(
            _CHECK_SECONDS,
            database.read(
                lambda connection: (reading.read_backlog(connection, now=now), pausing.find_pauses(connection))
            ),
        )
    except (LedgerUnavailableError, TimeoutError):
        metrics.ledger_up.set(0)
        return
    metrics.ledger_up.set(1)
    metrics.oldest_overdue_seconds.set(backlog.oldest_overdue.total_seconds())
    metrics.due_records.set(backlog.due)
    metrics.failed_records.set(backlog.failed)
    for kind in Kind:
        metrics.pauses.labels(kind).set(any(pause.kind is kind for pause in pauses))
