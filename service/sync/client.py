"""The Sync API as Mayfly uses it: GET and DELETE of a generation, the list, a short one to prove the key, and batches.

Source: sync.so API v2 reference, "Get generation", "Delete generation" and "List generations"; their paths differ.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final
from urllib.parse import quote

import httpx

from service import __version__
from service.core.attempts import Verdict
from service.core.secret import Secret
from service.runtime.causes import describe_cause
from service.runtime.cookies import NoCookies
from service.runtime.metrics import Metrics
from service.sync.answers import (
    MAX_BYTES,
    MAX_PAGE_BYTES,
    Answer,
    Reply,
    read_batch_answer,
    read_delete,
    read_get,
    read_list,
    read_page,
)
from service.sync.connections import Connections

# For the whole call, from connecting to the last byte: httpx's timeouts are per read, and a body that drips never
# exceeds them.
GET_SECONDS: Final = 10.0
DELETE_SECONDS: Final = 30.0
KEY_SECONDS: Final = 5.0
PAGE_SECONDS: Final = 30.0
# The cheapest call that needs the key and changes nothing.
LIST_ONE: Final = "/v2/generations?limit=1"
# The most that the API allows. Without a limit the list is in no order, and the cursor needs the same one throughout.
PAGE_LIMIT: Final = 100
_CONNECT_SECONDS: Final = 5.0
_IDLE_SECONDS: Final = 30.0
_HEADERS: Final = {
    "accept": "application/json",
    "accept-encoding": "identity",
    "user-agent": f"mayfly/{__version__}",
}


class SyncApi:
    """One organisation's API. Expected failures are an Answer, never an exception.

    *client* has the base URL and the key. *on_throttled* is called after each 429, with the seconds to wait.
    """

    def __init__(self, client: httpx.AsyncClient, metrics: Metrics, on_throttled: Callable[[float], None]) -> None:
        self._client = client
        self._metrics = metrics
        self._on_throttled = on_throttled

    async def get(self, generation_id: str) -> Answer:
        """Get a generation: DONE with it if it is terminal, RUNNING, GONE, or a failure."""
        path = f"/v2/generate/{quote(generation_id, safe='')}"
        return await self._call("GET", path, GET_SECONDS, partial(read_get, generation_id=generation_id))

    async def delete(self, generation_id: str) -> Answer:
        """Delete a generation: DONE if the API confirms it, GONE if there was none, or a failure."""
        path = f"/v2/generations/{quote(generation_id, safe='')}"
        return await self._call("DELETE", path, DELETE_SECONDS, partial(read_delete, generation_id=generation_id))

    async def check_key(self) -> Answer:
        """List one generation, which needs a valid key and concerns no generation: see read_list()."""
        return await self._call("GET", LIST_ONE, KEY_SECONDS, read_list)

    async def list_page(self, cursor: str | None) -> Answer:
        """List up to PAGE_LIMIT generations, newest first, from the one after *cursor*, the id of a generation, on."""
        after = "" if cursor is None else f"&cursor={quote(cursor, safe='')}"
        path = f"/v2/generations?limit={PAGE_LIMIT}{after}"
        return await self._call("GET", path, PAGE_SECONDS, read_page, max_bytes=MAX_PAGE_BYTES)

    async def get_batch(self, batch_id: str) -> Answer:
        """Get a batch: DONE with its *body*, or with the *location* that the API redirects to; or a failure."""
        return await self._call("GET", f"/v2/batch/{quote(batch_id, safe='')}", GET_SECONDS, read_batch_answer)

    async def _call(
        self, method: str, path: str, seconds: float, read: Callable[[Reply], Answer], *, max_bytes: int = MAX_BYTES
    ) -> Answer:
        try:
            async with asyncio.timeout(seconds):
                reply = await self._exchange(method, path, max_bytes)
        except TimeoutError:
            self._metrics.api_calls.labels(method, "timeout").inc()
            return Answer(Verdict.RETRY, error=f"the API did not answer the {method} within {seconds:.0f} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # InvalidURL: httpx parses the Location of a redirect that it does not follow. OSError: httpx does not
            # translate the ssl.SSLError of an established connection that breaks.
            self._metrics.api_calls.labels(method, "network").inc()
            return Answer(Verdict.RETRY, error=f"the {method} did not get through: {describe_cause(error)}")
        self._metrics.api_calls.labels(method, f"{reply.status // 100}xx").inc()
        answer = read(reply)
        if answer.throttle is not None:
            self._on_throttled(answer.throttle.total_seconds())
        return answer

    async def _exchange(self, method: str, path: str, max_bytes: int) -> Reply:
        async with self._client.stream(method, path) as response:
            return await _read_reply(response, max_bytes)


async def _read_reply(response: httpx.Response, max_bytes: int) -> Reply:
    chunks, size = [], 0
    # Raw: no encoding was requested, and a compressed body could be a decompression bomb.
    async for chunk in response.aiter_raw():
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            return _reply(response, None)
    return _reply(response, b"".join(chunks))


def _reply(response: httpx.Response, body: bytes | None) -> Reply:
    headers = response.headers
    return Reply(response.status_code, body, headers.get("retry-after"), headers.get("location"))


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

    *on_throttled* is called after each 429, with the seconds to wait. A cancelled call also closes its connection: a
    DELETE that arrives later could reach a generation whose record was put on hold meanwhile.
    """
    tls = httpx.create_ssl_context()
    tls.load_default_certs()  # the machine's store, too, for a company's own certificate authority
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_IDLE_SECONDS)
    open_transport = partial(httpx.AsyncHTTPTransport, verify=tls, trust_env=False, limits=limits)
    async with httpx.AsyncClient(
        base_url=base_url,
        headers=_HEADERS | {"x-api-key": key.reveal()},
        cookies=NoCookies(),
        timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),  # the whole call has a timeout of its own
        follow_redirects=False,  # the key goes to no other host
        trust_env=False,
        transport=Connections(open_transport, connections),
    ) as client:
        yield SyncApi(client, metrics, on_throttled)
