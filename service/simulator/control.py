"""``/simulator/…``: the routes with which other processes control the simulator. The names are not the API's.

From the loopback interface they need no key, from elsewhere the API key.
"""

import asyncio
from collections import Counter
from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import Litestar, Request, Response, delete, get, patch, post, put
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.exceptions import NotAuthorizedException, NotFoundException
from litestar.handlers import BaseRouteHandler
from litestar.params import JSONBody, QueryParameter

from service.simulator.calls import Call, Operation
from service.simulator.generation import Generation
from service.simulator.organisation import Delivery, Organisation, Switches
from service.simulator.wire import is_loopback

# With more at once, the receiver would time out.
WEBHOOKS_AT_ONCE = 50

Simulated = NamedDependency[Organisation]
GenerationId = Annotated[str, QueryParameter(name="id")]


class AddRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of ``Organisation.add``, *count* times."""

    count: int = 1
    generation_id: str | None = None
    status: str = "COMPLETED"
    text_input: bool = False
    model: str = "lipsync-2-pro"
    project_id: str | None = None
    webhook_url: str | None = None
    output_file_name: str | None = None
    created_at: datetime | None = None
    processing_seconds: float | None = None
    webhook_copies: int = 1
    faults: dict[str, list[str]] = {}
    overrides: dict[str, object] = {}


class Script(msgspec.Struct, forbid_unknown_fields=True):
    """Faults for the next calls about one generation or, without an id, about any."""

    operation: Operation
    faults: list[str]
    generation_id: str | None = None


class DeliverRequest(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[str]
    copies: int = 1


class CallPage(msgspec.Struct):
    next: int
    calls: list[Call]


class StateView(msgspec.Struct):
    generation: dict[str, object]
    first_delete_at: datetime | None
    deleted_at: datetime | None
    held: int


class WebhookView(msgspec.Struct):
    body: str
    headers: dict[str, str]


class Summary(msgspec.Struct):
    existing: int
    deleted: int
    calls: dict[str, int]  # by "operation status"
    faults: dict[str, int]
    deliveries: dict[str, int]  # by status or error
    held: dict[str, int]  # by generation id


@post("/generations")
async def add_generations(simulated: Simulated, data: JSONBody[list[AddRequest]]) -> list[str]:
    ids: list[str] = []
    for request in data:
        names = [name for name in request.__struct_fields__ if name not in ("count", "overrides")]
        arguments: dict[str, Any] = {name: getattr(request, name) for name in names}
        arguments |= request.overrides
        ids.extend(simulated.add(**arguments).id for _ in range(request.count))
    return ids


@get("/generation")
async def show_generation(simulated: Simulated, generation_id: GenerationId) -> StateView:
    generation = _find_generation(simulated, generation_id)
    return StateView(
        generation=generation.body(),
        first_delete_at=generation.first_delete_at,
        deleted_at=generation.deleted_at,
        held=simulated.gates.waiting.get(generation_id, 0),
    )


@delete("/generation")
async def remove_generation(simulated: Simulated, generation_id: GenerationId) -> None:
    simulated.remove(_find_generation(simulated, generation_id).id)


@post("/faults")
async def script_faults(simulated: Simulated, data: JSONBody[list[Script]]) -> None:
    for script in data:
        simulated.plan.script(script.operation, script.faults, script.generation_id)


@put("/standing")
async def set_standing(simulated: Simulated, data: JSONBody[dict[Operation, str | None]]) -> None:
    for operation, fault in data.items():
        simulated.plan.stand(operation, fault)


@put("/mix")
async def set_mix(simulated: Simulated, data: JSONBody[dict[Operation, dict[str, float]]]) -> None:
    for operation, probabilities in data.items():
        simulated.plan.mix(operation, probabilities)


@get("/switches")
async def show_switches(simulated: Simulated) -> Switches:
    return simulated.switches


@patch("/switches")
async def set_switches(simulated: Simulated, data: JSONBody[dict[str, object]]) -> Switches:
    simulated.switches = msgspec.convert(msgspec.to_builtins(simulated.switches) | data, Switches)
    return simulated.switches


@post("/release", status_code=200)
async def release(simulated: Simulated, generation_id: GenerationId) -> dict[str, int]:
    return {"released": simulated.release(generation_id)}


@post("/deliver", status_code=200)
async def deliver(simulated: Simulated, data: JSONBody[DeliverRequest]) -> list[Delivery]:
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
    body, headers = simulated.webhook(_find_generation(simulated, generation_id).id, at=at)
    return WebhookView(body.decode(), headers)


@get("/calls")
async def show_calls(simulated: Simulated, since: Annotated[int, QueryParameter()] = 0) -> CallPage:
    """Return the calls from number *since* on; *next* is the number at which the next page begins."""
    return CallPage(next=len(simulated.calls), calls=simulated.calls[since:])


@get("/summary")
async def show_summary(simulated: Simulated) -> Summary:
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
    """Return each generation's id with the Unix time at which its first DELETE arrived."""
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


def _describe_error(_: Request[Any, Any, Any], exc: ValueError) -> Response[dict[str, str]]:
    if isinstance(exc, NotFoundException):  # which is a ValueError, too
        return Response({"detail": exc.detail}, status_code=exc.status_code)
    return Response({"detail": str(exc)}, status_code=400)


def control_app(organisation: Organisation) -> Litestar:
    return Litestar(
        [
            *(add_generations, show_generation, remove_generation, script_faults, set_standing, set_mix),
            *(
                show_switches,
                set_switches,
                release,
                deliver,
                show_webhook,
                show_calls,
                show_summary,
                show_deletes,
            ),
        ],
        path="/simulator",
        state=State({"organisation": organisation}),
        dependencies={"simulated": Provide(lambda: organisation, sync_to_thread=False)},
        guards=[_from_loopback_or_with_key],
        exception_handlers={ValueError: _describe_error},
        openapi_config=None,
        logging_config=None,  # Litestar's own would change the root logger of the whole process
        request_max_body_size=None,
    )
