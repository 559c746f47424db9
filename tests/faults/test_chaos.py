"""Random faults against a whole system, and two systems with a part left out, which the judge must condemn."""

import asyncio
import os
import random
import secrets

import pytest

from tests.faults.chaos import Chaos
from tests.faults.system import System, on_both, overdue

SECONDS = float(os.environ.get("CHAOS_SECONDS", "5"))
# A seed means the same order of faults; what they meet differs with the machine's mood.
SEEDS = [int(seed) for seed in os.environ.get("CHAOS_SEED", "1 2").split()] or [secrets.randbelow(10**6)]


@pytest.mark.chaos
@pytest.mark.timeout(SECONDS * 2 + 180)
@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_is_killed_frozen_and_flushed_nothing_is_lost_early_or_without_its_record(
    both: tuple[System, System], seed: int
):
    async with asyncio.TaskGroup() as group:
        for system in both:
            group.create_task(survives(system, seed))


async def survives(system: System, seed: int) -> None:
    """Do harm to *system* and let the judge look at what is left."""
    name = f"seed {seed} on {type(system.ledger).__name__}"
    chaos = Chaos(system, random.Random(name))  # noqa: S311 - faults, not secrets
    await chaos.run(SECONDS)
    verdict = await system.judged()
    accepted = {sent.id for sent in system.sent if sent.is_accepted}
    print(f"{name}: {len(system.sent)} webhooks, {len(accepted)} generations accepted, {len(chaos.told)} faults")

    assert not verdict.all, f"{name}: {chaos.told}"
    assert len(accepted) > SECONDS * 3
    assert accepted <= set(system.simulator.removed)


async def test_the_judge_sees_records_that_stay_behind_without_the_ledgers_dispatch(system: System):
    await system.api(MAYFLY_TTL="2s")
    worker = system.spawn("worker", module="tests.faults.crippled", arguments=["ledger"])
    await worker.logged("worker.started")
    rung = await system.accepted(system.generation())
    await system.until(rung, "deleted", is_hurried=False)  # by its bell: the worker works
    left = [await system.accepted(system.generation()) for _ in range(10)]
    await asyncio.sleep(0.5)  # the last bells go behind the answers' backs
    await system.redis.command("FLUSHALL")
    await overdue(system, left[-1])
    await asyncio.sleep(2)

    verdict = await system.judged()
    assert len(verdict.lost) == len(left)
    assert verdict.early == verdict.unrecorded == verdict.uninvited == []


@on_both
async def test_the_judge_sees_deletes_without_a_record_when_the_copy_is_left_out(system: System):
    await system.api()
    worker = system.spawn("worker", module="tests.faults.crippled", arguments=["copy"])
    await worker.logged("worker.started")
    generations = [await system.accepted(system.generation()) for _ in range(10)]
    await asyncio.gather(*(system.until(one, "deleted") for one in generations))

    verdict = await system.judged()
    assert {one.split()[3] for one in verdict.unrecorded if "before its copy" in one} == {one.id for one in generations}
    assert verdict.lost == []
