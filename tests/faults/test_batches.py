"""A finished batch while its worker is killed, Redis is emptied, the API silent: each generation is deleted once."""

import asyncio
import json
from datetime import UTC, datetime

from service.simulator.batch import Batch
from tests.faults.judging import Sent
from tests.faults.system import API_KEY, System, on_both
from tests.support.waiting import eventually

PAYLOAD = {"model": "lipsync-2", "input": [{"type": "video", "url": "https://cdn.example.com/a.mp4"}]}


async def finished(system: System) -> Batch:
    """Let the API make a batch of 40, some of which fail, and send its webhook, which is the only one."""
    system.simulator.switches.processing_seconds = 0.1
    system.simulator.switches.endings = ("COMPLETED", "COMPLETED", "COMPLETED", "FAILED")
    lines = [
        json.dumps({"request_id": f"r{number}", "endpoint": "/v2/generate", "payload": PAYLOAD}) for number in range(40)
    ]
    made = await system.client.post(
        f"{system.simulator.url}/v2/batch",
        data={"webhook_url": f"{system.url}/webhooks/sync"},
        files={"input": ("batch.jsonl", "\n".join(lines))},
        headers={"x-api-key": API_KEY},
    )
    batch: Batch = system.simulator.batches[made.json()["id"]]
    delivery = await eventually(
        lambda: next((one for one in system.simulator.deliveries if one.generation_id == batch.id), None), seconds=40
    )
    assert delivery.status == 202
    now = datetime.now(UTC)
    system.sent += [Sent(one.id, 202, now) for one in batch.generations]  # its webhook is that of each of them
    return batch


async def expire_lease(system: System) -> None:
    """End the lease of a worker that was killed, as waiting two minutes would."""
    await system.ledger.execute("UPDATE batches SET look_at = :now WHERE look_at > :now")


async def resolved(system: System, *, seconds: float = 30) -> None:
    """Wait until the batch is resolved, its waits cut short, and everything is deleted."""

    async def is_resolved() -> bool:
        await expire_lease(system)
        await asyncio.sleep(0.3)
        return bool(await system.ledger.number("SELECT count(*) FROM batches WHERE state = 'resolved'"))

    await eventually(is_resolved, seconds=seconds)
    await system.drain()


async def check(system: System, batch: Batch) -> None:
    """Check that each generation of *batch* has one record, and was deleted once."""
    ids = {one.id for one in batch.generations}
    assert await system.ids() == ids == set(system.simulator.removed)
    assert await system.ledger.number("SELECT scheduled FROM batches") == 40
    assert not (await system.judged()).all


@on_both
async def test_a_worker_killed_between_the_results_and_the_commit_loses_nothing(system: System):
    worker, _ = await system.worker(), await system.api()
    system.simulator.plan.script("MEDIA", ["hold"])
    batch = await finished(system)
    async with asyncio.timeout(20):
        await system.simulator.gates.reached(batch.id)
    async with system.ledger.lock():
        system.simulator.release(batch.id)
        await asyncio.sleep(0.3)  # the results are read, and the records wait at the lock
        await worker.kill()
    assert await system.ids() == set()
    await system.worker()
    await resolved(system)

    await check(system, batch)


@on_both
async def test_a_batch_whose_job_redis_lost_is_found_in_the_ledger(system: System):
    await system.api()
    batch = await finished(system)
    await system.enqueued(1)
    await system.redis.command("FLUSHALL")
    await system.worker()
    await resolved(system)

    await check(system, batch)


@on_both
async def test_a_batch_waits_for_an_api_that_does_not_answer(system: System):
    for operation in ("BATCH-RESULT", "BATCH-GET", "LIST"):
        system.simulator.plan.stand(operation, "drop")
    await asyncio.gather(system.api(), system.worker())
    batch = await finished(system)

    async def is_unresolved() -> bool:
        return bool(await system.ledger.number("SELECT count(*) FROM batches WHERE state = 'unresolved'"))

    await eventually(is_unresolved, seconds=40)
    assert await system.ids() == set()
    for operation in ("BATCH-RESULT", "BATCH-GET", "LIST"):
        system.simulator.plan.stand(operation, None)
    await resolved(system)

    await check(system, batch)
