"""A control experiment: without the safety net, an undisturbed service deletes everything by its jobs."""

import asyncio

from service.simulator import Generation
from tests.faults.system import System, on_both
from tests.support.waiting import eventually


@on_both
async def test_an_undisturbed_service_deletes_everything_by_its_jobs_alone(system: System):
    _, worker = await asyncio.gather(system.api(), system.worker(without="safety net"))
    generations: list[Generation] = [
        *(system.generation() for _ in range(20)),
        *(system.generation(delete=["409"]) for _ in range(10)),
        *(system.generation(delete=["500"]) for _ in range(10)),
        *(system.generation(get=["500", "503"]) for _ in range(10)),
    ]
    await asyncio.gather(*map(system.accepted, generations))

    async def are_deleted() -> bool:
        return {row.state for row in await system.ledger.rows()} == {"deleted"}

    await eventually(are_deleted, seconds=30)
    assert {one.id for one in generations} == set(system.simulator.removed)
    assert {(await system.row(one)).attempts for one in generations[20:40]} == {2}
    assert {(await system.row(one)).attempts for one in generations[40:]} == {3}

    async def is_queue_empty() -> bool:
        return await system.jobs() == 0

    await eventually(is_queue_empty, seconds=5)
    assert worker.exit_code is None
    assert not (await system.judged()).all
