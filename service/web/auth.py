"""Authorization of the operator API, and of the one route in it that apps may call."""

import hmac
from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from service.core.secret import Secret
from service.ledger.adding import APP
from service.web.problems import problem

OPERATOR: Final = "operator"
# A route whose opt has this is open to the intake token as well.
FOR_APPS: Final = "for_apps"
# Where the guard notes whose token a request has, in the state of its connection.
CALLER: Final = "caller"


class ApiTokens:
    """A guard: only requests with the operator's token pass, or at a route for apps with that of the intake.

    Without a configured token, none does.
    """

    def __init__(self, operator: Secret | None, intake: Secret | None) -> None:
        self._operator = operator
        self._intake = intake

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raise 403 if no token is configured, 401 if the request does not have it."""
        is_for_apps = bool(handler.opt.get(FOR_APPS))
        names = "MAYFLY_INTAKE_TOKEN or MAYFLY_API_TOKEN" if is_for_apps else "MAYFLY_API_TOKEN"
        tokens = {OPERATOR: self._operator, APP: self._intake if is_for_apps else None}
        if not any(tokens.values()):
            what = "this route" if is_for_apps else "the operator API"
            raise problem(403, "Closed", f"{what} is closed: set {names} to open it")
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        # Both are compared, so that the time taken does not reveal which one matched.
        right = [who for who, token in tokens.items() if token is not None and _is_same(given, token)]
        if scheme.lower() != "bearer" or not right:
            detail = f"the Authorization header must be: Bearer <{names}>"
            raise problem(401, "Unauthorized", detail, {"WWW-Authenticate": "Bearer"})
        connection.state[CALLER] = right[0]


def _is_same(given: str, token: Secret) -> bool:
    return hmac.compare_digest(given.strip().encode(), token.reveal().encode())
