"""The single node: one container, one volume, embedded SQLite and Redis."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.documented import block_with, line_with
from tests.deploy.engine import Engine, EngineMissingError, Image, wait_until
from tests.deploy.stack import Stack, running
from tests.support.readme import README, code_with

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

COUNT = "SELECT state, count(*) FROM records GROUP BY state"
EVERYTHING = "SELECT * FROM records ORDER BY seq"
DRY_RUN_ERROR = "dry run: it would have been deleted"
LEDGER = "/data/mayfly/ledger.db"


@pytest.fixture(scope="module")
def stack(engine: Engine, image: Image, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Bring up deploy/compose.single.yaml with a simulator beside it, and take it down with its volume."""
    assert image.tag
    beside = root / "tests" / "deploy" / "compose.simulator.single.yaml"
    try:
        # The port is the compose file's own to decide.
        work, more = tmp_path_factory.mktemp("single"), "MAYFLY_HOST=127.0.0.1\nMAYFLY_PORT=9\n"
        with running(engine, root, work, "compose.single.yaml", beside, more=more, is_dry_run=True) as stack:
            stack.wait_until_simulated()
            stack.wait_until_ready()
            _assert_nothing_is_deleted_until_the_dry_run_ends(stack)
            yield stack
    except EngineMissingError as missing:
        pytest.skip(str(missing))


def _assert_nothing_is_deleted_until_the_dry_run_ends(stack: Stack) -> None:
    """Take the README's steps with Docker: look at the dry run, end it, and have what waited deleted."""
    _, up, doctor = code_with(README, "sh", "compose.single.yaml").splitlines()
    command = doctor.removesuffix("doctor")
    accepted = stack.accept(1)

    said = stack.run(doctor, seconds=60)
    wait_until(
        lambda: DRY_RUN_ERROR in stack.run(f"{command} records list", seconds=60),
        seconds=60,
        what="the dry run has run",
    )
    deleted = stack.deleted()
    # podman-compose does not notice a changed .env, as docker compose does.
    stack.run(f"sed -i /^MAYFLY_DRY_RUN=/d deploy/.env\n{up} --force-recreate mayfly", seconds=300)
    stack.wait_until_ready()
    stack.wait_until_deleted(accepted, seconds=60)

    assert "MAYFLY_DRY_RUN is on" in said
    assert deleted == {}


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


def test_a_restored_backup_deletes_nothing_that_was_held_since(stack: Stack, root: Path) -> None:
    gone = stack.accept(3)
    stack.wait_until_deleted(gone, seconds=60)
    wait_until(lambda: [state for state, _ in _query(stack, COUNT)] == ["deleted"], seconds=60, what="all are deleted")
    (held,) = stack.accept(1, query="ttl=30s")
    hold = line_with(root, "compose.single.yaml", "records hold").replace(" ID ", f" {held.id} ")
    backup = block_with(root, "compose.single.yaml", "cat backup.db")

    stack.run(backup, seconds=60)
    stack.run(backup, seconds=60)  # as on every other day
    before = _query(stack, EVERYTHING)
    stack.run(hold, seconds=60)
    _lose_the_volume(stack)
    stack.run(block_with(root, "compose.single.yaml", "restored.db"), seconds=240)
    stack.wait_until_ready()
    # Time enough for the worker, which runs, to delete what is due.
    time.sleep(max(0.0, held.due_at.timestamp() - time.time()) + 7)
    restored = _query(stack, EVERYTHING)
    stack.run(hold, seconds=60)
    stack.run(line_with(root, "compose.single.yaml", "mayfly resume"), seconds=60)
    later = stack.accept(1)
    stack.wait_until_deleted(later, seconds=60)

    assert restored == before
    assert held.id not in stack.deleted()
    stack.run(hold.replace(" hold ", " release --yes "), seconds=60)
    stack.wait_until_deleted([held], seconds=60)


def _lose_the_volume(stack: Stack) -> None:
    name = stack.container("mayfly")
    volume = stack.engine.inspect(name)["Mounts"][0]["Name"]
    stack.engine.run("rm", "--force", "--time", "5", name)
    stack.engine.run("volume", "rm", volume)
