"""The API's own routes, as one ASGI application.

They are not routes of Litestar's, for two reasons: paths must be read as received, but a router decodes and
normalises them; and in a benchmark the API must not be slower than Mayfly (8300 calls a second on one core, 3500 with
the router).
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import islice
from urllib.parse import parse_qsl
from uuid import UUID

import msgspec
from litestar.types import HTTPScope, Receive, Scope, Send

from service.simulator import wire
from service.simulator.answers import (
    INVALID_ID,
    KEY_MISSING,
    KEY_WRONG,
    NOT_FOUND,
    RATE_LIMITED,
    STILL_PROCESSING,
    Answer,
    error,
    faulty,
    json_answer,
)
from service.simulator.calls import Call, Operation, operation_of
from service.simulator.faults import Fault, FaultName
from service.simulator.generation import STATUSES, UNFINISHED, Generation
from service.simulator.organisation import Organisation
from service.simulator.server import hang_up

_GONE = (FaultName.NOT_FOUND, FaultName.GONE)


class SyncApi:
    """``/v2/…`` of one organisation."""

    def __init__(self, organisation: Organisation) -> None:
        self._organisation = organisation
        self._effects: dict[Operation, Callable[[Call, bytes], Answer]] = {
            Operation.GET: self._get,
            Operation.DELETE: self._delete,
            Operation.LIST: self._list,
            Operation.COUNT: self._count,
            Operation.CREATE: self._create,
            Operation.SECRET: self._secret,
        }

    async def handle(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        call, key = self._log_call(scope)
        body = await _body(receive) if call.operation is Operation.CREATE else b""
        switches = self._organisation.switches
        if switches.latency_seconds and call.operation in (Operation.GET, Operation.DELETE):
            await asyncio.sleep(switches.latency_seconds)
        if switches.outage:
            call.fault = "outage"
            hang_up(scope)
        elif refusal := self._refusal(key):
            await _answer(call, send, refusal)
        elif fault := self._organisation.plan.next(call.operation, call.generation_id):
            call.fault = str(fault)
            await self._answer_with_fault(fault, call, body, scope=scope, send=send)
        else:
            await _answer(call, send, self._effect(call, body))

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

    async def _answer_with_fault(self, fault: Fault, call: Call, body: bytes, *, scope: Scope, send: Send) -> None:
        if fault.name is FaultName.HOLD:
            await self._organisation.gates.wait(call.generation_id)
        true = self._effect(call, body) if fault.has_effect else self._without_effect(call)
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

    def _effect(self, call: Call, body: bytes) -> Answer:
        if effect := self._effects.get(call.operation):
            return effect(call, body)
        return error(404, f"Cannot {call.method} {call.raw_path}", error="Not Found")

    def _without_effect(self, call: Call) -> Answer:
        """Return what the answer would show, without the effect."""
        if call.operation is Operation.DELETE:
            return self._get(call, b"")
        return Answer(500, b"{}") if call.operation is Operation.CREATE else self._effect(call, b"")

    def _get(self, call: Call, _: bytes) -> Answer:
        generation = self._organisation.generations.get(call.generation_id)
        return NOT_FOUND if generation is None else Answer(200, generation.encoded())

    def _delete(self, call: Call, _: bytes) -> Answer:
        generation = self._organisation.generations.get(call.generation_id)
        if generation is None:
            return NOT_FOUND
        if generation.status in UNFINISHED:
            return STILL_PROCESSING
        self._organisation.remove(generation.id)
        return Answer(200, generation.encoded())

    def _list(self, call: Call, _: bytes) -> Answer:
        query = dict(parse_qsl(call.query))
        limit, cursor = query.get("limit"), query.get("cursor")
        if limit is not None and not (limit.isdecimal() and 1 <= int(limit) <= 100):
            return error(400, ["limit must be between 1 and 100"], error="Bad Request")
        if cursor is not None and limit is None:
            return error(400, ["cursor requires limit"], error="Bad Request")
        if problem := _filter_problem(query):
            return problem
        matching = (item for item in self._organisation.newest(cursor) if _matches(item, query))
        # Without a limit there are no pages, and the order has no meaning.
        page = sorted(matching, key=lambda item: item.id) if limit is None else islice(matching, int(limit))
        return Answer(200, b"[" + b",".join(item.encoded() for item in page) + b"]")

    def _count(self, call: Call, _: bytes) -> Answer:
        query = dict(parse_qsl(call.query))
        if problem := _filter_problem(query):
            return problem
        return json_answer(200, {"count": sum(_matches(item, query) for item in self._organisation.newest())})

    def _create(self, _: Call, body: bytes) -> Answer:
        try:
            request = msgspec.json.decode(body, type=CreateRequest)
        except msgspec.DecodeError as exc:
            return error(400, [str(exc)], error="Bad Request")
        generation = self._organisation.add(
            model=request.model,
            webhook_url=request.webhookUrl,
            project_id=request.projectId,
            output_file_name=request.outputFileName,
            processing_seconds=self._organisation.switches.processing_seconds,
        )
        generation.input, generation.options = request.input, request.options
        return Answer(201, generation.encoded())

    def _secret(self, call: Call, _: bytes) -> Answer:
        secret = self._organisation.webhook_secret
        is_masked = dict(parse_qsl(call.query)).get("masked") == "true"
        return json_answer(200, {"secret": f"{secret[:8]}********" if is_masked else secret})


class CreateRequest(msgspec.Struct):
    model: str
    input: list[dict[str, object]]
    options: dict[str, object] = {}
    webhookUrl: str | None = None  # noqa: N815 (the API's own name)
    projectId: str | None = None  # noqa: N815
    outputFileName: str | None = None  # noqa: N815


def _filter_problem(query: Mapping[str, str]) -> Answer | None:
    if unknown := _listed_values(query, "status") - STATUSES:
        return error(
            400,
            [f"each value in status must be one of the statuses, not {min(unknown)}"],
            error="Bad Request",
        )
    try:
        UUID(query.get("projectId", "00000000-0000-0000-0000-000000000000"))
    except ValueError:
        return INVALID_ID
    return None


def _listed_values(query: Mapping[str, str], name: str) -> frozenset[str]:
    return frozenset(part for part in query.get(name, "").split(",") if part)


def _matches(generation: Generation, query: Mapping[str, str]) -> bool:
    statuses, ids = _listed_values(query, "status"), _listed_values(query, "ids")
    return (
        (not statuses or generation.status in statuses)
        and (not ids or generation.id in ids)
        and query.get("projectId") in (None, generation.project_id)
    )


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
