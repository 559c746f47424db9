"""Rows 58 to 70 except Redis: keys, outages, many due records, crashes, clocks, operators, settings, full logs."""

import asyncio
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from service.simulator import Operation
from tests.faults.processes import Process, ProcessStarter
from tests.faults.system import TOKEN, System, at_once, on_both, overdue
from tests.support.waiting import eventually

HERD = 10_000
RATE = 40  # calls to the API in a second
OPERATOR = {"authorization": f"Bearer {TOKEN}"}


@on_both
async def test_a_refused_key_pauses_deletions_until_a_valid_key_resumes_them(system: System):
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


@on_both
async def test_after_three_days_of_api_outage_nothing_is_lost_and_the_rate_is_kept(
    system: System,
):
    system.is_enqueueing = True  # what is judged is when each is to be tried, and how fast
    await asyncio.gather(system.worker(MAYFLY_API_RATE=f"{RATE}/second"), system.api())
    system.simulator.switches.outage = True
    generations = [await system.accepted(system.generation()) for _ in range(60)]
    await eventually(partial(have_all_failed, system, 1))
    await system.ledger.pass_time(timedelta(days=3))
    await system.enqueue()
    await eventually(partial(have_all_failed_long, system), seconds=20)
    waits = [(row.wake_at - datetime.now(UTC)).total_seconds() for row in await system.ledger.rows() if row.wake_at]
    # Each is looked at within the hour, and not all the time: at random, so that they do not all come at once.
    assert len(waits) == len(generations)
    assert max(waits) <= 3600
    assert 900 < sum(waits) / len(waits) < 2700
    system.simulator.switches.outage = False
    before = len(system.simulator.calls)
    await system.hurry()
    await system.drain()

    times = [call.at.timestamp() for call in system.simulator.calls[before:]]
    assert len(times) == 2 * len(generations)
    assert max(times) - min(times) >= len(times) / RATE - 1
    # A budget is counted by the second: two of them may meet.
    assert max(sum(start <= at < start + 1 for at in times) for start in times) <= 2 * RATE
    assert {row.state for row in await system.ledger.rows()} == {"deleted"}
    assert not (await system.judged()).all


async def have_all_failed_long(system: System) -> bool:
    """Whether each record has failed once more after 99 times; an attempt that was under way writes its own number."""
    await system.ledger.execute("UPDATE records SET failures = 99 WHERE failures < 99 AND state = 'scheduled'")
    return await have_all_failed(system, 100)


async def have_all_failed(system: System, times: int) -> bool:
    """Whether each record has failed so many *times* at least, and waits."""
    return all(row.failures >= times and row.state == "scheduled" for row in await system.ledger.rows())


@pytest.mark.timeout(300)
async def test_with_ten_thousand_due_records_the_web_side_stays_fast_and_the_rate_is_kept(system: System):
    api = await system.api()
    first = await system.accepted(system.generation())
    for number in range(HERD):
        system.simulator.add(generation_id=f"herd-{number}")
    herd = f"WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {HERD} - 1)"  # noqa: S608
    await system.ledger.execute(
        f"{herd} INSERT INTO records (account, id, state, status, notification, received_at, sent_at, due_at, wake_at, "  # noqa: S608
        "attempts, failures, refusals, rule) SELECT account, 'herd-' || i, state, status, notification, "
        "received_at, sent_at, due_at, wake_at, 0, 0, 0, rule FROM records, n"
    )
    system.sent += [replace(system.sent[0], id=f"herd-{number}") for number in range(HERD)]
    await overdue(system, first)
    worker = await system.worker()
    open_calls, waits = [], []
    async with asyncio.timeout(240):
        while await system.ledger.number("SELECT count(*) FROM records WHERE state = 'deleted'") < HERD:
            for ask in (partial(is_ready, system), partial(is_taken, system)):
                begun = time.monotonic()
                assert await ask()
                waits.append(time.monotonic() - begun)
            open_calls.append(connections_to(worker, system))
            await asyncio.sleep(0.3)
    await system.drain()

    assert max(waits) < 1
    assert 1 < max(open_calls) <= 50
    assert api.exit_code is None
    assert len(system.simulator.removed) == len(system.sent)
    assert not (await system.judged()).all


async def is_ready(system: System) -> bool:
    """Whether the web side says that it can take webhooks."""
    return (await system.health())[0] == 200


async def is_taken(system: System) -> bool:
    """Whether the web side takes a webhook."""
    return (await system.announce(system.generation())).status == 202


async def test_a_record_that_crashes_its_attempt_fails_alone(system: System):
    system.is_enqueueing = True  # what is judged is what its attempts lead to
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


async def test_an_internal_error_in_one_record_fails_that_record_alone(system: System):
    system.is_enqueueing = True
    await system.api()
    poison, *others = generations = [system.generation() for _ in range(20)]
    await asyncio.gather(*map(system.accepted, generations))
    worker = await system.worker(without=f"crash{poison.id}")
    await system.drain()

    row = await system.row(poison)
    assert (row.state, row.attempts) == ("failed", 5)
    assert {one.id for one in others} == set(system.simulator.removed)
    assert worker.exit_code is None
    assert not (await system.judged(may_fail=[poison])).all


async def test_a_clock_that_jumps_makes_a_waiting_record_late_but_never_early(postgres_system: System):
    system = postgres_system
    worker, _ = await asyncio.gather(system.worker(without="a steady clock"), system.api(MAYFLY_TTL="2s"))
    early = await system.accepted(system.generation())
    worker.send(signal.SIGUSR1)  # an hour ahead: by its own clock it is due
    await worker.logged("clock.jumped")
    await system.enqueue()
    await asyncio.sleep(0.5)
    assert system.calls(early, Operation.GET) == []
    await overdue(system, early)
    await system.until(early, "deleted", is_hurried=False, seconds=3)
    late = await system.accepted(system.generation())
    worker.send(signal.SIGUSR2)
    await worker.logged("clock.jumped", times=2)
    worker.send(signal.SIGUSR2)  # an hour back
    await worker.logged("clock.jumped", times=3)
    await overdue(system, late)
    await system.enqueue()
    await asyncio.sleep(1)
    assert system.calls(late, Operation.GET) == []
    worker.send(signal.SIGUSR1)  # and right again
    await worker.logged("clock.jumped", times=4)
    await system.enqueue()
    await system.until(late, "deleted", is_hurried=False, seconds=3)

    assert worker.exit_code is None
    assert not (await system.judged()).all


@on_both
async def test_the_time_zone_of_a_process_changes_no_due_time(system: System):
    await asyncio.gather(system.api(TZ="Asia/Tokyo"), system.worker(TZ="America/Los_Angeles"))
    before = datetime.now(UTC)
    sent = await system.announce(system.generation())
    assert sent.due_at is not None
    assert timedelta(seconds=-1) < sent.due_at - before < timedelta(seconds=3)
    await system.drain()

    assert len(system.simulator.removed) == 1
    assert not (await system.judged()).all


@on_both
async def test_a_daylight_saving_switch_changes_no_due_time(system: System):
    # Central Europe's rule, written out: a bare machine knows no zones by name. Within a year there are two changes.
    await system.api(TZ="CET-1CEST,M3.5.0,M10.5.0/3")
    sent_at = datetime.now(UTC).replace(microsecond=0)
    for days in range(60, 361, 60):
        generation = system.generation(webhook_url=f"https://hooks.example.com/webhooks/sync?ttl={days}d")
        sent = await system.announce(generation, at=sent_at)

        assert sent.status == 202
        assert sent.due_at == sent_at + timedelta(days=days)
        assert (await system.row(generation)).due_at == sent_at + timedelta(days=days)
    # The hour that is there twice, told by its offset.
    for offset in (1, 2):
        expires = last_sunday(sent_at.year + 1, 10).astimezone(timezone(timedelta(hours=offset)))
        generation = system.generation(
            webhook_url=f"https://hooks.example.com/webhooks/sync?expires={quote(expires.isoformat())}"
        )

        assert (await system.announce(generation)).due_at == expires
        assert (await system.row(generation)).due_at == expires


def last_sunday(year: int, month: int) -> datetime:
    """Return the instant at which Central Europe changes its clocks in that month."""
    day = datetime(year, month, 31, 1, tzinfo=UTC)
    return day - timedelta(days=(day.weekday() + 1) % 7)


async def test_an_operator_can_stop_a_record_until_its_copy_and_not_after(starter: ProcessStarter, tmp_path: Path):
    gates = ("waiting", "looking", "deleting")
    await at_once(starter, tmp_path, {gate: partial(is_stopped, gate) for gate in gates})


async def is_stopped(gate: str, system: System) -> None:
    """Hold a record while it is at *gate*."""
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
        assert "may be in progress" in answer.json()["detail"]
    else:
        assert (answer.status_code, row.state) == (200, "held")
        assert system.calls(generation) == []
    assert not (await system.judged()).all


async def test_a_pause_stops_due_records_and_a_resume_deletes_them(system: System):
    await asyncio.gather(system.api(), system.worker())
    paused = await system.client.post(f"{system.url}/api/pause", headers=OPERATOR, json={"reason": "a look"})
    generation = await system.accepted(system.generation())
    await overdue(system, generation)
    await system.enqueue()
    await asyncio.sleep(1)
    assert paused.status_code == 200
    assert system.calls(generation, Operation.GET) == []
    assert (await system.client.post(f"{system.url}/api/resume", headers=OPERATOR)).status_code == 200
    await system.drain()

    assert not (await system.judged()).all


async def test_a_promised_due_time_stays_when_the_setting_changes(system: System):
    api = await system.api(MAYFLY_TTL="1h")
    generation = await system.accepted(system.generation())
    promised = (await system.row(generation)).due_at
    assert await api.stop() == 0
    await asyncio.gather(system.api(MAYFLY_TTL="1s"), system.worker(MAYFLY_TTL="1s"))
    later = await system.accepted(system.generation())
    await system.until(later, "deleted")

    assert (await system.row(generation)).due_at == promised
    assert system.calls(generation, Operation.GET) == []


async def test_the_daily_limit_stops_before_the_first_delete_beyond_it(system: System):
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


async def test_a_dry_run_does_everything_except_the_delete(system: System):
    await asyncio.gather(system.api(), system.worker(MAYFLY_DRY_RUN="true"))
    generations = [await system.accepted(system.generation()) for _ in range(5)]

    async def all_rehearsed() -> bool:
        return all(row.copy and row.state == "scheduled" for row in await system.ledger.rows())

    await eventually(all_rehearsed)
    assert [call for call in system.simulator.calls if call.operation is Operation.DELETE] == []
    assert len(system.simulator.generations) == len(generations)


async def test_a_log_that_cannot_be_written_stops_no_deletion(starter: ProcessStarter, tmp_path: Path):
    logs = ("full", "closed", "broken pipe")
    await at_once(starter, tmp_path, {log: partial(takes_nothing, log) for log in logs})


async def takes_nothing(log: str, system: System) -> None:
    """Run a worker whose standard error is of no use, through failures that it would tell of."""
    await system.api()
    worker = system.spawn("worker", module="tests.faults.worker_without_stderr", arguments=[log])
    generations = [await system.accepted(system.generation(delete=["500"])) for _ in range(3)]
    await system.drain()

    assert worker.exit_code is None
    assert {one.id for one in generations} == set(system.simulator.removed)
    assert not (await system.judged()).all


def connections_to(worker: Process, system: System) -> int:
    """Count the connections that *worker* has open to the simulator."""
    port = int(system.simulator.url.rpartition(":")[2])
    found = psutil.Process(worker.pid).net_connections("tcp")
    return sum(bool(one.raddr) and one.raddr.port == port for one in found)
