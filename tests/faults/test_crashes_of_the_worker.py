"""Rows 14 to 20 and 27: a worker that is killed, stopped or frozen at an exact step of a deletion."""

import asyncio
import signal
from functools import partial

import pytest

from service.simulator import Generation, Operation
from tests.faults.processes import Process
from tests.faults.system import System, on_both
from tests.support.waiting import eventually


async def begun(system: System, **faults: list[str]) -> tuple[Generation, Process]:
    """Start both sides and bring one deletion to the gate that *faults* hold."""
    worker, _ = await system.worker(), await system.api()
    generation = await system.accepted(system.generation(**faults))
    await system.held(generation)
    return generation, worker


async def succeeded(system: System, generation: Generation) -> None:
    """Open the gate, end the dead worker's lease, start another one and let it come to the end."""
    system.simulator.release(generation.id)
    await system.expire_leases()
    await system.worker()
    await system.drain()


@on_both
async def test_another_attempt_follows_a_worker_killed_before_its_get(system: System):
    generation, worker = await begun(system, get=["hold"])
    await worker.kill()
    await succeeded(system, generation)

    row = await system.row(generation)
    assert (row.state, row.attempts) == ("deleted", 2)
    assert len(system.calls(generation)) == 1
    assert not (await system.judged()).all


@on_both
async def test_a_worker_killed_before_the_copy_is_committed_has_sent_no_delete(system: System):
    generation, worker = await begun(system, get=["hold"])
    async with system.ledger.lock():
        system.simulator.release(generation.id)
        await asyncio.sleep(0.3)  # the GET is answered, and the copy waits at the lock
        await worker.kill()
    assert (await system.row(generation)).copied_at is None
    assert system.calls(generation) == []
    await succeeded(system, generation)

    assert len(system.calls(generation, Operation.GET)) == 2
    assert len(system.calls(generation)) == 1
    assert not (await system.judged()).all


@on_both
async def test_after_a_worker_killed_between_copy_and_delete_one_delete_is_sent(system: System):
    # One place at the API: while the look at one generation is held there, the DELETE of the other waits in the worker.
    worker, _ = await system.worker(MAYFLY_CONCURRENCY="1"), await system.api()
    pair = [await system.accepted(system.generation(get=["hold"])) for _ in range(2)]
    copied, held = await eventually(partial(first_at_its_gate, system, pair))
    await asyncio.sleep(0.1)  # the other one waits for the place, before anything else can
    system.simulator.release(copied.id)
    await system.held(held)

    async def is_copied() -> bool:
        return (await system.row(copied)).copied_at is not None

    await eventually(is_copied)
    await worker.kill()
    assert system.calls(copied) == []
    assert (await system.row(copied)).state == "deleting"
    await succeeded(system, held)

    for generation in pair:
        assert [call.status for call in system.calls(generation)] == [200]
        assert (await system.row(generation)).outcome == "deleted"
    assert not (await system.judged()).all


async def first_at_its_gate(system: System, pair: list[Generation]) -> list[Generation]:
    """Return *pair*, the one first whose call is held, as soon as one is and both are claimed."""
    states = {row.state for row in await system.ledger.rows()}
    waiting = system.simulator.gates.waiting
    return sorted(pair, key=lambda one: one.id not in waiting) if waiting and states == {"deleting"} else []


async def test_after_a_worker_killed_during_a_failed_delete_another_delete_is_sent(system: System):
    generation, worker = await begun(system, delete=["hold:effect=0"])
    assert (await system.row(generation)).copied_at is not None
    await worker.kill()
    assert generation.id in system.simulator.generations
    await succeeded(system, generation)

    assert (await system.row(generation)).outcome == "deleted"
    assert not (await system.judged()).all


@on_both
async def test_a_delete_whose_answer_was_lost_with_the_worker_is_confirmed_by_a_404(system: System):
    generation, worker = await begun(system, delete=["hold-after"])
    assert generation.id in system.simulator.removed
    await worker.kill()
    await succeeded(system, generation)

    row = await system.row(generation)
    assert (row.state, row.outcome) == ("deleted", "deleted")
    assert row.copy is not None
    assert not (await system.judged()).all


@on_both
async def test_a_delete_whose_commit_was_lost_with_the_worker_is_confirmed_by_a_404(system: System):
    generation, worker = await begun(system, delete=["hold-after"])
    async with system.ledger.lock():
        system.simulator.release(generation.id)
        await asyncio.sleep(0.3)  # the answer is read, and the settlement waits at the lock
        await worker.kill()
    assert (await system.row(generation)).state == "deleting"
    await succeeded(system, generation)

    assert (await system.row(generation)).outcome == "deleted"
    assert not (await system.judged()).all


async def test_sigterm_during_a_delete_lets_it_finish_and_exits_0(system: System):
    generation, worker = await begun(system, delete=["hold-after"])
    worker.send(signal.SIGTERM)
    await asyncio.sleep(0.5)
    assert worker.exit_code is None
    system.simulator.release(generation.id)

    assert await worker.ended(10) == 0
    row = await system.row(generation)
    assert (row.state, row.outcome, row.attempts) == ("deleted", "deleted", 1)
    assert len(system.calls(generation)) == 1


async def test_sigterm_lets_claimed_records_finish_and_leaves_the_others_scheduled(system: System):
    worker, _ = await system.worker(MAYFLY_CONCURRENCY="1"), await system.api()
    generations = [system.generation(get=["hold"]) for _ in range(6)]
    await asyncio.gather(*map(system.accepted, generations))
    await eventually(lambda: list(system.simulator.gates.waiting))
    worker.send(signal.SIGTERM)
    async with asyncio.timeout(10):
        while worker.exit_code is None:
            for generation_id in list(system.simulator.gates.waiting):
                system.simulator.release(generation_id)
            await asyncio.sleep(0.1)

    assert worker.exit_code == 0
    assert {row.state for row in await system.ledger.rows()} == {"deleted", "scheduled"}


async def test_a_record_whose_worker_ends_ten_times_is_not_given_up(system: System):
    system.is_enqueueing = True  # what is judged is that there is an eleventh attempt, not when
    await system.api()
    generation = await system.accepted(system.generation(get=["hold*10"], delete=["500*5"]))
    for is_killed in (True, False) * 5:
        worker = await system.worker()
        await system.held(generation)
        worker.send(signal.SIGKILL if is_killed else signal.SIGTERM)
        if not is_killed:
            await asyncio.sleep(0.1)
            assert worker.exit_code is None  # it is asked to end, and has the attempt to finish
        system.simulator.release(generation.id)
        assert await worker.ended(10) == (-signal.SIGKILL if is_killed else 0)
        await system.expire_leases()
    assert [call.status for call in system.calls(generation)] == [500] * 5
    await system.worker()
    await system.drain()

    row = await system.row(generation)
    assert (row.state, row.outcome, row.attempts) == ("deleted", "deleted", 11)
    assert not (await system.judged()).all


@pytest.mark.parametrize("step", ["get", "delete"])
async def test_a_worker_frozen_beyond_its_lease_cannot_overwrite_its_successor(either_system: System, step: str):
    system = either_system
    sleeper, _ = await system.worker(), await system.api()
    generation = system.generation(**{step: ["hold-after" if step == "delete" else "hold"]})
    await system.accepted(generation)
    await system.held(generation)
    sleeper.send(signal.SIGSTOP)
    await system.expire_leases()
    await system.worker()
    row = await system.until(generation, "deleted")
    system.simulator.release(generation.id)
    sleeper.send(signal.SIGCONT)
    await sleeper.logged("cleanup.lease_lost", seconds=10)

    assert await system.row(generation) == row
    assert sleeper.exit_code is None
    assert not (await system.judged()).all


@on_both
async def test_two_workers_and_twenty_jobs_make_one_get_and_one_delete(system: System):
    await asyncio.gather(system.worker(), system.worker(), system.api(MAYFLY_TTL="3s"))
    generations = [await system.accepted(system.generation()) for _ in range(5)]
    await system.enqueued(5)
    await system.enqueue(times=20)
    assert await system.jobs() == 100
    await system.drain()

    for generation in generations:
        assert len(system.calls(generation, Operation.GET)) == 1
        assert len(system.calls(generation)) == 1

    async def are_consumed() -> bool:
        return await system.jobs() == 0

    await eventually(are_consumed, seconds=5)
    assert not (await system.judged()).all
