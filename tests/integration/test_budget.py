"""All workers together make no more calls than the budget has, and fewer when they cannot ask each other."""

import asyncio
import time

import pytest

from service import queue
from service.budget import ALONE_SHARE, Budget, spread
from service.settings import Rate, Secret

KEY = Secret("sk-1")


async def granted_within(seconds, budgets, *, wanted=2):
    """Have all *budgets* grant calls for so long and return how many each did."""

    async def grant_on(budget):
        calls, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            calls += await budget.grant(wanted)
        return calls

    return await asyncio.gather(*map(grant_on, budgets))


@pytest.fixture
async def other_pool(redis_url):
    """Another worker's connections to the same Redis."""
    pool = queue.connect(Secret(redis_url), retries=1)
    yield pool
    await pool.aclose(close_connection_pool=True)


@pytest.fixture
async def no_pool(tmp_path):
    """Connections to a Redis that is not there."""
    pool = queue.connect(Secret(f"unix://{tmp_path}/none.sock"), retries=0)
    yield pool
    await pool.aclose(close_connection_pool=True)


@pytest.mark.parametrize(
    ("rate", "window"),
    [
        (Rate(300, 60), (5, 1)),
        (Rate(60, 60), (1, 1)),
        (Rate(30, 60), (1, 2)),
        (Rate(10, 1), (10, 1)),
        (Rate(1, 3600), (1, 3600)),
        (Rate(3600, 3600), (1, 1)),
        (Rate(100, 60), (1, 1)),
    ],
)
def test_a_rate_is_spread_over_the_shortest_window_and_never_exceeded(rate, window):
    assert spread(rate) == window
    assert window[0] / window[1] <= rate.calls / rate.seconds


async def test_within_the_budget_nobody_waits(pool):
    budget = Budget(Rate(1000, 1), pool, KEY, clock=time.monotonic)
    begun = time.monotonic()
    granted = [await budget.grant(2) for _ in range(50)]

    assert granted == [2] * 50
    assert time.monotonic() - begun < 1


async def test_what_is_granted_is_what_there_is_and_what_is_put_back_is_granted_again(pool):
    budget = Budget(Rate(5, 1), pool, KEY, clock=time.monotonic)
    assert await budget.grant(100) == 5
    begun = time.monotonic()
    assert await budget.grant(1) == 0
    assert 0.04 <= time.monotonic() - begun < 0.9  # it waits a little, so that whoever asks again does not spin
    budget.put_back(3)

    assert await budget.grant(2) == 2
    assert await budget.grant(2) == 1


async def test_two_workers_with_one_key_share_one_budget(pool, other_pool):
    budgets = [Budget(Rate(10, 1), one, KEY, clock=time.monotonic) for one in (pool, other_pool)]
    calls = await granted_within(1.5, budgets)

    assert 10 <= sum(calls) <= 30  # one and a half seconds touch at most three windows
    assert all(calls)


async def test_workers_with_different_keys_have_a_budget_each(pool):
    budgets = [Budget(Rate(10, 1), pool, Secret(key), clock=time.monotonic) for key in ("sk-1", "sk-2")]

    assert [await budget.grant(10) for budget in budgets] == [10, 10]
    assert not [key for key in await pool.keys("*") if b"sk-" in key]


async def test_without_redis_a_worker_takes_its_share_alone(no_pool):
    budget = Budget(Rate(8 * ALONE_SHARE, 1), no_pool, KEY, clock=time.monotonic)
    (calls,) = await granted_within(1.5, [budget])

    assert 8 <= calls <= 24


async def test_a_worker_that_has_seen_many_others_takes_no_more_than_its_part_without_redis(pool):
    rate = Rate(2 * 16, 1)
    budget = Budget(rate, pool, KEY, clock=time.monotonic)
    for _ in range(15):
        await Budget(rate, pool, KEY, clock=time.monotonic).grant(1)
    await budget.grant(1)
    await pool.config_set("maxmemory", 1)  # Redis answers, and takes nothing any more
    try:
        (calls,) = await granted_within(1.5, [budget])
    finally:
        await pool.config_set("maxmemory", 0)

    assert 2 <= calls <= 8 + 3  # up to three windows of two, and what one asking had left


async def test_after_a_429_no_worker_makes_a_call_until_its_time_is_over(pool, other_pool):
    told, other = (Budget(Rate(1000, 1), one, KEY, clock=time.monotonic) for one in (pool, other_pool))
    await told.grant(1)
    await told.close_for(1.5)
    begun = time.monotonic()

    assert list(await asyncio.gather(told.grant(1), other.grant(1))) == [0, 0]
    assert 0 < other.closed_seconds <= 0.5
    assert not await other.is_open_within(0.1)
    assert await other.is_open_within(5)
    assert 1.45 <= time.monotonic() - begun < 3
    assert await told.grant(1) == await other.grant(1) == 1


async def test_a_429_without_redis_closes_the_worker_that_met_it(no_pool):
    budget = Budget(Rate(1000, 1), no_pool, KEY, clock=time.monotonic)
    await budget.close_for(60)

    assert 59 < budget.closed_seconds <= 60


async def test_a_429_for_ten_years_is_waited_for_a_day_and_a_shorter_one_shortens_nothing(pool):
    budget = Budget(Rate(10, 1), pool, KEY, clock=lambda: 1000.0)
    await budget.close_for(315_360_000)
    assert budget.closed_seconds == 86_400
    await budget.close_for(1)

    assert budget.closed_seconds == 86_400
