"""The compose stack, started as the README says: each webhook leads to a deletion, whatever is killed meanwhile."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from tests.deploy.documented import block_with, line_with
from tests.deploy.engine import Engine, EngineMissingError, Image, wait_until
from tests.deploy.kubernetes import documents
from tests.deploy.stack import API_KEY, API_TOKEN, WEBHOOK_SECRET, Accepted, Stack, running

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

# A worker that was killed holds its records for the length of a lease, 60 s.
HEALED_SECONDS = 120
SERVICES = ("api", "worker", "redis", "postgres")
PSQL = ("psql", "--username", "mayfly", "--no-align", "--tuples-only")
# What is the compose file's own to decide, so that none of it may have an effect.
OVERRULED = """MAYFLY_HOST=127.0.0.1
MAYFLY_PORT=9
MAYFLY_DATA_DIR=/nowhere
MAYFLY_DATABASE_URL=postgresql://nobody@nowhere/nothing
MAYFLY_REDIS_URL=redis://nowhere:6379/0
"""


@pytest.fixture(scope="module")
def stack(engine: Engine, image: Image, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Bring up deploy/compose.yaml with a simulator beside it, and take it down with its volumes."""
    assert image.tag
    try:
        engine.have("redis:7-alpine", "postgres:16")
        beside = root / "tests" / "deploy" / "compose.simulator.yaml"
        work, more = tmp_path_factory.mktemp("compose"), f"{OVERRULED}MAYFLY_API_TOKEN={API_TOKEN}\n"
        with running(engine, root, work, "compose.yaml", beside, more=more) as stack:
            stack.wait_until_simulated()
            stack.wait_until_ready(seconds=90)
            yield stack
    except EngineMissingError as missing:
        pytest.skip(str(missing))


def _assert_none_was_early(accepted: Sequence[Accepted], deleted: dict[str, float]) -> None:
    for item in accepted:
        assert deleted[item.id] >= item.due_at.timestamp(), item.id


def _states(stack: Stack) -> dict[str, int]:
    rows = stack.execute("postgres", *PSQL, "--command", "SELECT state, count(*) FROM records GROUP BY state")
    return {state: int(count) for state, count in (line.split("|") for line in rows.split())}


def test_a_signed_webhook_leads_to_a_deletion(stack: Stack) -> None:
    accepted = stack.accept(1)

    deleted = stack.wait_until_deleted(accepted, seconds=30)

    _assert_none_was_early(accepted, deleted)
    assert stack.announce(accepted[0].id, secret="whsec_of_another_account").status_code == 401


def test_the_migration_ended_well(stack: Stack) -> None:
    state = stack.engine.inspect(stack.container("migrate"))["State"]

    assert (state["Running"], state["ExitCode"]) == (False, 0)


def test_nothing_is_published_but_the_api_on_loopback(stack: Stack) -> None:
    published = {}
    for service in ("migrate", "api", "worker", "redis", "postgres"):
        bindings = stack.engine.inspect(stack.container(service))["HostConfig"]["PortBindings"]
        published[service] = [where["HostIp"] for places in bindings.values() for where in places or ()]

    assert published == {"migrate": [], "api": ["127.0.0.1"], "worker": [], "redis": [], "postgres": []}


def test_each_role_has_the_secrets_it_needs_and_no_other(stack: Stack) -> None:
    secrets = ("SYNC_API_KEY", "SYNC_WEBHOOK_SECRET", "MAYFLY_API_TOKEN")
    given = {}
    for service in ("api", "worker"):
        lines = stack.execute(service, "env").splitlines()
        variables = {name: value for name, _, value in (line.partition("=") for line in lines)}
        given[service] = {name: variables[name] for name in secrets if variables[name]}

    assert given["api"] == {"SYNC_WEBHOOK_SECRET": WEBHOOK_SECRET, "MAYFLY_API_TOKEN": API_TOKEN}
    assert given["worker"] == {"SYNC_API_KEY": API_KEY}


def test_api_and_worker_have_memory_limits_and_every_log_has_one(stack: Stack) -> None:
    found = {service: stack.engine.inspect(stack.container(service))["HostConfig"] for service in SERVICES}

    assert {name for name, host in found.items() if host["Memory"]} == {"api", "worker"}
    assert {host["LogConfig"]["Size"] for host in found.values()} == {"10MB"}


def test_every_container_is_restricted(stack: Stack) -> None:
    for service in SERVICES:
        found = stack.engine.inspect(stack.container(service))
        status = stack.execute(service, "cat", "/proc/1/status")

        assert found["HostConfig"]["ReadonlyRootfs"] is True, service
        assert "CapEff:\t0000000000000000" in status, service
        assert "NoNewPrivs:\t1" in status, service
        assert "Uid:\t0\t" not in status, service


def test_redis_evicts_nothing_and_syncs_to_disk(stack: Stack) -> None:
    shown = stack.execute("redis", "redis-cli", "config", "get", "maxmemory-policy").split()
    shown += stack.execute("redis", "redis-cli", "config", "get", "appendonly").split()

    assert shown == ["maxmemory-policy", "noeviction", "appendonly", "yes"]


def test_every_health_check_says_healthy(stack: Stack) -> None:
    for service in SERVICES:
        stack.wait_until_healthy(stack.container(service))


def test_the_stores_have_no_access_to_the_internet(stack: Stack) -> None:
    routes = stack.execute("redis", "cat", "/proc/net/route").splitlines()[1:]

    assert not [line for line in routes if line.split()[1] == "00000000"], "there is a default route"


@pytest.mark.parametrize("victim", ["api", "worker", "redis", "postgres"])
def test_kill_9_of_a_container_loses_nothing(stack: Stack, victim: str) -> None:
    stack.wait_until_ready()
    # Each deletion takes two calls, so that some are under way whenever the blow falls.
    stack.simulate("PATCH", "switches", json={"latency_seconds": 0.3})
    before = stack.engine.inspect(stack.container(victim))["RestartCount"]
    accepted = stack.accept(60)
    due = min(item.due_at.timestamp() for item in accepted)
    time.sleep(max(0.0, due - time.time() + 0.2))

    stack.engine.kill(stack.container(victim))
    deleted = stack.wait_until_deleted(accepted, seconds=HEALED_SECONDS)
    stack.simulate("PATCH", "switches", json={"latency_seconds": 0})

    _assert_none_was_early(accepted, deleted)
    stack.wait_until_ready()
    after = stack.engine.inspect(stack.container(victim))["RestartCount"]
    assert after > before, f"{victim} was not restarted"
    wait_until(lambda: _states(stack).keys() == {"deleted"}, seconds=HEALED_SECONDS, what="all records say deleted")


def test_webhooks_that_were_accepted_while_the_api_was_killed_are_kept(stack: Stack) -> None:
    stack.wait_until_ready()
    ids = stack.generate(200)
    accepted: list[Accepted] = []

    def kill_soon() -> None:
        time.sleep(0.15)
        stack.engine.kill(stack.container("api"))

    killer = threading.Thread(target=kill_soon)
    killer.start()
    unanswered = _announce_until_refused(stack, ids, accepted)
    killer.join()
    stack.wait_until_ready()

    assert unanswered, "the blow fell too late"
    assert accepted, "the blow fell too early"
    stack.wait_until_deleted(accepted, seconds=HEALED_SECONDS)


def _announce_until_refused(stack: Stack, ids: Sequence[str], accepted: list[Accepted]) -> list[str]:
    for number, id_ in enumerate(ids):
        try:
            answer = stack.announce(id_)
        except httpx.TransportError:
            return list(ids[number:])
        assert answer.status_code == 202
        accepted.append(Accepted(id_, datetime.fromisoformat(answer.json()["dueAt"])))
    return []


def test_a_stopped_worker_finishes_what_it_began(stack: Stack) -> None:
    stack.wait_until_ready()
    stack.simulate("PATCH", "switches", json={"latency_seconds": 3})
    accepted = stack.accept(1)
    name = stack.container("worker")
    wait_until(lambda: "deleting" in _states(stack), seconds=30, what="the deletion began")

    stack.engine.run("stop", "--time", "80", name, timeout=100)
    state = stack.engine.inspect(name)["State"]
    deleted = stack.deleted()
    states = _states(stack)
    stack.simulate("PATCH", "switches", json={"latency_seconds": 0})
    stack.engine.run("start", name)

    assert state["ExitCode"] == 0, stack.engine.logs(name)
    assert accepted[0].id in deleted
    assert states.keys() == {"deleted"}


def test_the_scalers_question_counts_what_is_due_unless_deletions_are_paused(stack: Stack, root: Path) -> None:
    path = root / "deploy" / "kubernetes" / "overlays" / "keda" / "scaled-object.yaml"
    query = documents(path.read_text(encoding="utf-8"))[0]["spec"]["triggers"][0]["metadata"]["query"]

    def due() -> int:
        return int(stack.execute("postgres", *PSQL, "--command", query))

    stack.wait_until_ready()
    stack.run("docker compose --file deploy/compose.yaml stop worker", seconds=100)
    accepted = stack.accept(3)
    early = due()
    time.sleep(max(0.0, max(item.due_at.timestamp() for item in accepted) - time.time() + 0.1))
    late = due()
    stack.run(line_with(root, "compose.yaml", "exec -T api mayfly pause"), seconds=60)
    paused = due()
    stack.run(line_with(root, "compose.yaml", "exec -T api mayfly resume"), seconds=60)
    stack.run("docker compose --file deploy/compose.yaml start worker", seconds=60)

    assert (early, late, paused) == (0, 3, 0)
    stack.wait_until_deleted(accepted, seconds=60)


def test_the_commands_for_a_running_container_work(stack: Stack, root: Path) -> None:
    stack.wait_until_ready()

    said = stack.run(block_with(root, "compose.yaml", "mayfly stats"), seconds=120)

    assert "Deletions are running." in said
    assert "Deletions are paused." in said
    assert "Deletions are resumed." in said


def test_a_restored_backup_deletes_nothing_that_was_held_since(stack: Stack, root: Path) -> None:
    stack.wait_until_ready()
    gone = stack.accept(3)
    stack.wait_until_deleted(gone, seconds=60)
    wait_until(lambda: _states(stack).keys() == {"deleted"}, seconds=60, what="all records say deleted")
    (held,) = stack.accept(1, query="ttl=20s")
    hold = line_with(root, "compose.yaml", "records hold").replace(" ID ", f" {held.id} ")

    stack.run(block_with(root, "pg_dump"), seconds=60)
    before = _records(stack)
    stack.run(hold, seconds=60)
    told = stack.run(block_with(root, "records list --state held"), seconds=60)
    _lose_the_database(stack)
    stack.run(block_with(root, "pg_restore"), seconds=240)
    stack.wait_until_ready()
    # Time enough for the worker, which runs, to delete what is due.
    time.sleep(max(0.0, held.due_at.timestamp() - time.time()) + 7)
    restored = _records(stack)
    stack.run(hold, seconds=60)
    stack.run(line_with(root, "compose.yaml", "mayfly resume"), seconds=60)
    later = stack.accept(1)
    stack.wait_until_deleted(later, seconds=60)

    assert held.id in told
    assert restored == before
    assert {item.id for item in gone} < {record["id"] for record in restored}
    assert held.id not in stack.deleted()
    stack.run(hold.replace(" hold ", " release --yes "), seconds=60)
    stack.wait_until_deleted([held], seconds=60)


def _lose_the_database(stack: Stack) -> None:
    # With what depends on it, as podman wants; the volume as well.
    name = stack.container("postgres")
    volume = stack.engine.inspect(name)["Mounts"][0]["Name"]
    stack.engine.run("rm", "--force", "--depend", "--time", "5", name)
    stack.engine.run("volume", "rm", volume)


def _records(stack: Stack) -> list[dict[str, object]]:
    query = "SELECT coalesce(json_agg(records ORDER BY seq), '[]') FROM records"
    rows: list[dict[str, object]] = json.loads(stack.execute("postgres", *PSQL, "--command", query))
    return rows


def test_an_upgrade_is_three_commands_and_deletions_go_on(stack: Stack, root: Path) -> None:
    said = stack.run(block_with(root, "compose.yaml build"), seconds=400)
    stack.wait_until_ready()
    accepted = stack.accept(1)

    assert "The ledger's tables are" in said
    stack.wait_until_deleted(accepted, seconds=60)


def test_more_workers_are_one_command(stack: Stack) -> None:
    stack.run("docker compose --file deploy/compose.yaml up --detach --scale worker=3", seconds=120)
    workers = stack.containers("worker")
    for name in workers:
        stack.wait_until_healthy(name)
    stack.wait_until_ready()

    assert len(workers) == 3
    stack.wait_until_deleted(stack.accept(30), seconds=60)
