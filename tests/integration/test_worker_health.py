"""A worker by itself: its health and its metrics on a port of its own, and the end of that port."""

import asyncio
import os
import signal
import socket
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import httpx
import pytest
from sqlalchemy import URL

from service.core.secret import Secret
from service.jobs import connection
from service.ledger import pausing
from service.ledger.opening import open_database
from service.ledger.pausing import Kind, Pause
from service.web.app import make_worker_app
from service.web.server import serving
from tests.conftest import http_client
from tests.support.ledger import HOUR, claim_one, given_up, settle, store, utc_now
from tests.support.metrics import numbers_of
from tests.support.ports import free_port
from tests.support.waiting import eventually
from tests.support.webhooks import webhook


@pytest.fixture
def open_worker(settings, pool, metrics):
    """Serve what a worker by itself serves: ``async with open_worker(database) as client``."""

    @asynccontextmanager
    async def open_(database, queue=pool, **environment):
        app = make_worker_app(settings(**environment), database, queue, metrics)
        async with serving(app, "127.0.0.1", 0) as port, http_client(f"http://127.0.0.1:{port}") as client:
            yield client

    return open_


def go_round(metrics, *, ago=timedelta(0), account="default"):
    """Have the loop of *account* begin a round so long *ago*."""
    metrics.worker_round_seconds.labels(account).set((datetime.now(UTC) - ago).timestamp())


async def test_a_worker_is_live_while_its_loop_goes_round(sqlite_database, open_worker, metrics):
    async with open_worker(sqlite_database) as client:
        before = await client.get("/health/live")
        go_round(metrics)
        during = await client.get("/health/live")
        go_round(metrics, ago=timedelta(seconds=61))
        stuck = await client.get("/health/live")
        not_ready = await client.get("/health/ready")

    assert [answer.status_code for answer in (before, during, stuck, not_ready)] == [503, 200, 503, 503]
    assert before.json()["parts"]["worker"]["detail"] == "its loop has not begun yet"
    assert "not gone round for 61 s" in stuck.json()["parts"]["worker"]["detail"]


async def test_the_loop_of_each_account_must_go_round(sqlite_database, open_worker, metrics):
    go_round(metrics)
    go_round(metrics, account="another", ago=timedelta(seconds=90))
    async with open_worker(sqlite_database) as client:
        answer = await client.get("/health/live")

    assert answer.status_code == 503
    assert "not gone round for 90 s" in answer.json()["parts"]["worker"]["detail"]


async def test_a_worker_is_ready_while_all_it_needs_answers(database, open_worker, metrics):
    go_round(metrics)
    async with open_worker(database) as client:
        answer = await client.get("/health/ready")

    parts = ("ledger", "redis", "deletions", "worker")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "parts": {name: {"status": "ok"} for name in parts}}


async def test_a_pause_and_an_unreachable_redis_degrade_a_worker(sqlite_database, open_worker, metrics, tmp_path):
    go_round(metrics)
    nowhere = connection.connect(Secret(f"unix://{tmp_path}/none.sock"), retries=0)
    pause = Pause(Kind.OPERATOR, utc_now(), "an operator", "moving house", None)
    await sqlite_database.write(partial(pausing.pause, wanted=pause))
    async with open_worker(sqlite_database, nowhere) as client:
        answer = await client.get("/health/ready")
    await nowhere.aclose(close_connection_pool=True)

    found = answer.json()
    assert (answer.status_code, found["status"]) == (200, "degraded")
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        "ledger": "ok",
        "redis": "failing",
        "deletions": "paused",
        "worker": "ok",
    }
    assert "moving house" in found["parts"]["deletions"]["detail"]


async def test_a_worker_without_its_ledger_is_not_ready_and_live(open_worker, metrics):
    go_round(metrics)
    url = URL.create("postgresql", "mayfly", "verysecret", "127.0.0.1", 1, "mayfly")
    async with open_database(url) as database, open_worker(database) as client:
        live, ready = await client.get("/health/live"), await client.get("/health/ready")
        numbers = await numbers_of(client)

    assert (live.status_code, ready.status_code) == (200, 503)
    assert ready.json()["parts"]["ledger"]["status"] == "failing"
    assert "verysecret" not in ready.text
    assert numbers["mayfly_ledger_up",] == 0


async def test_a_worker_shows_the_numbers_of_the_ledger(database, open_worker):
    await store(database)
    await settle(database, given_up(await claim_one(database)))
    await store(database, due_in=-HOUR)
    async with open_worker(database) as client:
        numbers = await numbers_of(client)

    assert (numbers["mayfly_failed_records",], numbers["mayfly_due_records",]) == (1, 1)
    assert 3590 < numbers["mayfly_oldest_overdue_seconds",] < 3700
    assert numbers["mayfly_ledger_up",] == 1


async def test_a_worker_serves_nothing_else(sqlite_database, open_worker):
    sent = webhook()
    async with open_worker(sqlite_database) as client:
        posted = await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
        others = [await client.get(path) for path in ("/", "/api/records", "/api/stats", "/schema", "/nowhere")]

    assert {answer.status_code for answer in (posted, *others)} == {404}
    assert {answer.headers["x-content-type-options"] for answer in (posted, *others)} == {"nosniff"}


# The process


async def test_a_worker_process_serves_its_health_and_counts_what_it_deletes(mayfly, simulator, sqlite_url):
    where = {"MAYFLY_DATABASE_URL": f"sqlite:///{sqlite_url.database}", "SYNC_BASE_URL": simulator.url}
    generation = simulator.add()
    async with open_database(sqlite_url) as database:
        await store(database, id=generation.id)
    worker = await mayfly("worker", **where, SYNC_WEBHOOK_SECRET="").start()
    port = (await worker.wait_for_log("worker.listening"))["port"]
    await worker.wait_for_log("cleanup.confirmed")
    async with http_client(f"http://127.0.0.1:{port}") as client:

        async def well():
            answers = [await client.get(f"/health/{name}") for name in ("live", "ready")]
            return answers if {answer.status_code for answer in answers} == {200} else None

        live, ready = await eventually(well)
        numbers = await numbers_of(client)

    assert live.json() == {"status": "ok", "parts": {"worker": {"status": "ok"}}}
    assert ready.json()["parts"]["worker"] == {"status": "ok"}
    assert numbers["mayfly_settlements_total", "deleted"] == numbers["mayfly_attempts_total", "done"] == 1
    assert numbers["mayfly_deletion_lag_seconds_count",] == 1
    assert numbers["mayfly_running", "worker"] == 1
    assert ("mayfly_running", "web") not in numbers
    assert time.time() - numbers["mayfly_worker_round_timestamp_seconds", "default"] < 30


async def test_the_port_of_a_worker_ends_with_it_and_delays_no_stop(mayfly, simulator):
    worker = await mayfly("worker", SYNC_BASE_URL=simulator.url).start()
    port = (await worker.wait_for_log("worker.listening"))["port"]
    # One client that never ends its request, one that keeps its connection.
    half = socket.create_connection(("127.0.0.1", port))
    half.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
    kept = socket.create_connection(("127.0.0.1", port))
    kept.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.sleep(0.3)
    begun = time.monotonic()
    code = await worker.terminate()
    took = time.monotonic() - begun
    half.close()
    kept.close()

    assert code == 0
    assert took < 8
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


async def test_a_frozen_worker_gives_no_answer(mayfly, simulator):
    worker = await mayfly("worker", SYNC_BASE_URL=simulator.url).start()
    port = (await worker.wait_for_log("worker.listening"))["port"]
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=1) as client:
            with pytest.raises(httpx.TimeoutException):
                await client.get(f"http://127.0.0.1:{port}/health/live")
    finally:
        os.kill(worker.pid, signal.SIGCONT)


async def test_a_second_worker_on_the_same_port_is_refused_in_one_sentence(mayfly, simulator):
    chosen = free_port()
    worker = await mayfly("worker", SYNC_BASE_URL=simulator.url, MAYFLY_PORT=str(chosen)).start()
    taken = mayfly("worker", SYNC_BASE_URL=simulator.url, MAYFLY_PORT=str(chosen))
    taken.spawn()
    code = await taken.wait()

    assert (await worker.wait_for_log("worker.listening"))["port"] == chosen
    assert code == 1
    assert taken.output().splitlines()[-1].startswith(f"mayfly: cannot listen on 127.0.0.1 port {chosen}: ")
