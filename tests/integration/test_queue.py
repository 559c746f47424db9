"""Bells are arq jobs in one form for web and worker; they ring at their time, once, and can be moved and silenced."""

import asyncio
import shutil
import signal
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from arq.constants import job_key_prefix
from arq.worker import Worker, func

from service import queue
from service.generation import Key
from service.queue import Bell, QueueError
from service.settings import Secret
from tests.support.ledger import HOUR, utc_now
from tests.support.redis import redis_server
from tests.support.waiting import eventually

ID = b"default:g1:1"


def bell(generation_id="g1", *, attempts=0, delay=HOUR):
    return Bell(Key("default", generation_id), attempts, utc_now() + delay)


async def ring(pool, *bells: Bell):
    await queue.ring_later(pool, bells, now=utc_now())


async def scores(pool):
    return dict(await pool.zrange(queue.QUEUE, 0, -1, withscores=True))


def worker_of(pool, heard):
    async def ring_(ctx):
        heard.append(ctx["job_id"])

    return Worker(
        functions=[func(ring_, name=queue.FUNCTION)],
        queue_name=queue.QUEUE,
        redis_pool=pool,
        handle_signals=False,
        keep_result=0,
        poll_delay=0.02,
        job_serializer=pool.job_serializer,
        job_deserializer=pool.job_deserializer,
    )


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
    heard: list[str] = []
    other = queue.connect(Secret(redis_url), retries=1)
    worker = worker_of(other, heard)
    task = asyncio.create_task(worker.async_run())
    await ring(pool, bell("now", delay=-HOUR), bell("soon", delay=timedelta(seconds=0.4)), bell("later"))
    await eventually(lambda: heard == ["default:now:1"], seconds=3)
    await eventually(lambda: heard == ["default:now:1", "default:soon:1"], seconds=3)
    left = await scores(pool)
    worker.handle_sig(signal.SIGTERM)
    await asyncio.gather(task, return_exceptions=True)
    await other.aclose(close_connection_pool=True)

    assert [*left] == [b"default:later:1"]


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
