"""Random faults against a whole system, and against systems without one part, which must fail the verdict."""

import asyncio
import os
import random
import secrets
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.faults.chaos import Chaos
from tests.faults.databases import Postgres
from tests.faults.judging import Verdict
from tests.faults.processes import ProcessStarter
from tests.faults.system import System, at_once, on_both
from tests.support.waiting import eventually

SECONDS = float(os.environ.get("CHAOS_SECONDS", "5"))
# A seed means the same order of faults; what they meet differs with the machine's mood.
SEEDS = [int(seed) for seed in os.environ.get("CHAOS_SEED", "1 2").split()] or [secrets.randbelow(10**6)]
# All is to be forwarded as well, which takes a busy machine a while.
HEALED_WITHIN = 60 + SECONDS
# The controls are healed for longer than a whole system needs: a tick is five seconds.
CONTROL_SECONDS, CONTROL_HEALED_WITHIN = 3.0, 9.0


@pytest.fixture
async def mortal_both(system: System, mortal_system: System) -> tuple[System, System]:
    """A system on SQLite and one on a PostgreSQL that may be killed."""
    return system, mortal_system


@pytest.mark.chaos
@pytest.mark.looks
@pytest.mark.timeout(SECONDS * 3 + 240)
@pytest.mark.parametrize("seed", SEEDS)
async def test_under_random_faults_nothing_is_lost_deleted_early_or_without_a_record(
    mortal_both: tuple[System, System], mortal_postgres: Postgres, seed: int
):
    on_sqlite, on_postgresql = mortal_both
    async with asyncio.TaskGroup() as group:
        group.create_task(survives(on_sqlite, seed))
        group.create_task(survives(on_postgresql, seed, mortal_postgres))


async def survives(system: System, seed: int, postgres: Postgres | None = None) -> None:
    """Do harm to *system* and let the judge look at what is left."""
    name = f"seed {seed} on {type(system.ledger).__name__}"
    chaos = Chaos(system, random.Random(name), postgres, has_apps=True)  # noqa: S311 - faults, not secrets
    await chaos.run(SECONDS, healed_within=HEALED_WITHIN)
    verdict = await system.judged()
    accepted = {sent.id for sent in system.sent if sent.is_accepted}
    assert chaos.apps is not None
    answers = [Counter(str(one.begun) for one in app.requests) for app in chaos.apps.apps]
    print(
        f"{name}: {len(system.told)} webhooks, {len(accepted)} generations accepted, {len(chaos.told)} faults, "
        f"healed in {chaos.healing_seconds:.1f} s, {system.health_monitor.asked} looks at its health, "
        f"{len(await system.ledger.deliveries())} deliveries, answers {[dict(one) for one in answers]}, "
        f"{chaos.apps.replays} replays of failed ones"
    )

    breaches = [*verdict.all, *chaos.apps.stuck]
    assert not breaches, f"{name}: {chaos.told}; {breaches}"
    assert await chaos.apps.is_over()
    assert len(accepted) > SECONDS * 3
    assert accepted <= set(system.simulator.removed)
    assert system.health_monitor.asked > SECONDS
    for port in chaos.ports:
        await eventually(partial(is_well, system, port), seconds=10)


async def is_well(system: System, port: int) -> bool:
    """Whether the web side at *port* finds nothing wrong any more."""
    answer = await system.client.get(f"http://127.0.0.1:{port}/health/ready")
    return bool(answer.json()["status"] == "ok")


@pytest.mark.timeout(120)
async def test_the_verdict_on_the_same_chaos_fails_without_one_part(starter: ProcessStarter, tmp_path: Path):
    verdicts = await at_once(starter, tmp_path, {part: partial(condemned, part) for part in ("safety net", "copy")})

    lost, careless = verdicts["safety net"], verdicts["copy"]
    assert len(lost.lost) >= 10
    assert {one.partition(" ")[0] for one in lost.lost} == {"I4"}
    assert [*lost.early, *lost.unrecorded, *lost.uninvited, *lost.leaked] == []
    assert len(careless.unrecorded) > 20
    # The copy is also where a later announcement takes the record from its worker: without it some are early as well.
    assert [*careless.lost, *careless.uninvited, *careless.leaked] == []


@pytest.mark.timeout(120)
async def test_the_verdict_on_forwarding_fails_without_one_part(starter: ProcessStarter, tmp_path: Path):
    parts = ("requirements", "net of deliveries", "posts")
    verdicts = await at_once(starter, tmp_path, {one: partial(condemned, one, has_apps=True) for one in parts})

    hasty, lost, silent = (verdicts[part].forwards for part in parts)
    # One of each condemns a system; how many there are depends on the machine. Deleted before the app had the webhook:
    assert hasty.unasked
    # Left where they were when Redis lost their jobs:
    assert lost.undelivered
    assert lost.unasked == []
    # Called delivered:
    assert [one for one in silent.undelivered if "is called delivered" in one]
    assert silent.unasked
    assert [*hasty.changed, *lost.changed, *silent.changed, *lost.disordered, *silent.disordered] == []


async def condemned(without: str, system: System, *, has_apps: bool = False) -> Verdict:
    """Do harm to *system*, whose workers are *without* a part, heal what can be, and return what the judge says."""
    chaos = Chaos(system, random.Random(without), without=without, has_apps=has_apps)  # noqa: S311 - faults, not secrets
    await chaos.run(CONTROL_SECONDS, healed_within=CONTROL_HEALED_WITHIN)
    return await system.judged()


@on_both
async def test_the_verdict_shows_deletes_without_a_record_when_the_copy_is_left_out(system: System):
    await asyncio.gather(system.api(), system.worker(without="copy"))
    generations = [await system.accepted(system.generation()) for _ in range(10)]
    await asyncio.gather(*(system.until(one, "deleted") for one in generations))

    verdict = await system.judged()
    assert {one.split()[3] for one in verdict.unrecorded if "before its copy" in one} == {one.id for one in generations}
    assert verdict.lost == []
