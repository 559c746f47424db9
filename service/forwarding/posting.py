"""Posting a webhook to a target, byte for byte, with httpx. A failure is a Reply, never an exception."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import httpx
import msgspec

from service import __version__
from service.core.forwarding import Reply, Target
from service.core.retry_after import parse_retry_after
from service.core.standard_webhooks import standard_headers
from service.runtime.causes import describe_cause
from service.runtime.cookies import NoCookies

# The most of an answer that is read and stored.
ANSWER_BYTES: Final = 1024
_CONNECT_SECONDS: Final = 5.0
_IDLE_SECONDS: Final = 30.0
_BODY_SECONDS: Final = 2.0


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A webhook on its way to a target: *body*, *content_type* and *signature* as they came from sync.so.

    *id* is the same at each attempt; *attempt* counts from 1.
    """

    id: str
    attempt: int
    body: bytes
    content_type: str
    signature: str


def make_headers(target: Target, webhook: Outgoing, *, at: datetime) -> dict[bytes, bytes]:
    """Return the headers of an attempt that begins at the aware instant *at*; those of httpx come on top."""
    ours = {
        "Mayfly-Delivery": webhook.id,
        "Mayfly-Attempt": str(webhook.attempt),
        **standard_headers(webhook.id, webhook.body, secrets=target.secrets, at=at),
    }
    came = {"Content-Type": webhook.content_type, "Sync-Signature": webhook.signature}
    # Bytes, as they came: httpx encodes texts as it sees fit. Blanks after a value, which uvicorn leaves, are not part
    # of it, and with them httpx would send nothing at all.
    values = {name: value.encode("latin-1").strip(b" \t") for name, value in (came | ours).items()}
    return {name.encode(): value for name, value in values.items() if value}


class Poster:
    """One target; *client* is of its own, so that its connections are no other's. *now* is aware UTC."""

    def __init__(self, target: Target, client: httpx.AsyncClient, now: Callable[[], datetime]) -> None:
        self._target = target
        self._client = client
        self._now = now

    def build_request(self, webhook: Outgoing) -> httpx.Request:
        """Return the request of an attempt that begins now, with all that is sent.

        Raises: httpx.InvalidURL.
        """
        headers, url = make_headers(self._target, webhook, at=self._now()), self._target.url.reveal()
        try:
            return self._client.build_request("POST", url, content=webhook.body, headers=headers)
        except UnicodeError:  # httpx does not translate what is wrong with a label that begins with xn--
            raise httpx.InvalidURL("a label of its host cannot be decoded") from None

    async def post(self, webhook: Outgoing) -> Reply:
        """Make one attempt, within the target's timeout until its answer begins."""
        seconds = self._target.timeout.total_seconds()
        try:
            request = self.build_request(webhook)
        except httpx.InvalidURL:
            return Reply(None, error="not reached: its url in MAYFLY_CONFIG is invalid")
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.send(request, stream=True)
        except TimeoutError:
            return Reply(None, error=f"no answer within {seconds:g} s")
        except (httpx.HTTPError, OSError) as error:
            # OSError: httpx does not translate the ssl.SSLError of an established connection that breaks.
            return Reply(None, error=f"not reached: {describe_cause(error)}")
        retry_after = parse_retry_after(response.headers.get("retry-after", ""), now=self._now())
        return Reply(response.status_code, await _read_start(response), retry_after=retry_after)


async def _drop_location(response: httpx.Response) -> None:
    """Redirects are not followed, but httpx reads where to, and an invalid Location would lose the answer."""
    response.headers.pop("location", None)


async def _read_start(response: httpx.Response) -> str:
    """Read how the body begins, and close the response; the status counts, whatever becomes of the body."""
    start = b""
    with contextlib.suppress(TimeoutError, httpx.HTTPError, OSError):
        async with asyncio.timeout(_BODY_SECONDS), contextlib.aclosing(response):
            async for chunk in response.aiter_raw():
                start += chunk[: ANSWER_BYTES - len(start)]
                if len(start) >= ANSWER_BYTES:
                    break
    # PostgreSQL stores no NUL.
    return start.decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")


def make_tls() -> ssl.SSLContext:
    """Return what verifies certificates; making it takes long, so that all targets share one."""
    tls = httpx.create_ssl_context()
    tls.load_default_certs()  # the machine's store, too, for a company's own certificate authority
    return tls


@asynccontextmanager
async def open_poster(
    target: Target, tls: ssl.SSLContext, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> AsyncIterator[Poster]:
    """Open the client of *target*: no redirects, no cookies, no proxy of the environment."""
    async with httpx.AsyncClient(
        headers={"accept": "*/*", "accept-encoding": "identity", "user-agent": f"Mayfly/{__version__}"},
        cookies=NoCookies(),
        timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),  # the whole attempt has a timeout of its own
        limits=httpx.Limits(
            max_connections=target.concurrency,
            max_keepalive_connections=target.concurrency,
            keepalive_expiry=_IDLE_SECONDS,
        ),
        follow_redirects=False,
        event_hooks={"response": [_drop_location]},
        trust_env=False,
        verify=tls,
    ) as client:
        yield Poster(target, client, now)
