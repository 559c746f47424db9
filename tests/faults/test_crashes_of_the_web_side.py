"""Rows 1 to 4 and 28: a web side that dies while it receives a webhook, and duplicate webhooks."""

import asyncio

from tests.faults.proxy import Proxy
from tests.faults.system import System, on_both, overdue
from tests.support.ports import free_port


async def test_half_a_webhook_at_a_killed_web_side_makes_no_record_and_a_retry_makes_one(system: System):
    api = await system.api()
    generation = system.generation()
    body, headers = system.simulator.webhook(generation.id)
    reader, writer = await asyncio.open_connection("127.0.0.1", system.port)
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"POST /webhooks/sync HTTP/1.1\r\nhost: mayfly\r\n{head}content-length: {len(body)}\r\n\r\n".encode())
    writer.write(body[: len(body) // 2])
    await writer.drain()
    await asyncio.sleep(0.2)
    await api.kill()
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert answer == b""
    assert await system.ids() == set()
    await asyncio.gather(system.api(), system.worker())
    await system.accepted(generation)
    await system.drain()

    assert (await system.row(generation)).state == "deleted"
    assert not (await system.judged()).all


@on_both
async def test_a_web_side_killed_before_its_commit_answers_and_stores_nothing(system: System):
    api = await system.api()
    generation = system.generation()
    async with system.ledger.lock():
        sending = asyncio.create_task(system.announce(generation))
        await asyncio.sleep(0.5)
        await api.kill()
        sent = await sending
    assert sent.status is None
    assert await system.ids() == set()
    await asyncio.gather(system.api(), system.worker())
    await system.accepted(generation)
    await system.drain()

    assert not (await system.judged()).all


@on_both
async def test_a_record_of_a_web_side_killed_before_the_enqueue_is_deleted(system: System):

    async def connect():
        return await asyncio.open_connection("127.0.0.1", system.redis.port)

    async with Proxy(connect).serve() as proxy:
        api = await system.api(MAYFLY_REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0")
        proxy.trouble("stall", b"EVALSHA")
        generation = await system.accepted(system.generation())
        await asyncio.wait_for(proxy.reached.wait(), 5)
        await api.kill()
    assert await system.redis.command("ZCARD", "mayfly:v1") == 0
    await asyncio.gather(system.api(), system.worker())
    await system.accepted(generation)
    await system.until(generation, "deleted", is_hurried=False)

    assert len(system.calls(generation)) == 1
    assert not (await system.judged()).all


async def test_a_webhook_resent_after_a_lost_answer_makes_no_second_record(system: System):
    await asyncio.gather(system.api(), system.worker())

    async def connect():
        return await asyncio.open_connection("127.0.0.1", system.port)

    async with Proxy(connect).serve() as proxy:
        generation = system.generation()
        proxy.trouble("lose", b"Sync-Signature", once=True)
        first = await system.announce(generation, port=proxy.port)
        assert first.status is None
        await system.accepted(generation)
        await system.drain()

    assert len(system.calls(generation)) == 1
    assert not (await system.judged()).all


@on_both
async def test_fifty_webhooks_about_one_generation_at_once_make_one_record(system: System):
    await asyncio.gather(system.api(), system.worker())
    generation = system.generation()
    answers = await asyncio.gather(*(system.announce(generation) for _ in range(50)))
    await overdue(system, generation)
    await system.drain()

    assert {answer.status for answer in answers} == {202}
    assert len(await system.ledger.rows()) == 1
    assert len(system.calls(generation)) == 1
    assert not (await system.judged()).all


@on_both
async def test_two_web_sides_that_receive_one_generation_at_once_make_one_record(system: System):
    first = system.port
    second = free_port()
    await asyncio.gather(system.api(), system.api(MAYFLY_PORT=str(second)), system.worker())
    generations = [system.generation() for _ in range(10)]

    await asyncio.gather(*(system.announce(one, port=port) for one in generations for port in (first, second)))
    await system.drain()

    assert {one.status for one in system.sent} == {202}
    assert len(await system.ledger.rows()) == 10
    assert not (await system.judged()).all
