"""Sweeps whose worker is killed, whose Redis is emptied, and whose API fails at an exact step."""

import asyncio
from datetime import datetime, timedelta
from pathlib import Path

from service.simulator import Generation, Operation
from tests.faults.processes import Process
from tests.faults.system import API_KEY, System, on_both
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET

BASE = "https://mayfly.example"
OURS = f"{BASE}/webhooks/sync"
SWEPT = {"MAYFLY_PUBLIC_URL": BASE}
# The call of the list has no id.
LIST = ""


def missed(system: System, number: int = 1, *, ttl: str = "1h") -> list[Generation]:
    """Add generations that no webhook tells of."""
    return [system.generation(webhook_url=f"{OURS}?ttl={ttl}") for _ in range(number)]


async def sweeping(system: System, **environment: str) -> Process:
    """Start another worker that sweeps, as if the turn of the sweep that was killed were over."""
    await system.ledger.execute("DELETE FROM heartbeats WHERE name LIKE 'sweep:%'")
    return await system.worker(**SWEPT, **environment)


async def completed(process: Process) -> None:
    await process.logged("sweep.completed")


async def assert_adopted_once(
    system: System, generations: list[Generation], *, ttl: timedelta, since: datetime
) -> None:
    """Assert that exactly *generations* have a record, each due its whole *ttl* after *since* at the earliest."""
    rows = await system.ledger.rows()
    assert sorted(row.id for row in rows) == sorted(one.id for one in generations)
    assert all(row.due_at is not None and row.due_at >= since + ttl for row in rows)
    assert system.simulator.deleted == {}


def listed(system: System) -> int:
    return sum(call.operation is Operation.LIST for call in system.simulator.calls)


@on_both
async def test_a_worker_killed_in_the_list_has_adopted_nothing_and_the_next_adopts_all(system: System):
    since, generations = datetime.now().astimezone(), missed(system, 150)
    system.simulator.plan.script("LIST", ["hold"])
    worker = await sweeping(system)
    await eventually(lambda: LIST in system.simulator.gates.waiting)
    await worker.kill()
    assert await system.ids() == set()
    system.simulator.release(LIST)
    await completed(await sweeping(system))

    await assert_adopted_once(system, generations, ttl=timedelta(hours=1), since=since)


@on_both
async def test_a_worker_killed_before_its_commit_adopts_nothing_twice(system: System):
    since, generations = datetime.now().astimezone(), missed(system, 450)
    system.simulator.plan.script("LIST", ["hold"])
    worker = await sweeping(system)
    await eventually(lambda: LIST in system.simulator.gates.waiting)
    async with system.ledger.lock():
        system.simulator.release(LIST)
        await eventually(lambda: listed(system) == 5)
        await asyncio.sleep(0.5)  # the first records wait at the lock
        await worker.kill()
    assert await system.ids() == set()
    again = await sweeping(system)

    async def has_some() -> bool:
        return len(await system.ids()) > 0

    await eventually(has_some)
    await again.kill()  # between two of its commits, or after the last one
    await completed(await sweeping(system))

    await assert_adopted_once(system, generations, ttl=timedelta(hours=1), since=since)


async def test_what_was_adopted_is_deleted_when_it_is_due_and_redis_was_emptied_meanwhile(system: System):
    generations = missed(system, 3, ttl="2s")
    system.simulator.plan.script("LIST", ["hold"])
    worker = await sweeping(system)
    await eventually(lambda: LIST in system.simulator.gates.waiting)
    await system.redis.command("FLUSHALL")
    system.simulator.release(LIST)
    await completed(worker)
    for generation in generations:
        await system.until(generation, "deleted", is_hurried=False)

    verdict = await system.judged()
    assert not verdict.all
    assert set(system.simulator.deleted) == {one.id for one in generations}


async def test_a_sweep_that_redis_failed_in_is_completed(system: System):
    since, generations = datetime.now().astimezone(), missed(system, 3)
    system.simulator.plan.script("LIST", ["hold"])
    worker = await sweeping(system)
    await eventually(lambda: LIST in system.simulator.gates.waiting)
    system.redis.kill()
    system.simulator.release(LIST)
    await completed(worker)

    await assert_adopted_once(system, generations, ttl=timedelta(hours=1), since=since)
    assert worker.exit_code is None
    await system.redis.start()


async def test_while_the_api_fails_nothing_is_adopted_and_one_line_says_so(system: System):
    since, generations = datetime.now().astimezone(), missed(system, 3)
    system.simulator.plan.stand("LIST", "429:retry_after=3600")
    worker = await sweeping(system)
    await worker.logged("sweep.failed")
    assert (await system.ids(), listed(system)) == (set(), 1)
    assert worker.log.read_text().count("sweep.") == 1
    # Until the time that the API asked for is over: a worker that has seen the 429 would wait for a minute of it.
    await worker.kill()
    system.simulator.plan.stand("LIST", None)
    await system.ledger.execute("DELETE FROM pauses")
    await completed(await sweeping(system))

    await assert_adopted_once(system, generations, ttl=timedelta(hours=1), since=since)


async def test_a_cursor_that_is_deleted_during_a_sweep_loses_no_generation(system: System):
    since, generations = datetime.now().astimezone(), missed(system, 350)
    order = [one.id for one in system.simulator.newest()]
    system.simulator.plan.script("LIST", ["hold"])
    worker = await sweeping(system)
    await eventually(lambda: LIST in system.simulator.gates.waiting)
    system.simulator.plan.script("LIST", ["hold"])
    system.simulator.release(LIST)
    await eventually(lambda: listed(system) == 2)
    system.simulator.remove(order[99])
    system.simulator.release(LIST)
    await completed(worker)

    rest = [one for one in generations if one.id != order[99]]
    rows = await system.ledger.rows()
    assert sorted(row.id for row in rows) == sorted(one.id for one in rest)
    assert all(row.due_at is not None and row.due_at >= since + timedelta(hours=1) for row in rows)


async def test_in_the_dry_run_a_sweep_adopts_and_nothing_is_deleted(system: System):
    generations = missed(system, 3, ttl="1s")
    worker = await sweeping(system, MAYFLY_DRY_RUN="true")
    await completed(worker)
    await worker.logged("cleanup.simulated")

    assert await system.ids() == {one.id for one in generations}
    assert system.simulator.deleted == {}


async def test_of_several_workers_and_accounts_each_account_is_swept_once(system: System, tmp_path: Path):
    ours = missed(system, 3)
    theirs = [system.generation(webhook_url=f"{OURS}/acme?ttl=1h") for _ in range(2)]
    config = tmp_path / "mayfly.toml"
    config.write_text('[[account]]\nid = "acme"\napi_key_env = "ACME_KEY"\nwebhook_secret_env = "ACME_SECRET"\n')
    accounts = {"MAYFLY_CONFIG": str(config), "ACME_KEY": API_KEY, "ACME_SECRET": SECRET}
    workers = await asyncio.gather(*(system.worker(**SWEPT, **accounts) for _ in range(2)))
    await eventually(lambda: sum(one.log.read_text().count("sweep.completed") for one in workers) == 2)
    await asyncio.sleep(1)

    assert listed(system) == 2
    assert await system.ids() == {one.id for one in (*ours, *theirs)}


async def test_an_account_that_is_not_swept_says_so_once_and_reads_no_list(system: System):
    missed(system)
    worker = await system.worker()
    await worker.logged("sweep.off")
    await asyncio.sleep(1)

    assert (listed(system), await system.ids()) == (0, set())
    assert worker.log.read_text().count("sweep.off") == 1
