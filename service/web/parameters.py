"""Query parameters that no route knows: ignored, ``?stat=deleted`` would answer every record."""

import difflib
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from service.web.problems import problem


def refuse_unknown_parameters(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Raise 400 for a query parameter that the OpenAPI document does not have for this route; a guard."""
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
