"""The early look: killed, robbed of its job, refused, held up. It may be late, and it may never do harm."""

import asyncio
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from service.simulator import Operation
from tests.faults.system import TOKEN, System, on_both, overdue
from tests.support.waiting import eventually

pytestmark = pytest.mark.looks

OPERATOR = {"authorization": f"Bearer {TOKEN}"}
FILM = "0b1d6c0e-3f3a-4d8e-9a51-0f6f1b6f2a11"
RULES = f"""
[[rule]]
id = "film"
project = "{FILM}"
ttl = "forever"
"""


async def are_looked_at(system: System, number: int) -> bool:
    """Whether so many records have what the API shows, and want no look any more."""
    where = "copied_at IS NOT NULL AND look_at IS NULL"
    return await system.ledger.number(f"SELECT count(*) FROM records WHERE {where}") == number  # noqa: S608


async def failed_looks(system: System) -> int:
    """Return how many looks have failed."""
    return await system.ledger.number("SELECT coalesce(sum(looks), 0) FROM records")


def gets(system: System) -> int:
    """Return how many GETs have come."""
    return sum(call.operation is Operation.GET for call in system.simulator.calls)


def with_rules(folder: Path) -> dict[str, str]:
    """Write the rules and return the variable that names them."""
    path = folder / "mayfly.toml"
    path.write_text(RULES, encoding="utf-8")
    return {"MAYFLY_CONFIG": str(path)}


@on_both
async def test_a_look_killed_between_its_get_and_its_commit_is_made_again(system: System):
    worker, _ = await asyncio.gather(system.worker(), system.api(MAYFLY_TTL="1h"))
    generation = await system.accepted(system.generation(get=["hold"]))
    await system.held(generation)
    async with system.ledger.lock():
        system.simulator.release(generation.id)
        await asyncio.sleep(0.3)  # the GET is answered, and its commit waits at the lock
        await worker.kill()
    assert (await system.row(generation)).copied_at is None
    await system.worker()
    # arq blocks the id of a killed worker's job for 95 s.
    await system.redis.command("DEL", f"arq:in-progress:default:{generation.id}:copy")
    await eventually(partial(are_looked_at, system, 1), seconds=20)
    assert system.calls(generation) == []
    await system.ledger.pass_time(timedelta(hours=2))
    system.sent.clear()  # the promised time went by
    await system.until(generation, "deleted")

    assert len(system.calls(generation)) == 1


@on_both
async def test_looks_whose_jobs_were_lost_with_redis_are_made_from_the_ledger(system: System):
    await system.api(MAYFLY_TTL="1h")
    generations = [await system.accepted(system.generation()) for _ in range(20)]
    await asyncio.sleep(0.5)
    await system.redis.command("FLUSHALL")
    await system.worker()
    await eventually(partial(are_looked_at, system, len(generations)), seconds=30)

    assert gets(system) == len(generations)
    assert {row.state for row in await system.ledger.rows()} == {"scheduled"}


@pytest.mark.parametrize("fault", ["500*", "drop*", "503:retry_after=60*"])
async def test_while_the_api_fails_webhooks_are_stored_and_looks_wait(system: System, fault: str):
    await asyncio.gather(system.worker(), system.api(MAYFLY_TTL="1h"))
    system.simulator.plan.stand(Operation.GET, fault.removesuffix("*"))
    generations = [await system.accepted(system.generation()) for _ in range(10)]

    async def have_failed() -> bool:
        return await failed_looks(system) >= len(generations)

    await eventually(have_failed, seconds=20)
    before = gets(system)
    await asyncio.sleep(2)
    assert gets(system) - before <= len(generations)  # each waits longer every time
    assert not await are_looked_at(system, 1)
    system.simulator.plan.stand(Operation.GET, None)
    await system.ledger.execute("UPDATE records SET look_at = :now")
    await eventually(partial(are_looked_at, system, len(generations)), seconds=20)

    assert {row.state for row in await system.ledger.rows()} == {"scheduled"}
    assert not [call for call in system.simulator.calls if call.operation is Operation.DELETE]


@on_both
async def test_a_429_to_a_look_stops_all_calls_for_as_long_as_it_says(system: System):
    await asyncio.gather(system.worker(), system.worker(), system.api(MAYFLY_TTL="1h"))
    system.simulator.plan.stand(Operation.GET, "429:retry_after=600")
    await system.accepted(system.generation())

    async def is_throttled() -> bool:
        return await system.ledger.number("SELECT count(*) FROM pauses WHERE kind = 'throttled'") == 1

    await eventually(is_throttled, seconds=10)
    before = gets(system)
    for _ in range(10):
        await system.accepted(system.generation())
    await asyncio.sleep(6)
    assert gets(system) == before
    system.simulator.plan.stand(Operation.GET, None)


async def test_a_record_that_is_due_does_not_wait_for_its_look(system: System):
    await asyncio.gather(system.worker(), system.api())
    generation = await system.accepted(system.generation(get=["hold"]))
    await system.held(generation)
    await system.until(generation, "deleted", is_hurried=False)
    copied = (await system.row(generation)).copied_at
    system.simulator.release(generation.id)
    await asyncio.sleep(1)

    row = await system.row(generation)
    assert (row.state, row.outcome, row.copied_at) == ("deleted", "deleted", copied)
    assert len(system.calls(generation)) == 1
    assert not (await system.judged()).all


@on_both
async def test_a_record_that_is_held_during_its_look_stays_held(system: System):
    await asyncio.gather(system.worker(), system.api(MAYFLY_TTL="2s"))
    generation = await system.accepted(system.generation(get=["hold"], project_id=FILM))
    await system.held(generation)
    url = f"{system.url}/api/records/{generation.id}/hold"
    answer = await system.client.post(url, headers=OPERATOR, json={"reason": "a court asked"})
    assert answer.status_code == 200
    system.simulator.release(generation.id)
    await eventually(partial(are_looked_at, system, 1))
    await asyncio.sleep(2.5)

    shown = await system.record(generation)
    assert (shown["state"], shown["projectId"]) == ("held", FILM)
    assert system.calls(generation) == []
    assert not (await system.judged()).all


@on_both
async def test_a_generation_that_is_gone_at_its_look_is_confirmed_when_it_is_due(system: System):
    await asyncio.gather(system.worker(), system.api(MAYFLY_TTL="2s"))
    generation = await system.accepted(system.generation(get=["404"]))
    await asyncio.sleep(0.8)
    row = await system.row(generation)
    assert (row.state, row.outcome) == ("scheduled", None)
    await system.until(generation, "deleted", is_hurried=False)

    assert (await system.row(generation)).outcome == "already_gone"
    assert len(system.calls(generation, Operation.GET)) == 2
    assert not (await system.judged()).all


@on_both
async def test_a_rule_on_the_project_keeps_what_is_due_before_its_look(system: System):
    variables = with_rules(system.folder)
    await system.api(**variables)
    # Of two the look failed, of the others none was made: no worker ran.
    unseen = [await system.accepted(system.generation(project_id=FILM)) for _ in range(5)]
    other = await system.accepted(system.generation())
    await overdue(system, other)
    await system.worker(**variables)
    failed = [await system.accepted(system.generation(project_id=FILM, get=["500"])) for _ in range(2)]
    for generation in (*unseen, *failed):
        assert (await system.until(generation, "kept")).rule == "rule: film"
    await system.until(other, "deleted")

    assert [call.generation_id for call in system.simulator.calls if call.operation is Operation.DELETE] == [other.id]
    assert not (await system.judged()).all


async def test_looks_take_nothing_from_deletions_that_are_due(system: System):
    await system.api()
    due = [await system.accepted(system.generation()) for _ in range(50)]
    later = [
        await system.accepted(system.generation(webhook_url="https://hooks.example.com/webhooks/sync?ttl=7d"))
        for _ in range(200)
    ]
    await overdue(system, due[-1])
    began = time.monotonic()
    await system.worker(MAYFLY_API_RATE="600/minute")  # five attempts a second

    async def are_deleted() -> bool:
        return len(system.simulator.removed) == len(due)

    await eventually(are_deleted, seconds=30)
    took = time.monotonic() - began
    looked = sum(bool(system.calls(one, Operation.GET)) for one in later)

    assert took < 15
    assert looked < 20

    async def are_some_seen() -> bool:
        return sum(bool(system.calls(one, Operation.GET)) for one in later) > looked + 20

    await eventually(are_some_seen, seconds=30)
