"""Rows 58 to 70 but for Redis: refused keys, long outages, herds, poison, clocks, people, settings, and full logs."""

import asyncio
import contextlib
import time
from datetime import UTC, datetime, timedelta

import psutil
import pytest

from service.simulator import Operation
from tests.faults.databases import SqliteLedger
from tests.faults.processes import Process
from tests.faults.system import TOKEN, System, on_both, overdue
from tests.support.waiting import eventually

HERD = 3_000  # ten thousand took 43 s of two busy cores, and the same calls at once
OPERATOR = {"authorization": f"Bearer {TOKEN}"}


@on_both
async def test_a_refused_key_pauses_all_and_burns_none_until_a_good_key_resumes_by_itself(system: System):
    worker, _ = await asyncio.gather(system.worker(), system.api())
    system.simulator.switches.unauthorized = True
    generations = [await system.accepted(system.generation()) for _ in range(20)]
    await worker.logged("deletions.paused", seconds=10)
    await asyncio.sleep(1.5)  # what was under way at that moment ends
    calls = len(system.simulator.calls)
    await asyncio.sleep(2)
    status, health = await system.health()
    assert len(system.simulator.calls) - calls <= 1
    assert (status, health["parts"]["deletions"]["status"]) == (200, "paused")
    assert "SYNC_API_KEY" in health["parts"]["deletions"]["detail"]
    assert await system.metric('mayfly_pauses{kind="unauthorized"}') == 1
    taken = await system.accepted(system.generation())
    rows = await system.ledger.rows()
    assert {(row.state, row.failures, row.refusals) for row in rows} == {("scheduled", 0, 0)}
    system.simulator.switches.unauthorized = False
    await system.ledger.execute("UPDATE pauses SET until = :now")  # a minute later
    await system.drain()

    assert {one.id for one in (*generations, taken)} == set(system.simulator.removed)
    assert await system.metric('mayfly_pauses{kind="unauthorized"}') == 0
    assert not (await system.judged()).all


async def test_an_api_that_is_away_for_three_days_drops_nothing_and_is_asked_once_an_hour(system: System):
    await asyncio.gather(system.worker(), system.api())
    system.simulator.switches.outage = True
    generations = [await system.accepted(system.generation()) for _ in range(5)]
    for _ in range(12):
        await overdue(system, generations[0])
        await system.hurry()
        await asyncio.sleep(0.25)
    if isinstance(system.ledger, SqliteLedger):
        await system.ledger.execute("UPDATE records SET failing_since = failing_since - 259200000000")
    before = {row.id: row.failures for row in await system.ledger.rows()}
    await system.hurry()

    async def all_failed_again() -> bool:
        return all(row.failures > before[row.id] and row.state == "scheduled" for row in await system.ledger.rows())

    await eventually(all_failed_again, seconds=15)
    waits = [row.wake_at - datetime.now(UTC) for row in await system.ledger.rows() if row.wake_at]
    assert len(waits) == len(generations)
    assert max(waits) <= timedelta(hours=1)
    system.simulator.switches.outage = False
    await system.drain()

    assert not (await system.judged()).all


async def test_thousands_of_records_due_in_one_minute_leave_the_web_side_quick_and_the_calls_bounded(system: System):
    api = await system.api()
    seed = await system.accepted(system.generation())
    await overdue(system, seed)
    await system.ledger.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {herd}) "
        "INSERT INTO records (seq, account, id, state, status, notification, received_at, due_at, wake_at, attempts, "
        "failures, refusals, rule) SELECT i, account, 'herd-' || i, state, status, notification, received_at, due_at, "
        "wake_at, 0, 0, 0, rule FROM records, n".replace("{herd}", str(HERD))
    )
    worker = await system.worker()
    open_calls, waits = [], []
    async with asyncio.timeout(60):
        while (await counted(system)) < HERD:
            begun = time.monotonic()
            assert (await system.health())[0] == 200
            late = await system.announce(system.generation())
            assert late.status == 202
            waits.append(time.monotonic() - begun)
            open_calls.append(connections_to(worker, system))
            await asyncio.sleep(0.3)
    await system.drain()

    assert max(waits) < 2  # two requests, on a machine that the worker and the simulator have in use
    assert max(open_calls) <= 50
    assert api.exit_code is None
    states = {row.state for row in await system.ledger.rows()}
    assert states == {"deleted"}


async def test_a_poison_record_fails_alone_and_the_others_go_on(system: System):
    worker, _ = await asyncio.gather(system.worker(), system.api())
    poison = system.generation(get=["wrong-id*"])
    others = [system.generation() for _ in range(99)]
    await asyncio.gather(*map(system.accepted, [poison, *others]))
    await system.drain()

    row = await system.row(poison)
    assert (row.state, row.attempts) == ("failed", 5)
    assert {one.id for one in others} <= set(system.simulator.removed)
    assert worker.exit_code is None
    assert not (await system.judged(may_fail=[poison])).all


async def test_a_fault_of_ours_in_one_record_fails_that_record_alone(system: System):
    await system.api()
    poison, *others = generations = [system.generation() for _ in range(20)]
    await asyncio.gather(*map(system.accepted, generations))
    worker = system.spawn("worker", module="tests.faults.crippled", arguments=[f"crash{poison.id}"])
    await worker.logged("worker.started")
    await system.drain()

    row = await system.row(poison)
    assert (row.state, row.attempts) == ("failed", 5)
    assert {one.id for one in others} == set(system.simulator.removed)
    assert worker.exit_code is None
    assert not (await system.judged(may_fail=[poison])).all


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_worker_whose_clock_is_an_hour_off_deletes_nothing_early(postgres_system: System, hours: int):
    system = postgres_system
    await system.api(MAYFLY_TTL="2s")
    worker = system.spawn("worker", module="tests.faults.crippled", arguments=[f"clock{hours}"])
    await worker.logged("worker.started")
    generation = await system.accepted(system.generation())
    await overdue(system, generation)
    await asyncio.sleep(1)
    assert (generation.id in system.simulator.removed) == (hours > 0)
    await system.worker()
    await system.drain()

    assert not (await system.judged()).all


@on_both
async def test_a_time_zone_of_one_process_moves_no_due_time(system: System):
    await asyncio.gather(system.api(TZ="Asia/Tokyo"), system.worker(TZ="America/Los_Angeles"))
    before = datetime.now(UTC)
    sent = await system.announce(system.generation())
    assert sent.due_at is not None
    assert timedelta(seconds=-1) < sent.due_at - before < timedelta(seconds=3)
    await system.drain()

    assert len(system.simulator.removed) == 1
    assert not (await system.judged()).all


@pytest.mark.parametrize("gate", ["waiting", "looking", "deleting"])
async def test_a_person_who_stops_a_record_is_obeyed_before_the_copy_and_told_too_late_after(system: System, gate: str):
    await asyncio.gather(system.api(MAYFLY_TTL="2s" if gate == "waiting" else "1s"), system.worker())
    script = {"looking": {"get": ["hold"]}, "deleting": {"delete": ["hold-after"]}}.get(gate, {})
    generation = await system.accepted(system.generation(**script))
    if script:
        await system.held(generation)
    answer = await system.client.post(
        f"{system.url}/api/records/{generation.id}/hold", headers=OPERATOR, json={"reason": "wait"}
    )
    system.simulator.release(generation.id)
    await asyncio.sleep(2.5)

    row = await system.row(generation)
    if gate == "deleting":
        assert (answer.status_code, row.state) == (409, "deleted")
        assert "under way" in answer.json()["detail"]
    else:
        assert (answer.status_code, row.state) == (200, "held")
        assert system.calls(generation) == []
    assert not (await system.judged()).all


async def test_a_pause_stops_what_is_due_and_a_resume_lets_it_go(system: System):
    await asyncio.gather(system.api(), system.worker())
    paused = await system.client.post(f"{system.url}/api/pause", headers=OPERATOR, json={"reason": "a look"})
    generation = await system.accepted(system.generation())
    await overdue(system, generation)
    await system.ring()
    await asyncio.sleep(1)
    assert paused.status_code == 200
    assert system.calls(generation, Operation.GET) == []
    assert (await system.client.post(f"{system.url}/api/resume", headers=OPERATOR)).status_code == 200
    await system.drain()

    assert not (await system.judged()).all


async def test_the_due_time_that_was_promised_holds_when_the_setting_changes(system: System):
    api = await system.api(MAYFLY_TTL="1h")
    generation = await system.accepted(system.generation())
    promised = (await system.row(generation)).due_at
    assert await api.stop() == 0
    await asyncio.gather(system.api(MAYFLY_TTL="1s"), system.worker(MAYFLY_TTL="1s"))
    later = await system.accepted(system.generation())
    await system.until(later, "deleted")

    assert (await system.row(generation)).due_at == promised
    assert system.calls(generation, Operation.GET) == []


async def test_the_days_limit_stops_before_the_first_delete_beyond_it(system: System):
    _, worker = await asyncio.gather(system.api(), system.worker(MAYFLY_MAX_DELETES_PER_DAY="3"))
    generations = [await system.accepted(system.generation()) for _ in range(8)]
    await overdue(system, generations[-1])
    await asyncio.sleep(3)
    deletes = [call for call in system.simulator.calls if call.operation is Operation.DELETE]
    status, health = await system.health()

    assert len(deletes) == 3
    assert (status, health["parts"]["deletions"]["status"]) == (200, "paused")
    assert await system.metric('mayfly_pauses{kind="daily_limit"}') == 1
    assert worker.exit_code is None


async def test_a_dry_run_does_all_but_the_delete(system: System):
    await asyncio.gather(system.api(), system.worker(MAYFLY_DRY_RUN="true"))
    generations = [await system.accepted(system.generation()) for _ in range(5)]

    async def all_rehearsed() -> bool:
        return all(row.copy and row.state == "scheduled" for row in await system.ledger.rows())

    await eventually(all_rehearsed)
    assert [call for call in system.simulator.calls if call.operation is Operation.DELETE] == []
    assert len(system.simulator.generations) == len(generations)


@pytest.mark.parametrize("log", ["full", "closed", "broken pipe"])
async def test_a_log_that_takes_nothing_stops_no_deletion(system: System, log: str):
    await system.api()
    worker = system.spawn("worker", module="tests.faults.speechless", arguments=[log])
    generations = [await system.accepted(system.generation(delete=["500"])) for _ in range(3)]
    await system.drain()

    assert worker.exit_code is None
    assert {one.id for one in generations} == set(system.simulator.removed)
    assert not (await system.judged()).all


async def counted(system: System) -> int:
    """Count what of the herd is settled."""
    return sum(row.state == "deleted" for row in await system.ledger.rows() if row.id.startswith("herd-"))


def connections_to(worker: Process, system: System) -> int:
    """Count the connections that *worker* has open to the simulator."""
    port = int(system.simulator.url.rpartition(":")[2])
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(worker.pid).net_connections("tcp")
        return sum(bool(one.raddr) and one.raddr.port == port for one in found)
    return 0
