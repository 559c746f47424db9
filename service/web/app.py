"""The web side: the Litestar application, and its connection to the ledger and the queue."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from arq.connections import ArqRedis
from litestar import Litestar, Router
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from service import __version__
from service.config.settings import Settings, require_webhook_secret
from service.jobs import connection
from service.jobs.enqueue import Enqueuer
from service.ledger.database import Database
from service.resources import Resources, open_queue
from service.runtime.metrics import Metrics
from service.web import health, problems
from service.web.adding import Adding, AddingController
from service.web.auth import ApiTokens
from service.web.batches import BatchesController
from service.web.bulk import BulkController
from service.web.forwards import ForwardsController
from service.web.intake import Intake
from service.web.ledger_check import LedgerCheck
from service.web.operator import OperatorController
from service.web.parameters import refuse_unknown_parameters
from service.web.records import RecordsController
from service.web.refusals import Refusals
from service.web.security_headers import SECURITY_HEADERS
from service.web.server import serving
from service.web.webhooks import webhook_handler

log = structlog.get_logger()

# More than probes and scrapers open.
_WORKER_CONNECTIONS: Final = 64
# Longer than a check of health takes, and so short that a slow client does not delay the stop of a worker.
_WORKER_STOP_SECONDS: Final = 2


def make_app(
    settings: Settings,
    database: Database,
    queue_pool: ArqRedis,
    metrics: Metrics,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    refusals: Refusals | None = None,
) -> Litestar:
    """Build the ASGI application; the resources are open already."""
    enqueuer = Enqueuer(queue_pool, horizon=settings.queue_horizon, now=now, metrics=metrics)
    ledger_check = LedgerCheck(database, now=now)
    refusals = refusals or Refusals(metrics)
    dependencies = _health_dependencies(settings, database, queue_pool, metrics, now, ledger_check)
    adding = Adding(
        database=database,
        enqueue=enqueuer.enqueue,
        accounts=settings.account_ids,
        policy=settings.policy,
        now=now,
    )
    intake = _intake(settings, database, enqueuer, metrics, now, ledger_check)
    return Litestar(
        [webhook_handler(intake, refusals), health.live, health.ready, health.show_metrics, _operator(settings)],
        dependencies=dependencies
        | {
            "min_ttl_of": _provide(settings.min_ttl_of),
            "enqueue": _provide(enqueuer.enqueue),
            "adding": _provide(adding),
        },
        plugins=[problems.plugin],
        request_class=problems.JsonRequest,
        response_headers=SECURITY_HEADERS,
        exception_handlers=problems.exception_handlers,
        after_exception=[refusals.note_exception],
        on_shutdown=[enqueuer.close, refusals.close],
        openapi_config=_openapi(),
        logging_config=None,
    )


def _operator(settings: Settings) -> Router:
    """Return the operator API; one route of it takes the intake token as well."""
    return Router(
        "/api",
        route_handlers=[
            RecordsController,
            AddingController,
            BulkController,
            BatchesController,
            ForwardsController,
            OperatorController,
        ],
        guards=[ApiTokens(settings.api_token, settings.intake_token), refuse_unknown_parameters],
    )


def make_worker_app(
    settings: Settings,
    database: Database,
    queue_pool: ArqRedis,
    metrics: Metrics,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    refusals: Refusals | None = None,
) -> Litestar:
    """Build the ASGI application of a worker by itself: its health and its metrics, and nothing else."""
    refusals = refusals or Refusals(metrics)
    ledger_check = LedgerCheck(database, now=now)
    return Litestar(
        [health.worker_live, health.worker_ready, health.show_metrics],
        dependencies=_health_dependencies(settings, database, queue_pool, metrics, now, ledger_check),
        plugins=[problems.plugin],
        response_headers=SECURITY_HEADERS,
        exception_handlers=problems.exception_handlers,
        after_exception=[refusals.note_exception],
        on_shutdown=[refusals.close],
        openapi_config=None,
        logging_config=None,
    )


def _health_dependencies(  # noqa: PLR0917 - the parts of make_app()
    settings: Settings,
    database: Database,
    queue_pool: ArqRedis,
    metrics: Metrics,
    now: Callable[[], datetime],
    ledger_check: LedgerCheck,
) -> dict[str, Provide]:
    values = {
        "database": database,
        "ledger_check": ledger_check,
        "queue_pool": queue_pool,
        "metrics": metrics,
        "now": now,
        "is_dry_run": settings.is_dry_run,
        "swept": frozenset(settings.scopes),
        "key_names": {one.id: one.key_name for one in settings.accounts},
        "accounts": settings.account_ids,
        "targets": frozenset(target.id for target in settings.targets),
    }
    return {name: _provide(value) for name, value in values.items()}


def _intake(  # noqa: PLR0917 - the parts of make_app()
    settings: Settings,
    database: Database,
    enqueuer: Enqueuer,
    metrics: Metrics,
    now: Callable[[], datetime],
    ledger_check: LedgerCheck,
) -> Intake:
    return Intake(
        database=database,
        enqueue=enqueuer.enqueue,
        accounts=settings.accounts,
        tolerance=settings.webhook_tolerance,
        policy=settings.policy,
        targets=settings.targets,
        now=now,
        metrics=metrics,
        note_commit=ledger_check.note_commit,
    )


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Mayfly",
        version=__version__,
        components=Components(
            security_schemes={
                "bearer": SecurityScheme(type="http", scheme="bearer", description="MAYFLY_API_TOKEN"),
                "intake": SecurityScheme(type="http", scheme="bearer", description="MAYFLY_INTAKE_TOKEN"),
            }
        ),
        # JSON only: Litestar's pages load scripts from other hosts, and nobody should type a token beside those.
        render_plugins=[JsonRenderPlugin(path=["/", "/openapi.json"])],
    )


def _provide(value: object) -> Provide:
    def return_value() -> Any:  # noqa: ANN401 - each name has its own type
        return value

    return Provide(return_value, sync_to_thread=False, use_cache=True)


async def run_web(settings: Settings, resources: Resources, metrics: Metrics, stop: asyncio.Event) -> None:
    """Serve until *stop* is set, then answer the requests in progress and return.

    Raises: SettingsError without a webhook secret; QueueError for a Redis that would drop jobs; OSError when the
    address cannot be listened on.
    """
    require_webhook_secret(settings)
    async with open_queue(resources.redis_url, retries=0) as pool:
        refusals = Refusals(metrics)
        app = make_app(settings, resources.database, pool, metrics, refusals=refusals)
        server = serving(
            app, settings.host, settings.port, count_refusal=refusals.count_request, note_fault=refusals.note_fault
        )
        async with server as port:
            log.info("web.started", host=settings.host, port=port)
            metrics.running.labels("web").set(1)
            await stop.wait()
        log.info("web.stopped")


async def run_worker_web(settings: Settings, resources: Resources, metrics: Metrics, stop: asyncio.Event) -> None:
    """Serve the health and the metrics of a worker by itself until *stop* is set.

    Raises: OSError when the address cannot be listened on.
    """
    pool = connection.connect(resources.redis_url, retries=0)  # the worker checks the configuration of Redis
    try:
        refusals = Refusals(metrics)
        async with serving(
            make_worker_app(settings, resources.database, pool, metrics, refusals=refusals),
            settings.host,
            settings.port,
            max_connections=_WORKER_CONNECTIONS,
            stop_seconds=_WORKER_STOP_SECONDS,
            count_refusal=refusals.count_request,
            note_fault=refusals.note_fault,
        ) as port:
            log.info("worker.listening", host=settings.host, port=port)
            await stop.wait()
    finally:
        await pool.aclose(close_connection_pool=True)
