"""Query parameters: the filters of records, and the refusal of what no route knows."""

import difflib
from datetime import datetime
from typing import Annotated, Any

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler
from litestar.openapi.spec import Example
from litestar.params import FromQuery, QueryParameter

from service.core.forwarding import DeliveryState
from service.core.labels import parse_label
from service.core.lifecycle import State
from service.ledger.delivery_reading import DeliveryFilter
from service.ledger.reading import Filter, Span
from service.web.problems import problem

_Q = "part of an id, file name, model or error; a page searches 10 000 records and may be short"


def read_filter(  # noqa: PLR0917 - Litestar calls it by name
    account: FromQuery[str | None] = None,
    in_state: Annotated[State | None, QueryParameter(name="state")] = None,
    status: FromQuery[str | None] = None,
    project_id: Annotated[str | None, QueryParameter(name="projectId", description="its project id")] = None,
    since: Annotated[datetime | None, QueryParameter(name="from", description="received at or after")] = None,
    until: Annotated[datetime | None, QueryParameter(name="to", description="received before")] = None,
    due_from: Annotated[datetime | None, QueryParameter(name="dueFrom", description="due at or after")] = None,
    due_to: Annotated[datetime | None, QueryParameter(name="dueTo", description="due before")] = None,
    deleted_from: Annotated[datetime | None, QueryParameter(name="deletedFrom", description="gone at or after")] = None,
    deleted_to: Annotated[datetime | None, QueryParameter(name="deletedTo", description="gone before")] = None,
    label: Annotated[
        list[str] | None, QueryParameter(description="has this label, NAME=VALUE; may be repeated")
    ] = None,
    q: Annotated[str | None, QueryParameter(max_length=200, description=_Q)] = None,
) -> Filter:
    """Return what the query filters records by; a dependency."""
    return Filter(
        in_state,
        status,
        project_id,
        _span("from", since, "to", until),
        _span("dueFrom", due_from, "dueTo", due_to),
        _span("deletedFrom", deleted_from, "deletedTo", deleted_to),
        q,
        _labels(label or []),
        account,
    )


def read_delivery_filter(  # noqa: PLR0917 - Litestar calls it by name
    target: Annotated[
        str | None, QueryParameter(description="id of a [[forward]]", examples=[Example(value="app")])
    ] = None,
    in_state: Annotated[DeliveryState | None, QueryParameter(name="state")] = None,
    generation: Annotated[str | None, QueryParameter(description="its id, or that of a batch")] = None,
    account: FromQuery[str | None] = None,
    status: Annotated[
        str | None, QueryParameter(description="what the webhook says", examples=[Example(value="COMPLETED")])
    ] = None,
    since: Annotated[datetime | None, QueryParameter(name="from", description="received at or after")] = None,
    until: Annotated[datetime | None, QueryParameter(name="to", description="received before")] = None,
) -> DeliveryFilter:
    """Return what the query filters deliveries by; a dependency."""
    return DeliveryFilter(target, in_state, generation, account, status, _span("from", since, "to", until))


def _labels(texts: list[str]) -> dict[str, str]:
    try:
        return dict(parse_label(text) for text in texts)
    except ValueError as error:
        raise problem(400, "Bad request", f"label accepts {error}") from None


def _span(name: str, since: datetime | None, other: str, until: datetime | None) -> Span:
    return Span(_require_zone(since, name), _require_zone(until, other))


def _require_zone(instant: datetime | None, name: str) -> datetime | None:
    if instant is not None and instant.tzinfo is None:
        raise problem(400, "Bad request", f"{name} needs a time zone, such as 2026-12-31T00:00:00Z")
    return instant


def refuse_unknown_parameters(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Raise 400 for a query parameter that the OpenAPI document does not have for this route; a guard.

    Ignored, ``?stat=deleted`` would answer every record.
    """
    item = (connection.app.openapi_schema.paths or {}).get(connection.scope["path_template"])
    operation = getattr(item, str(connection.scope.get("method")).lower(), None)
    if operation is None:  # such as OPTIONS, which Litestar answers by itself
        return
    known = sorted(one.name for one in operation.parameters or () if one.param_in == "query")
    unknown = [name for name in connection.query_params if name not in known]
    if unknown:
        raise problem(400, "Bad Request", "; ".join(_describe(name, known) for name in dict.fromkeys(unknown)))


def _describe(name: str, known: list[str]) -> str:
    """Describe the unknown parameter *name* with the nearest of *known*, or with all of them."""
    shown = ascii(name[:50])
    if not known:
        return f"unknown query parameter {shown}: there are none here"
    near = next((one for one in known if one.lower() == name.lower()), None)
    near = near or next(iter(difflib.get_close_matches(name, known, n=1)), None)
    return f"unknown query parameter {shown}: " + (f"did you mean {near}?" if near else f"there are {', '.join(known)}")
