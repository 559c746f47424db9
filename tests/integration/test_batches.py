"""A finished batch: stored before its webhook is answered, then each of its generations has its record."""

import asyncio
import json
import time
from datetime import datetime, timedelta
from functools import partial

import httpx
import msgspec
import pytest
from sqlalchemy import select, text, update
from structlog.testing import capture_logs

from service.core.batch import BatchState
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.core.rate import Rate
from service.core.record_ttls import RecordTtls
from service.core.retention import Policy
from service.core.secret import Secret
from service.jobs import connection
from service.jobs.enqueue import BatchJob, CleanupJob, CopyJob
from service.ledger import adopting, batches, deliveries, pausing
from service.ledger.pausing import Kind, Pause
from service.ledger.schema import batches as table
from service.ledger.schema import records
from service.simulator import Operation
from service.sync.client import open_sync_api
from service.sync.rate_limit import Budget, SpareCalls
from service.sync.results import make_results_reader
from tests.conftest import API_KEY, API_TOKEN, http_client
from tests.support.ledger import ACCOUNT, HOUR, arrival, count, move, moves_of, receive, row_of, store, utc_now
from tests.support.requiring import CRM, announce, forwarding_of, requirements_of, rows_of_deliveries
from tests.support.waiting import eventually
from tests.support.webhooks import batch, webhook
from workers.batch import Batches
from workers.batch_look import BatchLook
from workers.hygiene import Hygiene

PAYLOAD = {"model": "lipsync-2", "input": [{"type": "video", "url": "https://cdn.example.com/a.mp4"}]}
TTL = timedelta(hours=24)
GIVE_UP = timedelta(days=3)
BEARER = {"authorization": f"Bearer {API_TOKEN}"}


@pytest.fixture
def enqueued():
    return []


@pytest.fixture
def worker(database, simulator, pool, metrics, enqueued):
    """Make the job of a worker; *enqueued* has what it enqueued."""

    def make(*, database=database, now=utc_now, stopping=None):
        stopping = stopping or asyncio.Event()
        budget = Budget(Rate(100_000, 1), pool, Secret(API_KEY), clock=time.monotonic, stopping=stopping)
        look = partial(
            BatchLook,
            policy=Policy(TTL, timedelta(minutes=1)),
            database=database,
            open_api=partial(open_sync_api, simulator.url, Secret(API_KEY), connections=1, metrics=metrics),
            reader=make_results_reader(simulator.url),
            acquire=partial(SpareCalls(budget, time.monotonic).wait, 5, stopping),
            now=now,
            list_wait_seconds=0.02,
        )

        async def enqueue(jobs):
            enqueued.extend(jobs)

        return Batches(
            database=database,
            look=lambda claimed: look(claimed=claimed),
            enqueue=enqueue,
            give_up_after=GIVE_UP,
            now=now,
            metrics=metrics,
            stopping=stopping,
        )

    return make


@pytest.fixture
async def app(database, open_client):
    async with open_client(database, MAYFLY_TTL="24h") as client:
        yield client


async def make_batch(simulator, app, *, lines=40, query="", own=None):
    """Let the simulator make a batch and send its webhook to *app*; return it when that is stored.

    *own* is the webhookUrl of its generations, by default the batch's.
    """
    simulator.switches.processing_seconds = 0.1
    url = f"{app.base_url.join('/webhooks/sync')}{query}"
    payload = PAYLOAD | ({"webhookUrl": own or url})
    content = b"\n".join(
        json.dumps({"request_id": f"r{number}", "endpoint": "/v2/generate", "payload": payload}).encode()
        for number in range(lines)
    )
    async with http_client(simulator.url) as client:
        files = {"input": ("batch.jsonl", content)}
        made = await client.post("/v2/batch", data={"webhook_url": url}, files=files, headers={"x-api-key": API_KEY})
    assert made.status_code == 201, made.text
    found = simulator.batches[made.json()["id"]]
    await eventually(lambda: any(one.generation_id == found.id for one in simulator.deliveries))
    return found


async def make_quiet_batch(simulator, app, **options):
    """Make a batch whose generations send no webhook that arrives: theirs are sent to nobody."""
    return await make_batch(simulator, app, own=f"{simulator.url}/nobody", **options)


async def batch_row(database, found):
    return await database.read(partial(batches.find_batch, key=Key(ACCOUNT, found.id)))


async def hurry(database):
    past = utc_now() - timedelta(seconds=1)
    await database.write(
        lambda connection: connection.execute(update(table).where(table.c.look_at.is_not(None)).values(look_at=past))
    )


async def rows_of(database):
    return await database.read(lambda connection: connection.execute(select(records)).all())


async def test_a_batch_with_failures_leads_to_a_record_of_each_generation(database, simulator, app, worker, enqueued):
    simulator.switches.endings = ("COMPLETED", "COMPLETED", "COMPLETED", "FAILED", "REJECTED")
    found = await make_quiet_batch(simulator, app)
    await worker().run(Key(ACCOUNT, found.id))

    rows = await rows_of(database)
    assert {row.id for row in rows} == {one.id for one in found.generations}
    assert {row.status for row in rows} == {"COMPLETED", "FAILED", "REJECTED"}
    row = await batch_row(database, found)
    assert (row.state, row.expected, row.scheduled) == ("resolved", 40, 40)
    assert (row.known, row.errors, row.unresolved) == (0, 0, 0)
    assert (row.source, row.look_at, row.last_error) == ("results", None, None)
    for one in rows:
        assert (one.state, one.rule, one.due_at) == ("scheduled", "MAYFLY_TTL", row.sent_at + TTL)
        assert (one.notification, one.copy, one.look_at is not None) == (None, None, True)
    assert [type(one) for one in enqueued].count(CopyJob) == 40
    assert [type(one) for one in enqueued].count(CleanupJob) == 40


async def test_the_key_is_sent_to_neither_url_of_the_results(simulator, app, worker):
    found = await make_quiet_batch(simulator, app)
    await worker().run(Key(ACCOUNT, found.id))

    calls = [one for one in simulator.calls if one.operation in (Operation.BATCH_RESULT, Operation.MEDIA)]
    assert [one.operation for one in calls] == [Operation.BATCH_RESULT, Operation.MEDIA]
    assert not any(one.has_key for one in calls)


async def test_the_webhook_is_stored_once_and_its_job_enqueued(database, simulator, app, pool):
    found = await make_quiet_batch(simulator, app, lines=20)
    before = await batch_row(database, found)
    body = msgspec.json.encode(found.body())
    answers = [await app.post("/webhooks/sync", content=body, headers=webhook(body).headers) for _ in range(3)]

    assert {(one.status_code, one.text) for one in answers} == {(202, f'{{"id":"{found.id}","state":"batch"}}')}
    assert await batch_row(database, found) == before
    assert (before.state, before.notification) == ("waiting", body.decode())
    job = BatchJob(Key(ACCOUNT, found.id), utc_now())

    async def is_enqueued():
        return await pool.zscore(connection.QUEUE, job.id)

    assert await eventually(is_enqueued)


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING", "JOBS_CREATED", "ARCHIVED"])
async def test_a_batch_that_has_not_ended_is_ignored(database, app, status):
    body = json.dumps(batch() | {"status": status}).encode()
    answer = await app.post("/webhooks/sync", content=body, headers=webhook(body).headers)

    assert (answer.status_code, answer.json()["state"]) == (202, "ignored")
    assert sum((await database.read(batches.count_batches)).values()) == 0


async def test_a_generation_with_its_own_webhook_is_untouched(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, query="?ttl=2h")
    known = found.generations[7]
    body, headers = simulator.webhook(known.id)
    await app.post("/webhooks/sync", content=body, headers=headers)
    key = Key(ACCOUNT, known.id)
    before, moves = await row_of(database, key), await moves_of(database, key)
    await worker().run(Key(ACCOUNT, found.id))

    assert await row_of(database, key) == before
    assert await moves_of(database, key) == moves
    row = await batch_row(database, found)
    assert (row.state, row.scheduled, row.known, await count(database)) == ("resolved", 39, 1, 40)


async def test_all_generations_of_a_batch_wait_for_its_required_target(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    known, own = (Key(ACCOUNT, one.id) for one in found.generations[:2])
    await store(database, id=known.id, due_in=HOUR)
    await announce(database, CRM, id=own.id, due_in=HOUR)
    webhook_of_batch = forwarding_of(Key(ACCOUNT, found.id), "COMPLETED", "{}", (CRM,))
    (delivery,) = await database.write(partial(deliveries.insert_deliveries, webhooks=[webhook_of_batch]))
    await worker().run(Key(ACCOUNT, found.id))
    rows = {row.seq: row.id for row in await rows_of_deliveries(database)}

    for one in found.generations:
        waits = [rows[seq] for seq in await requirements_of(database, Key(ACCOUNT, one.id))]
        assert delivery.id in waits
        assert len(waits) == (2 if one.id == own.id else 1)


@pytest.mark.parametrize(
    "case",
    [
        ("?hold=court", "held", "override: hold"),
        ("?ttl=forever", "kept", "override: ttl"),
        ("?ttl=2h", "scheduled", "MAYFLY_TTL"),
        ("?tll=2h", "held", "invalid override"),
        ("", "scheduled", "MAYFLY_TTL"),
    ],
)
async def test_the_override_of_the_batch_counts_for_what_a_sweep_adopted_before(database, simulator, app, worker, case):
    query, state, rule = case
    found = await make_quiet_batch(simulator, app, lines=20, query=query)
    one = found.generations[3]
    swept = msgspec.structs.replace(arrival(id=one.id, due_in=TTL), is_adopted=True, actor="sweep")
    await database.write(partial(adopting.adopt, arrivals=[swept]))
    await worker().run(Key(ACCOUNT, found.id))

    row = await row_of(database, swept.key)
    assert (row.state, row.rule, row.due_at) == (state, rule, None if state == "kept" else swept.retention.due_at)
    assert row.hold_by == ("batch" if state == "held" else None)


@pytest.mark.parametrize("case", [("?hold=court", "held"), ("?ttl=forever", "kept"), ("?ttl=1m", "scheduled")])
async def test_the_query_of_the_batchs_request_can_keep_longer(database, simulator, app, worker, case):
    query, state = case
    found = await make_quiet_batch(simulator, app, lines=20)
    await database.write(lambda connection: connection.execute(table.delete()))
    body = msgspec.json.encode(found.body())
    await app.post(f"/webhooks/sync{query}", content=body, headers=webhook(body).headers)
    await worker().run(Key(ACCOUNT, found.id))

    assert {row.state for row in await rows_of(database)} == {state}
    assert {row.ttl_seconds for row in await rows_of(database)} == {None if state == "kept" else TTL.total_seconds()}


async def test_what_an_operator_released_is_not_held_again_by_its_batch(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20, query="?hold=court")
    key = Key(ACCOUNT, found.generations[3].id)
    await receive(database, arrival(id=key.id, due_in=TTL))
    await worker().run(Key(ACCOUNT, found.id))
    await move(database, key, Move.RELEASE)
    await database.write(partial(batches.retry_batch, key=Key(ACCOUNT, found.id), now=utc_now()))
    await worker().run(Key(ACCOUNT, found.id))

    assert (await row_of(database, key)).state == State.SCHEDULED
    assert (await moves_of(database, key)).count(Move.HOLD) == 1


async def test_the_override_of_the_batch_counts_for_its_generations(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20, query="?ttl=2h&label.customer=acme")
    await worker().run(Key(ACCOUNT, found.id))

    sent_at = (await batch_row(database, found)).sent_at
    assert {(row.rule, row.due_at) for row in await rows_of(database)} == {("override: ttl", sent_at + 2 * HOUR)}


async def test_a_generations_own_url_can_lengthen_or_hold_but_not_shorten(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    ours = "https://mayfly.example/webhooks/sync"
    for number, query in enumerate(("?ttl=1m", "?ttl=7d", "?hold=court", "?tll=1d")):
        found.generations[number].webhook_url = f"{ours}{query}"
    found.results = results_of(found)
    await worker().run(Key(ACCOUNT, found.id))

    rows = [await row_of(database, Key(ACCOUNT, one.id)) for one in found.generations[:4]]
    assert [row.state for row in rows] == ["scheduled", "scheduled", "held", "held"]
    assert [row.due_at - row.sent_at for row in rows[:2]] == [TTL, timedelta(days=7)]
    assert (rows[2].hold_by, rows[2].hold_reason) == ("batch", "court")
    assert "in its own webhookUrl" in rows[3].hold_reason


def results_of(found):
    """Return the results file with what the simulator now has of the generations."""
    lines = [
        json.dumps({"request_id": name, "generation": one.body()}).encode()
        for name, one in zip(found.request_ids, found.generations, strict=True)
    ]
    return b"\n".join(lines)


async def test_a_late_job_leaves_the_minimum_ttl(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    later = utc_now() + timedelta(days=2)
    await hurry(database)
    await worker(now=lambda: later).run(Key(ACCOUNT, found.id))

    assert {row.due_at for row in await rows_of(database)} == {later + timedelta(minutes=1)}


async def test_results_that_are_gone_are_replaced_by_the_list(database, simulator, app, worker):
    found = await make_batch(simulator, app)  # their own webhooks come, too
    await eventually(lambda: len(simulator.deliveries) == 41)
    await database.write(lambda connection: connection.execute(records.delete()))  # none of them has come
    stranger = simulator.add(webhook_url=f"{app.base_url.join('/webhooks/sync')}?other")
    old = simulator.add(webhook_url=found.webhook_url, created_at=utc_now() - timedelta(hours=2))
    found.results = None
    await worker().run(Key(ACCOUNT, found.id))

    ids = {row.id for row in await rows_of(database)}
    assert ids == {one.id for one in found.generations}
    assert not ids & {stranger.id, old.id}
    row = await batch_row(database, found)
    assert (row.state, row.source, row.scheduled, row.unresolved) == ("resolved", "list", 40, 0)
    assert row.last_error == "the results answered 404"
    first = (await rows_of(database))[0]
    assert (first.look_at, json.loads(first.copy)["id"]) == (None, first.id)


async def test_the_list_is_read_no_further_than_the_batch_is_old(database, simulator, app, worker):
    for _ in range(450):
        simulator.add(created_at=utc_now() - timedelta(days=1))
    found = await make_batch(simulator, app, lines=20)
    found.results = None
    await worker().run(Key(ACCOUNT, found.id))

    assert (await batch_row(database, found)).state == "resolved"
    assert len([one for one in simulator.calls if one.operation is Operation.LIST]) == 1


async def test_a_new_url_of_the_results_is_asked_for(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    found.token = "renewed"
    await worker().run(Key(ACCOUNT, found.id))

    row = await batch_row(database, found)
    assert (row.state, row.source, row.scheduled) == ("resolved", "results", 20)


async def test_what_cannot_be_read_is_shown_and_tried_again(database, simulator, app, worker, metrics):
    found = await make_quiet_batch(simulator, app)
    good = found.results
    found.results = b"\n".join([*good.splitlines()[:37], b"garbage", b"x" * 3_000_000, b'{"request_id":"r39"}'])
    with capture_logs() as logs:
        await worker().run(Key(ACCOUNT, found.id))
    row = await batch_row(database, found)

    assert (row.state, row.scheduled, row.unresolved, await count(database)) == ("unresolved", 37, 3, 37)
    assert row.last_error == "3 lines of the results cannot be read; of 3 generations nothing was found"
    assert row.look_at > utc_now()
    (entry,) = [one for one in logs if one["event"] == "batch.unresolved"]
    assert (entry["log_level"], entry["unresolved"], entry["batch"]) == ("warning", 3, found.id)
    assert metrics.registry.get_sample_value("mayfly_batches_total", {"state": "unresolved"}) == 1

    found.results = good
    await hurry(database)
    await worker().run(Key(ACCOUNT, found.id))
    row = await batch_row(database, found)
    assert (row.state, row.scheduled, row.known, row.unresolved, row.tries) == ("resolved", 40, 0, 0, 2)


async def test_errors_without_a_generation_are_counted(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app)
    lines = found.results.splitlines()[:38]
    found.results = b"\n".join([*lines, *[json.dumps({"request_id": "r", "error": "refused"}).encode()] * 2])
    await worker().run(Key(ACCOUNT, found.id))

    row = await batch_row(database, found)
    assert (row.state, row.scheduled, row.errors, row.unresolved) == ("resolved", 38, 2, 0)


async def test_a_generation_that_has_not_ended_is_asked_for_again(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    slow, gone = found.generations[:2]
    simulator.plan.script("GET", ["processing"], slow.id)
    lines = found.results.splitlines()
    lines[0] = json.dumps({"request_id": "r0", "generation": slow.body() | {"status": "PROCESSING"}}).encode()
    lines[1] = json.dumps({"request_id": "r1", "generation_id": gone.id}).encode()
    found.results = b"\n".join(lines)
    simulator.remove(gone.id)
    await worker().run(Key(ACCOUNT, found.id))
    row = await batch_row(database, found)

    assert (row.state, row.scheduled, row.unresolved) == ("unresolved", 18, 1)
    assert row.last_error == f"generation {slow.id}: it is still being processed"
    await hurry(database)
    await worker().run(Key(ACCOUNT, found.id))
    row = await batch_row(database, found)
    assert (row.state, row.scheduled, row.unresolved, await count(database)) == ("resolved", 19, 0, 19)
    assert json.loads((await row_of(database, Key(ACCOUNT, slow.id))).copy)["status"] == "COMPLETED"


@pytest.mark.parametrize("fault", ["500", "429:retry_after=7", "401", "403-html", "drop", "html", "invalid-json"])
async def test_an_api_that_fails_loses_nothing(database, simulator, app, worker, fault):
    found = await make_quiet_batch(simulator, app, lines=20)
    for operation in ("BATCH-RESULT", "BATCH-GET", "LIST"):
        simulator.plan.stand(operation, fault)
    listing = asyncio.create_task(worker().run(Key(ACCOUNT, found.id)))
    await asyncio.wait([listing], timeout=25)
    row = await batch_row(database, found)

    assert (row.state, row.scheduled, row.unresolved) == ("unresolved", 0, 20)
    assert row.last_error
    assert "token" not in row.last_error
    for operation in ("BATCH-RESULT", "BATCH-GET", "LIST"):
        simulator.plan.stand(operation, None)
    await database.write(pausing_ended)
    await hurry(database)
    await worker().run(Key(ACCOUNT, found.id))
    assert (await batch_row(database, found)).state == "resolved"
    assert await count(database) == 20


def pausing_ended(connection):
    pausing.resume(connection, [*Kind])


async def test_a_batch_is_given_up_visibly_and_can_be_retried(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    good, found.results = found.results, b"garbage"
    waited = {"waited_seconds": int(GIVE_UP.total_seconds())}
    await database.write(lambda connection: connection.execute(update(table).values(waited)))
    with capture_logs() as logs:
        await worker().run(Key(ACCOUNT, found.id))
    shown = (await app.get(f"/api/batches/{found.id}", headers=BEARER)).json()
    metrics = (await app.get("/metrics")).text

    assert (shown["state"], shown["nextLookAt"], shown["unresolved"]) == ("failed", None, 20)
    assert 'mayfly_batches_open{state="failed"} 1.0' in metrics
    assert [one["log_level"] for one in logs if one["event"] == "batch.given_up"] == ["error"]
    assert (await app.get("/api/stats", headers=BEARER)).json()["batches"]["failed"] == 1

    found.results = good
    retried = (await app.post(f"/api/batches/{found.id}/retry", headers=BEARER)).json()
    await worker().run(Key(ACCOUNT, found.id))
    assert (retried["state"], (await batch_row(database, found)).state) == ("waiting", "resolved")


async def test_time_without_a_worker_is_no_reason_to_give_up(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    found.results = b"garbage"
    later = utc_now() + 2 * GIVE_UP
    await worker(now=lambda: later).run(Key(ACCOUNT, found.id))

    assert (await batch_row(database, found)).state == "unresolved"


async def test_a_look_that_was_cut_off_is_made_again_and_counts_each_generation_once(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app)
    simulator.plan.script("BATCH-RESULT", ["hold"], found.id)
    job = worker()
    job.begin(Key(ACCOUNT, found.id))
    await simulator.gates.reached(found.id)
    await job.close()
    simulator.release(found.id)

    assert (await batch_row(database, found)).look_at <= utc_now()
    assert await count(database) == 0
    await worker().run(Key(ACCOUNT, found.id))
    row = await batch_row(database, found)
    assert (row.state, row.scheduled, row.known) == ("resolved", 40, 0)


async def test_two_workers_give_each_generation_one_record(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app)
    key = Key(ACCOUNT, found.id)
    simulator.plan.script("BATCH-RESULT", ["hold"], found.id)
    slow = asyncio.create_task(worker().run(key))
    await simulator.gates.reached(found.id)
    await worker().run(key)
    held = await batch_row(database, found)
    await hurry(database)  # the lease of the first one ends
    await worker().run(key)
    done = await batch_row(database, found)
    simulator.release(found.id)
    await slow

    assert (held.state, held.tries) == ("waiting", 1)
    assert (done.state, done.scheduled, done.tries) == ("resolved", 40, 2)
    assert await batch_row(database, found) == done
    assert await count(database) == 40


@pytest.mark.parametrize("kind", [Kind.UNAUTHORIZED, Kind.WRONG_ORGANISATION, Kind.THROTTLED])
async def test_no_call_is_made_while_the_api_may_not_be_asked(database, simulator, app, worker, kind):
    found = await make_quiet_batch(simulator, app, lines=20)
    until = utc_now() + HOUR
    await database.write(partial(pausing.pause, wanted=Pause(kind, utc_now(), "a test", "because", until)))
    calls = len(simulator.calls)
    await worker().run(Key(ACCOUNT, found.id))

    assert await database.read(partial(batches.find_due_batches, account=ACCOUNT, now=utc_now(), limit=9)) == []
    assert len(simulator.calls) == calls
    assert (await batch_row(database, found)).tries == 0


async def test_a_pause_of_deletions_keeps_no_batch_waiting(database, simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    await database.write(partial(pausing.pause, wanted=Pause(Kind.OPERATOR, utc_now(), "a test", "because", None)))
    await worker().run(Key(ACCOUNT, found.id))

    assert (await batch_row(database, found)).state == "resolved"
    assert {row.state for row in await rows_of(database)} == {State.SCHEDULED}


async def test_batches_are_listed_by_their_state(simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    other = await make_quiet_batch(simulator, app, lines=20)
    await worker().run(Key(ACCOUNT, found.id))
    page = (await app.get("/api/batches", headers=BEARER)).json()
    waiting = (await app.get("/api/batches?state=waiting", headers=BEARER)).json()

    assert [one["id"] for one in page["items"]] == [other.id, found.id]
    assert [one["id"] for one in waiting["items"]] == [other.id]
    shown = page["items"][1]
    assert (shown["state"], shown["expected"], shown["scheduled"], shown["source"]) == ("resolved", 20, 20, "results")
    assert datetime.fromisoformat(shown["resolvedAt"]) <= utc_now()
    assert "notification" not in shown
    assert (await app.get(f"/api/batches/{found.id}", headers=BEARER)).json()["notification"]["metrics"]
    assert (await app.get("/api/batches/none", headers=BEARER)).status_code == 404
    assert (await app.post("/api/batches/none/retry", headers=BEARER)).status_code == 404
    assert (await app.get("/api/batches")).status_code == 401


async def test_old_batches_that_are_resolved_are_removed(database, simulator, app, worker, metrics):
    found = await make_quiet_batch(simulator, app, lines=20)
    other = await make_quiet_batch(simulator, app, lines=20)
    await worker().run(Key(ACCOUNT, found.id))
    hygiene = partial(Hygiene, database, RecordTtls(HOUR, {}), metrics=metrics, stopping=asyncio.Event())
    await hygiene().run()
    assert await batch_row(database, found) is not None
    await hygiene(now=lambda: utc_now() + 2 * HOUR).run()

    assert await batch_row(database, found) is None
    assert BatchState((await batch_row(database, other)).state) is BatchState.WAITING
    assert await count(database) == 20


async def rename(database, old, new):
    await database.write(lambda connection: connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}")))


async def test_a_batch_that_the_database_does_not_take_is_503(open_client, database):
    await rename(database, "batches", "elsewhere")
    try:
        async with open_client(database) as client:
            body = json.dumps(batch()).encode()
            answer = await client.post("/webhooks/sync", content=body, headers=webhook(body).headers)
    finally:
        await rename(database, "elsewhere", "batches")

    assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE


async def test_explain_says_that_the_webhook_of_its_batch_told_of_a_generation(simulator, app, worker):
    found = await make_quiet_batch(simulator, app, lines=20)
    await worker().run(Key(ACCOUNT, found.id))
    shown = (await app.get(f"/api/records/{found.generations[0].id}/explain", headers=BEARER)).json()

    assert "after the webhook of its batch was sent" in shown["explain"]
