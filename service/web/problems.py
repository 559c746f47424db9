"""Errors as RFC 9457 problem details: one table from exception to answer."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi import ResponseSpec
from litestar.plugins.problem_details import ProblemDetailsConfig, ProblemDetailsException, ProblemDetailsPlugin
from litestar.response import Response

from service.core.durations import DURATION_FORMS
from service.core.generation import MalformedError
from service.core.lifecycle import IllegalMoveError
from service.core.replaying import NotReplayedError
from service.core.signature import SignatureError
from service.ledger.bulk import ExpectationError
from service.ledger.cursors import CursorError
from service.ledger.database import (
    LedgerMovedError,
    LedgerUnavailableError,
    RefusedDataError,
    RowLockedError,
    UnknownOutcomeError,
)
from service.web.security_headers import SECURITY_HEADERS

RETRY_AFTER_SECONDS = 5


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 9457 problem details."""

    status: int
    title: str
    detail: str | None = None


def documented(*statuses: int) -> dict[int, ResponseSpec]:
    """Describe the errors of a route for OpenAPI."""
    descriptions = {
        400: "the request is invalid",
        401: "the bearer token, or the signature of a webhook, is missing or wrong",
        403: "it is closed: MAYFLY_API_TOKEN is not set, for POST /api/records neither that nor MAYFLY_INTAKE_TOKEN",
        404: "nothing of this id",
        408: "the body took longer than 10 s to arrive",
        409: "its state does not allow this now, or another number matches than expected",
        413: "the body is larger than 1 MiB",
        415: "the body is not JSON in UTF-8",
        503: "not stored, or not known to be: the database does not answer, or too many large bodies arrive at once",
    }
    return {
        status: ResponseSpec(
            Problem,
            description=descriptions[status],
            media_type="application/problem+json",
            generate_examples=False,  # they need a library that the image does not have
        )
        for status in statuses
    }


def problem(
    status: int, title: str, detail: str = "", headers: Mapping[str, str] | None = None
) -> ProblemDetailsException:
    """Return the exception that Litestar answers as problem details."""
    # Litestar adds the application's response_headers to the results of handlers, not to errors.
    return ProblemDetailsException(
        status_code=status, title=title, detail=detail, headers={**SECURITY_HEADERS, **(headers or {})}
    )


def _from_signature_error(error: SignatureError) -> ProblemDetailsException:
    advice = {
        "missing": "the Sync-Signature header is missing",
        "malformed": "the Sync-Signature header is not t=<unix seconds>,v1=<hex>",
        "stale": (
            f"the signature's time is {error.details}: check both clocks; an app that relays a webhook has to do so "
            "within MAYFLY_WEBHOOK_TOLERANCE, and can call POST /api/records later"
        ),
        "mismatch": "no secret matches: check SYNC_WEBHOOK_SECRET, and that no proxy changes the body",
    }
    return problem(401, "Signature rejected", advice[error.reason], {"WWW-Authenticate": "Sync-Signature"})


# The client's names of the handlers' arguments.
_WIRE_NAMES = {
    "in_state": "state",
    "since": "from",
    "until": "to",
    "due_from": "dueFrom",
    "due_to": "dueTo",
    "deleted_from": "deletedFrom",
    "deleted_to": "deletedTo",
    "project_id": "projectId",
    "form": "format",
    "data": "the body",
}


# What fields accept that are texts of a form, where another type was sent.
_ACCEPTED = {
    "ttl": f"a text, {DURATION_FORMS}, or forever",
    "expires": "a text, 2026-12-31T00:00:00Z or 2026-12-31",
    "hold": "a text, the reason",
    "labels": "an object of texts",
}


def _reason(found: Mapping[str, Any]) -> str:
    accepted = _ACCEPTED.get(str(found.get("key", ""))) if found.get("source") == "body" else None
    return f"{_wire_name(found)}: {found.get('message')}" + (f"; it accepts {accepted}" if accepted else "")


def _wire_name(found: Mapping[str, Any]) -> str:
    """Return the client's name of what is invalid: of a parameter, of the body or of a field in it."""
    name = str(found.get("key", ""))
    is_field = found.get("source") == "body" and name != "data"
    return name if is_field else _WIRE_NAMES.get(name, name)


def _from_http_exception(error: HTTPException) -> ProblemDetailsException:
    """Describe an error of Litestar's in the client's names; Litestar's text repeats the query."""
    found = error.extra if isinstance(error, ValidationException) and isinstance(error.extra, list) else []
    reasons = [_reason(one) for one in found]
    title = HTTPStatus(error.status_code).phrase
    return problem(error.status_code, title, "; ".join(reasons) or error.detail, error.headers)


def _from_unavailable(error: LedgerUnavailableError) -> ProblemDetailsException:
    detail = "the ledger is unavailable; nothing was stored, send the request again"
    if isinstance(error, RowLockedError):
        detail = "another process has locked this record; nothing was stored, send the request again"
    if isinstance(error, UnknownOutcomeError):
        detail = "the ledger did not answer in time; it is not known whether it was stored; send it again"
    return problem(503, "Ledger unavailable", detail, {"Retry-After": str(RETRY_AFTER_SECONDS)})


def _answer_internal_error(request: Request[Any, Any, Any], _error: Exception) -> Response[Any]:
    """Answer an internal error without details; the log has them."""
    return problem(500, "Internal error", "an internal error; see Mayfly's log").to_response(request)


plugin = ProblemDetailsPlugin(
    ProblemDetailsConfig(
        exception_to_problem_detail_map={
            HTTPException: _from_http_exception,
            SignatureError: _from_signature_error,
            LedgerUnavailableError: _from_unavailable,
            LedgerMovedError: _from_unavailable,
            RowLockedError: _from_unavailable,
            UnknownOutcomeError: _from_unavailable,
            RefusedDataError: lambda error: problem(400, "Not storable", str(error)),
            MalformedError: lambda error: problem(400, "Not a generation", str(error)),
            IllegalMoveError: lambda error: problem(409, "Not possible now", str(error)),
            NotReplayedError: lambda error: problem(409, "Not possible now", str(error)),
            ExpectationError: lambda error: problem(409, "Another number", str(error)),
            CursorError: lambda error: problem(400, "Bad cursor", str(error)),
        },
    )
)
exception_handlers: dict[Any, Any] = {Exception: _answer_internal_error}


class JsonRequest(Request[Any, Any, Any]):
    """A request whose JSON may be nested without end, or not be UTF-8: what msgspec raises Litestar answers 500."""

    async def json(self) -> Any:  # noqa: ANN401 - any JSON value
        """Return the body.

        Raises: ProblemDetailsException.
        """
        try:
            return await super().json()
        except RecursionError:
            raise problem(400, "Bad Request", "the body is nested too deeply") from None
        except UnicodeDecodeError:
            raise problem(400, "Bad Request", "the body is not in UTF-8") from None
