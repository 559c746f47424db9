"""A sweep adopts what no webhook told of, and nothing else, with a whole ttl from then on."""

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from sqlalchemy import ColumnElement, select
from structlog.testing import capture_logs

from service.core.adopting import POLLERS_TTL, Fit, Scope
from service.core.holding import Hold
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.core.rate import Rate
from service.core.retention import Policy
from service.core.secret import Secret
from service.ledger import adopting, explanations, history, holding, pausing, reading
from service.ledger.pausing import Kind, Pause
from service.ledger.reading import Filter
from service.ledger.schema import labels, records
from service.simulator import Operation
from service.sync.client import open_sync_api
from service.sync.rate_limit import Budget, SpareCalls
from tests.conftest import API_KEY
from tests.support.ledger import ACCOUNT, HOUR, arrival, count, receive, row_of, utc_now
from tests.support.waiting import eventually
from workers.sweep import Sweep, Sweeper

BASE = "https://mayfly.example"
OURS = f"{BASE}/webhooks/sync"
TTL = timedelta(hours=24)
FAST = Rate(100_000, 1)


@pytest.fixture
def make_sweeper(database, simulator, pool, metrics):
    """Make a sweeper of the simulator's organisation: ``make_sweeper(adopt="all")``."""

    def make(*, adopt="ours", rate=FAST, ttl=TTL, stopping=None, now=utc_now, base=BASE):
        budget = Budget(rate, pool, Secret(API_KEY), clock=time.monotonic, stopping=asyncio.Event())
        return Sweeper(
            scope=Scope(ACCOUNT, base, adopt),
            policy=Policy(ttl, timedelta(minutes=1)),
            database=database,
            open_api=partial(open_sync_api, simulator.url, Secret(API_KEY), connections=1, metrics=metrics),
            acquire=partial(SpareCalls(budget, time.monotonic).wait, 5, stopping or asyncio.Event()),
            now=now,
            metrics=metrics,
        )

    return make


@pytest.fixture
def make_sweep(make_sweeper):
    """Make the sweep of a worker, with what it enqueued in ``enqueued``."""

    def make(**options):
        stopping, enqueued = asyncio.Event(), []

        async def enqueue(jobs):
            enqueued.extend(jobs)

        made = Sweep(make_sweeper(stopping=stopping, **options), enqueue=enqueue, stopping=stopping)
        return made, stopping, enqueued

    return make


async def swept(sweeper):
    """Find and adopt, and return what was adopted."""
    found = await sweeper.find()
    assert found.listing.failure is None
    return await sweeper.adopt(found.unknown)


async def ids_of(database, *where: ColumnElement[bool]):
    rows = await database.read(lambda connection: connection.execute(select(records.c.id).where(*where)).all())
    return {row.id for row in rows}


async def test_what_no_webhook_told_of_is_adopted_with_a_whole_ttl(database, simulator, make_sweeper):
    missed = simulator.add(webhook_url=OURS, created_at=utc_now() - timedelta(days=400))
    before = utc_now()
    adopted = await swept(make_sweeper())

    row = await row_of(database, Key(ACCOUNT, missed.id))
    assert adopted.states == {State.SCHEDULED: 1}
    assert before + TTL <= row.due_at == row.wake_at == row.sent_at + TTL <= utc_now() + TTL
    assert (row.state, row.rule, row.ttl_seconds, row.attempts) == ("scheduled", "MAYFLY_TTL", 86_400, 0)


async def test_an_adopted_record_has_all_that_the_api_shows(database, simulator, make_sweeper):
    url = f"{OURS}?ttl=2h&label.customer=acme"
    missed = simulator.add(webhook_url=url, output_file_name="take 07", project_id="film", text_input=True)
    await swept(make_sweeper())

    row = await row_of(database, Key(ACCOUNT, missed.id))
    assert (row.output_file_name, row.project_id, row.webhook_url) == ("take_07", "film", url)
    assert (row.copy.encode(), row.notification, row.copied_at, row.look_at) == (missed.encoded(), None, None, None)
    assert (row.rule, row.due_at - row.sent_at) == ("override: ttl", timedelta(hours=2))
    stored = await database.read(lambda connection: connection.execute(select(labels)).all())
    assert [(one.record, one.name, one.value) for one in stored] == [(row.seq, "customer", "acme")]
    (entry,) = await database.read(partial(history.read_entries, record=row.seq))
    assert (entry.move, entry.actor, entry.detail) == (
        Move.RECEIVE,
        "sweep",
        {"rule": "override: ttl", "status": "COMPLETED"},
    )


async def test_an_adopted_record_is_found_by_its_file_name(database, simulator, make_sweeper):
    missed = simulator.add(webhook_url=OURS, output_file_name="needle")
    simulator.add(webhook_url=OURS, output_file_name="hay")
    await swept(make_sweeper())

    page = await database.read(partial(reading.read_page, wanted=Filter(text="needle"), limit=10, cursor=None))
    assert [row.id for row in page.rows] == [missed.id]


async def test_an_adopted_record_is_explained_without_a_webhook(database, simulator, make_sweeper):
    missed = simulator.add(webhook_url=OURS)
    await swept(make_sweeper())
    key = Key(ACCOUNT, missed.id)
    explained = await database.read(partial(explanations.explain_key, key=key, now=utc_now(), is_dry_run=False))

    assert "MAYFLY_TTL decided this, 1d after a sweep adopted it" in explained.explain


async def test_an_override_that_holds_or_keeps_counts(database, simulator, make_sweeper):
    held = simulator.add(webhook_url=f"{OURS}?hold=legal")
    kept = simulator.add(webhook_url=f"{OURS}?ttl=forever")
    wrong = simulator.add(webhook_url=f"{OURS}?tll=forever")
    adopted = await swept(make_sweeper())

    assert adopted.states == {State.HELD: 2, State.KEPT: 1}
    row = await row_of(database, Key(ACCOUNT, held.id))
    assert (row.state, row.hold_by, row.hold_reason, row.wake_at) == ("held", "sweep", "legal", None)
    assert (await row_of(database, Key(ACCOUNT, kept.id))).state == "kept"
    assert "did you mean" in (await row_of(database, Key(ACCOUNT, wrong.id))).hold_reason


async def test_a_hold_that_was_made_before_there_is_a_record_counts(database, simulator, make_sweeper):
    missed, other = simulator.add(webhook_url=OURS), simulator.add(webhook_url=OURS)
    key = Key(ACCOUNT, missed.id)
    hold = Hold("an operator", "legal", None)
    await database.write(partial(holding.hold_unseen, key=key, hold=hold, now=utc_now()))
    sweeper = make_sweeper()
    found = await sweeper.find()
    await sweeper.adopt(found.unknown)

    row = await row_of(database, key)
    assert found.held == {missed.id: "legal"}
    assert (row.state, row.hold_by, row.hold_reason, row.wake_at) == ("held", "an operator", "legal", None)
    assert row.due_at - row.sent_at == TTL
    assert await database.read(partial(holding.find_hold, key=key)) is None
    assert (await row_of(database, Key(ACCOUNT, other.id))).state == "scheduled"


@pytest.mark.parametrize("state", list(State))
async def test_a_record_stays_as_it_is_whatever_its_state(database, simulator, make_sweeper, state):
    known = simulator.add(webhook_url=OURS)
    await receive(database, arrival(id=known.id))
    await database.write(lambda connection: connection.execute(records.update().values(state=state)))
    before = await row_of(database, Key(ACCOUNT, known.id))
    sweeper = make_sweeper()
    found = await sweeper.find()
    adopted = await sweeper.adopt(found.listing.items)  # as if the webhook had come meanwhile

    assert [one.state for one in found.known.values()] == [state]
    assert (list(found.unknown), adopted.known, dict(adopted.states)) == ([], 1, {})
    assert await row_of(database, Key(ACCOUNT, known.id)) == before
    assert len(await database.read(partial(history.read_entries, record=before.seq))) == 1


async def test_another_account_with_the_same_id_is_another_record(database, simulator, make_sweeper):
    missed = simulator.add(webhook_url=f"{OURS}/acme")
    await receive(database, arrival(id=missed.id))
    sweeper = make_sweeper()
    await swept(replace(sweeper, scope=Scope("acme", BASE, "ours")))

    assert (await row_of(database, Key("acme", missed.id))).state == "scheduled"
    assert await count(database) == 2


async def test_only_what_has_ended_and_is_ours_is_adopted(database, simulator, make_sweeper):
    for status in ("PENDING", "PROCESSING"):
        simulator.add(webhook_url=OURS, status=status)
    simulator.add(webhook_url=OURS, overrides={}).overrides = {"status": "ARCHIVED"}
    simulator.add(webhook_url="https://app.example/hook")
    simulator.add()
    ended = [simulator.add(webhook_url=OURS, status=status).id for status in ("COMPLETED", "FAILED", "REJECTED")]
    sweeper = make_sweeper()
    found = await sweeper.find()
    await sweeper.adopt(found.unknown)

    assert await ids_of(database) == set(ended)
    assert found.fits == {Fit.FITS: 3, Fit.RUNNING: 2, Fit.UNKNOWN_STATUS: 1, Fit.FOREIGN: 2}


async def test_clients_that_poll_keep_their_generation_for_a_quarter_of_an_hour(database, simulator, make_sweeper):
    polled, ours = simulator.add(), simulator.add(webhook_url=OURS)
    simulator.add(webhook_url="https://app.example/hook")
    await swept(make_sweeper(adopt="without-webhook", ttl=timedelta(minutes=2)))

    assert await ids_of(database) == {polled.id, ours.id}
    for one, wait in ((polled, POLLERS_TTL), (ours, timedelta(minutes=2))):
        row = await row_of(database, Key(ACCOUNT, one.id))
        assert row.due_at - row.sent_at == wait


async def test_a_webhook_that_comes_late_is_no_conflict_and_the_later_due_time_counts(
    database, simulator, make_sweeper
):
    missed = simulator.add(webhook_url=OURS)
    await swept(make_sweeper())
    (early,) = await receive(database, arrival(id=missed.id, due_in=HOUR))
    (late,) = await receive(database, arrival(id=missed.id, due_in=48 * HOUR))

    assert (early.is_new, early.is_conflict, early.is_moved) == (False, False, False)
    assert late.is_moved
    assert late.due_at is not None
    assert late.due_at - utc_now() > 47 * HOUR


async def test_one_generation_that_the_database_refuses_keeps_no_other(database, simulator, make_sweeper):
    ids = {simulator.add(webhook_url=OURS).id for _ in range(5)}
    # PostgreSQL has no index entry of that length.
    refused = simulator.add(webhook_url=OURS, project_id="".join(f"{number:x}." for number in range(9000))).id
    adopted = await swept(make_sweeper())

    assert await ids_of(database) - {refused} == ids
    assert adopted.refused + sum(adopted.states.values()) == 6


async def test_two_sweeps_at_once_adopt_each_generation_once(database, simulator, make_sweeper):
    ids = {simulator.add(webhook_url=OURS).id for _ in range(500)}
    first, second = await asyncio.gather(swept(make_sweeper()), swept(make_sweeper()))

    assert sum(first.states.values()) + sum(second.states.values()) == 500
    assert await ids_of(database) == ids


async def test_of_twenty_thousand_generations_exactly_the_missed_are_adopted(database, simulator, make_sweeper):
    now = utc_now()
    made = [
        simulator.add(webhook_url=OURS if number % 40 else None, created_at=now - timedelta(seconds=number))
        for number in range(20_000)
    ]
    missed = {one.id for number, one in enumerate(made) if number % 20 == 7}
    foreign = {one.id for one in made if one.webhook_url is None}
    told = [arrival(id=one.id, due_in=HOUR) for one in made if one.id not in missed | foreign]
    for start in range(0, len(told), 1000):
        await receive(database, *told[start : start + 1000])
    simulator.calls.clear()
    sweeper = make_sweeper(rate=Rate(200, 1))

    # Killed in the list, and between two commits.
    def killed_at(pages, listing):
        if listing.pages == pages:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await sweeper.find(partial(killed_at, 100))
    assert await count(database) == len(told)
    found = await sweeper.find()
    adopting_some = asyncio.create_task(sweeper.adopt(found.unknown))
    await eventually(partial(has_more, database, len(told)))
    adopting_some.cancel()
    with suppress(asyncio.CancelledError):
        await adopting_some
    adopted = await swept(sweeper)

    by_sweep = await ids_of(database, records.c.notification.is_(None))
    assert (by_sweep, len(missed)) == (missed, 1000)
    assert await count(database) == len(told) + 1000
    assert sum(adopted.states.values()) <= 1000
    early = await ids_of(database, records.c.notification.is_(None), records.c.due_at < now + TTL)
    assert early == set()
    assert_rate(simulator, calls=200, pages=100 + 2 * 201)


async def has_more(database, number):
    return await count(database) > number


def assert_rate(simulator, *, calls, pages):
    """Assert that no second has more than *calls*, and that nothing but *pages* of the list and one look were read."""
    operations = Counter(call.operation for call in simulator.calls)
    assert operations == {Operation.LIST: pages, Operation.GET: 2}
    at = sorted(call.at.timestamp() for call in simulator.calls)
    assert max(sum(start <= one < start + 1 for one in at) for start in at) <= calls


async def test_while_deletions_wait_for_the_budget_the_sweep_makes_no_call(pool):
    rate = Rate(60, 60)  # one attempt in two seconds
    budget = Budget(rate, pool, Secret("sk-2"), clock=time.monotonic, stopping=asyncio.Event())
    spare = SpareCalls(budget, time.monotonic)
    assert await budget.acquire(5)
    waiting = [asyncio.create_task(budget.acquire(10)) for _ in range(2)]
    sweeping = asyncio.create_task(spare.wait(20, asyncio.Event()))
    await asyncio.wait(waiting)

    assert not sweeping.done()
    assert await sweeping


async def test_the_budget_of_one_attempt_at_a_time_is_enough_for_a_sweep(pool):
    budget = Budget(Rate(60, 60), pool, Secret("sk-3"), clock=time.monotonic, stopping=asyncio.Event())

    assert await SpareCalls(budget, time.monotonic).wait(5, asyncio.Event())


async def complete(database):
    return await database.read(partial(adopting.last_complete, account=ACCOUNT))


async def test_a_worker_sweeps_logs_a_line_and_notes_that_it_was_complete(database, simulator, make_sweep, metrics):
    simulator.add(webhook_url=f"{OURS}?ttl=30m")
    simulator.add()
    simulator.add(webhook_url=OURS).overrides = {"status": 7}
    sweep, _, enqueued = make_sweep()
    with capture_logs() as logs:
        sweep.begin()
        await sweep.wait()

    (line,) = [line for line in logs if line["event"] == "sweep.completed"]
    assert (line["read"], line["adopted"], line["known"], line["foreign"]) == (2, 1, 0, 1)
    assert [line["event"] for line in logs] == ["sweep.unreadable", "sweep.completed"]
    assert abs((await complete(database)) - utc_now()) < timedelta(seconds=10)
    assert [job.attempt for job in enqueued] == [1]
    samples = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    assert (samples["mayfly_sweep_adopted_total"], samples["mayfly_sweep_unreadable_total"]) == (1, 1)


async def pause_of(database, kind, until=None):
    wanted = Pause(kind, utc_now(), "a test", "for a test", until, ACCOUNT)
    await database.write(partial(pausing.pause, wanted=wanted))


@pytest.mark.parametrize(
    ("kind", "minutes", "is_swept"),
    [
        (Kind.OPERATOR, None, True),
        (Kind.DAILY_LIMIT, 60, True),
        (Kind.UNAUTHORIZED, 1, False),
        (Kind.UNAUTHORIZED, -1, True),
        (Kind.THROTTLED, 1, False),
        (Kind.THROTTLED, -1, True),
        (Kind.WRONG_ORGANISATION, None, False),
    ],
)
async def test_only_a_pause_that_concerns_the_key_stops_a_sweep(
    database, simulator, make_sweep, *, kind, minutes, is_swept
):
    simulator.add(webhook_url=OURS)
    await pause_of(database, kind, None if minutes is None else utc_now() + timedelta(minutes=minutes))
    sweep, _, _ = make_sweep()
    sweep.begin()
    await sweep.wait()

    assert (await count(database), bool(simulator.calls)) == (int(is_swept), is_swept)


async def test_of_several_workers_one_sweeps_and_the_next_turn_comes(simulator, make_sweep):
    now = [utc_now()]
    sweeps = [make_sweep(now=lambda: now[0])[0] for _ in range(3)]
    for sweep in sweeps:
        sweep.begin()
    await asyncio.gather(*(sweep.wait() for sweep in sweeps))
    assert len(simulator.calls) == 1
    now[0] += adopting.TURN + timedelta(seconds=1)
    sweeps[0].begin()
    await sweeps[0].wait()

    assert len(simulator.calls) == 2


async def test_a_list_that_is_not_complete_adopts_nothing(database, simulator, make_sweep):
    for _ in range(150):
        simulator.add(webhook_url=OURS)
    simulator.plan.script("LIST", ["401"])
    sweep, _, _ = make_sweep()
    with capture_logs() as logs:
        sweep.begin()
        await sweep.wait()

    assert (await count(database), await complete(database)) == (0, None)
    (line,) = logs
    assert (line["event"], line["error"]) == ("sweep.failed", "the API answered 401")
    assert len(simulator.calls) == 1


async def test_a_429_that_ends_a_sweep_lets_deletions_wait_too(database, simulator, make_sweep):
    simulator.plan.script("LIST", ["429:retry_after=600"])
    sweep, _, _ = make_sweep()
    sweep.begin()
    await sweep.wait()

    (pause,) = await database.read(pausing.find_pauses)
    assert (pause.kind, pause.until > utc_now() + timedelta(minutes=9)) == (Kind.THROTTLED, True)


async def test_a_stop_ends_a_sweep_at_once(database, simulator, make_sweep):
    simulator.add(webhook_url=OURS)
    simulator.plan.script("LIST", ["hold"])
    sweep, stopping, _ = make_sweep()
    sweep.begin()
    await eventually(lambda: simulator.gates.waiting)
    stopping.set()
    async with asyncio.timeout(2):
        await sweep.wait()
    simulator.release("")
    sweep.begin()
    await sweep.wait()

    assert (await count(database), len(simulator.calls)) == (0, 1)


async def test_the_metrics_say_when_a_sweep_last_was_complete(sqlite_database, open_client):
    at = datetime(2026, 11, 28, 12, tzinfo=UTC)
    name = 'mayfly_sweep_complete_timestamp_seconds{account="default"}'
    async with open_client(sqlite_database, MAYFLY_PUBLIC_URL=BASE) as client:
        never = (await client.get("/metrics")).text
        await sqlite_database.write(partial(adopting.note_complete, account=ACCOUNT, now=at))
        once = (await client.get("/metrics")).text

    assert f"{name} 0.0" in never
    assert float(next(line for line in once.splitlines() if line.startswith(name)).split()[1]) == at.timestamp()


async def test_an_account_that_is_not_swept_has_no_such_metric(sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        text = (await client.get("/metrics")).text

    assert "mayfly_sweep_complete_timestamp_seconds{" not in text
