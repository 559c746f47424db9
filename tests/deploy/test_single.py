"""The single node: one container, one volume, embedded SQLite and Redis."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.engine import Engine, EngineMissingError, Image, wait_until
from tests.deploy.stack import Stack, running

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

COUNT = "SELECT state, count(*) FROM records GROUP BY state"
LEDGER = "/data/mayfly/ledger.db"


@pytest.fixture(scope="module")
def stack(engine: Engine, image: Image, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Bring up deploy/compose.single.yaml with a simulator beside it, and take it down with its volume."""
    assert image.tag
    beside = root / "tests" / "deploy" / "compose.simulator.single.yaml"
    try:
        with running(engine, root, tmp_path_factory.mktemp("single"), ["compose.single.yaml"], beside) as stack:
            stack.wait_until_simulated()
            stack.wait_until_ready()
            yield stack
    except EngineMissingError as missing:
        pytest.skip(str(missing))


def _query(stack: Stack, statement: str) -> list[list[object]]:
    connect = "sqlite3.connect(sys.argv[1], isolation_level=None)"
    script = f"import json, sqlite3, sys; print(json.dumps({connect}.execute(sys.argv[2]).fetchall()))"
    rows: list[list[object]] = json.loads(stack.execute("mayfly", "python", "-c", script, LEDGER, statement))
    return rows


def test_a_signed_webhook_leads_to_a_deletion(stack: Stack) -> None:
    accepted = stack.accept(1)

    deleted = stack.wait_until_deleted(accepted, seconds=30)

    assert deleted[accepted[0].id] >= accepted[0].due_at.timestamp()


def test_kill_9_loses_nothing(stack: Stack) -> None:
    accepted = stack.accept(40)

    stack.engine.kill(stack.container("mayfly"))
    deleted = stack.wait_until_deleted(accepted, seconds=120)

    assert all(deleted[item.id] >= item.due_at.timestamp() for item in accepted)
    wait_until(lambda: [state for state, _ in _query(stack, COUNT)] == ["deleted"], seconds=90, what="all are deleted")


def test_a_backup_taken_from_the_running_service_brings_back_every_record(stack: Stack) -> None:
    accepted = stack.accept(3)
    stack.wait_until_deleted(accepted, seconds=60)
    wait_until(lambda: [state for state, _ in _query(stack, COUNT)] == ["deleted"], seconds=60, what="all are deleted")
    before = _query(stack, "SELECT * FROM records ORDER BY seq")
    name = stack.container("mayfly")

    # As in deploy/README.md.
    vacuum = "import sqlite3; sqlite3.connect('/data/mayfly/ledger.db').execute(\"VACUUM INTO '/data/backup.db'\")"
    stack.execute("mayfly", "python", "-c", vacuum)
    _query(stack, "DELETE FROM records")
    stack.engine.run("stop", "--time", "30", name)
    volume = stack.engine.inspect(name)["Mounts"][0]["Name"]
    restore = "cd /data && rm -f mayfly/ledger.db-wal mayfly/ledger.db-shm && mv backup.db mayfly/ledger.db"
    options = ("run", "--rm", "--pull=never", "--volume", f"{volume}:/data", "--entrypoint", "sh")
    stack.engine.run(*options, stack.engine.inspect(name)["ImageName"], "-c", restore)
    stack.engine.run("start", name)
    stack.wait_until_ready()

    assert _query(stack, "SELECT * FROM records ORDER BY seq") == before
    later = stack.accept(1)
    stack.wait_until_deleted(later, seconds=60)
