"""All workers together make no more calls than the budget has, and fewer when they cannot ask each other."""

import asyncio
import time

import pytest

from service import queue
from service.budget import ALONE_SHARE, CALLS, Budget, spread
from service.values import Rate, Secret

KEY = Secret("sk-1")


async def granted_within(seconds, budgets, *, wanted=1):
    """Have all *budgets* grant attempts for so long and return how many each did."""

    async def grant_on(budget):
        attempts, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            attempts += await budget.grant(wanted)
        return attempts

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
    ("rate", "attempts"),
    [
        (Rate(300, 60), (5, 2)),
        (Rate(60, 60), (1, 2)),
        (Rate(30, 60), (1, 4)),
        (Rate(10, 1), (5, 1)),
        (Rate(1, 3600), (1, 7200)),
        (Rate(1, 1), (1, 2)),
        (Rate(3600, 3600), (1, 2)),
        (Rate(100, 60), (5, 6)),
        (Rate(7, 60), (7, 120)),
        (Rate(1000, 1), (500, 1)),
    ],
)
def test_a_rate_of_calls_is_spread_over_short_windows_of_attempts_and_never_exceeded(rate, attempts):
    assert spread(rate) == attempts
    assert CALLS * attempts[0] / attempts[1] <= rate.calls / rate.seconds


async def test_within_the_budget_nobody_waits(pool):
    budget = Budget(Rate(1000, 1), pool, KEY, clock=time.monotonic)
    begun = time.monotonic()
    granted = [await budget.grant(2) for _ in range(50)]

    assert granted == [2] * 50
    assert time.monotonic() - begun < 1


async def test_what_is_granted_is_what_there_is_and_whoever_asks_again_waits_a_little(pool):
    budget = Budget(Rate(10, 1), pool, KEY, clock=time.monotonic)
    assert await budget.grant(100) == 5
    begun = time.monotonic()
    assert await budget.grant(1) == 0

    assert 0.04 <= time.monotonic() - begun < 0.9


async def test_what_is_put_back_is_granted_again_within_its_window_and_not_hoarded_beyond(pool):
    now = [1000.0]
    budget = Budget(Rate(10, 1), pool, KEY, clock=lambda: now[0])
    assert await budget.grant(5) == 5
    budget.put_back(5)
    assert await budget.grant(2) == 2
    budget.put_back(2)
    now[0] += 1

    assert await budget.grant(100) < 10  # of the new window alone


async def test_one_who_needs_little_leaves_the_rest_to_the_others(pool, other_pool):
    small, large = (Budget(Rate(200, 1), one, KEY, clock=time.monotonic) for one in (pool, other_pool))
    assert await small.grant(1) == 1

    assert await large.grant(100) >= 80


@pytest.mark.parametrize("rate", [Rate(60, 60), Rate(300, 60), Rate(1, 3600)])
async def test_with_nothing_left_it_does_not_spin_with_or_without_redis(pool, no_pool, rate):
    for connections in (pool, no_pool):
        budget = Budget(rate, connections, KEY, clock=time.monotonic)
        end, rounds = time.monotonic() + 0.5, 0
        while time.monotonic() < end:
            rounds += not await budget.grant(100)

        assert rounds <= 11


async def test_two_workers_with_one_key_share_one_budget(pool, other_pool):
    budgets = [Budget(Rate(20, 1), one, KEY, clock=time.monotonic) for one in (pool, other_pool)]
    attempts = await granted_within(1.5, budgets)

    assert 10 <= sum(attempts) <= 30  # one and a half seconds touch at most three windows
    assert all(attempts)


async def test_workers_with_different_keys_have_a_budget_each(pool):
    budgets = [Budget(Rate(10, 1), pool, Secret(key), clock=time.monotonic) for key in ("sk-1", "sk-2")]

    assert [await budget.grant(5) for budget in budgets] == [5, 5]
    assert not [key for key in await pool.keys("*") if b"sk-" in key]


async def test_without_redis_a_worker_takes_its_share_alone(no_pool):
    budget = Budget(Rate(16 * ALONE_SHARE, 1), no_pool, KEY, clock=time.monotonic)
    (attempts,) = await granted_within(1.5, [budget])

    assert 8 <= attempts <= 24


async def test_a_worker_that_has_seen_many_others_takes_no_more_than_its_part_without_redis(pool):
    rate = Rate(4 * 16, 1)
    budget = Budget(rate, pool, KEY, clock=time.monotonic)
    for _ in range(15):
        await Budget(rate, pool, KEY, clock=time.monotonic).grant(1)
    await budget.grant(1)
    await pool.config_set("maxmemory", 1)  # Redis answers, and takes nothing any more
    try:
        (attempts,) = await granted_within(1.5, [budget])
    finally:
        await pool.config_set("maxmemory", 0)

    assert 2 <= attempts <= 8 + 3  # up to three windows of two, and what one asking had left


async def test_while_closed_nothing_is_granted_and_whoever_has_no_time_to_wait_is_told(pool):
    budget = Budget(Rate(1000, 1), pool, KEY, clock=time.monotonic)
    assert await budget.is_open_within(0.1)
    budget.close_for(1.3)
    budget.close_for(0.1)  # a shorter one shortens nothing
    begun = time.monotonic()

    assert await budget.grant(1) == 0
    assert 0.9 <= time.monotonic() - begun < 1.2
    assert not await budget.is_open_within(0.1)
    assert await budget.is_open_within(5)
    assert 1.25 <= time.monotonic() - begun < 2
    assert await budget.grant(1) == 1
    assert not await budget.is_open_within(-1)
