"""The results file of a batch: a GET of its ``outputUrl``, which redirects to a signed URL in a storage.

The API's key is sent to none of the two: the tokens in the URLs are all that they ask for. The signed webhook names the
first URL, but nobody vouches for the second: it has to be https, and may lead to public addresses alone. The
connection goes to the very address that was checked. Source: sync.so docs, "Batch processing".
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Final

import httpx

from service import __version__
from service.core.batch import MAX_LINES, Line, is_public, read_line
from service.core.generation import Generation
from service.runtime.causes import describe_cause
from service.runtime.cookies import NoCookies
from service.sync.answers import REDIRECTS

# For all of it: httpx's timeouts are per read, and a file that drips never exceeds them.
RESULTS_SECONDS: Final = 120.0
MAX_BYTES: Final = 64 * 1024 * 1024
# A generation with segments and scripts has some kilobytes.
MAX_LINE_BYTES: Final = 2 * 1024 * 1024
_CONNECT_SECONDS: Final = 5.0
_HEADERS: Final = {"accept": "*/*", "accept-encoding": "identity", "user-agent": f"mayfly/{__version__}"}

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(slots=True)
class Results:
    """What was read. *failure* says why the file was not read to its end; what was read before it is there.

    *generations* by id, with whether the line itself says that it has ended; *errors* counts lines with an error and
    no generation, *unread* those that have neither, or are too long.
    """

    generations: dict[str, tuple[Generation, bool]] = field(default_factory=dict)
    errors: int = 0
    unread: int = 0
    lines: int = 0
    failure: str | None = None

    def add(self, line: Line) -> None:
        """Count one line; of two about the same generation, the one that says more counts."""
        self.lines += 1
        if line.generation is None:
            self.errors += line.is_error
            self.unread += not line.is_error
            return
        known = self.generations.get(line.generation.id)
        if known is None or line.is_ended:
            self.generations[line.generation.id] = (line.generation, line.is_ended)


class _UnreadableError(Exception):
    """The results cannot be read; its text is for the operator, without URLs."""


class ResultsReader:
    """Reads results files with *open_client*, which has no key; *base_url* is that of the API.

    *resolve* returns the addresses of a host and port. Where the API itself is reached over plain http, as the
    simulator is, so may the results, and at any address.
    """

    def __init__(self, open_client: Callable[[], httpx.AsyncClient], base_url: str, resolve: Resolve) -> None:
        self._open_client = open_client
        self._base = httpx.URL(base_url)
        self._resolve = resolve

    async def read(self, url: str, *, seconds: float = RESULTS_SECONDS) -> Results:
        """Read the results that *url* leads to, over one redirect at most. Failures are in the result."""
        results = Results()
        try:
            async with asyncio.timeout(seconds), self._open_client() as client:
                await self._follow(client, httpx.URL(url), results)
        except _UnreadableError as error:
            results.failure = str(error)
        except TimeoutError:
            results.failure = f"the results were not read within {seconds:.0f} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            results.failure = f"the results did not get through: {describe_cause(error)}"
        return results

    async def _follow(self, client: httpx.AsyncClient, url: httpx.URL, results: Results) -> None:
        location = await self._fetch(client, url, results)
        if location is not None and await self._fetch(client, url.join(location), results) is not None:
            raise _UnreadableError("the results redirect more than once")

    async def _fetch(self, client: httpx.AsyncClient, url: httpx.URL, results: Results) -> str | None:
        """Get *url* and read the lines into *results*, or return where it redirects to.

        Raises: _UnreadableError, httpx.HTTPError, OSError.
        """
        requests = [client.build_request("GET", url)]
        if self._is_checked(url):
            requests = [_pinned(client, url, address) for address in await self._find_addresses(url)]
        for number, request in enumerate(requests, 1):
            try:
                response = await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(requests):
                    raise
                continue
            try:
                return await _read_response(response, results)
            finally:
                await response.aclose()
        raise _UnreadableError("the host of the results has no address")

    def _is_checked(self, url: httpx.URL) -> bool:
        """Whether the addresses of *url* have to be public.

        Raises: _UnreadableError, for a URL that is not followed at all.
        """
        if url.scheme not in ("https", self._base.scheme) or not url.host:
            raise _UnreadableError("the results lead to a URL that is not https")
        if url.userinfo:
            raise _UnreadableError("the results lead to a URL with a login")
        return self._base.scheme == "https" and (url.host, url.port) != (self._base.host, self._base.port)

    async def _find_addresses(self, url: httpx.URL) -> Sequence[str]:
        """Return the addresses of *url*'s host.

        Raises: _UnreadableError, if one of them is not public; OSError, if there is no such host.
        """
        addresses = await self._resolve(url.host, url.port or 443)
        if not all(is_public(address) for address in addresses):
            raise _UnreadableError("the results lead to an address that is not public")
        return addresses[:_ADDRESSES]


_ADDRESSES: Final = 3


def _pinned(client: httpx.AsyncClient, url: httpx.URL, address: str) -> httpx.Request:
    """Return the request for *url* at *address*; the certificate is still checked for its host.

    Resolving the name again for the connection could give another address than the one that was checked.
    """
    host = url.netloc.decode("ascii")
    extensions = {"sni_hostname": url.host}
    return client.build_request("GET", url.copy_with(host=address), headers={"host": host}, extensions=extensions)


async def _read_response(response: httpx.Response, results: Results) -> str | None:
    if response.status_code in REDIRECTS:
        location = response.headers.get("location")
        if not location:
            raise _UnreadableError(f"the results answered {response.status_code} without a location")
        return str(location)
    if response.status_code != HTTPStatus.OK:
        raise _UnreadableError(f"the results answered {response.status_code}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _UnreadableError("the results are compressed, which was not asked for")
    async for line in _split_lines(response):
        results.add(Line() if line is None else read_line(line))
        if results.lines > MAX_LINES:
            raise _UnreadableError(f"the results have more than {MAX_LINES} lines")
    return None


async def _split_lines(response: httpx.Response) -> AsyncIterator[bytes | None]:
    """Yield the lines that are not blank, None for one that is too long.

    Raises: _UnreadableError, once the file is too large.
    """
    rest, size, is_too_long = b"", 0, False
    # Raw: a compressed body could be a decompression bomb.
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > MAX_BYTES:
            raise _UnreadableError(f"the results are larger than {MAX_BYTES >> 20} MiB")
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if is_too_long or len(line) > MAX_LINE_BYTES:
                yield None
            elif line.strip():
                yield line
            is_too_long = False
        if len(rest) > MAX_LINE_BYTES:
            rest, is_too_long = b"", True
    if is_too_long:
        yield None
    elif rest.strip():
        yield rest


async def resolve_host(host: str, port: int) -> Sequence[str]:
    """Return the addresses of *host*. Raises: OSError, if there is none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def make_results_reader(base_url: str) -> ResultsReader:
    """Return a reader of results for the API at *base_url*; it opens a client for each file."""
    tls = httpx.create_ssl_context()
    tls.load_default_certs()  # the machine's store, too, for a company's own certificate authority
    open_client = partial(
        httpx.AsyncClient,
        headers=_HEADERS,
        cookies=NoCookies(),
        timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),  # the whole has a timeout of its own
        follow_redirects=False,  # each URL is checked first
        trust_env=False,
        verify=tls,
    )
    return ResultsReader(open_client, base_url, resolve_host)
