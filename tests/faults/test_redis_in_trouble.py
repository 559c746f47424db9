"""Rows 6 to 13, 66 and 67: a Redis that is down, frozen, emptied, full, read-only, or holds bytes of others."""

import asyncio
import contextlib
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from service.simulator import Generation
from tests.faults.processes import free_port
from tests.faults.proxy import Proxy, Trouble
from tests.faults.system import System, on_both, overdue

OLD_JOB = {"t": 1, "f": "delete_generation", "a": ["from", "an", "older", "release"], "k": {}, "et": 1}


async def timed(system: System, generation: Generation) -> float:
    """Announce *generation*, which must be accepted, and return how long the answer took."""
    begun = time.monotonic()
    await system.accepted(generation)
    return time.monotonic() - begun


@on_both
async def test_a_webhook_is_taken_while_redis_is_down_and_its_record_runs_without_it(system: System):
    _, worker = await asyncio.gather(system.api(), system.worker())
    system.redis.kill()
    generation = system.generation()
    assert await timed(system, generation) < 2
    begun = time.monotonic()
    status, health = await system.health()
    await system.until(generation, "deleted", is_hurried=False, seconds=15)

    assert (status, health["status"], health["parts"]["redis"]["status"]) == (200, "degraded", "failing")
    assert time.monotonic() - begun < 15
    assert worker.exit_code is None
    await system.redis.start()
    assert not (await system.judged()).all


async def test_a_webhook_is_taken_while_redis_hangs_and_health_says_so_within_a_second(system: System):
    _, worker = await asyncio.gather(system.api(), system.worker())
    system.redis.freeze()
    generation = system.generation()
    assert await timed(system, generation) < 2
    begun = time.monotonic()
    status, health = await system.health()
    assert (status, health["parts"]["redis"]["status"]) == (200, "failing")
    assert time.monotonic() - begun < 1.5
    await system.until(generation, "deleted", is_hurried=False, seconds=20)
    system.redis.thaw()
    later = await system.accepted(system.generation())
    await system.until(later, "deleted", is_hurried=False)

    assert worker.exit_code is None
    assert not (await system.judged()).all


async def test_an_enqueue_that_fails_in_any_way_is_made_good_by_the_ledger(system: System):
    async def connect():
        return await asyncio.open_connection("127.0.0.1", system.redis.port)

    async def told_through(kind: Trouble) -> None:
        async with Proxy(connect).serve() as proxy:
            proxy.trouble(kind, b"EVALSHA")
            port = free_port()
            await system.api(MAYFLY_REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0", MAYFLY_PORT=str(port))
            generation = system.generation()
            begun = time.monotonic()
            assert (await system.announce(generation, port=port)).status == 202
            assert time.monotonic() - begun < 2
            await asyncio.wait_for(proxy.reached.wait(), 5)
            await system.until(generation, "deleted", is_hurried=False)
            assert len(system.calls(generation)) == 1

    await asyncio.gather(system.worker(), told_through("cut"), told_through("lose"), told_through("stall"))

    assert not (await system.judged()).all


@on_both
async def test_a_flushed_redis_loses_none_of_a_hundred_waiting_records_and_starts_none_early(system: System):
    await asyncio.gather(system.api(MAYFLY_TTL="3s"), system.worker())
    generations = [system.generation() for _ in range(100)]
    await asyncio.gather(*map(system.accepted, generations))
    await system.redis.command("FLUSHALL")
    await overdue(system, generations[-1])
    await system.drain()

    assert len(system.simulator.removed) == 100
    assert not (await system.judged()).all


@pytest.mark.parametrize("is_kept", [True, False], ids=["with its file", "without"])
async def test_a_redis_that_is_killed_and_comes_back_loses_nothing(system: System, *, is_kept: bool):
    await system.redis.command("CONFIG", "SET", "appendonly", "yes" if is_kept else "no")
    _, worker = await asyncio.gather(system.api(MAYFLY_TTL="3s"), system.worker())
    generations = [await system.accepted(system.generation()) for _ in range(10)]
    system.redis.kill()
    await asyncio.sleep(0.5)
    await system.redis.start()
    await system.drain()

    assert worker.exit_code is None
    assert len(system.simulator.removed) == len(generations)
    assert not (await system.judged()).all


@pytest.mark.parametrize("trouble", ["full", "read-only", "cannot save"])
async def test_a_redis_that_takes_no_writes_delays_nothing_but_bells(system: System, trouble: str):
    api, worker = await asyncio.gather(system.api(), system.worker())
    broken, healed = {
        "full": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        "read-only": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        "cannot save": (("CONFIG", "SET", "save", "1 1", "dir", "/proc"), ("CONFIG", "SET", "save", "")),
    }[trouble]
    with contextlib.suppress(Exception) if trouble == "cannot save" else contextlib.nullcontext():
        await system.redis.command(*broken)
    generation = system.generation()
    assert await timed(system, generation) < 2
    await system.until(generation, "deleted", is_hurried=False)
    await system.redis.command(*healed)
    later = await system.accepted(system.generation())
    await system.until(later, "deleted", is_hurried=False)

    assert worker.exit_code is None
    assert api.exit_code is None
    assert not (await system.judged()).all


async def test_a_worker_that_starts_without_a_redis_works_and_hears_bells_once_it_is_there(system: System):
    system.redis.kill()
    _, worker = await asyncio.gather(system.api(), system.worker())
    generation = await system.accepted(system.generation())
    await system.until(generation, "deleted", is_hurried=False)
    await system.redis.start()
    later = await system.accepted(system.generation())
    await system.until(later, "deleted", is_hurried=False)

    assert worker.exit_code is None
    assert not (await system.judged()).all


async def test_a_redis_that_would_drop_jobs_is_refused_at_start(system: System):
    await system.redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    for command in ("api", "worker"):
        process = system.spawn(command)

        assert await process.ended(15) == 1
        assert "noeviction" in process.log.read_text()


async def test_records_whose_jobs_expired_while_no_worker_was_there_run_when_one_returns(system: System):
    await system.api()
    generations = [await system.accepted(system.generation()) for _ in range(5)]
    await overdue(system, generations[-1])
    async with system.redis.client() as client:
        keys = [key async for key in client.scan_iter("arq:job:*")]
        await client.delete(*keys)
    assert await system.metric("mayfly_oldest_overdue_seconds") > 0
    assert await system.metric("mayfly_due_records") == 5
    await system.worker()
    await system.drain()

    assert len(system.simulator.removed) == 5
    assert await system.metric("mayfly_oldest_overdue_seconds") == 0
    assert not (await system.judged()).all


async def test_hostile_and_foreign_bytes_in_redis_run_no_code_and_stop_nobody(system: System, tmp_path: Path):
    target = tmp_path / "owned"

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (eval, (f"open({str(target)!r}, 'w').close()",))  # what a pickle may do

    _, worker = await asyncio.gather(system.api(), system.worker())
    now = int(time.time() * 1000)
    bytes_of_others = {
        "bomb": pickle.dumps({"t": 1, "f": "cleanup", "a": (Bomb(),), "k": {}, "et": now}),
        "old": pickle.dumps(OLD_JOB),
        "noise": b"\xff\x00\xfe not a job",
        "deep": b"\x91" * 100_000,
        "empty": b"",
    }
    for name, data in bytes_of_others.items():
        await system.redis.command("PSETEX", f"arq:job:{name}", 60_000, data)
        await system.redis.command("ZADD", "mayfly:v1", now, name)
    await system.redis.command("ZADD", "mayfly:v1", now, b"\xff\xfe\x00", now, "no job at all")
    generation = await system.accepted(system.generation())
    await system.until(generation, "deleted", is_hurried=False)

    assert not target.exists()
    assert worker.exit_code is None
    assert not (await system.judged()).all


async def test_a_queue_key_of_another_type_stops_no_deletion(system: System):
    await system.redis.command("SET", "mayfly:v1", "not a queue")
    _, worker = await asyncio.gather(system.api(), system.worker())
    generation = await system.accepted(system.generation())
    await system.until(generation, "deleted", is_hurried=False)

    assert worker.exit_code is None
    assert not (await system.judged()).all
