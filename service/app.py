"""The web side: Litestar joined to the ledger and the queue."""

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import structlog
from arq.connections import ArqRedis
from litestar import Litestar, Router
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, RequestBody, SecurityScheme

from service import __version__, health, problems, webhook_route
from service.enqueue import Enqueuer
from service.http_protocol import ShortWay
from service.ledger.database import Database
from service.operator_api import OperatorController
from service.records_api import ESCAPED_SLASH, OperatorToken, RecordsController
from service.resources import Resources, open_queue
from service.serving import serving
from service.settings import Settings, require_webhook_secret
from service.telemetry import Metrics
from service.webhook import Intake

log = structlog.get_logger()

_ESCAPED_SLASH: Final = re.compile(rb"%2f", re.IGNORECASE)


def make_app(
    settings: Settings,
    database: Database,
    queue_pool: ArqRedis,
    metrics: Metrics,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Litestar:
    """Build the ASGI application over resources that are open."""
    enqueuer = Enqueuer(queue_pool, horizon=settings.queue_horizon, now=now, metrics=metrics)
    given = {
        "database": database,
        "queue_pool": queue_pool,
        "metrics": metrics,
        "now": now,
        "is_dry_run": settings.is_dry_run,
    }
    operator = Router(
        "/api", route_handlers=[RecordsController, OperatorController], guards=[OperatorToken(settings.api_token)]
    )
    intake = _intake(settings, database, enqueuer, metrics, now)
    route = webhook_route.WebhookRoute(intake, metrics)
    app = _Mayfly(
        [route.handler(), health.live, health.ready, health.show_metrics, operator],
        dependencies={name: _provide(value) for name, value in given.items()},
        plugins=[problems.plugin],
        exception_handlers=problems.exception_handlers,
        after_exception=[problems.log_fault],
        on_shutdown=[enqueuer.close],
        openapi_config=_openapi(),
        logging_config=None,
    )
    _describe(app)
    app.short_way = route
    return app


def _intake(
    settings: Settings, database: Database, enqueuer: Enqueuer, metrics: Metrics, now: Callable[[], datetime]
) -> Intake:
    return Intake(
        database=database,
        enqueue=enqueuer.enqueue,
        secrets=[secret.reveal().encode() for secret in settings.webhook_secrets],
        tolerance=settings.webhook_tolerance,
        policy=settings.policy,
        now=now,
        metrics=metrics,
    )


class _Mayfly(Litestar):
    """Litestar with ids that may have a slash, and with a way past it for the one route that is always asked for."""

    short_way: ShortWay

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - as ASGI has it
        """Answer one request."""
        # An escaped slash is a part of a name and not a step.
        if b"%2" in scope.get("raw_path", b""):
            raw_path = _ESCAPED_SLASH.sub(ESCAPED_SLASH.encode(), scope["raw_path"])
            scope = {**scope, "path": unquote_to_bytes(raw_path).decode(errors="replace")}
        await super().__call__(scope, receive, send)


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Mayfly",
        version=__version__,
        components=Components(security_schemes={"bearer": SecurityScheme(type="http", scheme="bearer")}),
        # No page with it: those that Litestar has load scripts of others, beside which nobody should type a token.
        render_plugins=[JsonRenderPlugin(path=["/", "/openapi.json"])],
    )


def _describe(app: Litestar) -> None:
    """Complete what Litestar says of the routes: it cannot see into a raw handler, and takes no body for no choice."""
    paths = app.openapi_schema.paths or {}
    for item in paths.values():
        if item.post is not None and isinstance(item.post.request_body, RequestBody):
            item.post.request_body.required = False
    paths[webhook_route.PATH] = webhook_route.describe()


def _provide(value: object) -> Provide:
    def give() -> Any:  # noqa: ANN401 - each name has its own type
        return value

    return Provide(give, sync_to_thread=False, use_cache=True)


async def run_web(settings: Settings, resources: Resources, metrics: Metrics, stop: asyncio.Event) -> None:
    """Serve until *stop* is set, then answer what is under way and return.

    Raises: SettingsError without a webhook secret; QueueError for a Redis that would drop jobs; OSError when the
    address cannot be listened on.
    """
    require_webhook_secret(settings)
    async with open_queue(resources.redis_url, retries=0) as pool:
        app = make_app(settings, resources.database, pool, metrics)
        async with serving(app, settings.host, settings.port) as port:
            log.info("web.started", host=settings.host, port=port)
            await stop.wait()
        log.info("web.stopped")
