"""Health checks and metrics."""

import asyncio
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Literal

import msgspec
from arq.connections import ArqRedis
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.core.batch import BatchState
from service.jobs.connection import QUEUE_ERRORS
from service.ledger import adopting, batches, pausing, reading
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.pausing import Kind, Pause
from service.runtime.metrics import Metrics
from service.runtime.tasks import run_within
from service.web.ledger_check import LedgerCheck

_TEXT = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")  # Litestar adds the charset
_CHECK_SECONDS = 0.9
# The safety net begins a round every two seconds; one may wait for the ledger and the budget.
_ROUND_WITHIN = timedelta(minutes=1)
# Longer than a usual backlog, a restart or a lease.
LATE = timedelta(minutes=10)


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """The health of one part; *detail* says what fails and what follows from that."""

    status: Literal["ok", "failing", "paused", "late"]
    detail: str | None = None


class Health(msgspec.Struct, frozen=True):
    """The health of the service. *degraded*: webhooks are stored, but deletions are paused or late."""

    status: Literal["ok", "degraded", "failing"]
    parts: dict[str, Part]


@get("/health/live", tags=["health"], summary="Is the process alive?")
async def live() -> Health:
    """Answer 200 whenever the process can answer."""
    return Health("ok", {})


@get("/health/live")
async def worker_live(
    metrics: NamedDependency[Metrics], now: NamedDependency[Callable[[], datetime]]
) -> Response[Health]:
    """Answer 200 while the loop of the worker in this process goes round, else 503."""
    return _answer({"worker": _check_worker(metrics, now())})


@get(
    "/health/ready",
    tags=["health"],
    summary="Can it take webhooks?",
    responses={503: ResponseSpec(Health, generate_examples=False, description="No; the parts say why")},
)
async def ready(
    database: NamedDependency[Database],
    ledger_check: NamedDependency[LedgerCheck],
    queue_pool: NamedDependency[ArqRedis],
    now: NamedDependency[Callable[[], datetime]],
    is_dry_run: NamedDependency[bool],
) -> Response[Health]:
    """Answer 200 while webhooks can be stored, else 503; both with the state of each part.

    An unreachable Redis only delays deletions. Refusing webhooks would lose them, because sync.so does not retry.
    """
    return _answer(await _check_stores(database, ledger_check, queue_pool, now(), is_dry_run=is_dry_run))


@get("/health/ready")
async def worker_ready(  # noqa: PLR0917 - injected
    database: NamedDependency[Database],
    ledger_check: NamedDependency[LedgerCheck],
    queue_pool: NamedDependency[ArqRedis],
    metrics: NamedDependency[Metrics],
    now: NamedDependency[Callable[[], datetime]],
    is_dry_run: NamedDependency[bool],
) -> Response[Health]:
    """Answer 200 while the worker can commit and its loop goes round, else 503; both with the state of each part."""
    parts = await _check_stores(database, ledger_check, queue_pool, now(), is_dry_run=is_dry_run)
    return _answer(parts | {"worker": _check_worker(metrics, now())})


async def _check_stores(
    database: Database, ledger_check: LedgerCheck, queue_pool: ArqRedis, now: datetime, *, is_dry_run: bool
) -> dict[str, Part]:
    ledger, redis, deletions = await asyncio.gather(
        _check_ledger(ledger_check), _check_redis(queue_pool), _check_deletions(database, now, is_dry_run=is_dry_run)
    )
    return {"ledger": ledger, "redis": redis, "deletions": deletions}


def _answer(parts: dict[str, Part]) -> Response[Health]:
    if any(parts[name].status == "failing" for name in ("ledger", "worker") if name in parts):
        return Response(Health("failing", parts), status_code=503)
    is_well = all(part.status == "ok" for part in parts.values())
    return Response(Health("ok" if is_well else "degraded", parts))


def _check_worker(metrics: Metrics, now: datetime) -> Part:
    """Tell a worker whose event loop runs, but whose safety net is stuck, from one that works."""
    begun = metrics.last_round()
    if begun is None:
        return Part("failing", "its loop has not begun yet")
    if now - begun >= _ROUND_WITHIN:
        seconds = int((now - begun).total_seconds())
        return Part("failing", f"its loop has not gone round for {seconds} s: restart it, and keep its log")
    return Part("ok")


async def _check_ledger(ledger_check: LedgerCheck) -> Part:
    failure = await ledger_check.find_failure()
    return Part("ok") if failure is None else Part("failing", failure)


async def _check_redis(queue_pool: ArqRedis) -> Part:
    try:
        await run_within(_CHECK_SECONDS, queue_pool.ping())
    except QUEUE_ERRORS:
        return Part("failing", "Redis does not answer: webhooks are stored, and the ledger starts deletions")
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
        return Part("late", f"the oldest is {minutes} min overdue: check that a worker runs, and its log")
    return Part("ok")


def _explain_pause(pause: Pause) -> str:
    advice = {
        Kind.OPERATOR: "mayfly resume ends it",
        Kind.UNAUTHORIZED: "check SYNC_API_KEY; one record a minute tests whether it works again",
        Kind.DAILY_LIMIT: "MAYFLY_MAX_DELETES_PER_DAY is reached; it ends at midnight UTC, or with a higher limit",
        Kind.WRONG_ORGANISATION: "check SYNC_API_KEY with mayfly doctor; mayfly resume ends it if they are really gone",
        Kind.THROTTLED: "it ends after the time that the API asked for",
    }
    return f"since {pause.since:%Y-%m-%d %H:%M:%S} UTC by {pause.actor}: {pause.reason}; {advice[pause.kind]}"


@get("/metrics", tags=["health"], summary="Prometheus metrics", media_type=_TEXT)
async def show_metrics(
    database: NamedDependency[Database],
    ledger_check: NamedDependency[LedgerCheck],
    metrics: NamedDependency[Metrics],
    now: NamedDependency[Callable[[], datetime]],
    swept: NamedDependency[frozenset[str]],
) -> Response[bytes]:
    """Answer the metrics of this process, and gauges read from the ledger; *swept* are the accounts that are swept."""
    failure, is_read = await asyncio.gather(ledger_check.find_failure(), _read_gauges(database, metrics, now(), swept))
    metrics.ledger_up.set(failure is None and is_read)
    return Response(generate_latest(metrics.registry), media_type=_TEXT)


async def _read_gauges(database: Database, metrics: Metrics, now: datetime, swept: Iterable[str]) -> bool:
    """Read the ledger's gauges; False if it does not answer, and they keep their values."""
    try:
        backlog, held, pauses, sweeps, counted = await run_within(
            _CHECK_SECONDS,
            database.read(
                lambda connection: (
                    reading.read_backlog(connection, now=now),
                    reading.count_held(connection),
                    pausing.find_pauses(connection),
                    {account: adopting.last_complete(connection, account) for account in swept},
                    batches.count_batches(connection),
                )
            ),
        )
    except (LedgerUnavailableError, TimeoutError):
        return False
    for account, at in sweeps.items():
        metrics.sweep_complete_seconds.labels(account).set(0 if at is None else at.timestamp())
    for state, number in counted.items():
        if state is not BatchState.RESOLVED:
            metrics.batches_open.labels(state).set(number)
    metrics.oldest_overdue_seconds.set(backlog.oldest_overdue.total_seconds())
    metrics.due_records.set(backlog.due)
    metrics.failed_records.set(backlog.failed)
    for cause, number in held.items():
        metrics.held_records.labels(cause).set(number)
    for kind in Kind:
        metrics.pauses.labels(kind).set(any(pause.kind is kind for pause in pauses))
    return True
