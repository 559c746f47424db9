"""Two api and three worker processes on one Redis and one PostgreSQL share the work; measured.

With ``-s`` the figures of deploy/README.md are printed. The processes are those of the image without the image, so that
nothing but the processor is between them.
"""

import asyncio
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import URL

from tests.bench.api import Api, api
from tests.bench.processes import PYTHON, python_module, running, wait_for, wait_for_file
from tests.bench.systems import Place, place, write_json
from tests.deploy.engine import wait_until
from tests.support.ports import free_port
from tests.support.postgres import NoPostgresError, postgres_server

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

MAYFLY = str(Path(PYTHON).with_name("mayfly"))
LEAD = timedelta(seconds=6)  # for the webhooks to be taken before the first record is due
# Slow enough that a worker waits for the API rather than for its processor, and no slower than an API across the world.
LATENCY_SECONDS = 0.3
CONNECTED = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@dataclass(frozen=True, slots=True)
class Stores:
    """One Redis, one PostgreSQL with the tables, synced at each commit, and a stand-in for the Sync API."""

    where: Place
    database: URL
    api: Api

    def environment(self, **more: str) -> dict[str, str]:
        """Return what each process is told; the budget of calls is lifted unless *more* sets one."""
        url = self.database.render_as_string(hide_password=False)
        return self.where.environment(self.api.url) | {"MAYFLY_DATABASE_URL": url} | more

    def ask(self, statement: str) -> list[Any]:
        """Return the rows of a statement."""

        async def ask() -> list[Any]:
            host = self.database.query["host"]
            connection = await asyncpg.connect(user="postgres", host=host, database=self.database.database)
            try:
                return list(await connection.fetch(statement))
            finally:
                await connection.close()

        return asyncio.run(ask())


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    """Start the stores and the stand-in."""
    try:
        with postgres_server() as server, place(tmp_path / "place") as where, api(tmp_path) as stand_in:
            started = Stores(where, asyncio.run(server.empty()), stand_in)
            subprocess.run([MAYFLY, "migrate"], env=started.environment(), check=True, capture_output=True)
            yield started
    except NoPostgresError as missing:
        pytest.skip(str(missing))


@contextmanager
def _webs(stores: Stores, number: int) -> Iterator[list[str]]:
    """Run so many api processes and yield where each takes webhooks."""
    with ExitStack() as stack:
        urls = []
        for _ in range(number):
            port = free_port()
            environment, log = stores.environment(MAYFLY_PORT=str(port)), stores.where.folder / f"api-{port}.log"
            process = stack.enter_context(running([MAYFLY, "api"], log=log, environment=environment))
            wait_for(f"http://127.0.0.1:{port}/health/ready", process)
            urls.append(f"http://127.0.0.1:{port}/webhooks/sync")
        yield urls


@contextmanager
def _workers(stores: Stores, number: int, **more: str) -> Iterator[None]:
    """Run so many worker processes."""
    with ExitStack() as stack:
        for _ in range(number):
            folder = stores.where.folder / f"worker-{time.monotonic_ns()}"
            environment = stores.environment(MAYFLY_DATA_DIR=str(folder), MAYFLY_PORT="0", **more)
            log = folder.with_suffix(".log")
            process = stack.enter_context(running([MAYFLY, "worker"], log=log, environment=environment))
            wait_for_file(folder / "worker.alive", process)
        yield


@contextmanager
def _most_connections(stores: Stores) -> Iterator[list[int]]:
    """Yield a list that has the highest number of connections to PostgreSQL in it when the block has ended."""
    most, is_over = [0], threading.Event()

    def look() -> None:
        while not is_over.wait(0.5):
            most[0] = max(most[0], stores.ask(CONNECTED)[0][0])

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield most
    finally:
        is_over.set()
        looker.join()


def _offer(urls: Sequence[str], *options: str) -> list[dict[str, Any]]:
    """Have a load generator for each of *urls* offer webhooks at the same time, and return what each saw."""
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda url: python_module("tests.bench.load", url, *options), urls))
    assert all(result["errors"] == 0 for result in results), results
    return results


@dataclass(frozen=True, slots=True)
class Drained:
    """How fast records that fell due at once were deleted, and by whom."""

    rate: float  # deletions a second
    shares: list[float]  # of each worker, as a part of what each would have if all had the same
    connections: int


def _drain(stores: Stores, workers: int, count: int, **more: str) -> Drained:
    """Announce *count* generations to two api, half to each, and let *workers* delete them."""
    ids, start = stores.api.add(count), datetime.now(UTC)
    with _webs(stores, 2) as urls, _workers(stores, workers, **more), _most_connections(stores) as connections:
        due = datetime.now(UTC) + LEAD
        webhook_url = f"https://hooks.example.com/webhooks/sync?expires={due:%Y-%m-%dT%H:%M:%S.%f}Z"
        with ThreadPoolExecutor() as threads:
            halves = [ids[number::2] for number in range(2)]
            files = [
                write_json(stores.where.folder / f"wanted-{number}.json", [(id_, webhook_url) for id_ in half])
                for number, half in enumerate(halves)
            ]
            list(threads.map(lambda url, file: _offer([url], "--wanted", str(file), "--seconds", "60"), urls, files))
        wait_until(lambda: set(ids) <= stores.api.deletes().keys(), seconds=180, every=1, what="all are deleted")
        deletes = [at for id_, at in stores.api.deletes().items() if id_ in set(ids)]
        done = "SELECT count(*) FROM records WHERE state <> 'deleted'"
        wait_until(lambda: stores.ask(done)[0][0] == 0, seconds=60, what="all records say deleted")
    assert min(deletes) >= due
    rows = stores.ask(f"SELECT actor FROM events WHERE move = 'confirm' AND at >= '{start.isoformat()}'")  # noqa: S608
    by_worker = Counter(row["actor"] for row in rows)
    assert by_worker.total() == count, "a generation was confirmed twice"
    shares = sorted(number * workers / count for number in by_worker.values())
    return Drained((count - 1) / (max(deletes) - min(deletes)).total_seconds(), shares, connections[0])


def test_two_api_and_three_workers_share_the_work_and_do_more_than_one(stores: Stores) -> None:
    stores.api.set_latency(LATENCY_SECONDS)

    one = _drain(stores, workers=1, count=800)
    three = _drain(stores, workers=3, count=2400)

    print(f"\nat {LATENCY_SECONDS} s a call: 1 worker {one.rate:.0f} deletions/s, 3 workers {three.rate:.0f}")
    print("shares of the mean:", *(f"{share:.2f}" for share in three.shares))
    print("connections to PostgreSQL of 2 api and 3 workers, at most:", three.connections)
    assert len(three.shares) == 3
    assert three.shares[0] > 0.75
    assert three.shares[-1] < 1.33
    assert three.rate > 1.5 * one.rate  # 2.9 where nothing else runs
    assert three.connections <= 5 * 15


def test_more_workers_neither_add_to_a_budget_nor_waste_it(stores: Stores) -> None:
    rate = "6000/minute"  # 100 calls a second, which is 50 deletions

    one = _drain(stores, workers=1, count=600, MAYFLY_API_RATE=rate)
    three = _drain(stores, workers=3, count=600, MAYFLY_API_RATE=rate)

    print(f"\nat {rate}: 1 worker {one.rate:.1f} deletions/s, 3 workers {three.rate:.1f}")
    print("shares of the mean:", *(f"{share:.2f}" for share in three.shares))
    # Not who had how many: the calls of a second go to whoever asks first.
    assert 0.9 < three.rate / one.rate < 1.1


def test_one_api_and_two_store_every_webhook_that_they_answer(stores: Stores) -> None:
    stored = 0
    for number in (1, 2):
        with _webs(stores, number) as urls, _most_connections(stores) as connections:
            warm = _offer(urls, "--connections", "8", "--seconds", "1")  # what is only slow the first time
            results = _offer(urls, "--connections", "32", "--seconds", "5", "--count", "40000")
        rate, slowest = sum(result["rate"] for result in results), max(result["p99_ms"] for result in results)
        print(f"\n{number} api: {rate:.0f} webhooks/s, p99 {slowest:.0f} ms, {connections[0]} connections")
        stored += sum(result["statuses"]["202"] for result in warm + results)

    assert stores.ask("SELECT count(*) FROM records")[0][0] == stored


def test_workers_delete_each_generation_once_however_fast_the_api_is(stores: Stores) -> None:
    one = _drain(stores, workers=1, count=2000)
    three = _drain(stores, workers=3, count=3000)

    print(f"\nanswered at once: 1 worker {one.rate:.0f} deletions/s, 3 workers {three.rate:.0f}")
    calls = stores.api._ask("GET", "summary")["calls"]
    assert {name: number for name, number in calls.items() if name.startswith("DELETE")} == {"DELETE 200": 5000}
