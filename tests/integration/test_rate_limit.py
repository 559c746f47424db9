"""All workers together stay within the budget of calls, and use a fixed share each without Redis."""

import asyncio
import time

import pytest

from service.core.rate import Rate
from service.core.secret import Secret
from service.jobs import connection
from service.sync.rate_limit import ALONE_SHARE, CALLS, Budget, spread_rate

KEY = Secret("sk-1")


def budget_of(rate, pool, key=KEY):
    return Budget(rate, pool, key, clock=time.monotonic, stopping=asyncio.Event())


async def granted_within(seconds, budgets, *, wanted=1):
    """Have all *budgets* grant attempts for so long and return how many each did."""

    async def grant_on(budget):
        attempts, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            attempts += (granted := await budget.grant(wanted))
            await asyncio.sleep(0 if granted else 0.01)
        return attempts

    return await asyncio.gather(*map(grant_on, budgets))


@pytest.fixture
async def other_pool(redis_url):
    """Another worker's connections to the same Redis."""
    pool = connection.connect(Secret(redis_url), retries=1)
    yield pool
    await pool.aclose(close_connection_pool=True)


@pytest.fixture
async def no_pool(tmp_path):
    """Connections to a Redis that is not there."""
    pool = connection.connect(Secret(f"unix://{tmp_path}/none.sock"), retries=0)
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
def test_a_rate_is_spread_over_short_windows_and_never_exceeded(rate, attempts):
    assert spread_rate(rate) == attempts
    assert CALLS * attempts[0] / attempts[1] <= rate.calls / rate.seconds


def look_at_every_window(rate):
    """Return what spread_rate() does, by comparing each window up to ten times the shortest."""
    shortest = max(1, -(-CALLS * rate.seconds // rate.calls))
    windows = range(shortest, 10 * shortest + 1)
    counts = {seconds: rate.calls * seconds // (CALLS * rate.seconds) for seconds in windows}
    best = max(windows, key=lambda seconds: (counts[seconds] / seconds, -seconds))
    return counts[best], best


def test_few_windows_are_compared_and_no_other_rounds_down_less():
    for calls in [*range(1, 400, 7), 1000, 7201, 10**6]:
        for seconds in (1, 60, 240, 3600):
            if calls * 20 > seconds:  # else the slow way takes too long
                rate = Rate(calls, seconds)
                assert spread_rate(rate) == look_at_every_window(rate), rate


@pytest.mark.parametrize("seconds", [3600, 3600 * ALONE_SHARE])
def test_the_slowest_rate_is_spread_at_once(seconds):
    compared = []

    class Counted(int):
        def __mul__(self, seconds: int) -> int:
            compared.append(seconds)
            return int(self) * seconds

    spread_rate(Rate(Counted(1), seconds))

    assert len(compared) < 100


async def test_at_a_slow_rate_an_attempt_put_back_outlasts_a_ledger_that_fails(pool):
    now = [1000.0]
    budget = Budget(Rate(1, 3600), pool, KEY, clock=lambda: now[0], stopping=asyncio.Event())
    assert await budget.grant(1) == 1
    now[0] += 60
    budget.put_back(1)

    assert await budget.grant(1) == 1  # not two hours later
    budget.put_back(1)
    now[0] += 700
    assert await budget.grant(1) == 0  # too near to the next one


async def test_an_attempt_within_the_budget_does_not_wait(pool):
    budget = budget_of(Rate(1000, 1), pool)
    begun = time.monotonic()
    granted = [await budget.grant(2) for _ in range(50)]

    assert granted == [2] * 50
    assert time.monotonic() - begun < 1


async def test_grant_returns_what_is_available_without_waiting_for_more(pool):
    budget = budget_of(Rate(10, 1), pool)
    begun = time.monotonic()

    assert await budget.grant(100) == 5
    assert await budget.grant(1) == 0
    assert time.monotonic() - begun < 0.5


async def test_an_attempt_put_back_is_granted_again_within_its_window_only(pool):
    now = [1000.0]
    budget = Budget(Rate(10, 1), pool, KEY, clock=lambda: now[0], stopping=asyncio.Event())
    assert await budget.grant(5) == 5
    budget.put_back(5)
    assert await budget.grant(2) == 2
    budget.put_back(2)
    now[0] += 1

    assert await budget.grant(100) <= 5  # of the new window alone


async def test_a_worker_that_needs_little_leaves_the_rest_to_the_others(pool, other_pool):
    small, large = (budget_of(Rate(200, 1), one) for one in (pool, other_pool))
    assert await small.grant(1) == 1

    assert await large.grant(100) >= 80


async def test_waiting_attempts_are_granted_in_order_and_within_the_rate(pool):
    budget = budget_of(Rate(40, 1), pool)
    served = []

    async def wait_for(number):
        if await budget.acquire(10):
            served.append((number, time.monotonic()))

    await asyncio.gather(*(wait_for(number) for number in range(60)))

    assert [number for number, _ in served] == list(range(60))
    times = [at for _, at in served]
    assert times[-1] - times[0] >= 1.8  # 20 at once, and 20 a second from then on
    assert budget.waiting == 0


async def test_acquire_returns_false_at_its_timeout_and_stops_asking(pool):
    budget = budget_of(Rate(1, 3600), pool)
    assert await budget.acquire(1)
    begun = time.monotonic()

    assert await asyncio.gather(*(budget.acquire(0.3) for _ in range(5))) == [False] * 5
    assert time.monotonic() - begun < 1
    assert budget.waiting == 0


async def test_a_stop_ends_all_waits_at_once(pool):
    stopping = asyncio.Event()
    budget = Budget(Rate(1, 3600), pool, KEY, clock=time.monotonic, stopping=stopping)
    assert await budget.acquire(1)
    waiting = [asyncio.create_task(budget.acquire(30)) for _ in range(100)]
    await asyncio.sleep(0.05)
    stopping.set()

    async with asyncio.timeout(1):
        assert await asyncio.gather(*waiting) == [False] * 100


@pytest.mark.parametrize("rate", [Rate(60, 60), Rate(300, 60), Rate(1, 3600)])
async def test_waiting_with_an_empty_budget_does_not_busy_loop(pool, rate, monkeypatch):
    budget = budget_of(rate, pool)
    await budget.grant(100)
    asked = []
    grant = budget.grant

    async def counting(wanted):
        asked.append(wanted)
        return await grant(wanted)

    monkeypatch.setattr(budget, "grant", counting)
    await budget.acquire(0.5)

    assert 1 <= len(asked) <= 15


async def test_no_window_edge_allows_twice_the_rate(pool):
    budget = budget_of(Rate(40, 1), pool)
    times = []
    end = time.monotonic() + 4
    while time.monotonic() < end:
        if await budget.grant(1):
            times.append(time.monotonic())
        else:
            await asyncio.sleep(0.005)

    in_any_second = max(sum(start <= at < start + 1 for at in times) for start in times[20:])
    assert in_any_second <= 24  # 20, and what a window's edge and a slow machine move
    assert len(times) >= 75  # of 20 and 20 a second


async def test_two_workers_with_one_key_share_one_budget(pool, other_pool):
    budgets = [budget_of(Rate(20, 1), one) for one in (pool, other_pool)]
    attempts = await granted_within(1.5, budgets)

    assert 10 <= sum(attempts) <= 30  # one and a half seconds touch at most three windows
    assert all(attempts)


async def test_workers_with_different_keys_have_a_budget_each(pool):
    budgets = [budget_of(Rate(10, 1), pool, Secret(key)) for key in ("sk-1", "sk-2")]

    assert [await budget.grant(5) for budget in budgets] == [5, 5]
    assert not [key for key in await pool.keys("*") if b"sk-" in key]


async def test_without_redis_a_worker_uses_its_own_share(no_pool):
    budget = budget_of(Rate(16 * ALONE_SHARE, 1), no_pool)
    (attempts,) = await granted_within(1.5, [budget])

    assert 8 <= attempts <= 24


async def test_a_closed_budget_grants_nothing_and_reports_a_deadline_it_cannot_meet(pool):
    budget = budget_of(Rate(1000, 1), pool)
    assert await budget.is_open_within(0.1)
    budget.close_for(1.3)
    budget.close_for(0.1)  # a shorter one shortens nothing
    begun = time.monotonic()

    assert await budget.grant(1) == 0
    assert not await budget.acquire(0.1)
    assert not await budget.is_open_within(0.1)
    assert await budget.is_open_within(5)
    assert 1.25 <= time.monotonic() - begun < 2
    assert await budget.grant(1) == 1
    assert not await budget.is_open_within(-1)
