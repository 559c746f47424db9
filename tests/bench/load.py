"""The load generator, a process of its own: ``python -m tests.bench.load URL --connections 32 --seconds 5``.

Each connection sends one prepared request, waits for the whole answer, sends the next (closed loop, keep-alive). It
offers more than 20 000 requests a second from one core, so that the server and not the load is what is measured.
Prints one JSON object.
"""

import argparse
import asyncio
import contextlib
import json
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import uvloop

from tests.bench.webhooks import Wanted, fresh, requests_of

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)
# How long answers under way are waited for after the last request.
_GRACE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Result:
    """What one run saw; errors are all answers but 202, and connections that broke."""

    connections: int
    answers: int
    seconds: float
    rate: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    statuses: dict[str, int]
    errors: int


class Run:
    """The requests still to be sent and what came of those that were.

    The first answer of each connection is not counted, and the clock starts once all have theirs: event loops that
    accept one connection per round let the last of many wait for seconds.
    """

    def __init__(self, requests: list[bytes], *, seconds: float, connections: int) -> None:
        self.requests: Iterator[bytes] = iter(requests)
        self.seconds = seconds
        self.statuses: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.started_at = self.ended_at = time.perf_counter()
        self._unready = connections
        self._ready: list[Callable[[], None]] = []

    def next(self) -> bytes | None:
        """Return the next request; None once there are no more or the time is over."""
        if not self._unready and time.perf_counter() > self.started_at + self.seconds:
            return None
        return next(self.requests, None)

    def wait(self, go: Callable[[], None]) -> None:
        """Call *go* once every connection waits."""
        self._unready -= 1
        self._ready.append(go)
        if not self._unready:
            self.started_at = self.ended_at = time.perf_counter()
            for one in self._ready:
                one()

    def answered(self, status: str, sent_at: float, *, is_counted: bool) -> None:
        """Count an answer."""
        now = time.perf_counter()
        self.statuses[status] += 1
        if is_counted:
            self.ended_at = now
            self.latencies.append(now - sent_at)


class Connection(asyncio.Protocol):
    """One connection of the load: a request, its answer, the next request."""

    def __init__(self, run: Run, done: asyncio.Future[None]) -> None:
        self._run = run
        self._done = done
        self._buffer = b""
        self._sent_at = 0.0
        self._is_warm = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        """Once the answer is whole, send the next request."""
        self._buffer = data = self._buffer + data if self._buffer else data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(data, 0, end + 2)
        if length is None:
            self._answered("no content-length")
            self._transport.abort()
        elif len(data) >= end + 4 + int(length[1]):
            self._buffer = b""
            self._answered(data[9:12].decode("latin-1"))
            if self._is_warm:
                self._send()
            else:
                self._is_warm = True
                self._run.wait(self._send)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a connection that ended before its time."""
        if not self._done.done():
            self._answered(f"connection lost ({exc})")
            self._done.set_result(None)

    def _answered(self, status: str) -> None:
        self._run.answered(status, self._sent_at, is_counted=self._is_warm)

    def _send(self) -> None:
        request = self._run.next()
        if request is None:
            if not self._done.done():
                self._done.set_result(None)
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.write(request)


async def offer(host: str, port: int, run: Run, connections: int) -> None:
    """Offer the requests of *run* over so many connections, until they or the time are over."""
    loop = asyncio.get_running_loop()
    done = [loop.create_future() for _ in range(connections)]
    async with asyncio.timeout(run.seconds + _GRACE_SECONDS):
        await asyncio.gather(*(loop.create_connection(partial(Connection, run, one), host, port) for one in done))
        await asyncio.gather(*done)


def exchange(port: int, request: bytes) -> str | None:
    """Send one request and return the status of its answer, None while nobody listens or answers."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(4096)[9:12].decode("latin-1")
    return None


def result_of(run: Run, connections: int) -> Result:
    """Add up what *run* saw."""
    latencies = sorted(run.latencies) or [0.0]
    seconds = max(run.ended_at - run.started_at, 1e-9)
    return Result(
        connections=connections,
        answers=len(run.latencies),
        seconds=round(seconds, 3),
        rate=round(len(run.latencies) / seconds, 1),
        p50_ms=round(latencies[len(latencies) // 2] * 1000, 3),
        p99_ms=round(latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))] * 1000, 3),
        max_ms=round(latencies[-1] * 1000, 3),
        statuses=dict(run.statuses),
        errors=sum(count for status, count in run.statuses.items() if status != "202"),
    )


def main() -> None:
    """Parse the arguments, prepare the requests, run, print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="http://127.0.0.1:PORT/path of a server on this machine")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--count", type=int, default=20_000, help="requests at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds at most")
    parser.add_argument("--wanted", type=Path, help='announce these: a JSON list of ["id", "webhookUrl"]')
    arguments = parser.parse_args()
    parts = urlsplit(arguments.url)
    if parts.hostname != "127.0.0.1" or parts.port is None:
        sys.exit("the load goes to 127.0.0.1 alone")
    wanted = fresh(arguments.count)
    if arguments.wanted is not None:
        wanted = (Wanted(*pair) for pair in json.loads(arguments.wanted.read_text()))
    requests = requests_of(wanted, parts.path, parts.netloc)
    connections = min(arguments.connections, len(requests))
    run = Run(requests, seconds=arguments.seconds, connections=connections)
    uvloop.run(offer(parts.hostname, parts.port, run, connections))
    print(json.dumps(asdict(result_of(run, connections))))


if __name__ == "__main__":
    main()
