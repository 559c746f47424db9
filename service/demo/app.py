"""The app in the demo: it gets its webhooks from Mayfly, and verifies both signatures as any app would."""

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from litestar import Litestar, Request, Response, post

PATH: Final = "/webhooks"


@dataclass(frozen=True, slots=True)
class Received:
    """One request: whether both signatures were right, and the status of its answer."""

    at: datetime
    delivery: str
    is_genuine: bool
    status: int

    @property
    def is_taken(self) -> bool:
        """Whether the answer said so."""
        return self.status == 204


class App:
    """An app that has both secrets; it answers 503 to as many webhooks of a generation as *refusals* says."""

    def __init__(self, *, sync_secret: str, signing_secret: str) -> None:
        self._sync_key = sync_secret.encode()
        self._signing_key = base64.b64decode(signing_secret.removeprefix("whsec_"))
        self.received: dict[str, list[Received]] = {}
        self.refusals: dict[str, int] = {}

    def requests_about(self, generation: str) -> Sequence[Received]:
        """Return the requests with a webhook of *generation*, in their order."""
        return self.received.get(generation, ())

    def make_asgi(self) -> Litestar:
        """Return what serves it."""

        @post(PATH)
        async def take(request: Request[Any, Any, Any]) -> Response[None]:
            return Response(None, status_code=self._answer(request.headers, await request.body()))

        return Litestar([take], openapi_config=None, logging_config=None)

    def _answer(self, headers: Mapping[str, str], body: bytes) -> int:
        """Note a webhook, and return the status to answer."""
        is_genuine = self._is_from_sync(headers, body) and self._is_from_mayfly(headers, body)
        generation = str(msgspec.json.decode(body)["id"]) if is_genuine else ""
        requests = self.received.setdefault(generation, [])
        status = 401 if not is_genuine else 503 if len(requests) < self.refusals.get(generation, 0) else 204
        requests.append(Received(datetime.now(UTC), headers.get("mayfly-delivery", ""), is_genuine, status))
        return status

    def _is_from_sync(self, headers: Mapping[str, str], body: bytes) -> bool:
        """Verify ``t=<unix seconds>,v1=<hex>``, as the documentation of sync.so says."""
        at, _, signature = headers.get("sync-signature", "").removeprefix("t=").partition(",v1=")
        expected = hmac.new(self._sync_key, f"{at}.".encode() + body, hashlib.sha256).hexdigest()
        return hmac.compare_digest(expected, signature)

    def _is_from_mayfly(self, headers: Mapping[str, str], body: bytes) -> bool:
        """Verify the signature of this attempt, as Standard Webhooks says; apps use their library for it."""
        delivery, at = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
        digest = hmac.digest(self._signing_key, f"{delivery}.{at}.".encode() + body, "sha256")
        signature = f"v1,{base64.b64encode(digest).decode()}"
        is_same = delivery == headers.get("mayfly-delivery")
        return is_same and hmac.compare_digest(signature, headers.get("webhook-signature", ""))
