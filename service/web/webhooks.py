"""``POST /webhooks/sync``: reads the request, passes it to the intake, counts refusals."""

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from litestar import Request, post
from litestar.exceptions import HTTPException, InternalServerException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.params import FromPath, HeaderParameter

from service.core.key import DEFAULT_ACCOUNT
from service.core.overrides import WEBHOOK_PATH
from service.core.signature import SignatureError
from service.web.intake import Answer, Intake
from service.web.problems import RETRY_AFTER_SECONDS, documented, problem
from service.web.refusals import Refusals

MAX_BODY_BYTES = 1024 * 1024
# For the whole body; a webhook has a few kilobytes.
BODY_SECONDS = 10.0
# The memory limit of all bodies that are still arriving. Small bodies are accepted beyond it.
MAX_UNREAD_BYTES = 32 * 1024 * 1024
SMALL_BODY_BYTES = 32 * 1024


@dataclass
class _JsonOperation(Operation):
    """Documents the body; the handler reads raw bytes, because the signature covers them."""

    def __post_init__(self) -> None:
        content = {"application/json": OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT))}
        self.request_body = RequestBody(content=content, required=True)


def webhook_handler(intake: Intake, refusals: Refusals) -> HTTPRouteHandler:
    """Return the handler of the route."""
    bodies = _Bodies()

    @post(
        [WEBHOOK_PATH, f"{WEBHOOK_PATH}/{{account:str}}"],
        status_code=HTTPStatus.ACCEPTED,
        request_max_body_size=MAX_BODY_BYTES,
        tags=["webhooks"],
        summary="Receive a webhook of sync.so",
        responses=documented(400, 401, 404, 408, 413, 415, 503),
        operation_class=_JsonOperation,
    )
    async def receive_webhook(
        request: Request[Any, Any, Any],
        account: FromPath[str] = DEFAULT_ACCOUNT,
        # The default makes a missing header a 401 instead of Litestar's 400.
        signature: Annotated[str, HeaderParameter(name="Sync-Signature", description="t=<unix seconds>,v1=<hex>")] = "",
    ) -> Answer:
        """Store the webhook of a generation or a batch that has ended, and schedule the deletion; ignore all others.

        *account* is an account of the configuration; without it the webhook is of the account `default`.
        """
        try:
            if not intake.knows(account):
                raise problem(404, "Unknown account", _unknown_account(account))
            content_type = request.headers.get("content-type", "")
            _check_content_type(content_type)
            intake.check_form(signature)
            body = await bodies.read(request)
            query = request.scope["query_string"].decode("latin-1")
            return await intake.accept(account, signature, body, query=query, content_type=content_type)
        except (SignatureError, HTTPException) as error:
            refusals.count_webhook(error)
            raise

    return receive_webhook


def _unknown_account(account: str) -> str:
    if account == DEFAULT_ACCOUNT:
        return f"no account is called {DEFAULT_ACCOUNT}: the webhookUrl must end in {WEBHOOK_PATH}/ACCOUNT"
    return "no account of this name is configured; check the end of the webhookUrl, and [[account]] in MAYFLY_CONFIG"


class _Bodies:
    """Reads bodies, with limits of size and time for each, and of memory for all together."""

    def __init__(self) -> None:
        self._unread_bytes = 0

    async def read(self, request: Request[Any, Any, Any]) -> bytes:
        """Return the body of *request*.

        Raises: HTTPException: 408 too slow, 413 too large (Litestar's own), 400 aborted, 503 too many at once.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    self._unread_bytes += len(part)
                    if size > SMALL_BODY_BYTES and self._unread_bytes > MAX_UNREAD_BYTES:
                        raise _too_many_bodies()
                    parts.append(part)
        except TimeoutError:
            # Otherwise a body that drips would keep the connection open.
            close = {"Connection": "close"}
            raise problem(408, "Too slow", f"the body took longer than {BODY_SECONDS:g} s to arrive", close) from None
        except InternalServerException:
            raise problem(400, "Body not accepted", "the body is incomplete") from None
        finally:
            self._unread_bytes -= size
        return b"".join(parts)


def _too_many_bodies() -> HTTPException:
    detail = "too many large bodies arrive at once; nothing was stored, send it again"
    return problem(503, "Body not accepted", detail, {"Retry-After": str(RETRY_AFTER_SECONDS)})


def _check_content_type(content_type: str) -> None:
    """Refuse a content type other than JSON in UTF-8; without one, the body decides."""
    if content_type in ("application/json", ""):
        return
    kind, _, parameters = content_type.lower().partition(";")
    kind, charset = kind.strip(), parameters.replace(" ", "").replace('"', "")
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not is_json or ("charset=" in charset and "charset=utf-8" not in charset and "charset=utf8" not in charset):
        raise problem(415, "Body not accepted", "the body must be application/json in UTF-8")
