"""The Sync API as Mayfly uses it: look at a generation, delete it, and say what the answer means.

Source: sync.so API v2 reference, "Get generation" and "Delete generation"; the two have different paths.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from http.cookiejar import CookieJar
from typing import Any, Final
from urllib.parse import quote

import httpx
import msgspec

from service import __version__
from service.generation import RUNNING, Generation, MalformedError, read
from service.retention import Verdict, throttle
from service.sync_connections import Connections
from service.telemetry import Metrics
from service.values import Secret

# The whole call, connecting and the last byte included: httpx's own timeouts are per read, and a dripping body
# passes them for ever.
GET_SECONDS: Final = 10.0
DELETE_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 5.0
_IDLE_SECONDS: Final = 30.0
# A generation is a few kilobytes; segments and scripts make it some more.
MAX_BYTES: Final = 2 * 1024 * 1024
_HEADERS: Final = {
    "accept": "application/json",
    "accept-encoding": "identity",
    "user-agent": f"mayfly/{__version__}",
}

_MOST_SECONDS: Final = 10**9  # what is longer is clamped by the policy all the same
_SECONDS = re.compile(r"[0-9]{1,400}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call came to.

    *generation* and *body* are there when the API showed the one asked for; *error* is a sentence for people, without
    URLs or bodies; *status* is None when no answer came.
    """

    verdict: Verdict
    status: int | None = None
    generation: Generation | None = None
    body: str | None = None
    error: str | None = None
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    body: bytes | None  # None when it was longer than MAX_BYTES
    retry_after: str | None


class _NoCookies(CookieJar):
    """Keeps no cookie, and does not even read them."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Do nothing."""


class SyncApi:
    """One organisation's API. What can be expected to go wrong is an Answer, never an exception.

    *client* has the base URL and the key. *on_throttled* is called after each 429, with the seconds to wait.
    """

    def __init__(self, client: httpx.AsyncClient, metrics: Metrics, on_throttled: Callable[[float], None]) -> None:
        self._client = client
        self._metrics = metrics
        self._on_throttled = on_throttled

    async def get(self, generation_id: str) -> Answer:
        """Look at a generation: DONE with it when it is terminal, RUNNING, GONE, or what went wrong."""
        reply = await self._call("GET", f"/v2/generate/{quote(generation_id, safe='')}", GET_SECONDS)
        if isinstance(reply, Answer):
            return reply
        if reply.status != HTTPStatus.OK:
            return _judge(reply)
        answer = _shown(reply, generation_id)
        if answer.generation is None or answer.generation.is_terminal:
            return answer
        if answer.generation.status in RUNNING:
            return _but(answer, Verdict.RUNNING, "it is still being processed")
        # A status we do not know might be one that must not be deleted.
        return _but(answer, Verdict.RETRY, "the API shows a status that this release does not know")

    async def delete(self, generation_id: str) -> Answer:
        """Delete a generation: DONE when the API confirms it, GONE when there was none, or what went wrong."""
        reply = await self._call("DELETE", f"/v2/generations/{quote(generation_id, safe='')}", DELETE_SECONDS)
        if isinstance(reply, Answer):
            return reply
        if reply.status == HTTPStatus.NO_CONTENT:
            return Answer(Verdict.DONE, reply.status)
        if reply.status != HTTPStatus.OK:
            return _judge(reply)
        return _shown(reply, generation_id)

    async def _call(self, method: str, path: str, seconds: float) -> _Reply | Answer:
        try:
            async with asyncio.timeout(seconds):
                reply = await self._exchange(method, path)
        except TimeoutError:
            self._metrics.api_calls.labels(method, "timeout").inc()
            return Answer(Verdict.RETRY, error=f"the API did not answer the {method} within {seconds:.0f} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # InvalidURL: httpx reads a Location that it does not follow. OSError: of an established TLS connection that
            # breaks, the ssl.SSLError arrives as it is.
            self._metrics.api_calls.labels(method, "network").inc()
            return Answer(Verdict.RETRY, error=f"the {method} did not get through: {type(error).__name__}")
        self._metrics.api_calls.labels(method, f"{reply.status // 100}xx").inc()
        if reply.status == HTTPStatus.TOO_MANY_REQUESTS:
            self._on_throttled(throttle(_judge(reply).retry_after).total_seconds())
        return reply

    async def _exchange(self, method: str, path: str) -> _Reply:
        async with self._client.stream(method, path) as response:
            return await _read(response)


async def _read(response: httpx.Response) -> _Reply:
    chunks, size = [], 0
    # Raw: no encoding was asked for, and one that comes all the same could be a bomb.
    async for chunk in response.aiter_raw():
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            return _Reply(response.status_code, None, response.headers.get("retry-after"))
    return _Reply(response.status_code, b"".join(chunks), response.headers.get("retry-after"))


@asynccontextmanager
async def open_sync_api(
    base_url: str,
    key: Secret,
    *,
    connections: int,
    metrics: Metrics,
    on_throttled: Callable[[float], None] = lambda _seconds: None,
) -> AsyncIterator[SyncApi]:
    """Open a client of the API at *base_url* that makes at most *connections* calls at once.

    *on_throttled* is called after each 429, with the seconds to wait. A call that is cancelled ends on the wire as
    well: a DELETE that arrives late would meet a record that was held since.
    """
    tls = httpx.create_ssl_context()
    tls.load_default_certs()  # the machine's own store, too: an organisation may have an authority of its own
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_IDLE_SECONDS)
    open_transport = partial(httpx.AsyncHTTPTransport, verify=tls, trust_env=False, limits=limits)
    async with httpx.AsyncClient(
        base_url=base_url,
        headers=_HEADERS | {"x-api-key": key.reveal()},
        cookies=_NoCookies(),
        timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),  # the rest is limited for the whole call
        follow_redirects=False,  # the key goes to this host alone
        trust_env=False,
        transport=Connections(open_transport, connections),
    ) as client:
        yield SyncApi(client, metrics, on_throttled)


def _shown(reply: _Reply, generation_id: str) -> Answer:
    """Read the generation in a 200; it must be the one asked for."""
    if reply.body is None:
        return Answer(Verdict.RETRY, reply.status, error="the API's answer is longer than any generation")
    try:
        generation = read(reply.body)
    except MalformedError:
        return Answer(Verdict.RETRY, reply.status, error="the API answered 200 without a generation")
    if generation.id != generation_id:
        # Never seen, and nothing to be clever about: a few tries, then a person looks.
        return Answer(Verdict.REFUSED, reply.status, error="the API answered with another generation")
    return Answer(Verdict.DONE, reply.status, generation, reply.body.decode())


def _judge(reply: _Reply) -> Answer:
    """Say what any status but the one hoped for means."""
    details = _details(reply.body)
    # A page of some proxy or a route that is not there, as behind a mistyped SYNC_BASE_URL, proves nothing.
    is_theirs = reply.body == b"" or (details is not None and not str(details.get("message")).startswith("Cannot "))
    verdict = _verdict(reply.status, is_theirs=is_theirs)
    code = (details or {}).get("errorCode")
    error = f"the API answered {reply.status}" + (f" {code}" if isinstance(code, str) and code.isidentifier() else "")
    now = datetime.now(UTC)
    retry_after = parse_retry_after(reply.retry_after or "", now=now)
    if retry_after is None:
        retry_after = parse_retry_after(str((details or {}).get("retryAfterSeconds", "")), now=now)
    body = reply.body.decode(errors="replace") if verdict is Verdict.GONE and reply.body else None
    return Answer(verdict, reply.status, body=body, error=error, retry_after=retry_after)


def _verdict(status: int, *, is_theirs: bool) -> Verdict:
    match status:
        case 401 | 402 | 403:
            return Verdict.UNAUTHORIZED
        case 404 | 410:
            return Verdict.GONE if is_theirs else Verdict.REFUSED
        case 409:
            return Verdict.RUNNING
        case 408 | 425 | 429:
            return Verdict.RETRY
        case _ if 400 <= status < 500:
            return Verdict.REFUSED
        case _:  # 5xx; 3xx is never followed; another 2xx confirms nothing, the next attempt looks again
            return Verdict.RETRY


def _details(body: bytes | None) -> dict[str, Any] | None:
    """Read an error body: a JSON object, else None; HTML comes from proxies and guards in front of the API."""
    try:
        details = msgspec.json.decode(body or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return details if isinstance(details, dict) else None


def _but(answer: Answer, verdict: Verdict, error: str) -> Answer:
    return Answer(verdict, answer.status, answer.generation, answer.body, error)


def parse_retry_after(text: str, *, now: datetime) -> timedelta | None:
    """Read a Retry-After, seconds or an HTTP date; None for anything else. Clamping is the policy's business."""
    text = text.strip().partition(".")[0]
    if _SECONDS.fullmatch(text):
        return timedelta(seconds=min(int(text), _MOST_SECONDS))
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # "-0000" makes a naive one; HTTP dates are GMT.
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return at - now
