"""Answers of the Sync API, regular and faulty.

Source: sync.so API reference, error catalogue and captured answers. ``message`` may be a list, ``error`` and
``errorCode`` may be missing, and proxies in front of the API answer in HTML.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import msgspec

from service.simulator.faults import Fault, FaultName

JSON = b"application/json; charset=utf-8"
HTML = b"text/html; charset=utf-8"
BLOCK_PAGE = (
    b"<!DOCTYPE html><html><head><title>Attention Required! | Cloudflare</title></head>"
    b"<body><h1>Sorry, you have been blocked</h1></body></html>"
)
GATEWAY_PAGE = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
MAINTENANCE_PAGE = b"<!DOCTYPE html><html><body><h1>We will be back soon</h1></body></html>"
OTHER_ID = "00000000-0000-4000-8000-000000000000"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


def json_answer(status: int, value: object) -> Answer:
    return Answer(status, msgspec.json.encode(value))


def error(status: int, message: str | list[str], code: str | None = None, **more: object) -> Answer:
    body: dict[str, object] = {"statusCode": status, "message": message}
    return json_answer(status, body | ({"errorCode": code} if code else {}) | more)


class RefusedError(Exception):
    """A call that the API refuses, with its answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def invalid(field: str, *messages: str, code: str | None = None) -> RefusedError:
    """Return a 400 that names the first wrong *field*, with a message for each."""
    return RefusedError(error(400, list(messages), code, error="Bad Request", field=field))


KEY_MISSING = error(401, "Either Cookie or x-api-key header must be provided", error="Unauthorized")
KEY_WRONG = error(401, "Unauthorized")
TOKEN_WRONG = error(403, "The token is missing or wrong", error="Forbidden")
NOT_FOUND = error(404, "Generation not found", "generation_not_found", error="Not Found")
STILL_PROCESSING = error(
    409, "Generation cannot be deleted while processing", "generation_not_deletable_while_processing"
)
RATE_LIMITED = error(
    429,
    "Rate limit exceeded. Please try again later.",
    "rate_limit_exceeded",
    error="Too Many Requests",
)
INVALID_ID = error(400, "Invalid generation id", "invalid_generation_id", error="Bad Request")

_FIXED: dict[FaultName, Answer] = {
    FaultName.PROCESSING_CONFLICT: STILL_PROCESSING,
    FaultName.CONFLICT: error(409, "The generation is being changed", "generation_conflict"),
    FaultName.INTERNAL_ERROR: error(500, "Internal server error", "internal_error", requestId="req_7f3a"),
    FaultName.BAD_GATEWAY: Answer(502, GATEWAY_PAGE, HTML),
    FaultName.GATEWAY_TIMEOUT: error(504, "Controller timed out", "controller_timeout", requestId="req_7f3b"),
    FaultName.BAD_REQUEST: INVALID_ID,
    FaultName.METHOD_NOT_ALLOWED: error(405, "Method Not Allowed", error="Method Not Allowed"),
    FaultName.UNPROCESSABLE: error(422, ["id must be a UUID"], error="Unprocessable Entity"),
    FaultName.UNAUTHORIZED: KEY_WRONG,
    FaultName.FORBIDDEN: error(403, "Forbidden resource", error="Forbidden"),
    FaultName.FORBIDDEN_HTML: Answer(403, BLOCK_PAGE, HTML),
    FaultName.NOT_FOUND: NOT_FOUND,
    FaultName.GONE: error(410, "Generation is gone", "generation_not_found", error="Gone"),
    FaultName.NO_CONTENT: Answer(204, b""),
    FaultName.INVALID_JSON: Answer(200, b'{"id": "3f1c2a9e", "status": '),
    FaultName.HTML: Answer(200, MAINTENANCE_PAGE, HTML),
}


def _rate_limited(fault: Fault, _: Answer) -> Answer:
    if (seconds := fault.parameters.get("body")) is None:
        return _with_retry_after(fault, RATE_LIMITED)
    return json_answer(429, msgspec.json.decode(RATE_LIMITED.body) | {"retryAfterSeconds": float(seconds)})


def _unavailable(fault: Fault, _: Answer) -> Answer:
    return _with_retry_after(
        fault, error(503, "Controller unavailable", "controller_unavailable", requestId="req_7f3c")
    )


def _with_retry_after(fault: Fault, answer: Answer) -> Answer:
    value = fault.parameters.get("retry_after")
    if "date" in fault.parameters:
        value = format_datetime(datetime.now(UTC) + timedelta(seconds=fault.number("date", 0)), usegmt=True)
    return answer if value is None else replace(answer, headers=((b"retry-after", value.encode()),))


def _redirect(fault: Fault, _: Answer) -> Answer:
    location = fault.parameters.get("location", "https://elsewhere.invalid/")
    return Answer(int(fault.name), b"", HTML, ((b"location", location.encode()),))


_ABSENT: dict[str, Answer] = {
    "empty": Answer(404, b""),
    "object": json_answer(404, {}),
    "gateway": json_answer(404, {"message": "no Route matched with those values"}),
    "html": Answer(404, b"<html><body><h1>404 Not Found</h1></body></html>", HTML),
    "route": error(404, "Cannot GET /v2/generate", error="Not Found"),
    "organization": error(404, "Organization not found", "organization_not_found", error="Not Found"),
    "project": error(404, "Project not found", "project_not_found", error="Not Found"),
}


def _absent(fault: Fault, _: Answer) -> Answer:
    own = _FIXED[fault.name]
    return replace(_ABSENT.get(fault.parameters.get("answer", "own"), own), status=own.status)


def _accepted(_: Fault, true: Answer) -> Answer:
    return replace(true, status=202) if true.status == 200 else true


def _edited(**changes: object) -> Callable[[Fault, Answer], Answer]:
    def edit(_: Fault, true: Answer) -> Answer:
        return json_answer(200, msgspec.json.decode(true.body) | changes) if true.status == 200 else true

    return edit


def _non_utf8(_: Fault, true: Answer) -> Answer:
    return replace(true, body=true.body.replace(b'":"', b'":"\xff\xfe', 1))


_BUILT: dict[FaultName, Callable[[Fault, Answer], Answer]] = {
    FaultName.RATE_LIMITED: _rate_limited,
    FaultName.UNAVAILABLE: _unavailable,
    FaultName.MOVED_PERMANENTLY: _redirect,
    FaultName.FOUND: _redirect,
    FaultName.TEMPORARY_REDIRECT: _redirect,
    FaultName.PERMANENT_REDIRECT: _redirect,
    FaultName.NOT_FOUND: _absent,
    FaultName.GONE: _absent,
    FaultName.ACCEPTED: _accepted,
    FaultName.WRONG_ID: _edited(id=OTHER_ID),
    FaultName.PROCESSING: _edited(status="PROCESSING", outputUrl=None, outputDuration=None),
    FaultName.NON_UTF8: _non_utf8,
}


def faulty(fault: Fault, true: Answer) -> Answer:
    """Return the *true* answer as *fault* changes it; faults of the connection do not change it."""
    if build := _BUILT.get(fault.name):
        return build(fault, true)
    return _FIXED.get(fault.name, true)
