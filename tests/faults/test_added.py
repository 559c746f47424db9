"""Generations that an app adds by their ids: a web side that dies, many calls at once, and ones that still process."""

import asyncio
from datetime import UTC, datetime, timedelta

import httpx

from service.simulator import Generation, Operation
from tests.faults.judging import Sent
from tests.faults.proxy import Proxy
from tests.faults.system import System, on_both
from tests.support.ports import free_port
from tests.support.waiting import eventually

INTAKE_TOKEN = "intake-token-of-the-fault-tests"
APP = {"authorization": f"Bearer {INTAKE_TOKEN}"}


async def add(system: System, generation_id: str, *, port: int | None = None, **asked: str) -> httpx.Response:
    """Add a generation as an app does, and note the due time that was promised as that of a webhook."""
    url = f"http://127.0.0.1:{port or system.port}/api/records"
    answer = await system.client.post(url, json={"id": generation_id} | asked, headers=APP)
    if answer.status_code in {200, 201}:
        due_at = answer.json()["dueAt"]
        system.sent.append(Sent(generation_id, 202, datetime.now(UTC), due_at and datetime.fromisoformat(due_at)))
    return answer


@on_both
async def test_a_record_added_at_a_web_side_killed_before_the_enqueue_is_deleted(system: System):

    async def connect():
        return await asyncio.open_connection("127.0.0.1", system.redis.port)

    system.environment["MAYFLY_INTAKE_TOKEN"] = INTAKE_TOKEN
    generation = system.generation()
    async with Proxy(connect).serve() as proxy:
        api = await system.api(MAYFLY_REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0")
        proxy.trouble("stall", b"EVALSHA")
        assert (await add(system, generation.id)).status_code == 201
        await asyncio.wait_for(proxy.reached.wait(), 5)
        await api.kill()
    assert await system.redis.command("ZCARD", "mayfly:v1") == 0
    await system.worker()
    row = await system.until(generation, "deleted", is_hurried=False, seconds=30)

    assert row.status == "COMPLETED"
    assert len(system.calls(generation)) == 1
    assert not (await system.judged()).all


@on_both
async def test_what_two_web_sides_are_told_at_once_is_one_record_and_deleted_once(system: System):
    system.environment["MAYFLY_INTAKE_TOKEN"] = INTAKE_TOKEN
    other = free_port()
    await asyncio.gather(system.api(), system.api(MAYFLY_PORT=str(other)), system.worker())
    generations = [system.generation() for _ in range(10)]
    answers = await asyncio.gather(
        *(add(system, one.id, port=port) for one in generations for port in (system.port, other, system.port))
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 20 + [201] * 10
    await system.drain()

    assert len(await system.ledger.rows()) == 10
    assert [len(system.calls(one)) for one in generations] == [1] * 10
    assert not (await system.judged()).all


@on_both
async def test_what_still_processes_is_deleted_only_after_it_has_ended(system: System):
    system.environment["MAYFLY_INTAKE_TOKEN"] = INTAKE_TOKEN
    await asyncio.gather(system.api(), system.worker())
    generations = [system.generation(status="PROCESSING") for _ in range(5)]
    for generation in generations:
        assert (await add(system, generation.id)).status_code == 201

    async def are_seen() -> bool:
        return {row.status for row in await system.ledger.rows()} == {"PROCESSING"}

    async def were_tried() -> bool:
        return all(len(system.calls(one, Operation.GET)) >= 2 for one in generations)

    await eventually(are_seen, seconds=20)
    await eventually(were_tried, seconds=20)
    ended = datetime.now(UTC)
    for generation in generations:
        generation.become("COMPLETED")
    await system.ledger.execute("UPDATE records SET look_at = :now")
    await asyncio.gather(*(_is_deleted(system, one) for one in generations))

    assert all(call.at >= ended for one in generations for call in system.calls(one))
    assert not (await system.judged()).all


async def _is_deleted(system: System, generation: Generation) -> None:
    await system.until(generation, "deleted", seconds=40)


@on_both
async def test_a_wrong_id_fails_and_every_other_record_is_deleted(system: System):
    system.environment["MAYFLY_INTAKE_TOKEN"] = INTAKE_TOKEN
    await asyncio.gather(system.api(), system.worker())
    for number in range(8):
        assert (await add(system, f"wrong-{number}")).status_code == 201
    generation = system.generation()
    await add(system, generation.id)
    await system.until(generation, "deleted", seconds=30)
    await system.ledger.pass_time(timedelta(minutes=2))

    async def have_failed() -> bool:
        rows = [row for row in await system.ledger.rows() if row.id.startswith("wrong")]
        return {row.state for row in rows} == {"failed"}

    await eventually(have_failed, seconds=30)

    rows = {row.id: row for row in await system.ledger.rows()}
    assert all("sync.so does not know this id" in (rows[f"wrong-{number}"].last_error or "") for number in range(8))
    assert await system.ledger.number("SELECT count(*) FROM pauses") == 0
