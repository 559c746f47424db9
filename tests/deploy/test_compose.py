"""The compose stack, brought up as the README says: a webhook in, a deletion out, whatever is killed on the way."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from tests.deploy.engine import Engine, EngineMissingError, Image, wait_until
from tests.deploy.kubernetes import documents
from tests.deploy.stack import Accepted, Stack, running

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

# A worker that was killed holds its records for the length of a lease, 60 s.
HEALED_SECONDS = 120


@pytest.fixture(scope="module")
def stack(engine: Engine, image: Image, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Bring up deploy/compose.yaml with a simulator beside it, and take it down with its volumes."""
    assert image.tag
    try:
        engine.have("redis:7-alpine", "postgres:16")
        beside = root / "tests" / "deploy" / "compose.simulator.yaml"
        with running(engine, root, tmp_path_factory.mktemp("compose"), ["compose.yaml"], beside) as stack:
            stack.wait_until_simulated()
            stack.wait_until_ready(seconds=90)
            yield stack
    except EngineMissingError as missing:
        pytest.skip(str(missing))


def _assert_none_was_early(accepted: Sequence[Accepted], deleted: dict[str, float]) -> None:
    for item in accepted:
        assert deleted[item.id] >= item.due_at.timestamp(), item.id


def _states(stack: Stack) -> dict[str, int]:
    command = ["psql", "--username", "mayfly", "--no-align", "--tuples-only"]
    rows = stack.execute("postgres", *command, "--command", "SELECT state, count(*) FROM records GROUP BY state")
    return {state: int(count) for state, count in (line.split("|") for line in rows.split())}


def test_a_signed_webhook_leads_to_a_deletion(stack: Stack) -> None:
    accepted = stack.accept(1)

    deleted = stack.wait_until_deleted(accepted, seconds=30)

    _assert_none_was_early(accepted, deleted)
    assert stack.announce(accepted[0].id, secret="whsec_of_somebody_else").status_code == 401


def test_the_migration_ended_well(stack: Stack) -> None:
    state = stack.engine.inspect(stack.container("migrate"))["State"]

    assert (state["Running"], state["ExitCode"]) == (False, 0)


def test_nothing_is_published_but_the_api_on_loopback(stack: Stack) -> None:
    published = {}
    for service in ("migrate", "api", "worker", "redis", "postgres"):
        bindings = stack.engine.inspect(stack.container(service))["HostConfig"]["PortBindings"]
        published[service] = [where["HostIp"] for places in bindings.values() for where in places or ()]

    assert published == {"migrate": [], "api": ["127.0.0.1"], "worker": [], "redis": [], "postgres": []}


def test_every_container_is_locked_up(stack: Stack) -> None:
    for service in ("api", "worker", "redis", "postgres"):
        found = stack.engine.inspect(stack.container(service))
        status = stack.execute(service, "cat", "/proc/1/status")

        assert found["HostConfig"]["ReadonlyRootfs"] is True, service
        assert "CapEff:\t0000000000000000" in status, service
        assert "NoNewPrivs:\t1" in status, service
        assert "Uid:\t0\t" not in status, service


def test_redis_keeps_what_it_is_given(stack: Stack) -> None:
    shown = stack.execute("redis", "redis-cli", "config", "get", "maxmemory-policy").split()
    shown += stack.execute("redis", "redis-cli", "config", "get", "appendonly").split()

    assert shown == ["maxmemory-policy", "noeviction", "appendonly", "yes"]


def test_every_health_check_says_healthy(stack: Stack) -> None:
    for service in ("api", "worker", "redis", "postgres"):
        stack.wait_until_healthy(stack.container(service))


def test_the_stores_cannot_reach_out(stack: Stack) -> None:
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
    since = stack.simulate("GET", "calls")["next"]
    wait_until(lambda: stack.simulate("GET", "calls")["next"] > since, seconds=30, what="the deletion began")

    stack.engine.run("stop", "--time", "80", name, timeout=100)
    state = stack.engine.inspect(name)["State"]
    deleted = stack.deleted()
    states = _states(stack)
    stack.simulate("PATCH", "switches", json={"latency_seconds": 0})
    stack.engine.run("start", name)

    assert state["ExitCode"] == 0, stack.engine.logs(name)
    assert accepted[0].id in deleted
    assert states.keys() == {"deleted"}


def test_the_scalers_question_to_the_ledger_is_one_it_answers(stack: Stack, root: Path) -> None:
    path = root / "deploy" / "kubernetes" / "overlays" / "keda" / "scaled-object.yaml"
    query = documents(path.read_text(encoding="utf-8"))[0]["spec"]["triggers"][0]["metadata"]["query"]

    command = ["psql", "--username", "mayfly", "--no-align", "--tuples-only", "--command"]
    answer = stack.execute("postgres", *command, query)

    assert int(answer) == 0


def test_a_backup_brings_back_every_record(stack: Stack) -> None:
    accepted = stack.accept(5)
    stack.wait_until_deleted(accepted, seconds=60)
    wait_until(lambda: _states(stack).keys() == {"deleted"}, seconds=60, what="all records say deleted")
    before = _records(stack)
    dump = ["pg_dump", "--username", "mayfly", "--format", "custom", "--file", "/tmp/mayfly.dump", "mayfly"]  # noqa: S108
    restore = ["pg_restore", "--username", "mayfly", "--dbname", "mayfly", "--clean", "--if-exists"]

    stack.execute("postgres", *dump)
    stack.execute("postgres", "psql", "--username", "mayfly", "--command", "DELETE FROM records")
    gone = _records(stack)
    stack.execute("postgres", *restore, "--single-transaction", "/tmp/mayfly.dump")  # noqa: S108

    assert gone == []
    assert _records(stack) == before
    assert {item.id for item in accepted} <= {record["id"] for record in before}
    later = stack.accept(1)
    stack.wait_until_deleted(later, seconds=60)


def _records(stack: Stack) -> list[dict[str, object]]:
    query = "SELECT coalesce(json_agg(records ORDER BY seq), '[]') FROM records"
    command = ["psql", "--username", "mayfly", "--no-align", "--tuples-only", "--command", query]
    rows: list[dict[str, object]] = json.loads(stack.execute("postgres", *command))
    return rows


def test_three_workers_share_the_work(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-build", "--scale", "worker=3", seconds=120)
    workers = stack.containers("worker")
    for name in workers:
        stack.wait_until_healthy(name)
    stack.wait_until_ready()
    # Slow enough that each has its hands full.
    stack.simulate("PATCH", "switches", json={"latency_seconds": 2})

    accepted = stack.accept(400)
    stack.wait_until_deleted(accepted, seconds=90)
    stack.simulate("PATCH", "switches", json={"latency_seconds": 0})
    shares = _confirmed_by_worker(stack, accepted)

    print("shares of 3 workers:", sorted(shares.values()))
    assert len(workers) == len(shares) == 3
    assert min(shares.values()) > len(accepted) / 5


def _confirmed_by_worker(stack: Stack, accepted: Sequence[Accepted]) -> dict[str, int]:
    ids = ",".join(f"'{item.id}'" for item in accepted)
    query = (
        "SELECT events.actor, count(*) FROM events JOIN records ON records.seq = events.record "  # noqa: S608 - our own ids
        f"WHERE move = 'confirm' AND id IN ({ids}) GROUP BY actor"
    )
    command = ["psql", "--username", "mayfly", "--no-align", "--tuples-only"]
    wait_until(lambda: _states(stack).keys() == {"deleted"}, seconds=60, what="all records say deleted")
    rows = stack.execute("postgres", *command, stdin=query).splitlines()
    return {actor: int(count) for actor, count in (line.split("|") for line in rows)}
