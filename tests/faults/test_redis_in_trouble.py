"""Rows 6 to 13, 66 and 67: a Redis that is down, frozen, emptied, full, read-only, or contains foreign bytes."""

import asyncio
import pickle
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis.asyncio as redis

from service.jobs import connection, enqueue
from service.simulator import Generation
from tests.faults.judging import Sent, Verdict
from tests.faults.processes import ProcessStarter
from tests.faults.proxy import Proxy, Trouble
from tests.faults.system import System, at_once, on_both, overdue
from tests.support.ports import free_port
from tests.support.waiting import eventually

OUTAGE = timedelta(hours=30)


async def timed(system: System, generation: Generation) -> float:
    """Announce *generation*, which must be accepted, and return how long the answer took."""
    begun = time.monotonic()
    await system.accepted(generation)
    return time.monotonic() - begun


@on_both
async def test_a_webhook_is_stored_and_its_record_deleted_while_redis_is_down(system: System):
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


async def test_while_redis_hangs_a_webhook_is_stored_and_health_reports_it_in_a_second(system: System):
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


async def test_after_any_failed_enqueue_the_ledger_starts_the_deletion(system: System):
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


# Three ways to lose every job. Each ends with records that are overdue and have no job: what runs them is the safety
# net, or nothing.


async def flushed(system: System, *, without: str | None = None) -> None:
    """Empty Redis while a hundred records wait."""
    await asyncio.gather(system.api(MAYFLY_TTL="6s"), system.worker(without=without))
    generations = [system.generation() for _ in range(100)]
    await asyncio.gather(*map(system.accepted, generations))
    await system.enqueued(100)
    await system.redis.command("FLUSHALL")
    assert await system.jobs() == 0
    assert datetime.now(UTC) < min(row.due_at for row in await system.ledger.rows() if row.due_at)
    await overdue(system, generations[-1])


async def restarted_empty(system: System, *, without: str | None = None) -> None:
    """Kill a Redis that keeps nothing, and start it again."""
    await killed(system, is_kept=False, without=without)


async def killed(system: System, *, is_kept: bool, without: str | None = None) -> None:
    """Kill Redis while ten records wait, and start it again, with its file or without."""
    await system.redis.command("CONFIG", "SET", "appendonly", "yes" if is_kept else "no")
    await asyncio.gather(system.api(MAYFLY_TTL="3s"), system.worker(without=without))
    generations = [await system.accepted(system.generation()) for _ in range(10)]
    await system.enqueued(10)
    system.redis.kill()
    await asyncio.sleep(0.5)
    await system.redis.start()
    assert await system.jobs() == (10 if is_kept else 0)
    await overdue(system, generations[-1])


async def expired(system: System, *, without: str | None = None) -> None:
    """Have no worker until all jobs have expired, and then one."""
    await system.api()
    generations = [await system.accepted(system.generation()) for _ in range(10)]
    await system.enqueued(10)
    await overdue(system, generations[-1])
    async with system.redis.client() as client:
        keys = [key async for key in client.scan_iter("arq:job:*")]
        assert await client.delete(*keys) == 20  # with those of early looks
    await system.ledger.pass_time(OUTAGE)
    assert await system.metric("mayfly_oldest_overdue_seconds") > OUTAGE.total_seconds()
    assert await system.metric("mayfly_due_records") == 10
    await system.worker(without=without)


@on_both
async def test_after_flushall_a_hundred_waiting_records_are_deleted_and_none_early(system: System):
    await flushed(system)
    await system.drain(seconds=10)

    assert len(system.simulator.removed) == 100
    assert await system.jobs() == 0
    assert not (await system.judged()).all


async def test_a_redis_that_is_killed_and_restarted_loses_nothing(starter: ProcessStarter, tmp_path: Path):
    async def loses_nothing(system: System, *, is_kept: bool) -> None:
        await killed(system, is_kept=is_kept)
        await system.drain(seconds=10)

        assert len(system.simulator.removed) == 10
        assert [process.exit_code for process in system.processes] == [None, None]
        assert not (await system.judged()).all

    both = {"with_its_file": partial(loses_nothing, is_kept=True), "without": partial(loses_nothing, is_kept=False)}
    await at_once(starter, tmp_path, both)


@on_both
async def test_records_whose_jobs_expired_without_a_worker_are_deleted_when_one_starts(system: System):
    await expired(system)
    await system.drain(seconds=10)

    assert len(system.simulator.removed) == 10
    assert await system.metric("mayfly_oldest_overdue_seconds") == 0
    assert not (await system.judged()).all


async def test_without_the_safety_net_the_verdict_shows_every_record_left(starter: ProcessStarter, tmp_path: Path):
    async def is_not_deleted(scenario: Callable[..., Awaitable[None]], system: System) -> Verdict:
        await scenario(system, without="safety net")
        await asyncio.sleep(3)
        verdict = await system.judged()
        await system.enqueue()  # jobs would have helped: the worker has nothing else wrong
        await system.drain(seconds=10)
        assert not (await system.judged()).lost
        return verdict

    scenarios = {one.__name__: partial(is_not_deleted, one) for one in (flushed, restarted_empty, expired)}
    verdicts = await at_once(starter, tmp_path, scenarios)

    assert {name: len(one.lost) for name, one in verdicts.items()} == {
        "flushed": 100,
        "restarted_empty": 10,
        "expired": 10,
    }
    assert not any([*one.early, *one.unrecorded, *one.uninvited, *one.leaked] for one in verdicts.values())


async def test_a_redis_that_refuses_writes_delays_no_deletion(starter: ProcessStarter, tmp_path: Path):
    troubles = {
        "full": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "command not allowed when"),
        "read_only": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "read only replica"),
        "cannot_save": (("CONFIG", "SET", "save", "3600 1"), ("CONFIG", "SET", "save", ""), "MISCONF"),
    }
    await at_once(starter, tmp_path, {name: partial(takes_no_writes, *words) for name, words in troubles.items()})


async def takes_no_writes(broken: tuple[str, ...], healed: tuple[str, ...], refusal: str, system: System) -> None:
    """Let Redis refuse writes with *refusal* from its command *broken* to *healed*."""
    await asyncio.gather(system.api(), system.worker())
    await system.redis.command(*broken)
    if refusal == "MISCONF":
        await let_a_save_fail(system)
    with pytest.raises(redis.RedisError, match=refusal):
        await system.redis.command("SET", "anything", "at all")
    generation = system.generation()
    assert await timed(system, generation) < 2
    await system.until(generation, "deleted", is_hurried=False)
    assert await system.metric("mayfly_enqueue_failures_total") == 2  # its attempt and its early look
    await system.redis.command(*healed)
    later = await system.accepted(system.generation())
    await system.until(later, "deleted", is_hurried=False)

    assert await system.metric("mayfly_enqueue_failures_total") == 2  # its attempt and its early look
    assert [process.exit_code for process in system.processes] == [None, None]
    assert not (await system.judged()).all


async def let_a_save_fail(system: System) -> None:
    """Have Redis find a folder where its dump should be."""
    (system.folder / "redis" / "dump.rdb").mkdir()
    await system.redis.command("BGSAVE")

    async def has_failed() -> bool:
        async with system.redis.client() as client:
            return bool((await client.info("persistence"))["rdb_last_bgsave_status"] == "err")

    await eventually(has_failed)


async def test_a_worker_deletes_without_redis_and_by_jobs_when_redis_is_back(system: System):
    system.redis.kill()
    _, worker, other = await asyncio.gather(system.api(), system.worker(), system.worker(without="safety net"))
    generation = await system.accepted(system.generation())
    await system.until(generation, "deleted", is_hurried=False)
    assert await worker.stop() == 0
    for outages in (1, 2):
        # What is left works by jobs alone. It has missed Redis, its arq worker has ended, and is started again.
        await other.logged("jobs.interrupted", times=outages)
        await system.redis.start()
        later = await system.accepted(system.generation())
        await system.until(later, "deleted", is_hurried=False, seconds=10)
        system.redis.kill()

    assert other.exit_code is None
    assert not (await system.judged()).all


async def test_a_redis_that_would_drop_jobs_is_refused_at_start(system: System):
    await system.redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    for command in ("api", "worker"):
        process = system.spawn(command)

        assert await process.ended(15) == 1
        assert "noeviction" in process.log.read_text()


class Bomb:
    """What a pickle may do when it is read."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (eval, (f"open({str(self._target)!r}, 'w').close()",))


def packed(function: Any, *arguments: Any, t: Any = None, et: Any = 1, **keywords: Any) -> bytes:  # noqa: ANN401
    """Return the payload of a job as arq and our serializer write it."""
    return msgspec.msgpack.encode({"t": t, "f": function, "a": arguments, "k": keywords, "et": et})


async def put(system: System, job_id: bytes, payload: bytes | None) -> None:
    """Put a job into the queue as another program would."""
    now = int(time.time() * 1000)
    if payload is not None:
        await system.redis.command("PSETEX", b"arq:job:" + job_id, 600_000, payload)
    await system.redis.command("ZADD", connection.QUEUE, now - 1000, job_id)


async def left_in_redis(system: System) -> list[Any]:
    """Return what is left of all jobs: ids in the queue, payloads, and results."""
    async with system.redis.client() as client:
        kept = [key async for key in client.scan_iter("arq:*") if b":in-progress:" not in key and b":retry:" not in key]
        return [*await client.zrange(connection.QUEUE, 0, -1), *kept]


async def is_empty(system: System) -> bool:
    """Whether no job is left."""
    return not await left_in_redis(system)


async def test_hostile_bytes_in_redis_run_no_code_and_stop_no_job(system: System, tmp_path: Path):
    target = tmp_path / "owned"
    # This worker deletes only by jobs, and the webhook's job comes after the hostile ones.
    _, worker = await asyncio.gather(system.api(), system.worker(without="safety net"))
    now = int(time.time() * 1000)
    for job_id, payload in {
        "bomb": pickle.dumps({"t": 1, "f": "cleanup", "a": (Bomb(target),), "k": {}, "et": now}),
        "noise": b"\xff\x00\xfe not a job",
        "deep": b"\x91" * 100_000,
        "number": msgspec.msgpack.encode(7),
        "nobody": packed("no function of ours", "x"),
        "list": msgspec.msgpack.encode([1, 2, 3]),
        "empty": b"",
        "no job at all": None,
    }.items():
        await put(system, job_id.encode(), payload)
    generation = await system.accepted(system.generation())
    await system.until(generation, "deleted", is_hurried=False)

    await eventually(partial(is_empty, system))
    assert not target.exists()
    assert worker.exit_code is None
    assert worker.events("jobs.crashed") == []
    assert not (await system.judged()).all


@pytest.mark.parametrize(
    ("job_id", "payload"),
    [(b"\xff\xfe\x00", b"any"), (b"a job", packed(["no name"])), (b"a job", packed(enqueue.CLEANUP, t="no number"))],
    ids=["an id that is no text", "a function that is no name", "a try that is no number"],
)
async def test_a_job_that_arq_fails_on_stops_no_later_job(system: System, job_id: bytes, payload: bytes):
    _, worker = await asyncio.gather(system.api(), system.worker(without="safety net"))
    await put(system, job_id, payload)
    generation = await system.accepted(system.generation())
    await system.until(generation, "deleted", is_hurried=False, seconds=8)

    await eventually(partial(is_empty, system), seconds=8)
    assert worker.exit_code is None
    assert not (await system.judged()).all


async def is_out_of_the_queue(system: System, job_id: str) -> bool:
    """Whether the queue knows nothing of a job."""
    return await system.redis.command("ZSCORE", connection.QUEUE, job_id) is None


@pytest.mark.parametrize("kept", [b"arq:job:", b"arq:retry:"], ids=["its payload", "its tries"])
async def test_a_job_key_of_another_type_stops_no_later_job(system: System, kept: bytes):
    _, worker = await asyncio.gather(system.api(), system.worker(without="safety net"))
    await system.redis.command("LPUSH", kept + b"odd", "a list")
    await put(system, b"odd", None if kept == b"arq:job:" else packed(enqueue.CLEANUP))
    generation = await system.accepted(system.generation())
    await system.until(generation, "deleted", is_hurried=False, seconds=12)

    assert worker.exit_code is None
    await eventually(partial(is_out_of_the_queue, system, "odd"), seconds=8)
    assert not (await system.judged()).all


@on_both
async def test_jobs_and_rows_of_another_release_run_or_are_dropped(system: System):
    _, worker = await asyncio.gather(system.api(MAYFLY_TTL="3s"), system.worker(without="safety net"))
    waiting = await system.accepted(system.generation())
    await system.enqueued(1)
    await system.redis.command("FLUSHALL")
    await overdue(system, waiting)
    # This worker has no safety net: a job under an id of another form begins the attempt.
    await put(system, b"older", packed(enqueue.CLEANUP, "default", waiting.id, 1))
    await system.until(waiting, "deleted", is_hurried=False)
    await put(system, b"with names", packed(enqueue.CLEANUP, account="default", attempt=1))
    await put(system, b"renamed", packed("delete_generation", waiting.id))
    await eventually(partial(is_empty, system))
    assert worker.events("jobs.crashed") == []
    left = await a_row_of_an_older_release(system)
    await system.worker()
    await system.drain()

    assert (await system.row(left)).outcome == "deleted"
    assert worker.exit_code is None
    assert not (await system.judged()).all


async def a_row_of_an_older_release(system: System) -> Generation:
    """Write a record that knows less than ours: after attempts and a copy that left no traces but the least."""
    generation = system.generation()
    body = f'{{"id":"{generation.id}","status":"COMPLETED"}}'
    await system.ledger.execute(
        "INSERT INTO records (account, id, state, status, notification, copy, received_at, sent_at, copied_at, due_at, "  # noqa: S608
        "wake_at, attempts, failures, refusals, rule) "
        f"SELECT account, '{generation.id}', 'scheduled', status, '{body}', '{body}', received_at, sent_at, copied_at, "
        "due_at, due_at, 3, 3, 1, 'a rule that is no more' FROM records"
    )
    system.sent.append(Sent(generation.id, 202, datetime.now(UTC), (await system.row(generation)).due_at))
    return generation


async def test_a_queue_key_of_another_type_stops_no_deletion(system: System):
    await system.redis.command("SET", connection.QUEUE, "not a queue")
    _, worker = await asyncio.gather(system.api(), system.worker())
    generation = await system.accepted(system.generation())
    await system.until(generation, "deleted", is_hurried=False)

    assert worker.exit_code is None
    assert not (await system.judged()).all
