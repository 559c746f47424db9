"""The API's own routes, as one ASGI application.

They are not routes of Litestar's, for two reasons: paths must be read as received, but a router decodes and
normalises them; and in a benchmark the API must not be slower than Mayfly (8300 calls a second on one core, 3500 with
the router).
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

from litestar.types import HTTPScope, Receive, Scope, Send

from service.simulator import catalogue, wire
from service.simulator.answers import (
    KEY_MISSING,
    KEY_WRONG,
    RATE_LIMITED,
    Answer,
    RefusedError,
    error,
    faulty,
    json_answer,
)
from service.simulator.assets import AssetRoutes
from service.simulator.batches import BatchRoutes
from service.simulator.calls import CHANGING, OPEN, WITH_BODY, Call, Operation, operation_of
from service.simulator.creating import CreateRoutes
from service.simulator.faults import Fault, FaultName
from service.simulator.generations import GenerationRoutes
from service.simulator.listing import ListRoutes
from service.simulator.media import MediaRoutes
from service.simulator.organisation import Organisation
from service.simulator.requests import Request
from service.simulator.server import hang_up

_GONE = (FaultName.NOT_FOUND, FaultName.GONE)


class SyncApi:
    """``/v2/…`` of one organisation, and the storage that its URLs lead to."""

    def __init__(self, organisation: Organisation) -> None:
        self._organisation = organisation
        self._generations = GenerationRoutes(organisation)
        lists, creation, media = ListRoutes(organisation), CreateRoutes(organisation), MediaRoutes(organisation)
        assets, batches = AssetRoutes(organisation), BatchRoutes(organisation)
        self._effects: dict[Operation, Callable[[Request], Answer]] = {
            Operation.GET: self._generations.get,
            Operation.DELETE: self._generations.delete,
            Operation.DOWNLOAD: self._generations.download,
            Operation.LIST: lists.list_generations,
            Operation.COUNT: lists.count,
            Operation.CREATE: creation.create,
            Operation.ESTIMATE: creation.estimate,
            Operation.MEDIA: media.media,
            Operation.SECRET: self._secret,
            Operation.ERRORS: lambda _: catalogue.ERRORS,
            Operation.MODELS: lambda _: catalogue.MODELS,
            Operation.ASSET_LIST: assets.list_assets,
            Operation.ASSET_GET: assets.get,
            Operation.ASSET_DELETE: assets.delete,
            Operation.ASSET_DOWNLOAD: assets.download,
            Operation.BATCH_CREATE: batches.create,
            Operation.BATCH_GET: batches.get,
            Operation.BATCH_LIST: batches.list_batches,
            Operation.BATCH_RESULT: media.batch_result,
        }

    async def handle(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        call, key = self._log_call(scope)
        body = await _body(receive) if call.operation in WITH_BODY else b""
        request = Request(call, tuple(scope["headers"]), body)
        switches = self._organisation.switches
        if switches.latency_seconds and call.operation in (Operation.GET, Operation.DELETE):
            await asyncio.sleep(switches.latency_seconds)
        if switches.outage:
            call.fault = "outage"
            hang_up(scope)
        elif call.operation not in OPEN and (refusal := self._refusal(key)):
            await _answer(call, send, refusal)
        elif fault := self._organisation.plan.next(call.operation, call.generation_id):
            call.fault = str(fault)
            await self._answer_with_fault(fault, request, scope=scope, send=send)
        elif call.operation is Operation.GET and self._generations.is_long_poll(request):
            await _answer(call, send, await self._generations.long_poll(request))
        else:
            await _answer(call, send, self._effect(request))

    def _log_call(self, scope: HTTPScope) -> tuple[Call, str | None]:
        raw_path = scope["raw_path"]
        operation, generation_id = operation_of(scope["method"], raw_path)
        key = next((value for name, value in scope["headers"] if name == b"x-api-key"), None)
        now = datetime.now(UTC)
        call = Call(
            at=now,
            method=scope["method"],
            raw_path=raw_path.decode("latin-1"),
            query=scope["query_string"].decode("latin-1"),
            operation=operation,
            generation_id=generation_id,
            has_key=key is not None,
        )
        self._organisation.calls.append(call)
        generation = self._organisation.generations.get(generation_id)
        if operation is Operation.DELETE and generation is not None and generation.first_delete_at is None:
            generation.first_delete_at = now
        return call, None if key is None else key.decode("latin-1")

    def _refusal(self, key: str | None) -> Answer | None:
        if key is None:
            return KEY_MISSING
        if self._organisation.switches.unauthorized or key != self._organisation.api_key:
            return KEY_WRONG
        return RATE_LIMITED if self._organisation.is_over_rate() else None

    async def _answer_with_fault(self, fault: Fault, request: Request, *, scope: Scope, send: Send) -> None:
        call = request.call
        if fault.name is FaultName.HOLD:
            await self._organisation.gates.wait(call.generation_id)
        true = self._effect(request) if fault.has_effect else self._without_effect(request)
        if fault.name in _GONE and fault.has_effect:
            self._organisation.remove(call.generation_id)
        answer = faulty(fault, true)
        match fault.name:
            case FaultName.DROP | FaultName.LOST:
                hang_up(scope)
            case FaultName.RESET:
                hang_up(scope, reset=True)
            case FaultName.TRUNCATED:
                call.status = answer.status
                await wire.truncate(scope, send, answer)
            case FaultName.SLOW:
                call.status = answer.status
                await wire.drip(send, answer, interval_seconds=fault.number("interval", 0.1))
            case FaultName.HUGE:
                call.status = 200
                await wire.flood(send, megabytes=int(fault.number("megabytes", 64)))
            case FaultName.HOLD_AFTER:
                await self._organisation.gates.wait(call.generation_id)
                await _answer(call, send, answer)
            case _:
                await _answer(call, send, answer)

    def _effect(self, request: Request) -> Answer:
        call = request.call
        if (effect := self._effects.get(call.operation)) is None:
            return error(404, f"Cannot {call.method} {call.raw_path}", error="Not Found")
        try:
            return effect(request)
        except RefusedError as refused:
            return refused.answer

    def _without_effect(self, request: Request) -> Answer:
        """Return what the answer would show, without the effect."""
        operation = request.call.operation
        if operation is Operation.DELETE:
            return self._generations.get(request)
        return Answer(500, b"{}") if operation in CHANGING else self._effect(request)

    def _secret(self, request: Request) -> Answer:
        """Answer with the secret, or masked: a value to show, with which nothing can be verified."""
        secret = self._organisation.webhook_secret
        return json_answer(200, {"secret": f"{secret[:8]}********" if request.query.flag("masked") else secret})


async def _answer(call: Call, send: Send, answer: Answer) -> None:
    call.status = answer.status
    await wire.respond(send, answer)


async def _body(receive: Receive) -> bytes:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    return body
