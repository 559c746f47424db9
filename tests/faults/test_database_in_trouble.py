"""Rows 5 and 21 to 25: a ledger that is locked, full, read-only, killed, cut off in COMMIT, or an old backup."""

import asyncio
import contextlib
import resource
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from service.simulator import Operation
from tests.faults.databases import Ledger, Postgres, PostgresLedger, SqliteLedger
from tests.faults.processes import Process, ProcessStarter
from tests.faults.proxy import Proxy
from tests.faults.system import System, on_both, running
from tests.support.waiting import eventually


@on_both
async def test_a_ledger_that_stays_locked_is_answered_503_and_both_sides_recover(system: System):
    api, worker = await asyncio.gather(system.api(), system.worker())
    taken = await system.accepted(system.generation(get=["hold"]))
    await system.held(taken)
    missed = system.generation()
    body, headers = system.simulator.webhook(missed.id)
    async with system.ledger.lock():
        system.simulator.release(taken.id)
        answer = await system.client.post(f"{system.url}/webhooks/sync", content=body, headers=headers, timeout=15)
        alive = await system.client.get(f"{system.url}/health/live", timeout=1)
        await worker.logged("cleanup.not_committed", seconds=15)
        assert system.calls(taken) == []
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert alive.status_code == 200
    assert (await system.until(taken, "deleted", is_hurried=False)).attempts == 1
    assert await system.ids() == {taken.id}
    await system.accepted(missed)
    await system.drain()

    assert (api.exit_code, worker.exit_code) == (None, None)
    assert not (await system.judged()).all


@on_both
async def test_both_sides_wait_for_a_lock_of_three_seconds(system: System):
    worker, _ = await asyncio.gather(system.worker(), system.api())
    taken = await system.accepted(system.generation(get=["hold"]))
    await system.held(taken)
    async with system.ledger.lock():
        sending = asyncio.create_task(system.announce(system.generation()))
        system.simulator.release(taken.id)
        await asyncio.sleep(3)
        assert not sending.done()
        # The worker has its answer, and its copy waits at the lock.
        assert [look.status for look in system.calls(taken, Operation.GET)] == [200]
        assert system.calls(taken) == []
    assert (await sending).status == 202
    row = await system.until(taken, "deleted", is_hurried=False, seconds=5)
    await system.drain()

    assert row.attempts == 1
    assert worker.events("cleanup.not_committed") == []
    assert worker.exit_code is None
    assert not (await system.judged()).all


async def test_a_postgresql_killed_during_each_commit_loses_nothing(mortal_system: System, mortal_postgres: Postgres):
    system = mortal_system
    worker, api = await asyncio.gather(system.worker(), system.api())
    before = await system.accepted(system.generation())
    at_get = await system.accepted(system.generation(get=["hold"]))
    at_delete = await system.accepted(system.generation(delete=["hold-after"]))
    await asyncio.gather(system.held(at_get), system.held(at_delete))
    missed = system.generation()
    async with system.ledger.lock():
        for generation in (at_get, at_delete):
            system.simulator.release(generation.id)
        announcing = asyncio.create_task(system.announce(missed))
        await eventually(partial(all_three_wait, system.ledger))
        mortal_postgres.kill()
    assert (await announcing).status == 503
    await worker.logged("cleanup.not_committed", times=2, seconds=5)
    status, health = await system.health()
    assert (status, health["parts"]["ledger"]["status"]) == (503, "failing")
    await asyncio.sleep(1)
    assert system.calls(at_get) == []
    await mortal_postgres.start()
    assert missed.id not in await system.ids()
    await system.accepted(missed)
    await system.drain()

    assert (worker.exit_code, api.exit_code) == (None, None)
    for generation in (at_get, at_delete):  # the worker had patience: what it had in hand is committed after all
        row = await system.row(generation)
        assert (row.outcome, row.attempts) == ("deleted", 1)
    assert {before.id, at_get.id, at_delete.id, missed.id} == set(system.simulator.removed)
    assert not (await system.judged()).all


async def all_three_wait(ledger: Ledger) -> bool:
    """Whether the commits of a webhook, of a copy and of a settlement wait for a lock, all at once."""
    assert isinstance(ledger, PostgresLedger)
    waiting = await ledger.waiting()
    inserts = [one for one in waiting if one.startswith("INSERT INTO records")]
    fences = [one for one in waiting if one.startswith("SELECT records.seq, records.")]
    return len(inserts) >= 1 and len(fences) >= 2


async def test_a_full_disk_under_the_ledger_is_answered_503_and_deletes_nothing(system: System):
    worker, api = await asyncio.gather(system.worker(), system.api())
    taken = await system.accepted(system.generation(get=["hold"]))
    await system.held(taken)
    missed = system.generation()
    with no_room(worker), no_room(api):
        system.simulator.release(taken.id)
        assert (await system.announce(missed)).status == 503
        await asyncio.sleep(2)
        assert not [call for call in system.simulator.calls if call.operation is Operation.DELETE]
        assert (await system.client.get(f"{system.url}/health/live")).status_code == 200
        ready = await system.client.get(f"{system.url}/health/ready")
        assert (ready.status_code, ready.json()["parts"]["ledger"]["status"]) == (503, "failing")
        assert await system.metric("mayfly_ledger_up") == 0
    await system.accepted(missed)
    await system.expire_leases()
    await system.drain()

    assert (worker.exit_code, api.exit_code) == (None, None)
    assert not (await system.judged()).all


async def test_a_read_only_postgresql_is_answered_503_and_deletes_nothing(postgres_system: System):
    system = postgres_system
    assert isinstance(system.ledger, PostgresLedger)
    worker, _ = await asyncio.gather(system.worker(), system.api())
    taken = await system.accepted(system.generation(get=["hold"]))
    await system.held(taken)
    await read_only(system.ledger, "on")
    system.simulator.release(taken.id)
    missed = system.generation()
    assert (await system.announce(missed)).status == 503
    await asyncio.sleep(1)
    assert not [call for call in system.simulator.calls if call.operation is Operation.DELETE]
    await read_only(system.ledger, "off")
    await system.accepted(missed)
    await system.expire_leases()
    await system.drain()

    assert worker.exit_code is None
    assert not (await system.judged()).all


async def test_a_connection_lost_in_commit_makes_one_record_and_no_delete_without_it(
    starter: ProcessStarter, tmp_path: Path, mortal_postgres: Postgres
):
    async with asyncio.TaskGroup() as group:
        for side in ("web", "worker"):
            (tmp_path / side).mkdir()
            ledger = await mortal_postgres.ledger()
            group.create_task(loses_a_commit(starter, tmp_path / side, ledger, side))


async def connect_to(ledger: PostgresLedger) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the server of *ledger* as a driver does."""
    return await asyncio.open_unix_connection(f"{ledger.host}/.s.PGSQL.5432")


async def loses_a_commit(starter: ProcessStarter, folder: Path, ledger: PostgresLedger, side: str) -> None:
    """Lose the reply to *side*'s commit of a webhook, or of a copy."""
    async with running(starter, folder, ledger) as system, Proxy(partial(connect_to, ledger)).serve() as proxy:
        await never_hears(system, proxy, side)
    ledger.close()


async def never_hears(system: System, proxy: Proxy, side: str) -> None:
    """See loses_a_commit."""
    assert isinstance(system.ledger, PostgresLedger)
    through = f"postgresql://postgres@127.0.0.1:{proxy.port}/{system.ledger.name}"
    urls = {"web": system.ledger.url, "worker": system.ledger.url} | {side: through}
    await asyncio.gather(system.api(MAYFLY_DATABASE_URL=urls["web"]), system.worker(MAYFLY_DATABASE_URL=urls["worker"]))
    generation = system.generation(get=["hold"])
    if side == "web":
        proxy.trouble("lose", b"COMMIT", after=b"INSERT INTO records", once=True)
        first = await system.announce(generation)
        assert first.status == 503
        assert len(await system.ids()) == 1  # it was committed, and nobody told the web side
    await system.accepted(generation)
    await system.held(generation)
    if side == "worker":
        proxy.trouble("lose", b"COMMIT", after=b"copied_attempt=")  # of the copy, and of nothing else
    system.simulator.release(generation.id)
    if side == "worker":
        await asyncio.wait_for(proxy.reached.wait(), 10)
        await asyncio.sleep(2.5)
        assert system.calls(generation) == []
        assert (await system.row(generation)).copied_at is not None  # it was committed, and nobody told the worker
        proxy.heal()
    await system.drain()

    assert len(await system.ledger.rows()) == 1
    assert not (await system.judged()).all


async def test_a_restored_older_backup_deletes_nothing_wrongly(system: System):
    ledger = system.ledger
    assert isinstance(ledger, SqliteLedger)
    worker, api = await asyncio.gather(system.worker(), system.api())
    old = await system.accepted(system.generation())
    assert await worker.stop() == 0
    assert await api.stop() == 0
    backup = ledger.path.with_name("backup.db")
    shutil.copy(ledger.path, backup)
    worker, api = await asyncio.gather(system.worker(), system.api())
    await system.until(old, "deleted")
    newer = await system.accepted(system.generation(webhook_url="https://hooks.example.com/webhooks/sync?ttl=1h"))
    assert await worker.stop() == 0
    assert await api.stop() == 0
    ledger.close()
    for left in ledger.path.parent.glob(f"{ledger.path.name}-*"):
        left.unlink()
    shutil.copy(backup, ledger.path)
    await asyncio.gather(system.worker(), system.api())
    await system.drain()

    row = await system.row(old)
    assert (row.state, row.outcome) == ("deleted", "already_gone")
    assert len(system.calls(old)) == 1
    assert system.calls(newer) == []
    assert newer.id in system.simulator.generations


@contextlib.contextmanager
def no_room(process: Process) -> Iterator[None]:
    """Let *process* write nothing more into any file, as on a full disk."""
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)


async def read_only(ledger: PostgresLedger, mode: str) -> None:
    """Make the database read-only for whoever connects next, and let all connect anew."""
    await ledger.execute(f'ALTER DATABASE "{ledger.name}" SET default_transaction_read_only = {mode}')
    await ledger.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
