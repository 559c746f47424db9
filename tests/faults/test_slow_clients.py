"""Rows 41 and 42: slow and stuck senders beside a good one, and endless bodies."""

import contextlib
import socket
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.website import Website, website
from tests.support.webhooks import webhook

STUCK = 200
MEGABYTE = b"x" * 2**20


def unfinished_head() -> bytes:
    """Begin a webhook's head, with a signature that could be one: anything else is refused before its body."""
    return (
        b"POST /webhooks/sync HTTP/1.1\r\nhost: mayfly\r\ncontent-type: application/json\r\n"
        b"sync-signature: t=%d,v1=%s\r\n" % (time.time(), b"0" * 64)
    )


@pytest.fixture
def site(starter: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Website]:  # noqa: ANN401
    """A web side of its own."""
    with website(starter, tmp_path_factory.mktemp("slow")) as site:
        yield site


@contextlib.contextmanager
def connections(site: Website, number: int) -> Iterator[list[socket.socket]]:
    """Open so many connections."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", site.port), timeout=5)) for _ in range(number)
        ]


def test_slow_senders_delay_no_other_and_are_disconnected_in_their_body(site: Website):
    """One that is stuck in its head is left to the reverse proxy: see ``deploy/test_proxy.py``."""
    head = unfinished_head() + b"content-length: 1000\r\n\r\n{"
    parts = [b"", b"POST /webhooks/sync HT", head, unfinished_head(), head]
    with connections(site, STUCK) as stuck:
        for index, connection in enumerate(stuck):
            connection.sendall(parts[index % len(parts)])
        in_body = {connection for index, connection in enumerate(stuck) if parts[index % len(parts)] is head}
        begun = time.monotonic()
        waits = []
        while in_body and time.monotonic() - begun < 30:
            sent_at = time.monotonic()
            sent = webhook()
            assert site.client.post("/webhooks/sync", content=sent.body, headers=sent.headers).status_code == 202
            waits.append(time.monotonic() - sent_at)
            in_body -= {connection for connection in in_body if is_closed(connection, drip=len(waits) % 2 == 0)}
            time.sleep(0.5)

    assert not in_body
    assert max(waits) < 1
    assert site.process.exit_code is None


def test_a_slow_body_is_answered_408_after_ten_seconds(site: Website):
    begun = time.monotonic()
    with connections(site, 1) as (connection,):
        connection.sendall(unfinished_head() + b"content-length: 1000\r\n\r\n")
        connection.settimeout(0.5)
        answer = b""
        while not answer and time.monotonic() - begun < 20:
            connection.send(b"x")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 9 < time.monotonic() - begun < 13


@pytest.mark.parametrize("is_chunked", [False, True], ids=["by length", "in chunks"])
def test_an_endless_body_is_answered_413_or_disconnected_without_using_memory(site: Website, *, is_chunked: bool):
    assert site.client.get("/health/live").status_code == 200
    before = site.process.resident_megabytes
    for _ in range(3):
        length = b"transfer-encoding: chunked" if is_chunked else b"content-length: 104857600"
        head = b"%b%b\r\n\r\n" % (unfinished_head(), length)
        piece = b"100000\r\n" + MEGABYTE + b"\r\n" if is_chunked else MEGABYTE
        with socket.create_connection(("127.0.0.1", site.port), timeout=5) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(head)
                for _ in range(100):
                    connection.sendall(piece)
            with contextlib.suppress(OSError):
                answer = connection.recv(64)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 413")

    assert site.process.resident_megabytes - before < 25
    assert site.count() == 0


def test_long_paths_are_414_and_memory_stays_flat(site: Website):
    assert site.client.get("/health/live").status_code == 200
    before = site.process.resident_megabytes
    # With one character that takes four bytes in memory, so do all others of its text.
    target = b"/api/records/%F0%9F%98%80" + b"x" * 60_000
    statuses = {site.raw(b"GET", target + b"%d" % number, b"", {}) for number in range(300)}

    assert statuses == {414}
    assert site.process.resident_megabytes - before < 10
    assert site.client.get("/api/records/" + "x" * 3000).status_code == 401


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """200 MB of zeros, packed: a body of a fifth of what a body may be."""
    packer = zlib.compressobj(wbits=31)  # a gzip stream
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(200)), packer.flush()])


def test_a_gzip_bomb_is_never_decompressed(site: Website, bomb: bytes):
    assert 100_000 < len(bomb) < 2**20
    assert site.client.get("/health/live").status_code == 200
    before = site.process.peak_megabytes
    for headers in (webhook(bomb).headers, webhook(b"{}").headers):  # signed over the compressed bytes, and over others
        begun = time.monotonic()
        answer = site.client.post("/webhooks/sync", content=bomb, headers=headers | {"content-encoding": "gzip"})

        assert answer.status_code in (400, 401, 415)
        assert time.monotonic() - begun < 1

    assert site.process.peak_megabytes - before < 10
    assert site.count() == 0


def is_closed(connection: socket.socket, *, drip: bool) -> bool:
    """Whether the other side has ended *connection*; a *drip* of one byte must not keep it open."""
    connection.settimeout(0)
    try:
        if drip:
            connection.send(b"x")
        while data := connection.recv(4096):
            if not data:
                break
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
