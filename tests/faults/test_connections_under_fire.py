"""Thousands of connections, open at once or one after the other: a webhook is still answered, memory stays level.

``FIRE_CONNECTIONS`` says how many short ones there are; ``make fire`` takes 120 000.
"""

import contextlib
import multiprocessing
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.processes import ProcessStarter
from tests.faults.website import Website, website
from tests.support.webhooks import webhook

OPEN = 4000
BEYOND = 4600  # more than the server has files for: see MAX_CONCURRENT in service/web/server.py
SHORT = int(os.environ.get("FIRE_CONNECTIONS", "12000"))
CLIENTS = 2
# The allocator keeps some of what it had in use at the most; what is not given back for each connection would add up.
MAX_GROWTH_MEGABYTES = 6
ANSWER_SECONDS = 3  # a webhook takes some 5 ms on an idle machine, and three tests run at once

GET = b"GET /health/live HTTP/1.1\r\nHost: mayfly\r\nConnection: close\r\n\r\n"
UNSIGNED = b"POST /webhooks/sync HTTP/1.1\r\nHost: mayfly\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
HALF_A_HEAD = b"POST /webhooks/sync HTTP/1.1\r\nHost: mayfly\r\nX-A: " + b"a" * 200
NO_HTTP = b"\x16\x03\x01\x02\x00\x01\r\n\r\n"
# What a short connection sends, and whether it waits for the answer.
SENT = ((GET, True), (UNSIGNED, True), (NO_HTTP, True), (b"", False), (HALF_A_HEAD, False), (GET * 3, False))


@pytest.fixture
def site(starter: ProcessStarter, tmp_path: Path) -> Iterator[Website]:
    """A web side of its own."""
    with website(starter, tmp_path) as site:
        yield site


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """Raise the number of files that this process may open, as ``ulimit -n`` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < BEYOND + 500:
        pytest.skip(f"the hard limit of open files is {hard}: ulimit -Hn {BEYOND + 500}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (BEYOND + 500, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def connections(site: Website, number: int, data: bytes = b"") -> Iterator[None]:
    """Keep so many connections open, each of which has sent *data*."""
    opened: list[socket.socket] = []
    try:
        for _ in range(number):
            opened.append(socket.create_connection(("127.0.0.1", site.port), timeout=10))
            opened[-1].sendall(data)
        yield
    finally:
        for one in opened:
            one.close()


def answer_time(site: Website) -> float:
    """Send a webhook on a connection of its own, which must be answered 202; return the seconds."""
    sent, begun = webhook(), time.monotonic()
    answer = site.client.post("/webhooks/sync", content=sent.body, headers=sent.headers | {"Connection": "close"})
    assert answer.status_code == 202
    return time.monotonic() - begun


def wait_for_files(site: Website, number: int) -> None:
    """Wait until the process has no more than so many files open."""
    deadline = time.monotonic() + 20
    while (now := psutil.Process(site.process.pid).num_fds()) > number:
        assert time.monotonic() < deadline, f"{now} files are open"
        time.sleep(0.1)


def test_with_four_thousand_open_connections_a_webhook_is_answered(site: Website):
    answer_time(site)
    files = psutil.Process(site.process.pid).num_fds()
    waits, levels = [], []
    for data in (HALF_A_HEAD, b"", HALF_A_HEAD):
        with connections(site, OPEN, data):
            waits += [answer_time(site) for _ in range(10)]
            assert psutil.Process(site.process.pid).num_fds() >= files + OPEN
            levels.append(site.process.resident_megabytes)
        wait_for_files(site, files + 2)

    assert max(waits) < ANSWER_SECONDS
    assert levels[-1] - levels[0] < MAX_GROWTH_MEGABYTES
    assert site.process.exit_code is None


def test_beyond_the_limit_of_connections_a_request_is_503_at_once_and_then_served(site: Website):
    answer_time(site)
    size = site.process.log.stat().st_size
    sent = webhook()
    with connections(site, BEYOND):
        begun = time.monotonic()
        answer = site.client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
        took = time.monotonic() - begun
        time.sleep(1)  # a server that is out of files could fill the log
        grown = site.process.log.stat().st_size - size

    assert (answer.status_code, took < ANSWER_SECONDS) == (503, True)
    assert site.count(sent.id) == 0
    assert grown < 1000
    site.client.close()
    wait_for_files(site, 300)
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
        connection.sendall(GET)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def connect_often(port: int, number: int) -> None:
    """Open *number* connections one after the other; each sends something and ends with a FIN or a reset."""
    for index in range(number):
        data, is_waiting = SENT[index % len(SENT)]
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, contextlib.suppress(OSError):
            if not is_waiting and index % 4 < 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(data)
            while is_waiting and connection.recv(4096):
                pass


def connect_from_all_clients(site: Website, number: int) -> list[float]:
    """Open *number* short connections from CLIENTS processes; return how long webhooks took meanwhile."""
    context = multiprocessing.get_context("spawn")
    clients = [context.Process(target=connect_often, args=(site.port, number // CLIENTS)) for _ in range(CLIENTS)]
    waits = []
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients):
        waits.append(answer_time(site))
        time.sleep(0.2)
    for client in clients:
        client.join()
        assert client.exitcode == 0
    return waits


@pytest.mark.timeout(600)
def test_memory_is_level_after_thousands_of_short_connections(site: Website):
    connect_from_all_clients(site, SHORT // 4)  # to warm up
    level, files = site.process.resident_megabytes, psutil.Process(site.process.pid).num_fds()
    begun = time.monotonic()
    waits = connect_from_all_clients(site, SHORT)
    took = time.monotonic() - begun
    growth = site.process.resident_megabytes - level

    print(f"{SHORT} connections, {SHORT / took:.0f} a second; {level:.1f} MB before, {growth:+.1f} MB")
    assert growth < MAX_GROWTH_MEGABYTES
    assert max(waits) < ANSWER_SECONDS
    wait_for_files(site, files + 2)
    assert site.process.exit_code is None
