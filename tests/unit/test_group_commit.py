"""Many callers share a commit, and each gets the result of its own item."""

import asyncio
from collections.abc import Sequence

import pytest

from service.ledger.database import LedgerUnavailableError
from service.ledger.group_commit import MAX_BATCH, GroupCommit


class Commits:
    """A commit that doubles numbers, refuses 13 and counts its batches; it waits at its gate."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: Exception | None = None

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        if 13 in items:
            raise ValueError("not 13")
        return [2 * item for item in items]


@pytest.fixture
async def commits():
    return Commits()


@pytest.fixture
async def group(commits):
    return GroupCommit(commits)


async def submit_all(group, items):
    return await asyncio.gather(*(group.submit(item) for item in items), return_exceptions=True)


async def test_a_single_item_does_not_wait_for_others(group, commits):
    assert await group.submit(1) == 2
    assert commits.batches == [[1]]


async def test_items_that_arrive_during_a_commit_share_the_next_one(group, commits):
    commits.gate.clear()
    first = asyncio.create_task(group.submit(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = asyncio.create_task(submit_all(group, [2, 3, 4]))
    await asyncio.sleep(0)
    commits.gate.set()

    assert (await first, await others) == (2, [4, 6, 8])
    assert commits.batches == [[1], [2, 3, 4]]


async def test_items_that_arrive_turn_by_turn_before_a_commit_share_it(group, commits):
    submissions = []
    for number in range(5):
        submissions.append(asyncio.create_task(group.submit(number)))
        await asyncio.sleep(0)

    assert await asyncio.gather(*submissions) == [0, 2, 4, 6, 8]
    assert commits.batches == [[0, 1, 2, 3, 4]]


async def test_a_batch_has_a_largest_size(group, commits):
    assert await submit_all(group, range(100, 100 + MAX_BATCH + 1)) == [2 * n for n in range(100, 101 + MAX_BATCH)]
    assert [len(batch) for batch in commits.batches] == [MAX_BATCH, 1]


async def test_a_bad_item_fails_alone(group):
    results = await submit_all(group, [1, 13, 3])

    assert results[0] == 2
    assert isinstance(results[1], ValueError)
    assert results[2] == 6


async def test_an_unavailable_ledger_fails_the_whole_batch_after_one_call(group, commits):
    commits.fault = LedgerUnavailableError("unavailable")
    results = await submit_all(group, [1, 2, 3])

    assert results == [commits.fault] * 3
    assert commits.batches == [[1, 2, 3]]


async def test_group_commit_continues_after_a_failure(group, commits):
    commits.fault = LedgerUnavailableError("unavailable")
    await submit_all(group, [1])
    commits.fault = None

    assert await group.submit(5) == 10


async def test_a_cancelled_caller_does_not_affect_the_others(group, commits):
    commits.gate.clear()
    first, second = asyncio.create_task(group.submit(1)), asyncio.create_task(group.submit(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    commits.gate.set()

    assert await second == 4
    assert first.cancelled()
    assert commits.batches == [[1, 2]]
