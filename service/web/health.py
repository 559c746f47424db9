"""Health checks and metrics."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Literal

import msgspec
from arq.connections import ArqRedis
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import Connection

from service.core.batch import BatchState
from service.jobs.connection import QUEUE_ERRORS
from service.ledger import account_reading, adopting, batches, pausing, reading
from service.ledger.database import Database, LedgerUnavailableError
from service.ledger.delivery_reading import Open, count_open
from service.ledger.pausing import ALL_ACCOUNTS, Kind, Pause
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
async def ready(  # noqa: PLR0917 - injected
    database: NamedDependency[Database],
    ledger_check: NamedDependency[LedgerCheck],
    queue_pool: NamedDependency[ArqRedis],
    now: NamedDependency[Callable[[], datetime]],
    is_dry_run: NamedDependency[bool],
    key_names: NamedDependency[Mapping[str, str]],
) -> Response[Health]:
    """Answer 200 while webhooks can be stored, else 503; both with the state of each part.

    An unreachable Redis only delays deletions. Refusing webhooks would lose them, because sync.so does not retry.
    """
    deletions = _check_deletions(database, key_names, now(), is_dry_run=is_dry_run)
    return _answer(await _check_stores(ledger_check, queue_pool, deletions))


@get("/health/ready")
async def worker_ready(  # noqa: PLR0917 - injected
    database: NamedDependency[Database],
    ledger_check: NamedDependency[LedgerCheck],
    queue_pool: NamedDependency[ArqRedis],
    metrics: NamedDependency[Metrics],
    now: NamedDependency[Callable[[], datetime]],
    is_dry_run: NamedDependency[bool],
    key_names: NamedDependency[Mapping[str, str]],
) -> Response[Health]:
    """Answer 200 while the worker can commit and its loop goes round, else 503; both with the state of each part."""
    deletions = _check_deletions(database, key_names, now(), is_dry_run=is_dry_run)
    parts = await _check_stores(ledger_check, queue_pool, deletions)
    return _answer(parts | {"worker": _check_worker(metrics, now())})


async def _check_stores(
    ledger_check: LedgerCheck, queue_pool: ArqRedis, check_deletions: Coroutine[object, object, Part]
) -> dict[str, Part]:
    ledger, redis, deletions = await asyncio.gather(
        _check_ledger(ledger_check), _check_redis(queue_pool), check_deletions
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


async def _check_deletions(
    database: Database, key_names: Mapping[str, str], now: datetime, *, is_dry_run: bool
) -> Part:
    try:
        pauses, overdue = await run_within(_CHECK_SECONDS, database.read(partial(_read_deletions, now=now)))
    except (LedgerUnavailableError, TimeoutError):
        return Part("failing", "the database does not answer")
    if pauses:
        paused = {pause.account for pause in pauses}
        others = {one: late for one, late in overdue.items() if not paused & {one, ALL_ACCOUNTS}}
        reasons = [_explain_pause(pause, key_names) for pause in pauses]
        return Part("paused", "; ".join(reasons + [_explain_late(*one, key_names) for one in others.items()]))
    if is_dry_run:
        return Part("paused", "MAYFLY_DRY_RUN is on: nothing is deleted")
    if overdue:
        return Part("late", "; ".join(_explain_late(account, late, key_names) for account, late in overdue.items()))
    return Part("ok")


def _read_deletions(connection: Connection, *, now: datetime) -> tuple[list[Pause], dict[str, timedelta]]:
    return pausing.find_pauses(connection), account_reading.find_overdue(connection, now=now, than=LATE)


def _explain_late(account: str, late: timedelta, key_names: Mapping[str, str]) -> str:
    oldest = f"the oldest is {late // timedelta(minutes=1)} min overdue"
    if account not in key_names:
        return f"account {account} is not configured: nothing deletes its records, and {oldest}"
    whose = "" if len(key_names) == 1 else f"account {account}: "
    return f"{whose}{oldest}: check that a worker runs, and its log"


def _explain_pause(pause: Pause, key_names: Mapping[str, str]) -> str:
    key = key_names.get(pause.account) or " and ".join(key_names.values())
    advice = {
        Kind.OPERATOR: "mayfly resume ends it",
        Kind.UNAUTHORIZED: f"check {key}; one record a minute tests whether it works again",
        Kind.DAILY_LIMIT: "MAYFLY_MAX_DELETES_PER_DAY is reached; it ends at midnight UTC, or with a higher limit",
        Kind.WRONG_ORGANISATION: f"check {key} with mayfly doctor; mayfly resume ends it if they are really gone",
        Kind.THROTTLED: "it ends after the time that the API asked for",
    }
    whose = "" if pause.account == ALL_ACCOUNTS or list(key_names) == [pause.account] else f"account {pause.account}, "
    since = f"{whose}since {pause.since:%Y-%m-%d %H:%M:%S} UTC"
    return f"{since} by {pause.actor}: {pause.reason}; {advice[pause.kind]}"


@get("/metrics", tags=["health"], summary="Prometheus metrics", media_type=_TEXT)
async def show_metrics(  # noqa: PLR0917 - injected
    database: NamedDependency[Database],
    ledger_check: NamedDependency[LedgerCheck],
    metrics: NamedDependency[Metrics],
    now: NamedDependency[Callable[[], datetime]],
    swept: NamedDependency[frozenset[str]],
    key_names: NamedDependency[Mapping[str, str]],
    targets: NamedDependency[frozenset[str]],
) -> Response[bytes]:
    """Answer the metrics of this process, and gauges read from the ledger; *swept* are the accounts that are swept."""
    gauges = _read_gauges(database, metrics, [*key_names], swept, now())
    failure, is_read = await asyncio.gather(ledger_check.find_failure(), gauges)
    metrics.ledger_up.set(failure is None and is_read)
    if is_read:  # afterwards, so that it needs no further connection
        await _read_forwards(database, metrics, targets, now())
    return Response(generate_latest(metrics.registry), media_type=_TEXT)


async def _read_gauges(
    database: Database, metrics: Metrics, accounts: Sequence[str], swept: Iterable[str], now: datetime
) -> bool:
    """Read the ledger's gauges; False if it does not answer, and they keep their values."""
    try:
        backlog, held, pauses, sweeps, counted, overdue = await run_within(
            _CHECK_SECONDS,
            database.read(
                lambda connection: (
                    reading.read_backlog(connection, now=now),
                    reading.count_held(connection),
                    pausing.find_pauses(connection),
                    {account: adopting.last_complete(connection, account) for account in swept},
                    batches.count_batches(connection),
                    account_reading.find_overdue(connection, now=now, than=timedelta(0)),
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
    paused = {pause.account for pause in pauses}
    for account in {*accounts, *overdue}:
        metrics.account_paused.labels(account).set(bool(paused & {account, ALL_ACCOUNTS}))
        metrics.account_overdue_seconds.labels(account).set(overdue.get(account, timedelta(0)).total_seconds())
    return True


async def _read_forwards(database: Database, metrics: Metrics, targets: Iterable[str], now: datetime) -> None:
    """Read the gauges of deliveries; they keep their values if the ledger does not answer in time.

    A target that is not configured any more has them as long as the ledger has deliveries to it.
    """
    try:
        counted = await run_within(_CHECK_SECONDS, database.read(count_open))
    except (LedgerUnavailableError, TimeoutError):
        return
    gauges = (metrics.forwards_waiting, metrics.forwards_failed, metrics.forward_oldest_waiting_seconds)
    for gauge in gauges:
        gauge.clear()
    for target in {*targets, *counted}:
        one = counted.get(target, Open())
        age = timedelta(0) if one.waiting_since is None else max(now - one.waiting_since, timedelta(0))
        for gauge, value in zip(gauges, (one.waiting, one.failed, age.total_seconds()), strict=True):
            gauge.labels(target).set(value)
