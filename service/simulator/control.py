"""``/simulator/…``: the routes with which other processes control the simulator. The names are not the API's.

From the loopback interface they need no key, from elsewhere the API key. Bodies are decoded here and not by Litestar,
whose errors do not say which field of which item is wrong.
"""

import asyncio
import inspect
import re
from collections import Counter
from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import Litestar, Request, Response, delete, get, patch, post, put
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.exceptions import NotAuthorizedException, NotFoundException, ValidationException
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.params import QueryParameter, RawBody

from service.simulator.control_bodies import (
    AddRequest,
    AssetRequest,
    CallPage,
    DeliverRequest,
    Script,
    StateView,
    Summary,
    WebhookView,
    convert_field,
    decode,
)
from service.simulator.generation import Generation
from service.simulator.organisation import Delivery, Organisation, Switches
from service.simulator.wire import is_loopback

# With more at once, the receiver would time out.
WEBHOOKS_AT_ONCE = 50

# What msgspec appends to its messages.
_PLACE = re.compile(r"(?P<message>.*) - at `\$(?P<place>.*)`", re.DOTALL)

Simulated = NamedDependency[Organisation]
GenerationId = Annotated[str, QueryParameter(name="id")]


@get("/")
async def list_routes() -> dict[str, str]:
    """List these routes."""
    return dict(describe_routes())


@post("/generations")
async def add_generations(simulated: Simulated, body: RawBody) -> list[str]:
    """Add generations, as many as their counts say, and answer with their ids; all of them or none."""
    requests: list[AddRequest] = decode(body, list[AddRequest])
    ids: list[str] = []
    for request in requests:
        names = [name for name in request.__struct_fields__ if name not in ("count", "overrides")]
        arguments: dict[str, Any] = {name: getattr(request, name) for name in names}
        arguments |= request.overrides
        ids.extend(simulated.add(**arguments).id for _ in range(request.count))
    return ids


@get("/generation")
async def show_generation(simulated: Simulated, generation_id: GenerationId) -> StateView:
    """Show one generation, also once it is deleted, with what the API does not show."""
    generation = _find_generation(simulated, generation_id)
    return StateView(
        generation=generation.body(),
        source=generation.source,
        batch_id=generation.batch_id,
        first_delete_at=generation.first_delete_at,
        deleted_at=generation.deleted_at,
        held=simulated.gates.waiting.get(generation_id, 0),
    )


@delete("/generation")
async def remove_generation(simulated: Simulated, generation_id: GenerationId) -> None:
    """Delete one generation, as another client of the API would."""
    simulated.remove(_find_generation(simulated, generation_id).id)


@post("/faults")
async def script_faults(simulated: Simulated, body: RawBody) -> None:
    """Script faults for the next calls, of one generation or of all."""
    for script in decode(body, list[Script]):
        simulated.plan.script(script.operation, script.faults, script.generation_id)


@put("/standing")
async def set_standing(simulated: Simulated, body: RawBody) -> None:
    """Set the fault of every call of an operation; null ends it."""
    for operation, fault in decode(body, dict[str, object]).items():
        simulated.plan.stand(operation, convert_field(operation, fault, str | None))


@put("/mix")
async def set_mix(simulated: Simulated, body: RawBody) -> None:
    """Set the faults that hit calls of an operation at random, each with its probability."""
    for operation, probabilities in decode(body, dict[str, object]).items():
        simulated.plan.mix(operation, convert_field(operation, probabilities, dict[str, float]))


@post("/assets")
async def add_asset(simulated: Simulated, body: RawBody) -> dict[str, object]:
    """Add an uploaded file."""
    request: AssetRequest = decode(body or b"{}", AssetRequest)
    asset = simulated.add_asset(kind=request.kind, name=request.name, size=request.size, is_own=request.is_own)
    return asset.body()


@get("/switches")
async def show_switches(simulated: Simulated) -> Switches:
    """Show the switches."""
    return simulated.switches


@patch("/switches")
async def set_switches(simulated: Simulated, body: RawBody) -> Switches:
    """Change some switches: outage, key, latency, rate, final statuses, and what is undocumented."""
    data: dict[str, object] = decode(body, dict[str, object])
    simulated.switches = msgspec.convert(msgspec.to_builtins(simulated.switches) | data, Switches)
    return simulated.switches


@post("/release", status_code=200)
async def release(simulated: Simulated, generation_id: GenerationId) -> dict[str, int]:
    """Let the calls about one generation continue that wait by the faults hold and hold-after."""
    return {"released": simulated.release(generation_id)}


@post("/deliver", status_code=200)
async def deliver(simulated: Simulated, body: RawBody) -> list[Delivery]:
    """Send the webhooks of some generations now, each in so many copies."""
    data: DeliverRequest = decode(body, DeliverRequest)
    gate = asyncio.Semaphore(WEBHOOKS_AT_ONCE)

    async def send(generation_id: str) -> list[Delivery]:
        async with gate:
            return await simulated.deliver(_find_generation(simulated, generation_id).id, copies=data.copies)

    sent = await asyncio.gather(*(send(generation_id) for generation_id in data.ids))
    return [delivery for deliveries in sent for delivery in deliveries]


@get("/webhook")
async def show_webhook(
    simulated: Simulated,
    generation_id: GenerationId,
    at: Annotated[datetime | None, QueryParameter()] = None,
) -> WebhookView:
    """Show the signed webhook of one generation, as sent at some time, without sending it."""
    body, headers = simulated.webhook(_find_generation(simulated, generation_id).id, at=at)
    return WebhookView(body.decode(), headers)


@get("/calls")
async def show_calls(simulated: Simulated, since: Annotated[int, QueryParameter()] = 0) -> CallPage:
    """List the calls from number since on; next is the number at which the next page begins."""
    return CallPage(next=len(simulated.calls), calls=simulated.calls[since:])


@get("/summary")
async def show_summary(simulated: Simulated) -> Summary:
    """Count generations, calls, faults and webhooks."""
    return Summary(
        existing=len(simulated.generations),
        deleted=len(simulated.removed),
        calls=Counter(f"{call.operation} {call.status}" for call in simulated.calls),
        faults=Counter(call.fault for call in simulated.calls if call.fault is not None),
        deliveries=Counter(str(sent.status or sent.error) for sent in simulated.deliveries),
        held=simulated.gates.waiting,
    )


@get("/deletes")
async def show_deletes(simulated: Simulated) -> list[tuple[str, float | None]]:
    """List each generation with the Unix time at which its first DELETE arrived."""
    return [
        (item.id, item.first_delete_at.timestamp() if item.first_delete_at else None)
        for items in (simulated.generations, simulated.removed)
        for item in items.values()
    ]


def _find_generation(simulated: Organisation, generation_id: str) -> Generation:
    generation = simulated.generations.get(generation_id) or simulated.removed.get(generation_id)
    if generation is None:
        raise NotFoundException(f"no generation {generation_id!r}")
    return generation


def _from_loopback_or_with_key(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    if connection.client is not None and is_loopback(connection.client.host):
        return
    organisation: Organisation = connection.app.state.organisation
    if connection.headers.get("x-api-key") != organisation.api_key:
        raise NotAuthorizedException("from other machines the control routes need the x-api-key")


def _describe_error(request: Request[Any, Any, Any], exc: ValueError) -> Response[dict[str, str]]:
    """Say what is wrong and where, such as ``[0].count: Expected `int`, got `str```."""
    status, detail = 400, str(exc)
    if isinstance(exc, NotFoundException):
        status, detail = 404, exc.detail
        if detail == "Not Found":
            detail = f"no route {request.url.path}; GET /simulator lists them"
    elif isinstance(exc, ValidationException):  # of a query parameter
        wrong = [f"{one['key']}: {one['message']}" for one in exc.extra or [] if isinstance(one, dict)]
        detail = "; ".join(wrong) or exc.detail
    elif match := _PLACE.fullmatch(detail):
        detail = f"{match['place'].removeprefix('.')}: {match['message']}" if match["place"] else match["message"]
    return Response({"detail": detail}, status_code=status)


HANDLERS: tuple[HTTPRouteHandler, ...] = (
    *(list_routes, add_generations, show_generation, remove_generation, add_asset, script_faults, set_standing),
    *(set_mix, show_switches, set_switches, release, deliver, show_webhook, show_calls, show_summary, show_deletes),
)


def describe_routes() -> list[tuple[str, str]]:
    """Return each control route, ``METHOD /path``, with a sentence about it."""
    return [
        (f"{method} /simulator{path.rstrip('/')}", (inspect.getdoc(handler.fn) or "").partition("\n")[0])
        for handler in HANDLERS
        for path in handler.paths
        for method in sorted(handler.http_methods)
    ]


def control_app(organisation: Organisation) -> Litestar:
    return Litestar(
        HANDLERS,
        path="/simulator",
        state=State({"organisation": organisation}),
        dependencies={"simulated": Provide(lambda: organisation, sync_to_thread=False)},
        guards=[_from_loopback_or_with_key],
        exception_handlers={ValueError: _describe_error},
        openapi_config=None,
        logging_config=None,  # Litestar's own would change the root logger of the whole process
        request_max_body_size=None,
    )
