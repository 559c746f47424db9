"""Web and worker enqueue the same arq jobs; many at once have the form that arq gives to one."""

import asyncio
import pickle
import shutil
import tempfile
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from arq.constants import abort_jobs_ss, job_key_prefix, result_key_prefix, retry_key_prefix
from arq.jobs import Job
from arq.worker import Worker, func

from service.core.key import Key
from service.core.secret import Secret
from service.jobs import connection, enqueue
from service.jobs.connection import QueueError
from service.jobs.enqueue import CleanupJob, ForwardJob
from service.runtime.tasks import cancel_and_wait
from tests.support.ledger import ACCOUNT, HOUR, utc_now
from tests.support.redis import redis_server
from tests.support.waiting import eventually

ID = b"default:g1:1"
_NOW = timedelta(0)


def job(generation_id="g1", *, attempt=1, delay=HOUR):
    return CleanupJob(Key("default", generation_id), attempt, utc_now() + delay)


async def put(pool, *jobs: CleanupJob):
    return await enqueue.enqueue_jobs(pool, enqueue.queue_of(ACCOUNT), jobs, now=utc_now())


async def scores(pool):
    return dict(await pool.zrange(connection.QUEUE, 0, -1, withscores=True))


@asynccontextmanager
async def consuming(redis_url):
    """Run an arq worker as it comes on a pool of its own and yield the arguments of the jobs that it ran."""
    pool = connection.connect(Secret(redis_url), retries=1)
    found: list[Any] = []

    async def note(_ctx, *arguments: object):
        found.append(arguments)

    worker = Worker(
        functions=[func(note, name=enqueue.CLEANUP)],  # type: ignore[arg-type]
        queue_name=connection.QUEUE,
        redis_pool=pool,
        handle_signals=False,
        keep_result=0,
        max_tries=10**6,
        poll_delay=0.05,
        job_serializer=pool.job_serializer,
        job_deserializer=pool.job_deserializer,
    )
    task = asyncio.create_task(worker.async_run())
    try:
        yield found
    finally:
        await cancel_and_wait([task])
        await pool.aclose(close_connection_pool=True)


@pytest.fixture
def short_path():
    """A folder whose path is short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("delay", [HOUR, -HOUR], ids=["in an hour", "an hour ago"])
async def test_many_jobs_at_once_are_written_as_arq_writes_one(pool, delay):
    one, other = job("one", delay=delay), job("other", delay=delay)
    await enqueue.enqueue_job(pool, one, now=utc_now())
    await put(pool, other)
    found = {}
    for item in (one, other):
        handle = Job(item.id, pool, _queue_name=connection.QUEUE, _deserializer=pool.job_deserializer)
        info = await handle.info()
        assert info is not None
        found[item.key.id] = {
            "function": info.function,
            "attempt": info.args[2],
            "kwargs": info.kwargs,
            "try": info.job_try,
            "status": await handle.status(),
            "type": await pool.type(job_key_prefix + item.id),
        }
        assert [*info.args] == ["default", item.key.id, 1]
    (first, first_score), (second, second_score) = (await scores(pool)).items()

    assert found["one"] == found["other"]
    assert {first, second} == {b"default:one:1", b"default:other:1"}
    assert abs(first_score - second_score) < 100
    lives = [await pool.pttl(job_key_prefix + item.id) for item in (one, other)]
    assert abs(lives[0] - lives[1]) < 1000


async def test_arq_runs_many_jobs_when_they_are_due_and_leaves_no_keys(pool, redis_url):
    async with consuming(redis_url) as found:
        await put(pool, job("now", delay=-HOUR, attempt=3), job("soon", delay=timedelta(seconds=1)), job("later"))
        await eventually(lambda: found == [("default", "now", 3)], seconds=3)
        begun = time.monotonic()
        await eventually(lambda: found[1:] == [("default", "soon", 1)], seconds=3)
        left = await eventually(lambda: only_one_left(pool), seconds=3)

    assert time.monotonic() - begun > 0.3
    assert left == [b"default:later:1"]
    assert await pool.keys("arq:*") == [b"arq:job:default:later:1"]


async def only_one_left(pool):
    left = [*await scores(pool)]
    return left if len(left) == 1 else []


async def test_a_job_that_was_run_can_be_enqueued_again(pool, redis_url):
    async with consuming(redis_url) as found:
        for _ in range(3):
            await put(pool, job("again", delay=-HOUR))
            await eventually(lambda: len(found) > 0, seconds=3)
            found.clear()
            # arq passes over an id that is marked as in progress.
            await eventually(lambda: is_gone(pool, "default:again:1"), seconds=3)


async def is_gone(pool, job_id):
    prefixes = (job_key_prefix, retry_key_prefix, result_key_prefix)
    return not await pool.exists(*(prefix + job_id for prefix in prefixes)) and not await scores(pool)


async def test_no_number_of_tries_drops_a_job(pool, redis_url):
    await pool.set(retry_key_prefix + "default:g1:1", 5000)
    await put(pool, job(delay=-HOUR))
    async with consuming(redis_url) as found:
        await eventually(lambda: len(found) == 1, seconds=3)


async def test_an_abort_in_redis_neither_drops_nor_blocks_a_job(pool, redis_url):
    await pool.zadd(abort_jobs_ss, {"default:g1:1": int(time.time() * 1000)})
    await put(pool, job(delay=timedelta(seconds=0.3)))
    async with consuming(redis_url) as found:
        handle = Job("default:g1:1", pool, _queue_name=connection.QUEUE, _deserializer=pool.job_deserializer)
        assert not await handle.abort(timeout=0.1)
        await eventually(lambda: len(found) == 1, seconds=3)


async def test_jobs_in_another_form_run_no_code(pool, redis_url, tmp_path):
    target = tmp_path / "owned"

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (eval, (f"open({str(target)!r}, 'w').close()",))  # what a pickle may do

    await pool.set(
        job_key_prefix + "pickled", pickle.dumps({"t": 1, "f": enqueue.CLEANUP, "a": (Bomb(),), "k": {}, "et": 1})
    )
    await pool.zadd(connection.QUEUE, {"pickled": 1})
    async with consuming(redis_url) as found:
        await eventually(lambda: is_gone(pool, "pickled"), seconds=3)
        await put(pool, job(delay=-HOUR))
        await eventually(lambda: len(found) == 1, seconds=3)

    assert not target.exists()


async def test_a_job_later_than_its_new_time_is_brought_forward(pool):
    await put(pool, job(delay=9 * HOUR))
    sooner = job(delay=HOUR)
    await put(pool, sooner)

    assert await scores(pool) == {ID: int(sooner.at.timestamp() * 1000) + 1}


async def test_a_job_earlier_than_its_new_time_is_unchanged(pool):
    sooner = job(delay=HOUR)
    await put(pool, sooner)
    await put(pool, job(delay=9 * HOUR))

    assert await scores(pool) == {ID: int(sooner.at.timestamp() * 1000) + 1}


async def test_a_job_without_its_payload_gets_it_again(pool):
    await put(pool, job())
    await pool.delete(job_key_prefix + ID.decode())
    await put(pool, job())

    assert await pool.exists(job_key_prefix + ID.decode())


async def test_a_job_for_the_past_is_due_now(pool):
    before = int(utc_now().timestamp() * 1000)
    await put(pool, job(delay=-HOUR))

    assert before <= (await scores(pool))[ID] <= before + 5000


@pytest.mark.parametrize("is_one", [True, False])
async def test_a_job_stays_in_redis_for_weeks_after_its_time(pool, is_one):
    item = job(delay=48 * HOUR)
    await (enqueue.enqueue_job(pool, item, now=utc_now()) if is_one else put(pool, item))
    left = timedelta(milliseconds=await pool.pttl(job_key_prefix + ID.decode()))

    assert left > timedelta(days=31)


async def test_a_redis_has_one_mark_until_it_is_emptied(pool):
    mark = await put(pool, job())
    assert [await put(pool), await put(pool, job("g2"))] == [mark, mark]
    await pool.flushall()
    other = await put(pool)

    assert other != mark
    assert await put(pool) == other


async def test_no_account_and_no_target_has_a_queue_where_another_has_its_mark(pool):
    jobs: list[enqueue.Job] = [CleanupJob(Key(name, "g1"), 1, utc_now()) for name in (ACCOUNT, "mark", "forward")]
    jobs.append(ForwardJob("mark", "d1", 1, utc_now()))
    for one in jobs * 2:
        await enqueue.enqueue_jobs(pool, one.queue, [one], now=utc_now())

    assert [await pool.zcard(one.queue) for one in jobs] == [1, 1, 1, 1]


async def test_a_full_redis_refuses_even_no_jobs(pool):
    await pool.config_set("maxmemory", 1)
    try:
        with pytest.raises(connection.QUEUE_ERRORS):
            await put(pool)
    finally:
        await pool.config_set("maxmemory", 0)


async def test_due_jobs_are_removed_whatever_their_ids_are(pool):
    await pool.zadd(connection.QUEUE, {b"\xff\xfe": 1})
    await put(pool, job("due", delay=-HOUR), job("later"))
    await enqueue.remove_due_jobs(pool, connection.QUEUE, now=utc_now() + timedelta(seconds=1))

    assert [*await scores(pool)] == [b"default:later:1"]
    assert await pool.keys("arq:job:*") == [b"arq:job:default:later:1"]


async def test_thousands_of_jobs_are_enqueued_at_once(pool):
    await put(pool, *(job(f"g{number}") for number in range(2500)))

    assert await pool.zcard(connection.QUEUE) == 2500


async def test_any_id_is_enqueued(pool, redis_url):
    name = "a:b ü\"'{}🪰"
    await put(pool, job(name, delay=_NOW))
    async with consuming(redis_url) as found:
        await eventually(lambda: found == [("default", name, 1)], seconds=3)


async def test_a_redis_that_is_unreachable_is_an_error_within_its_time(short_path):
    pool = connection.connect(Secret(f"unix://{short_path}/none.sock"), retries=0)
    begun = asyncio.get_running_loop().time()
    with pytest.raises(connection.QUEUE_ERRORS):
        await put(pool, job())
    await pool.aclose(close_connection_pool=True)

    assert asyncio.get_running_loop().time() - begun < enqueue.ENQUEUE_TIMEOUT_SECONDS + 1


async def test_a_redis_that_hangs_is_an_error_within_its_time(monkeypatch):
    monkeypatch.setattr(enqueue, "ENQUEUE_TIMEOUT_SECONDS", 0.3)

    async def hang(reader, writer):
        await reader.read()  # until the client is gone
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        pool = connection.connect(Secret(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"), retries=0)
        with pytest.raises(connection.QUEUE_ERRORS):
            await asyncio.wait_for(put(pool, job()), 2)
        await pool.aclose(close_connection_pool=True)
        await asyncio.sleep(0.05)


async def test_a_redis_that_would_drop_jobs_is_refused(short_path):
    with redis_server(short_path, maxmemory_policy="allkeys-lru") as url:
        pool = connection.connect(Secret(url), retries=0)
        with pytest.raises(QueueError, match="maxmemory-policy allkeys-lru and would drop jobs: set it to noeviction"):
            await connection.check_config(pool)
        await pool.aclose(close_connection_pool=True)


@pytest.mark.parametrize(("appendonly", "warnings"), [("no", 1), ("yes", 0)])
async def test_a_redis_without_an_append_only_file_is_warned_about(short_path, appendonly, warnings):
    with redis_server(short_path, appendonly=appendonly) as url:
        pool = connection.connect(Secret(url), retries=0)
        found = await connection.check_config(pool)
        await pool.aclose(close_connection_pool=True)

    assert [warning.partition(":")[0] for warning in found] == ["Redis has appendonly no"] * warnings


@pytest.mark.parametrize(
    ("url", "hosts", "service", "login"),
    [
        ("sentinel://a:1,b:2/main/3", [("a", 1), ("b", 2)], "main", (3, None, None)),
        ("sentinel://a", [("a", 26379)], "mymaster", (0, None, None)),
        ("sentinel://:p%40ss@a:1/main", [("a", 1)], "main", (0, None, "p@ss")),
        ("sentinel://u:p@a:1,b:2,c:3/main", [("a", 1), ("b", 2), ("c", 3)], "main", (0, "u", "p")),
    ],
)
async def test_a_sentinel_url_is_read(url, hosts, service, login):
    pool: Any = connection.connect(Secret(url), retries=1).connection_pool
    options = pool.connection_kwargs
    sentinels = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]

    assert [(one["host"], one["port"]) for one in sentinels] == hosts
    assert pool.service_name == service
    assert (options["db"], options["username"], options["password"]) == login
    assert options["socket_timeout"] == 2
