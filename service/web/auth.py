"""Authorization of the operator API."""

import hmac
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from service.core.secret import Secret
from service.web.problems import problem


class OperatorToken:
    """A guard: only requests with the bearer token pass; without a configured token, none does."""

    def __init__(self, token: Secret | None) -> None:
        self._token = token

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
        """Raise 403 if no token is configured, 401 if the request does not have it."""
        if self._token is None:
            raise problem(403, "Closed", "the operator API is closed: set MAYFLY_API_TOKEN to open it")
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self._token.reveal().encode())
        if scheme.lower() != "bearer" or not is_right:
            detail = "the Authorization header must be: Bearer <MAYFLY_API_TOKEN>"
            raise problem(401, "Unauthorized", detail, {"WWW-Authenticate": "Bearer"})
