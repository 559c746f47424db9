"""The fixtures: a real Redis, both databases, the web application on a socket, the simulator of the Sync API.

Only the fixtures that need the web framework load it: the unit tests take less time than loading it.
"""

import shutil
import signal
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import redis.asyncio as redis
from arq.connections import ArqRedis
from sqlalchemy import URL

from service.config.settings import Settings, read_settings
from service.core.secret import Secret
from service.jobs import connection
from service.ledger import migrating
from service.ledger.database import Database
from service.ledger.opening import open_database
from service.runtime.metrics import Metrics
from tests.support.postgres import NoPostgresError, Postgres, postgres_server
from tests.support.process import Mayfly
from tests.support.redis import redis_server
from tests.support.webhooks import SECRET

if TYPE_CHECKING:
    from service.simulator import Simulator

API_KEY = "sk-sim"
API_TOKEN = "operator-token-of-the-tests"

ReadSettings = Callable[..., Settings]
OpenClient = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


def pytest_configure() -> None:
    """End at SIGTERM as at Ctrl-C, so that the servers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


@pytest.fixture(scope="session")
def _redis() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="mayfly-redis-"))  # short, for the socket's path
    try:
        with redis_server(folder) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def redis_url(_redis: str) -> str:
    """The URL of a real Redis, empty."""
    async with redis.Redis.from_url(_redis) as client:
        await client.flushall()
    return _redis


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[ArqRedis]:
    """The queue, as web and worker open it."""
    pool = connection.connect(Secret(redis_url), retries=1)
    yield pool
    await pool.aclose(close_connection_pool=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL that runs as long as the tests."""
    try:
        with postgres_server() as server:
            yield server
    except NoPostgresError as error:
        pytest.skip(str(error))


@pytest.fixture
async def postgres_url(postgres: Postgres) -> URL:
    """A migrated PostgreSQL database, empty."""
    return await postgres.migrated()


@pytest.fixture
async def latin_url(postgres: Postgres) -> AsyncIterator[URL]:
    """A PostgreSQL database that cannot store every character."""
    url = await postgres.empty("ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    yield url
    await postgres.drop(url)


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sqlite") / "migrated.db"


@pytest.fixture
async def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> URL:
    """A fresh, migrated SQLite file."""
    if not _sqlite_template.exists():  # noqa: ASYNC240 - a test may block
        async with open_database(URL.create("sqlite", database=str(_sqlite_template))) as database:
            await database.write(migrating.migrate)
    path = tmp_path / "ledger.db"
    shutil.copy(_sqlite_template, path)
    return URL.create("sqlite", database=str(path))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> URL:
    """A fresh, migrated database: the test runs once on each kind."""
    url: URL = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture
async def database(database_url: URL) -> AsyncIterator[Database]:
    """The ledger's database, migrated and empty: the test runs once on each kind."""
    async with open_database(database_url) as database:
        yield database


@pytest.fixture
async def sqlite_database(sqlite_url: URL) -> AsyncIterator[Database]:
    """The same on SQLite only, for tests that do not depend on the database."""
    async with open_database(sqlite_url) as database:
        yield database


@pytest.fixture
def settings(tmp_path: Path) -> ReadSettings:
    """Read settings as from an environment: ``settings(MAYFLY_TTL="90s")``; what must be set is."""

    def read(**environment: str) -> Settings:
        defaults = {
            "SYNC_API_KEY": API_KEY,
            "SYNC_WEBHOOK_SECRET": SECRET,
            "MAYFLY_API_TOKEN": API_TOKEN,
            "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        }
        return read_settings(defaults | environment)

    return read


@pytest.fixture
async def simulator() -> AsyncIterator["Simulator"]:
    """The simulator of the Sync API, on a socket."""
    from service.simulator import Simulator

    simulator = Simulator(api_key=API_KEY, webhook_secret=SECRET, seed=0)
    async with simulator.serve():
        yield simulator


@pytest.fixture
def metrics() -> Metrics:
    """The counters of one process."""
    return Metrics()


@pytest.fixture
def open_client(settings: ReadSettings, pool: ArqRedis, metrics: Metrics) -> OpenClient:
    """Serve the web application and yield a client of it: ``async with open_client(database, MAYFLY_TTL="7d")``."""
    from service.web.app import make_app
    from service.web.server import serving

    @asynccontextmanager
    async def open_(
        database: Database, *, now: Callable[[], datetime] = lambda: datetime.now(UTC), **environment: str
    ) -> AsyncIterator[httpx.AsyncClient]:
        app = make_app(settings(**environment), database, pool, metrics, now=now)
        async with serving(app, "127.0.0.1", 0) as port, http_client(f"http://127.0.0.1:{port}") as client:
            yield client

    return open_


@pytest.fixture
async def app_client(database: Database, open_client: OpenClient) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the web application: the test runs once on each kind of database."""
    async with open_client(database) as client:
        yield client


@pytest.fixture
def mayfly(tmp_path: Path) -> Iterator[Callable[..., Mayfly]]:
    """Make a mayfly process: ``await mayfly("up", MAYFLY_TTL="1s").start()``; all are ended with the test."""
    made: list[Mayfly] = []

    def make(command: str = "up", **environment: str) -> Mayfly:
        defaults = {
            "SYNC_API_KEY": API_KEY,
            "SYNC_WEBHOOK_SECRET": SECRET,
            "MAYFLY_API_TOKEN": API_TOKEN,
            "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        }
        made.append(Mayfly(command, tmp_path, defaults | environment))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def http_client(url: str) -> httpx.AsyncClient:
    """Return a client that uses no proxy and reads no certificates, which would take 60 ms."""
    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.AsyncClient(base_url=url, verify=no_tls, trust_env=False, timeout=10)
