"""Records for the operator, behind the bearer token."""

import hmac
from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import Controller, get
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.handlers.base import BaseRouteHandler
from litestar.params import FromPath, FromQuery, QueryParameter
from sqlalchemy import Connection, Row

from service.generation import Key
from service.ledger import history, reading
from service.ledger.database import Database
from service.ledger.describing import DESCRIBED
from service.ledger.reading import MAX_PAGE, Filter
from service.lifecycle import Move, State
from service.problems import documented, problem
from service.retention import format_duration
from service.values import Secret

DEFAULT_PAGE = 50


class Event(msgspec.Struct, rename="camel", frozen=True):
    """One move in a record's history."""

    at: datetime
    move: Move
    actor: str
    detail: dict[str, Any] | None


class RecordRetention(msgspec.Struct, frozen=True):
    """What decided how long the generation is kept; *ttl* as it would be set, None for ever."""

    rule: str
    ttl: str | None


class Hold(msgspec.Struct, frozen=True):
    """Who stopped the deletion, why, and until when."""

    by: str
    reason: str | None
    until: datetime | None


class Record(msgspec.Struct, rename="camel", frozen=True, kw_only=True, omit_defaults=False):
    """A record: the generation in sync.so's own names, and what Mayfly has to say of it beside them."""

    account: str
    id: str
    state: State
    outcome: str | None
    status: str
    model: str | None
    created_at: str | None
    input: Any
    options: Any
    segments: Any
    output_url: str | None
    segment_output_url: str | None
    synthesized_audio_url: str | None
    output_duration: float | None
    output_file_name: str | None
    project_id: str | None
    webhook_url: str | None
    error: str | None
    error_code: str | None
    received_at: datetime
    due_at: datetime | None
    copied_at: datetime | None
    deleted_at: datetime | None
    attempts: int
    next_attempt_at: datetime | None
    last_error: str | None
    retention: RecordRetention
    hold: Hold | None
    archived: list[str]
    receipt: dict[str, Any] | None


class FullRecord(Record, rename="camel", frozen=True, kw_only=True, omit_defaults=False):
    """A record with its history and the bodies as they came: the webhook's, and the API's once it is copied."""

    notification: Any
    copy: Any
    events: list[Event]


class RecordPage(msgspec.Struct, rename="camel", frozen=True):
    """Records, newest first; *next_cursor* is None on the last page."""

    items: list[Record]
    next_cursor: str | None


def present(row: Row[Any]) -> Record:
    """Show a row of the ledger as the API's record."""
    return Record(**_shown(row))


def find_record(connection: Connection, *, key: Key) -> FullRecord | None:
    """Read one record with its history and its bodies; None where there is none."""
    row = reading.find(connection, key)
    if row is None:
        return None
    return FullRecord(
        **_shown(row),
        notification=_decoded(row.notification),
        copy=_decoded(row.copy),
        events=[Event(e.at, e.move, e.actor, e.detail) for e in history.read(connection, row.seq)],
    )


def _shown(row: Row[Any]) -> dict[str, Any]:
    ttl = None if row.ttl_seconds is None else format_duration(row.ttl_seconds)
    return {name: getattr(row, name) for name in _COLUMNS} | {
        "state": State(row.state),
        "input": _decoded(row.input),
        "options": _decoded(row.options),
        "segments": _decoded(row.segments),
        "next_attempt_at": row.wake_at if row.state == State.SCHEDULED else None,
        "retention": RecordRetention(row.rule, ttl),
        "hold": Hold(row.hold_by, row.hold_reason, None) if row.state == State.HELD else None,
        "archived": [],
        "receipt": msgspec.json.decode(row.receipt) if row.receipt else None,
    }


# What is shown as it stands in the row.
_COLUMNS = (
    *("account", "id", "outcome", "status", *DESCRIBED),
    *("received_at", "due_at", "copied_at", "deleted_at", "attempts", "last_error"),
)


def _decoded(text: str | None) -> Any:  # noqa: ANN401 - JSON is whatever it is
    if text is None:
        return None
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):  # 1e999 is JSON as well, and no float
        return text


class OperatorToken:
    """A guard: only requests with the bearer token pass, none where no token is set."""

    def __init__(self, token: Secret | None) -> None:
        self._token = token

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
        """Raise 403 without a token set, 401 without the right one in the request."""
        if self._token is None:
            raise problem(403, "Closed", "the operator API is closed: set MAYFLY_API_TOKEN to open it")
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self._token.reveal().encode())
        if scheme.lower() != "bearer" or not is_right:
            detail = "the Authorization header must be: Bearer <MAYFLY_API_TOKEN>"
            raise problem(401, "Unauthorized", detail, {"WWW-Authenticate": "Bearer"})


class RecordsController(Controller):
    """Reading records."""

    path = "/records"
    tags = ("records",)
    security = ({"bearer": []},)

    @get("/", summary="A page of records, newest first", responses=documented(400, 401, 403, 503))
    async def list_records(  # noqa: PLR0917 - Litestar calls it by name
        self,
        database: NamedDependency[Database],
        in_state: Annotated[State | None, QueryParameter(name="state")] = None,
        status: FromQuery[str | None] = None,
        project_id: Annotated[str | None, QueryParameter(name="projectId")] = None,
        since: Annotated[datetime | None, QueryParameter(name="from", description="received at or after")] = None,
        until: Annotated[datetime | None, QueryParameter(name="to", description="received before")] = None,
        q: Annotated[
            str | None,
            QueryParameter(
                max_length=200,
                description="part of an id, file name, model or error; a page looks at 10 000 records and may be short",
            ),
        ] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE,
        cursor: Annotated[str | None, QueryParameter(description="nextCursor of the page before")] = None,
    ) -> RecordPage:
        """Answer a page; the filters narrow it together."""
        wanted = Filter(in_state, status, project_id, _aware(since, "from"), _aware(until, "to"), q)
        page = await database.read(lambda connection: reading.page(connection, wanted, limit=limit, cursor=cursor))
        return RecordPage([present(row) for row in page.rows], page.next_cursor)

    @get(
        "/{generation_id:str}",
        summary="One record with its history and the bodies as they came",
        responses=documented(400, 401, 403, 404, 503),
    )
    async def show_record(
        self, database: NamedDependency[Database], generation_id: FromPath[str], account: FromQuery[str] = "default"
    ) -> FullRecord:
        """Answer one record, 404 where there is none."""
        record = await database.read(lambda connection: find_record(connection, key=Key(account, generation_id)))
        if record is None:
            raise NotFoundException("No record of this generation")
        return record


def _aware(instant: datetime | None, name: str) -> datetime | None:
    if instant is not None and instant.tzinfo is None:
        raise problem(400, "Bad request", f"{name} needs its zone, such as 2026-12-31T00:00:00Z")
    return instant
