"""Field tests A and E1: absence is no proof, and one record's refusal is its own."""

import asyncio

from service.simulator import Operation
from service.simulator.faults import ABSENT_BODIES, Plan
from tests.faults.system import System, on_both
from tests.support.waiting import eventually

FOREIGN = [f"{status}:answer={body}" for status in (404, 410) for body in sorted(ABSENT_BODIES - {"own"})]
LOST = "answer lost, confirmed by a later 404"


@on_both
async def test_no_404_without_the_apis_own_code_makes_a_record_deleted(system: System):
    system.is_enqueueing = True
    await asyncio.gather(system.worker(), system.api())
    generations = [
        await system.accepted(system.generation(**{method: [f"{fault}*"]}))
        for method in ("get", "delete")
        for fault in FOREIGN
    ]
    while (rows := await system.ledger.rows()) and min(row.failures for row in rows) < 6:
        assert {row.state for row in rows} <= {"scheduled", "deleting"}
        await system.hurry()
        await asyncio.sleep(0.2)
    assert {one.id for one in generations} == set(system.simulator.generations)
    system.simulator.plan = Plan(0)  # the routes are back
    assert {row.refusals for row in rows} == {0}
    await system.drain()

    assert {row.outcome for row in await system.ledger.rows()} == {"deleted"}
    assert not (await system.judged()).all


@on_both
async def test_a_delete_with_a_lost_answer_ends_as_deleted_and_says_why(system: System):
    system.is_enqueueing = True
    await asyncio.gather(system.worker(), system.api())
    ours = await system.accepted(system.generation(delete=["lost"]))
    others = await system.accepted(system.generation(get=["404"]))
    await system.drain()

    record = await system.record(ours)
    assert (record["outcome"], record["receipt"]["detail"]) == ("deleted", LOST)
    assert record["events"][-1]["detail"]["detail"] == LOST
    assert (await system.row(others)).outcome == "already_gone"
    assert not (await system.judged()).all


async def test_the_verdict_fails_for_a_deleted_record_whose_generation_exists(system: System):
    await asyncio.gather(system.worker(), system.api())
    # Of what the API itself says, only the judge can know that it is not true.
    untrue = await system.accepted(system.generation(get=["404:answer=own"]))
    await system.until(untrue, "deleted")

    verdict = await system.judged()
    assert verdict.all == verdict.untrue == [f"I8 {untrue.id} is called deleted and still there (already_gone)"]


@on_both
async def test_generations_that_a_key_never_knew_pause_deletions(system: System):
    worker, _ = await asyncio.gather(system.worker(), system.api())
    system.simulator.switches.latency_seconds = 0.2
    generations = [system.generation() for _ in range(60)]
    system.simulator.plan.stand("GET", "404:answer=own")  # as to the key of another organisation
    await asyncio.gather(*map(system.accepted, generations))

    async def is_paused() -> bool:
        return await system.metric('mayfly_pauses{kind="wrong_organisation"}') == 1

    await eventually(is_paused, seconds=20)
    await asyncio.sleep(2)  # what was under way at that moment ends
    calls = len(system.simulator.calls)
    await asyncio.sleep(2)
    _, health = await system.health()

    assert len(system.simulator.calls) == calls
    assert "mayfly doctor" in health["parts"]["deletions"]["detail"]
    assert sum(row.state == "deleted" for row in await system.ledger.rows()) == 5
    assert await worker.stop() == 0

    # Another key, which knows them: the pause was not its own.
    system.simulator.plan.stand("GET", None)
    system.simulator.api_key = "sk-right-0123456789"
    await system.worker(SYNC_API_KEY="sk-right-0123456789")
    await system.drain()

    assert {row.state for row in await system.ledger.rows()} == {"deleted"}
    assert await system.metric('mayfly_pauses{kind="wrong_organisation"}') == 0
    assert len(system.simulator.generations) == 5  # the first few cannot be told from what is gone
    verdict = await system.judged()
    assert len(verdict.untrue) == len(verdict.all) == 5


@on_both
async def test_a_record_that_is_refused_alone_fails_while_all_others_are_deleted(system: System):
    system.is_enqueueing = True
    await asyncio.gather(system.worker(), system.api())
    refused = [
        await system.accepted(system.generation(**{method: [f"{fault}*"]}))
        for method in ("get", "delete")
        for fault in ("401", "403", "403-html")
    ]
    others = [await system.accepted(system.generation()) for _ in range(30)]
    await system.drain()

    assert {one.id for one in others} == set(system.simulator.removed)
    assert {(await system.row(one)).state for one in refused} == {"failed"}
    assert await system.metric('mayfly_pauses{kind="unauthorized"}') == 0
    assert not (await system.judged(may_fail=refused)).all


async def test_a_block_page_for_every_call_pauses_and_fails_nothing(system: System):
    await asyncio.gather(system.worker(), system.api())
    for operation in (Operation.GET, Operation.LIST):
        system.simulator.plan.stand(operation, "403-html")
    generation = await system.accepted(system.generation())
    async with asyncio.timeout(30):
        while (row := await system.row(generation)).failures < 6:
            await system.hurry()
            await asyncio.sleep(0.2)

    assert row.refusals == 0
    assert await system.metric('mayfly_pauses{kind="unauthorized"}') == 0
    for operation in (Operation.GET, Operation.LIST):
        system.simulator.plan.stand(operation, None)
    await system.drain()
    assert not (await system.judged()).all
