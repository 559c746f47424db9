"""The route of the webhooks: a raw ASGI handler for Litestar, and the short way past it for ordinary requests.

Litestar's typed handlers cost more than all the rest together: measured with 64 connections, request objects,
dependency groups and responses took 52 % of the process; then ASGI's own messages and tasks a quarter.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import msgspec
import structlog
from litestar import asgi
from litestar.exceptions import MethodNotAllowedException
from litestar.handlers import ASGIRouteHandler
from litestar.openapi.spec import (
    OpenAPIFormat,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    PathItem,
    RequestBody,
    Schema,
)
from litestar.types import Receive, Scope, Send

from service.generation import MalformedError
from service.grouping import Done
from service.http_protocol import RAISED
from service.ledger.database import LedgerUnavailableError, RefusedDataError
from service.signature import SignatureError
from service.telemetry import Metrics
from service.webhook import FREE_BODY_BYTES, MAX_BODY_BYTES, MAX_UNREAD_BYTES, Answer, BodyError, Intake

log = structlog.get_logger()

PATH = "/webhooks/sync"
_DEFAULT_ACCOUNT = "default"
_LOG_EVERY_SECONDS = 1.0
_CONTENT_TYPE = (b"content-type", b"application/json")
_REFUSALS = (SignatureError, MalformedError, RefusedDataError, LedgerUnavailableError, BodyError)

_encode = msgspec.json.Encoder().encode


class WebhookRoute:
    """``POST /webhooks/sync``: ordinary requests on the short way, all others as an ASGI application."""

    path = PATH.encode()
    max_bytes = FREE_BODY_BYTES

    def __init__(self, intake: Intake, metrics: Metrics) -> None:
        self._intake = intake
        self._bodies = _Bodies()
        self._refusals = _Refusals(metrics)

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raise what is wrong with the headers; see ShortWay."""
        try:
            _check_content_type(headers.get(b"content-type", b""))
            self._intake.check_form(_signature(headers))
        except _REFUSALS as error:
            self._refusals.note(error)
            raise

    def take(self, headers: Mapping[bytes, bytes], body: bytes, done: Done[bytes]) -> None:
        """Answer a whole request; see ShortWay."""
        try:
            _check_content_type(headers.get(b"content-type", b""))
            self._intake.take(_DEFAULT_ACCOUNT, _signature(headers), body, partial(self._finish, done))
        except _REFUSALS as error:
            self._refusals.note(error)
            raise

    def _finish(self, done: Done[bytes], answer: Answer | Exception) -> None:
        if isinstance(answer, _REFUSALS):
            self._refusals.note(answer)
        done(answer if isinstance(answer, Exception) else _encode(answer))

    def handler(self) -> ASGIRouteHandler:
        """Return the handler for Litestar."""
        return asgi(PATH, copy_scope=False)(self._receive)

    async def _receive(self, scope: Scope, receive: Receive, send: Send) -> None:
        if raised := cast("dict[str, Any]", scope).get(RAISED):
            raise raised
        if scope.get("method") != "POST":
            raise MethodNotAllowedException(headers={"Allow": "POST"})
        content_type, signature, length = _read_headers(scope["headers"])
        try:
            _check_content_type(content_type)
            if length.isdigit() and int(length) > MAX_BODY_BYTES:
                raise _too_large()
            body = await self._bodies.read(receive, partial(self._intake.check_form, signature))
            answer = await self._intake.accept(_DEFAULT_ACCOUNT, signature, body)
        except _REFUSALS as error:
            self._refusals.note(error)
            raise
        content = _encode(answer)
        headers = [_CONTENT_TYPE, (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": False})


class _Refusals:
    """Counts what was not stored, and logs it, but no more than once a second: anyone can send what is refused."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._unlogged = 0
        self._log_again_at = 0.0

    def note(self, error: Exception) -> None:
        """Count and perhaps log *error*."""
        self._metrics.webhooks.labels(_label(error)).inc()
        if time.monotonic() < self._log_again_at:
            self._unlogged += 1
            return
        log.warning("webhook.not_stored", reason=str(error), unlogged=self._unlogged)
        self._log_again_at, self._unlogged = time.monotonic() + _LOG_EVERY_SECONDS, 0


def _label(error: Exception) -> str:
    match error:
        case SignatureError():
            return "refused"
        case LedgerUnavailableError():
            return "unavailable"
        case BodyError():
            return {413: "too_large", 415: "unsupported", 503: "unavailable"}.get(error.status, "broken_off")
        case _:
            return "malformed"


def _signature(headers: Mapping[bytes, bytes]) -> str:
    return headers.get(b"sync-signature", b"").decode("latin-1")


def _read_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, str, bytes]:
    """Pick content type, signature and length; a signature sent twice is read as one with commas, as HTTP says."""
    content_type, signatures, length = b"", b"", b""
    for name, value in headers:
        if name == b"sync-signature":
            signatures = signatures + b"," + value if signatures else value
        elif name == b"content-type":
            content_type = value
        elif name == b"content-length":
            length = value[:20]
    return content_type, signatures.decode("latin-1"), length


def _check_content_type(content_type: bytes) -> None:
    """Refuse what says it is not JSON in UTF-8; a sender that says nothing is judged by the body."""
    if content_type in (b"application/json", b""):
        return
    kind, _, parameters = content_type.decode("latin-1").lower().partition(";")
    kind, charset = kind.strip(), parameters.replace(" ", "").replace('"', "")
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not is_json or ("charset=" in charset and "charset=utf-8" not in charset and "charset=utf8" not in charset):
        raise BodyError(415, "the body must be application/json in UTF-8")


class _Bodies:
    """Collects bodies, each up to MAX_BODY_BYTES; what is large of those under way is bounded together."""

    def __init__(self) -> None:
        self._unread_bytes = 0

    async def read(self, receive: Receive, check_form: Callable[[], None]) -> bytes:
        """Return the whole body; *check_form* is asked first whether one that is not all there is worth waiting for.

        The server ends a connection whose request takes too long.

        Raises: BodyError; what *check_form* raises.
        """
        parts: list[bytes] = []
        size = held = 0
        try:
            while True:
                message: Any = await receive()
                if message["type"] == "http.disconnect":
                    raise BodyError(400, "the body broke off")
                part = message["body"]
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise _too_large()
                if not message["more_body"]:
                    return b"".join((*parts, part)) if parts else part
                if not parts:
                    check_form()
                parts.append(part)
                more = max(0, size - FREE_BODY_BYTES) - held
                held += more
                self._unread_bytes += more
                if self._unread_bytes > MAX_UNREAD_BYTES:
                    raise BodyError(503, "too many large bodies arrive at once; nothing was stored, send it again")
        finally:
            self._unread_bytes -= held


def _too_large() -> BodyError:
    return BodyError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")


_ACCEPTED = Schema(
    type=OpenAPIType.OBJECT,
    title="Accepted",
    properties={
        "id": Schema(type=OpenAPIType.STRING),
        "state": Schema(type=OpenAPIType.STRING, description="the record's state, or ignored"),
        "dueAt": Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.DATE_TIME),
    },
    required=["id", "state"],
)
_PROBLEM = Schema(
    type=OpenAPIType.OBJECT,
    title="Problem",
    description="RFC 9457 problem details",
    properties={
        "status": Schema(type=OpenAPIType.INTEGER),
        "title": Schema(type=OpenAPIType.STRING),
        "detail": Schema(type=OpenAPIType.STRING),
    },
    required=["status", "title"],
)
_PROBLEMS = {
    "400": "not the documented shape",
    "401": "the signature does not prove it",
    "408": "it took longer than 10 s to arrive",
    "413": "the body is larger than 1 MiB",
    "415": "not JSON in UTF-8",
}
_SIGNATURE = Parameter(
    name="Sync-Signature",
    param_in="header",
    required=True,
    schema=Schema(type=OpenAPIType.STRING, description="t=<unix seconds>,v1=<hex>"),
)


def describe() -> PathItem:
    """Describe the route for OpenAPI, which Litestar cannot do for a raw handler."""
    trouble = {"application/problem+json": OpenAPIMediaType(schema=_PROBLEM)}
    seconds = OpenAPIHeader(schema=Schema(type=OpenAPIType.INTEGER), description="seconds")
    return PathItem(
        post=Operation(
            operation_id="ReceiveWebhook",
            tags=["webhooks"],
            summary="Take a webhook of sync.so",
            description="Stores a proven webhook of a terminal generation and schedules its deletion; ignores others.",
            parameters=[_SIGNATURE],
            request_body=RequestBody(
                content={"application/json": OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT))}, required=True
            ),
            responses={
                "202": OpenAPIResponse(
                    "stored, or ignored", content={"application/json": OpenAPIMediaType(schema=_ACCEPTED)}
                ),
                **{status: OpenAPIResponse(text, content=trouble) for status, text in _PROBLEMS.items()},
                "503": OpenAPIResponse(
                    "nothing was stored for now; send it again", headers={"Retry-After": seconds}, content=trouble
                ),
            },
        )
    )
