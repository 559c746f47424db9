"""Bells are arq jobs in one form for web and worker; they ring at their time, once, and can be moved and silenced."""

import asyncio
import os
import pickle
import shutil
import signal
import tempfile
import time
from contextlib import asynccontextmanager
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import pytest
from arq.constants import abort_jobs_ss, in_progress_key_prefix, job_key_prefix, result_key_prefix, retry_key_prefix
from arq.jobs import Job

import workers.main
from service import queue
from service.generation import Key
from service.queue import Bell, QueueError
from service.tasks import end
from service.values import Secret
from tests.support.ledger import HOUR, utc_now
from tests.support.redis import redis_server
from tests.support.waiting import eventually
from workers.dispatch import Dispatcher

ID = b"default:g1:1"


def bell(generation_id="g1", *, attempts=0, delay=HOUR):
    return Bell(Key("default", generation_id), attempts, utc_now() + delay)


async def ring(pool, *bells: Bell):
    await queue.ring_later(pool, bells, now=utc_now())


async def scores(pool):
    return dict(await pool.zrange(queue.QUEUE, 0, -1, withscores=True))


class Listener(Dispatcher):
    """What a worker's arq tells of bells: it counts them, where a dispatcher would look at the ledger."""

    def __init__(self) -> None:
        self.rung = 0

    def ring(self):
        self.rung += 1


@asynccontextmanager
async def listening(redis_url):
    """Run the arq worker of ``mayfly worker`` on a pool of its own and yield what hears it."""
    pool = queue.connect(Secret(redis_url), retries=1)
    listener = Listener()
    worker = workers.main._arq_worker(pool, listener)
    task = asyncio.create_task(worker.async_run())
    try:
        yield listener
    finally:
        worker.handle_sig(signal.SIGTERM)
        await end([task])
        await pool.aclose(close_connection_pool=True)


@pytest.fixture
def short_path():
    """A folder whose path is short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


async def test_a_bell_is_a_delayed_job_with_the_records_key_and_attempt_as_its_id(pool):
    one = bell(attempts=2)
    await ring(pool, one)

    assert await scores(pool) == {b"default:g1:3": int(one.at.timestamp() * 1000) + 1}
    assert await pool.exists(job_key_prefix + "default:g1:3")


async def test_arq_hears_what_we_ring_when_its_time_has_come_and_not_before(pool, redis_url):
    async with listening(redis_url) as listener:
        await ring(pool, bell("now", delay=-HOUR), bell("soon", delay=timedelta(seconds=1)), bell("later"))
        await eventually(lambda: listener.rung == 1, seconds=3)
        begun = time.monotonic()
        await eventually(lambda: listener.rung == 2, seconds=3)
        left = await scores(pool)

    assert time.monotonic() - begun > 0.3
    assert [*left] == [b"default:later:1"]


async def test_a_bell_that_was_heard_leaves_nothing_and_can_be_rung_again(pool, redis_url):
    async with listening(redis_url) as listener:
        for _ in range(3):
            await ring(pool, bell("again", delay=-HOUR))
            # arq refuses the id of a job whose result lives, and passes over one that is marked as in progress.
            await eventually(lambda: is_gone(pool, "default:again:1"), seconds=3)

    assert listener.rung == 3


async def is_gone(pool, job_id):
    prefixes = (job_key_prefix, in_progress_key_prefix, retry_key_prefix, result_key_prefix)
    return not await pool.exists(*(prefix + job_id for prefix in prefixes)) and not await scores(pool)


async def test_no_number_of_tries_silences_a_bell(pool, redis_url):
    await pool.set(retry_key_prefix + "default:g1:1", 5000)
    await ring(pool, bell(delay=-HOUR))
    async with listening(redis_url) as listener:
        await eventually(lambda: listener.rung == 1, seconds=3)


async def test_an_abort_that_somebody_sent_neither_silences_a_bell_nor_stays_in_its_way(pool, redis_url):
    await pool.zadd(abort_jobs_ss, {"default:g1:1": int(time.time() * 1000)})
    await ring(pool, bell(delay=timedelta(seconds=0.3)))
    async with listening(redis_url) as listener:
        job = Job("default:g1:1", pool, _queue_name=queue.QUEUE, _deserializer=pool.job_deserializer)
        assert not await job.abort(timeout=0.1)
        await eventually(lambda: listener.rung == 1, seconds=3)


async def test_only_our_own_queue_is_heard_and_only_in_our_own_form(pool, redis_url, tmp_path):
    target = tmp_path / "owned"

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (eval, (f"open({str(target)!r}, 'w').close()",))  # what a pickle may do

    await pool.enqueue_job(queue.FUNCTION, _job_id="elsewhere", _queue_name="arq:queue")
    await pool.set(
        job_key_prefix + "pickled", pickle.dumps({"t": 1, "f": queue.FUNCTION, "a": (Bomb(),), "k": {}, "et": 1})
    )
    await pool.zadd(queue.QUEUE, {"pickled": 1})
    async with listening(redis_url) as listener:
        await eventually(lambda: is_gone(pool, "pickled"), seconds=3)
        await ring(pool, bell(delay=-HOUR))
        await eventually(lambda: listener.rung == 1, seconds=3)

    assert not target.exists()
    assert await pool.zcard("arq:queue") == 1


async def test_a_worker_that_dies_with_a_bell_in_hand_holds_that_id_for_seconds_and_not_for_minutes(pool):
    worker = workers.main._arq_worker(pool, Listener())

    # arq holds an id for the longest job_timeout of all functions and ten seconds more.
    assert worker.in_progress_timeout_s <= 30
    assert all(one.timeout_s is None for one in worker.functions.values())
    assert all(one.max_tries is None and one.keep_result_s is None for one in worker.functions.values())


async def test_each_process_has_a_health_key_of_its_own_that_ends_soon_after_it(pool, redis_url):
    async with listening(redis_url):
        (key,) = await eventually(lambda: pool.keys(f"{queue.QUEUE}:health:*"), seconds=3)

        assert key.decode().endswith(f":{os.getpid()}")
        assert await pool.pttl(key) <= 16_000


async def test_arq_is_built_with_the_settings_that_keep_bells_from_being_lost(pool):
    worker = workers.main._arq_worker(pool, Listener())
    is_built = {
        "queue_name": queue.QUEUE,
        "keep_result_s": 0,
        "keep_result_forever": False,
        "max_tries": 10**6,
        "allow_abort_jobs": False,
        "job_serializer": pool.job_serializer,
        "job_deserializer": pool.job_deserializer,
        "timezone": UTC,
        "burst": False,
        "cron_jobs": [],
        "on_job_start": None,  # a hook that raises would end the worker
        "on_job_end": None,
        "after_job_end": None,
    }

    assert {name: getattr(worker, name) for name in is_built} == is_built
    assert list(worker.functions) == [queue.FUNCTION]
    assert worker.poll_delay_s <= 0.2


async def test_ringing_again_moves_the_one_job(pool):
    await ring(pool, bell(delay=9 * HOUR))
    sooner = bell(delay=HOUR)
    await ring(pool, sooner)

    assert await scores(pool) == {ID: int(sooner.at.timestamp() * 1000) + 1}


async def test_a_bell_for_the_past_rings_now(pool):
    before = int(utc_now().timestamp() * 1000)
    await ring(pool, bell(delay=-HOUR))

    assert before <= (await scores(pool))[ID] <= before + 5000


async def test_a_job_outlives_its_time_by_weeks_so_that_a_long_stop_does_not_eat_it(pool):
    await ring(pool, bell(delay=48 * HOUR))
    left = timedelta(milliseconds=await pool.pttl(job_key_prefix + ID.decode()))

    assert left > timedelta(days=31)


async def test_silenced_bells_leave_nothing_in_redis(pool):
    bells = [bell(f"g{number}") for number in range(3)]
    await ring(pool, *bells)
    await queue.silence(pool, bells[:2])

    assert [*await scores(pool)] == [b"default:g2:1"]
    assert await pool.keys("arq:job:*") == [b"arq:job:default:g2:1"]


async def test_thousands_of_bells_are_rung_at_once(pool):
    await ring(pool, *(bell(f"g{number}") for number in range(2500)))

    assert await pool.zcard(queue.QUEUE) == 2500


async def test_any_id_is_rung_for(pool):
    await ring(pool, bell("a:b ü\"'{}🪰"))

    assert [*await scores(pool)] == ["default:a:b ü\"'{}🪰:1".encode()]


async def test_a_redis_that_is_away_is_an_error_within_its_time(short_path):
    pool = queue.connect(Secret(f"unix://{short_path}/none.sock"), retries=0)
    begun = asyncio.get_running_loop().time()
    with pytest.raises(queue.QUEUE_ERRORS):
        await ring(pool, bell())
    await pool.aclose(close_connection_pool=True)

    assert asyncio.get_running_loop().time() - begun < queue.ENQUEUE_TIMEOUT_SECONDS + 1


async def test_a_redis_that_hangs_is_an_error_within_its_time(monkeypatch):
    monkeypatch.setattr(queue, "ENQUEUE_TIMEOUT_SECONDS", 0.3)

    async def hang(reader, writer):
        await reader.read()  # until the client is gone
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        pool = queue.connect(Secret(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"), retries=0)
        with pytest.raises(queue.QUEUE_ERRORS):
            await asyncio.wait_for(ring(pool, bell()), 2)
        await pool.aclose(close_connection_pool=True)
        await asyncio.sleep(0.05)


async def test_a_redis_that_would_drop_jobs_is_refused(short_path):
    with redis_server(short_path, maxmemory_policy="allkeys-lru") as url:
        pool = queue.connect(Secret(url), retries=0)
        with pytest.raises(QueueError, match="maxmemory-policy allkeys-lru and would drop jobs: set it to noeviction"):
            await queue.check(pool)
        await pool.aclose(close_connection_pool=True)


@pytest.mark.parametrize(("appendonly", "warnings"), [("no", 1), ("yes", 0)])
async def test_a_redis_without_a_log_of_its_commands_is_warned_of(short_path, appendonly, warnings):
    with redis_server(short_path, appendonly=appendonly) as url:
        pool = queue.connect(Secret(url), retries=0)
        found = await queue.check(pool)
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
    pool: Any = queue.connect(Secret(url), retries=1).connection_pool
    options = pool.connection_kwargs
    sentinels = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]

    assert [(one["host"], one["port"]) for one in sentinels] == hosts
    assert pool.service_name == service
    assert (options["db"], options["username"], options["password"]) == login
    assert options["socket_timeout"] == 2
