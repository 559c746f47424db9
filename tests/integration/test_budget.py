"""All workers together make no more calls than the budget has, and fewer when they cannot ask each other."""

import asyncio
import time

import pytest

from service import queue
from service.budget import ALONE_SHARE, MAX_CLOSED_SECONDS, Budget, spread
from service.settings import Rate, Secret
from workers.main import LEASE, paced

KEY = Secret("sk-1")


async def taken_within(seconds, budgets):
    """Take calls from all *budgets* for so long and return how many there were."""
    calls = 0

    async def take_on(budget):
        nonlocal calls
        while True:
            await budget.take()
            calls += 1

    takers = [asyncio.create_task(take_on(budget)) for budget in budgets]
    await asyncio.sleep(seconds)
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)
    return calls


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
    for _ in range(100):
        await budget.take()

    assert time.monotonic() - begun < 1


async def test_two_workers_with_one_key_share_one_budget(pool, redis_url):
    other_pool = queue.connect(Secret(redis_url), retries=1)
    budgets = [Budget(Rate(10, 1), one, KEY, clock=time.monotonic) for one in (pool, other_pool)]
    calls = await taken_within(1.5, budgets)
    await other_pool.aclose(close_connection_pool=True)

    assert 10 <= calls <= 30  # one and a half seconds touch at most three windows


async def test_workers_with_different_keys_have_a_budget_each(pool):
    budgets = [Budget(Rate(10, 1), pool, Secret(key), clock=time.monotonic) for key in ("sk-1", "sk-2")]
    for budget in budgets:
        for _ in range(10):
            await asyncio.wait_for(budget.take(), 5)

    assert not [key for key in await pool.keys("*") if b"sk-" in key]


async def test_without_redis_a_worker_takes_its_share_alone(tmp_path):
    pool = queue.connect(Secret(f"unix://{tmp_path}/none.sock"), retries=0)
    budget = Budget(Rate(8 * ALONE_SHARE, 1), pool, KEY, clock=time.monotonic)
    calls = await taken_within(1.5, [budget])
    await pool.aclose(close_connection_pool=True)

    assert 1 <= calls <= 24


async def test_after_a_429_no_call_is_made_until_its_time_is_over(pool):
    budget = Budget(Rate(1000, 1), pool, KEY, clock=time.monotonic)
    await budget.take()
    budget.close_for(0.4)
    begun = time.monotonic()
    assert budget.is_closed()
    await budget.take()

    assert 0.35 <= time.monotonic() - begun < 2
    assert not budget.is_closed()


async def test_a_429_for_an_hour_does_not_stop_all_for_an_hour(pool):
    now = 1000.0
    budget = Budget(Rate(10, 1), pool, KEY, clock=lambda: now)
    budget.close_for(3600)
    now += MAX_CLOSED_SECONDS

    assert not budget.is_closed()


@pytest.mark.parametrize("calls_per_second", [1000, 5, 1, 0.1, 1 / 3600])
def test_no_more_is_claimed_at_once_than_the_budget_can_serve_within_the_lease(calls_per_second):
    lease, concurrency = paced(50, 1 / calls_per_second)

    assert 1 <= concurrency <= 50
    assert lease >= LEASE
    # Four times as many records are claimed as calls are made at once, and each takes two calls.
    assert 8 * (concurrency - 1) / calls_per_second <= lease.total_seconds()
