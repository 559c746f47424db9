"""The Sync API as Mayfly uses it: look at a generation, delete it, and say what the answer means.

Source: sync.so API v2 reference, "Get generation" and "Delete generation"; the two have different paths.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

import httpx
import msgspec
from pyreqwest.client import ClientBuilder
from pyreqwest.compatibility.httpx import HttpxTransport
from pyreqwest.exceptions import PyreqwestError

from service.generation import RUNNING, Generation, MalformedError, read
from service.retention import MIN_BACKOFF, MIN_RETRY_AFTER, Verdict
from service.settings import Secret
from service.telemetry import Metrics

# The whole call, connecting and the last byte included: httpx's own timeouts are per read, and a dripping body
# passes them for ever.
GET_SECONDS: Final = 10.0
DELETE_SECONDS: Final = 30.0
# A generation is a few kilobytes; segments and scripts make it some more.
MAX_BYTES: Final = 2 * 1024 * 1024

_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)


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


class SyncApi:
    """One organisation's API, reached with its key. Expected trouble is an Answer, never an exception."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        base_url: str,
        key: Secret,
        metrics: Metrics,
        on_throttled: Callable[[float], Awaitable[None]],
    ) -> None:
        self._on_throttled = on_throttled
        self._transport = transport
        self._base_url = base_url
        self._headers = {"x-api-key": key.reveal(), "accept": "application/json", "accept-encoding": "identity"}
        self._metrics = metrics

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
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, PyreqwestError) as error:
            self._metrics.api_calls.labels(method, "network").inc()
            return Answer(Verdict.RETRY, error=f"the {method} did not get through: {type(error).__name__}")
        self._metrics.api_calls.labels(method, f"{reply.status // 100}xx").inc()
        if reply.status == HTTPStatus.TOO_MANY_REQUESTS:
            asked = _judge(reply).retry_after or MIN_BACKOFF
            await self._on_throttled(max(asked, MIN_RETRY_AFTER).total_seconds())
        return reply

    async def _exchange(self, method: str, path: str) -> _Reply:
        request = httpx.Request(method, self._base_url + path, headers=self._headers)
        response = await self._transport.handle_async_request(request)
        try:
            chunks, size = [], 0
            # Raw: no encoding was asked for, and one that comes all the same could be a bomb.
            async for chunk in response.aiter_raw():
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_BYTES:
                    return _Reply(response.status_code, None, response.headers.get("retry-after"))
            return _Reply(response.status_code, b"".join(chunks), response.headers.get("retry-after"))
        finally:
            await response.aclose()


async def _heed_nothing(_seconds: float) -> None:
    return


@asynccontextmanager
async def open_sync_api(
    base_url: str,
    key: Secret,
    *,
    connections: int,
    metrics: Metrics,
    on_throttled: Callable[[float], Awaitable[None]] = _heed_nothing,
) -> AsyncIterator[SyncApi]:
    """Open a pool of *connections* to the API at *base_url*. The key goes to that host alone: nothing is redirected.

    *on_throttled* hears of each 429, with the seconds to wait.

    httpx over reqwest, and its transport without its client: measured with 50 calls in flight, 139 pairs of GET and
    DELETE a second with httpx's own pool, 924 with its client over this one, 1 579 so.
    """
    client = (
        ClientBuilder()
        .follow_redirects(enable=False)
        .no_proxy()
        .gzip(enable=False)
        .brotli(enable=False)
        .zstd(enable=False)
        .deflate(enable=False)
        .referer(enable=False)
        .connect_timeout(timedelta(seconds=5))
        .max_connections(connections)
        .pool_max_idle_per_host(connections)
        .pool_idle_timeout(timedelta(seconds=30))
        .build()
    )
    async with HttpxTransport(client) as transport:
        yield SyncApi(transport, base_url, key, metrics, on_throttled)


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
    verdict = _verdict(reply.status, is_theirs=details is not None or reply.body == b"")
    code = (details or {}).get("errorCode")
    error = f"the API answered {reply.status}" + (f" {code}" if isinstance(code, str) and code.isidentifier() else "")
    asked = reply.retry_after if reply.retry_after is not None else str((details or {}).get("retryAfterSeconds", ""))
    return Answer(verdict, reply.status, error=error, retry_after=parse_retry_after(asked, now=datetime.now(UTC)))


def _verdict(status: int, *, is_theirs: bool) -> Verdict:
    match status:
        case 401 | 402 | 403:
            return Verdict.UNAUTHORIZED
        case 404 | 410:
            # A page of some proxy, as behind a mistyped SYNC_BASE_URL, proves nothing of the generation.
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
        return timedelta(seconds=int(text))
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # "-0000" makes a naive one; HTTP dates are GMT.
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return at - now
