"""Rows 49 to 60: what follows from each answer of the API, in a whole system."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from service.simulator import Generation, Operation, Simulator
from tests.faults.databases import Row, migrated_sqlite
from tests.faults.processes import ProcessStarter
from tests.faults.system import TOKEN, System, at_once, overdue, running
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What stands in a record of a generation that talks: the copy has to keep all of it.
PROMISED = (
    *("id", "createdAt", "status", "model", "input", "webhookUrl", "options", "outputUrl", "outputDuration"),
    *("outputFileName", "projectId", "synthesizedAudioUrl"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(starter: ProcessStarter, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """One system for all of them: each test has generations of its own."""
    folder = tmp_path_factory.mktemp("answers")
    ledger = await migrated_sqlite(folder)
    async with running(starter, folder, ledger) as system:
        system.is_enqueueing = True  # what is judged here is what an answer leads to, not who wakes up for the next one
        await asyncio.gather(system.api(), system.worker())
        yield system
    ledger.close()


@pytest_asyncio.fixture(loop_scope="module")
async def own(starter: ProcessStarter, tmp_path: Path) -> AsyncIterator[System]:
    """A system for one test alone."""
    ledger = await migrated_sqlite(tmp_path)
    async with running(starter, tmp_path, ledger) as system:
        yield system
    ledger.close()


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _good_to_the_end(shared: System) -> AsyncIterator[None]:
    """Let the judge look after each test: nothing early, nothing unrecorded, nothing uninvited."""
    yield
    verdict = await shared.judged()
    assert not [*verdict.early, *verdict.unrecorded, *verdict.uninvited, *verdict.leaked]


async def test_the_record_has_every_field_that_the_api_documents(shared: System):
    generation = await shared.accepted(
        shared.generation(text_input=True, output_file_name="take 7", project_id="612bb64a-e7f4-40c1-977b-3e9797845637")
    )
    shown = generation.body()
    await shared.until(generation, "deleted")
    record = await shared.record(generation)

    assert {name: record[name] for name in PROMISED} == {name: shown[name] for name in PROMISED}
    assert record["receipt"]["method"] == "DELETE"
    assert record["receipt"]["status"] == 200
    assert '"synthesizedAudioUrl"' in record["receipt"]["body"]


async def test_an_answer_about_another_generation_is_never_followed_by_a_delete(shared: System):
    generation = await shared.accepted(shared.generation(get=["wrong-id*"]))
    row = await shared.until(generation, "failed")

    assert shared.calls(generation) == []
    assert row.copy is None
    assert row.last_error == "the API answered with another generation"
    assert await shared.metric("mayfly_failed_records") >= 1


async def table(shared: System, method: str, scripts: Sequence[list[str]]) -> list[tuple[str, Generation, Row]]:
    """Bring a generation per script of *method* to its end, all at once; return the first fault beside each."""
    generations = [shared.generation(**{method: script}) for script in scripts]
    await asyncio.gather(*map(shared.accepted, generations))
    rows = await asyncio.gather(*(shared.until(one, "deleted", seconds=40) for one in generations))
    return [(script[0], one, row) for script, one, row in zip(scripts, generations, rows, strict=True)]


async def test_a_generation_that_is_gone_is_confirmed_without_a_delete(shared: System):
    for fault, generation, row in await table(shared, "get", [["404"], ["410"]]):
        record = await shared.record(generation)

        assert row.outcome == "already_gone", fault
        assert shared.calls(generation) == [], fault
        assert record["outputUrl"] == generation.body()["outputUrl"], fault


async def test_after_an_unreadable_get_no_delete_is_sent_and_the_attempt_is_retried(shared: System):
    worker = next(process for process in shared.processes if process.log.name.startswith("worker"))
    before = worker.resident_megabytes
    faults = ["html", "invalid-json", "truncated", "non-utf8", "huge:megabytes=64", "204", "202", "processing"]
    for fault, generation, _ in await table(shared, "get", [[fault, fault] for fault in faults]):
        looks = shared.calls(generation, Operation.GET)
        (delete,) = shared.calls(generation)

        assert len(looks) == 3, fault
        assert delete.at > looks[-1].at, fault
    assert worker.resident_megabytes - before < 40


async def test_only_the_apis_own_answer_confirms_a_delete(shared: System):
    for fault, generation, row in await table(shared, "delete", [["204"], ["404"], ["410"]]):
        assert row.outcome == ("deleted" if fault == "204" else "already_gone"), fault
        assert row.copy is not None, fault
        assert len(shared.calls(generation)) == 1, fault


async def test_an_unconfirmed_delete_is_retried_until_it_is_confirmed(shared: System):
    faults = [
        *("202", "409", "409-conflict", "429:retry_after=1", "500", "502", "503", "504", "drop", "reset", "lost"),
        *("truncated", "invalid-json", "html", "non-utf8", "huge:megabytes=8"),
    ]
    for fault, generation, row in await table(shared, "delete", [[fault, fault] for fault in faults]):
        assert row.attempts >= 2, fault
        assert row.refusals == 0, fault
        assert generation.id not in shared.simulator.generations, fault


async def test_a_409_is_retried_twenty_times_and_shown_meanwhile(shared: System):
    generation = await shared.accepted(shared.generation(delete=["409*20"]))
    seen = set()
    async with asyncio.timeout(40):
        while (row := await shared.row(generation)).state != "deleted":
            seen.add(row.last_error)
            await shared.hurry()
            await asyncio.sleep(0.1)

    assert row.attempts == 21
    assert "the API answered 409 generation_not_deletable_while_processing" in seen


async def test_retry_after_is_obeyed_between_a_second_and_a_day(shared: System):
    asked = {
        "503:retry_after=120": (120, 133),
        "503:date=120": (117, 133),
        "503:date=-3600": (1, 5.1),
        "503:retry_after=0": (1, 5.1),
        "503:retry_after=soon": (2, 5.1),
        "503:retry_after=315360000": (86_400, 86_431),
    }
    generations = {fault: shared.generation(delete=[fault]) for fault in asked}
    await asyncio.gather(*map(shared.accepted, generations.values()))
    for fault, (low, high) in asked.items():
        row = await put_off(shared, generations[fault])
        first, *_ = shared.calls(generations[fault])

        assert row.wake_at is not None, fault
        assert low - 1 <= (row.wake_at - first.at).total_seconds() <= high + 1, fault


async def test_a_429_pauses_all_workers_and_delays_its_record_by_its_retry_after(own: System):
    system = own
    _, *workers = await asyncio.gather(system.api(), system.worker(), system.worker())
    first = await system.accepted(system.generation(delete=["429:body=120"]))
    row = await put_off(system, first)
    (delete,) = system.calls(first)
    assert row.wake_at is not None
    assert 119 <= (row.wake_at - delete.at).total_seconds() <= 133
    others = [await system.accepted(system.generation()) for _ in range(8)]
    await overdue(system, others[-1])
    await asyncio.sleep(3)  # either worker has looked at them more than once
    assert [call for one in others for call in system.calls(one, Operation.GET)] == []
    assert (await system.health())[1]["parts"]["deletions"]["detail"].count(
        "the API answered 429, too many requests"
    ) == 1
    await asyncio.gather(*(worker.kill() for worker in workers))
    operator = {"authorization": f"Bearer {TOKEN}"}
    resumed = await system.client.post(f"{system.url}/api/resume", headers=operator)  # as the wait would
    assert resumed.status_code == 200
    await system.worker()
    await system.drain()

    assert not (await system.judged()).all


async def test_three_workers_together_use_exactly_the_budget(own: System):
    system = own
    await system.api()
    generations = [await system.accepted(system.generation()) for _ in range(60)]
    await overdue(system, generations[-1])
    await asyncio.gather(*(system.worker(MAYFLY_API_RATE="300/minute") for _ in range(3)))
    begun = time.monotonic()
    await asyncio.sleep(10)
    calls, seconds = len(system.simulator.calls), time.monotonic() - begun
    deleted = [one for one in generations if one.id in system.simulator.removed]

    # 5 calls a second, and two for each record; the first and the last window are not seen whole.
    assert 5 * (seconds - 3) <= calls <= 5 * (seconds + 3)
    assert len(deleted) >= 2.5 * (seconds - 3)
    assert not [event for process in system.processes for event in process.events("cleanup.returned")]
    assert not (await system.judged()).early


async def put_off(system: System, generation: Generation) -> Row:
    """Wait until the first attempt at *generation* is over and the next one is put off."""

    async def has_failed() -> bool:
        return (await system.row(generation)).failures > 0

    await eventually(has_failed, seconds=20)
    return await system.row(generation)


async def test_a_refusal_is_given_up_after_a_few_tries_and_shown(shared: System):
    generations = {fault: shared.generation(delete=[f"{fault}*"]) for fault in ("400", "405", "422")}
    await asyncio.gather(*map(shared.accepted, generations.values()))
    for fault, generation in generations.items():
        row = await shared.until(generation, "failed")

        assert row.attempts == 5
        assert row.last_error is not None
        assert row.last_error.startswith(f"the API answered {fault}")
        assert row.copy is not None
    assert await shared.metric("mayfly_failed_records") >= 3


async def test_a_redirect_is_never_followed_and_the_key_goes_nowhere_else(shared: System):
    elsewhere = Simulator(api_key="another")
    async with elsewhere.serve() as url:
        redirects = [[f"{status}:location={url}/v2/generations/x"] for status in (301, 302, 307, 308)]
        of_get, of_delete = await asyncio.gather(table(shared, "get", redirects), table(shared, "delete", redirects))

    for fault, _, row in of_get + of_delete:
        assert row.attempts == 2, fault
    assert elsewhere.calls == []


async def test_a_slow_answer_times_out_and_the_next_attempt_settles_it(shared: System):
    generation = await shared.accepted(shared.generation(get=["slow:interval=1"]))
    begun = datetime.now(UTC)
    row = await put_off(shared, generation)

    assert row.last_error == "the API did not answer the GET within 10 s"
    assert datetime.now(UTC) - begun < timedelta(seconds=15)
    assert shared.calls(generation) == []
    await shared.until(generation, "deleted")


async def test_an_unreachable_api_fails_no_record(starter: ProcessStarter, tmp_path: Path):
    with no_one_answers() as port:
        addresses = {
            "refused": "http://127.0.0.1:9",
            "no_tls": "https://127.0.0.1:{simulator}",
            "no_name": "https://mayfly-test.invalid",
            "silent": f"http://127.0.0.1:{port}",
        }
        reach = {name: partial(cannot_be_reached, address) for name, address in addresses.items()}
        seconds = await at_once(starter, tmp_path, reach)

    # Its connect timeout is 5 s, and the due time up to 1 s away.
    assert 4.5 < seconds.pop("silent") < 9
    assert max(seconds.values()) < 4


async def cannot_be_reached(address: str, system: System) -> float:
    """Let *system* call an API at *address*, then at the right one; return how long the first attempt took."""
    url = address.format(simulator=system.simulator.url.rpartition(":")[2])
    worker, _ = await asyncio.gather(system.worker(SYNC_BASE_URL=url), system.api())
    generation = await system.accepted(system.generation())
    begun = time.monotonic()
    row = await put_off(system, generation)
    seconds = time.monotonic() - begun
    assert row.last_error is not None
    assert row.last_error.startswith("the GET did not get through")
    assert (row.state, row.failures, row.refusals) == ("scheduled", 1, 0)
    assert await worker.stop() == 0
    assert system.simulator.calls == []
    await system.hurry()
    await system.worker()
    await system.drain()

    assert not (await system.judged()).all
    return seconds


@contextlib.contextmanager
def no_one_answers() -> Iterator[int]:
    """Listen at a port where connections are neither taken nor refused: those that may wait do so already."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        address = listener.getsockname()
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.settimeout(0)
            one.connect_ex(address)
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.3)
        yield address[1]
