"""What anonymous clients send cannot fill the log: the bytes that a real web side writes to standard error."""

import collections
import contextlib
import json
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import ProcessStarter
from tests.faults.website import Website, website
from tests.support.webhooks import webhook

REQUESTS = 1000
AT_ONCE = 50
# For each kind: a line at once and one when the minute or the process ends, each of some 200 bytes.
MAX_LINES, MAX_BYTES = 2, 600


def post(*headers: bytes, body: bytes = b"{}") -> bytes:
    lines = [b"POST /webhooks/sync HTTP/1.1", b"Host: mayfly", b"Content-Length: %d" % len(body), *headers, b"", b""]
    return b"\r\n".join(lines) + body


def get(target: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", b"Host: mayfly", *headers, b"", b""])


def signed_by_nobody() -> bytes:
    return b"Sync-Signature: t=%d,v1=%b" % (time.time(), b"0" * 64)


# What is sent, how the log and the metrics name it, and how many requests a connection takes.
KINDS: dict[str, tuple[Callable[[], bytes], str, str, int]] = {
    "no signature": (post, "webhook signature rejected: missing", "webhook", AT_ONCE),
    "a forged one": (lambda: post(signed_by_nobody()), "webhook signature rejected: mismatch", "webhook", AT_ONCE),
    "an old one": (
        lambda: post(b"Sync-Signature: t=1,v1=" + b"0" * 64),
        "webhook signature rejected: stale",
        "webhook",
        AT_ONCE,
    ),
    "garbage as one": (
        lambda: post(b"Sync-Signature: " + b"\xff" * 300),
        "webhook signature rejected: malformed",
        "webhook",
        AT_ONCE,
    ),
    "another content type": (lambda: post(b"Content-Type: text/html"), "the body must be", "webhook", AT_ONCE),
    "a long path": (lambda: get(b"/" + b"x" * 3000), "404", "request", AT_ONCE),
    "a longer one": (lambda: get(b"/" + b"x" * 5000), "too_long", "request", 1),
    "another method": (lambda: get(b"/webhooks/sync", method=b"DELETE"), "405", "request", AT_ONCE),
    "no token": (lambda: get(b"/api/records?q=" + b"x" * 900), "401", "request", AT_ONCE),
    "no HTTP": (lambda: b"\x16\x03\x01\x02\x00\x01\r\n\r\n", "not_http", "request", 1),
    "an upgrade": (lambda: get(b"/", b"Connection: upgrade", b"Upgrade: websocket"), "upgrade", "request", 1),
}


@pytest.fixture
def site(starter: ProcessStarter, tmp_path: Path) -> Iterator[Website]:
    """A web side of its own."""
    with website(starter, tmp_path) as site:
        yield site


def flood(site: Website, data: bytes, at_once: int) -> None:
    """Send the same request REQUESTS times, so many over each connection, and read the answers."""
    for _ in range(REQUESTS // at_once):
        with (
            socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection,
            contextlib.suppress(ConnectionError),
        ):
            connection.sendall(data * (at_once - 1))
            connection.sendall(data if at_once == 1 else last(data))
            while connection.recv(65536):
                pass


def last(data: bytes) -> bytes:
    """Return the same request with the header that ends the connection."""
    return data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


def lines_of(site: Website) -> list[bytes]:
    return site.process.log.read_bytes().splitlines(keepends=True)


async def test_thousands_of_refused_requests_of_each_kind_are_two_lines_and_counted(site: Website):
    before, sizes = len(lines_of(site)), {}
    for name, (make, _, _, at_once) in KINDS.items():
        size = site.process.log.stat().st_size
        flood(site, make(), at_once)
        sizes[name] = site.process.log.stat().st_size - size
    metrics = site.client.get("/metrics").text
    site.process.send(signal.SIGTERM)
    await site.process.ended(20)

    lines = [json.loads(line) for line in lines_of(site)[before:]]
    refused = [line for line in lines if line["event"] in ("webhook.not_stored", "request.refused")]
    numbers: collections.Counter[str] = collections.Counter()
    for name, (_, reason, event, _) in KINDS.items():
        found = [line for line in refused if line["event"].startswith(event) and line["reason"].startswith(reason)]
        numbers[name] = sum(line["number"] for line in found)
        assert len(found) <= MAX_LINES, name
        assert sum(len(json.dumps(line)) for line in found) <= MAX_BYTES, name

    assert max(sizes.values()) <= MAX_BYTES
    # An upgrade to a route that is not there is refused as a 404 as well.
    assert numbers == dict.fromkeys(KINDS, REQUESTS) | {"a long path": 2 * REQUESTS}
    assert len(refused) <= MAX_LINES * len(KINDS)
    assert {line["level"] for line in refused} == {"warning"}
    for reason in ("404", "405", "401", "too_long", "not_http", "upgrade"):
        assert f'mayfly_requests_refused_total{{reason="{reason}"}}' in metrics
    assert f'mayfly_webhooks_total{{answer="refused"}} {4 * REQUESTS}.0' in metrics


async def test_clients_that_leave_before_their_answers_are_two_lines(site: Website):
    """uvicorn logs a traceback of four kilobytes for each pipelined webhook whose client has left."""
    sent = webhook()
    data = post(*(f"{name}: {value}".encode() for name, value in sent.headers.items()), body=sent.body)
    for _ in range(300):
        with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
            connection.sendall(data * 2)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert site.post(sent.body).status_code == 202
    site.process.send(signal.SIGTERM)
    await site.process.ended(20)

    left = [event for event in site.process.events("request.refused") if event["reason"] == "left"]
    assert 1 <= len(left) <= MAX_LINES
    assert sum(event["number"] for event in left) > 50
    assert b"Traceback" not in site.process.log.read_bytes()
    assert site.process.log.stat().st_size < 3000


def test_each_verified_webhook_that_is_not_stored_is_logged_with_its_generation(site: Website):
    for _ in range(100):
        assert site.post(b"[]").status_code == 400
    assert site.post(webhook().body).status_code == 202
    moved = site.ledger.rename(site.ledger.with_name("moved.db"))
    sent = [webhook() for _ in range(100)]
    statuses = {site.post(one.body).status_code for one in sent}
    moved.rename(site.ledger)

    events: list[dict[str, Any]] = site.process.events("webhook.not_stored")
    assert statuses == {503}
    assert len(events) == 200
    assert [event["generation"] for event in events[100:]] == [one.id for one in sent]
    assert {(event["is_verified"], event["level"]) for event in events} == {(True, "error")}
