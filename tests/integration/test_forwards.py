"""Deliveries: pages, single ones, replays and what the metrics count, in the ledger and through the routes."""

import asyncio
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import event

from service.core.forwarding import DeliveryState
from service.core.replaying import Replay
from service.jobs.enqueue import queue_of_target
from service.ledger import delivery_reading, replaying
from service.ledger.bulk import ExpectationError
from service.ledger.cursors import CursorError
from service.ledger.delivery_reading import DeliveryFilter, Open, count_open
from service.ledger.delivery_views import list_deliveries, show_delivery
from service.ledger.reading import Span
from service.ledger.replaying import WantedReplay, replay_matching, replay_one
from tests.conftest import API_TOKEN
from tests.support.deliveries import (
    APP,
    CONFIG,
    CONFIGURED,
    CRM,
    alter,
    attempt,
    claim_delivery,
    delivery_of,
    failed,
    forward,
)
from tests.support.ledger import HOUR, utc_now
from tests.support.metrics import numbers_of
from tests.support.webhooks import webhook

HEADERS = {"Authorization": f"Bearer {API_TOKEN}"}
FAILED = DeliveryFilter(state=DeliveryState.FAILED)


async def page_of(database, wanted=None, *, limit=50, cursor=None):
    return await database.read(partial(list_deliveries, wanted=wanted or DeliveryFilter(), limit=limit, cursor=cursor))


async def ids_of(database, **wanted):
    return [one.id for one in (await page_of(database, DeliveryFilter(**wanted))).items]


async def replay(database, delivery_id, *, configured=CONFIGURED, now=None):
    work = partial(replay_one, delivery_id=delivery_id, configured=configured, now=now or utc_now())
    replayed = await database.write(work)
    return None if replayed is None else replayed.result


async def replay_all(database, chosen, expected, **options):
    wanted = WantedReplay.of(chosen, options.pop("configured", CONFIGURED))
    return await replay_matching(database, wanted, now=utc_now, expected=expected, **options)


# Pages and single ones


async def test_pages_have_each_delivery_once_newest_first_whatever_the_filter(database):
    now = utc_now()
    for number in range(24):  # three have the same time each
        target, at = (APP, CRM)[number % 2], now - timedelta(seconds=number // 3)
        made = await forward(database, target, received_at=at, status=("COMPLETED", "FAILED")[number % 4 > 1])
        if number % 3 == 0:
            await alter(database, made, state="failed", wake_at=None)
    for wanted in (DeliveryFilter(), DeliveryFilter(target="app"), FAILED, DeliveryFilter(status="failed")):
        whole = (await page_of(database, wanted, limit=100)).items
        seen, cursor = [], None
        while True:
            page = await page_of(database, wanted, limit=5, cursor=cursor)
            seen += page.items
            cursor = page.next_cursor
            if cursor is None:
                break

        assert seen == whole
        assert len({one.id for one in whole}) == len(whole) == (24 if wanted == DeliveryFilter() else len(whole)) > 5
        assert all(a.received_at >= b.received_at for a, b in pairwise(whole))


async def test_deliveries_are_filtered(database):
    now = utc_now()
    old = await failed(database, APP, id="g-1", received_at=now - 2 * HOUR, status="FAILED")
    new = await forward(database, CRM, id="g-2", account="studio", received_at=now)

    assert await ids_of(database) == [new, old]
    assert await ids_of(database, target="app") == await ids_of(database, state=DeliveryState.FAILED) == [old]
    assert await ids_of(database, generation="g-2") == await ids_of(database, account="studio") == [new]
    assert await ids_of(database, status="failed") == await ids_of(database, received=Span(None, now - HOUR)) == [old]
    assert await ids_of(database, received=Span(now - HOUR)) == await ids_of(database, target="crm") == [new]
    assert await ids_of(database, target="crm", state=DeliveryState.FAILED) == await ids_of(database, target="x") == []


async def test_a_page_of_a_rare_account_may_be_short_and_the_next_one_continues(database, monkeypatch):
    rare = await forward(database, account="studio")
    for _ in range(12):
        await forward(database)
    monkeypatch.setattr(delivery_reading, "SEARCHED", 5)
    pages: list[list[str]] = []
    cursor = None
    while len(pages) < 4:
        page = await page_of(database, DeliveryFilter(account="studio"), cursor=cursor)
        pages.append([one.id for one in page.items])
        cursor = page.next_cursor
        if cursor is None:
            break

    assert pages == [[], [], [rare]]


async def test_a_foreign_cursor_is_refused(database):
    with pytest.raises(CursorError):
        await page_of(database, cursor="nonsense")


async def test_one_delivery_is_shown_with_what_its_target_gets_and_answered(database):
    made = await forward(database, error="später 🪰")
    await attempt(database, made, 503, answer="come again")
    shown = await database.read(partial(show_delivery, delivery_id=made))
    row = await delivery_of(database, made)

    assert (shown.body.encode(), shown.signature, shown.content_type) == (row.body, row.signature, "application/json")
    assert (shown.last_status, shown.last_answer, shown.last_error) == (503, "come again", "answered 503")
    assert (shown.attempts, shown.state, shown.next_attempt_at) == (1, DeliveryState.WAITING, row.wake_at)
    assert await database.read(partial(show_delivery, delivery_id="none")) is None


async def test_an_attempt_in_progress_and_what_waits_behind_it_are_shown(database):
    first, second = [await forward(database, id="g-1", outputDuration=number) for number in (1, 2)]
    other = await forward(database, CRM, id="g-1")
    await claim_delivery(database, first)
    shown = {one.id: one for one in (await page_of(database)).items}

    assert shown[first].leased_until is not None
    assert shown[first].next_attempt_at is None
    assert (shown[first].behind, shown[second].behind, shown[other].behind) == (None, first, None)


# Replays


@pytest.mark.parametrize("status", [410, 200])
async def test_a_replay_of_what_has_ended_begins_anew_under_the_same_id(database, status):
    made = await forward(database, received_at=utc_now() - HOUR)
    await attempt(database, made, status)
    now = utc_now()

    assert await replay(database, made, now=now) is Replay.REPLAYED

    row = await delivery_of(database, made)
    assert (row.state, row.attempts, row.tries, row.finished_at) == (DeliveryState.WAITING, 1, 0, None)
    assert (row.since, row.wake_at, row.leased_until) == (now, now, None)
    claimed = await claim_delivery(database, made)
    assert claimed is not None
    assert (claimed.id, claimed.attempt, claimed.tries) == (made, 2, 1)


async def test_a_replay_of_what_waits_brings_its_next_attempt_forward_alone(database):
    made = await forward(database)
    await attempt(database, made, 503)
    before = await delivery_of(database, made)

    assert await replay(database, made) is Replay.ADVANCED
    assert await replay(database, made) is Replay.ALREADY

    row = await delivery_of(database, made)
    assert before.wake_at > row.wake_at <= utc_now()
    assert (row.since, row.tries, row.attempts) == (before.since, 1, 1)


async def test_a_replay_while_an_attempt_is_made_changes_nothing(database):
    made = await forward(database)
    await claim_delivery(database, made)
    before = await delivery_of(database, made)

    assert await replay(database, made) is Replay.ATTEMPTED
    assert await delivery_of(database, made) == before


async def test_a_replay_to_a_target_that_is_not_configured_changes_nothing(database):
    made = await failed(database)
    before = await delivery_of(database, made)

    assert await replay(database, made, configured=frozenset({"crm"})) is Replay.NO_TARGET
    assert await delivery_of(database, made) == before
    assert await replay(database, "none") is None


async def test_a_replayed_delivery_has_its_whole_schedule_again(database):
    made = await forward(database)
    for number in range(11):
        await alter(database, made, wake_at=utc_now())
        await attempt(database, made, 503)
        assert (await delivery_of(database, made)).state == ("failed" if number == 10 else "waiting")
    await replay(database, made)
    await attempt(database, made, 503)
    row = await delivery_of(database, made)

    assert (row.state, row.attempts, row.tries) == ("waiting", 12, 1)
    assert row.wake_at < utc_now() + timedelta(seconds=10)


async def test_a_replay_by_filter_sends_what_failed_in_steps_and_nothing_else(database, monkeypatch):
    monkeypatch.setattr(replaying, "BATCH", 3)
    made = [await failed(database, target) for target in (APP, CRM) for _ in range(4)]
    delivered, waits = await forward(database), await forward(database)
    await attempt(database, delivered)
    steps: list[Any] = []
    counts = await replay_all(database, DeliveryFilter(account="default"), 8, note=steps.append)

    assert (counts.replayed, counts.already, counts.attempted, counts.is_complete) == (8, 0, 0, True)
    assert [one.id for step in steps for one in step] == made
    assert max(len(step) for step in steps) == 3
    assert {(await delivery_of(database, one)).tries for one in made} == {0}
    assert (await delivery_of(database, delivered)).state == DeliveryState.DELIVERED
    assert (await delivery_of(database, waits)).since < (await delivery_of(database, made[0])).since


async def test_a_replay_by_filter_needs_the_number_that_matches(database):
    made = [await failed(database) for _ in range(3)]
    for expected in (2, 4, None):
        with pytest.raises(ExpectationError, match="3 deliveries match"):
            await replay_all(database, FAILED, expected)

    assert {(await delivery_of(database, one)).state for one in made} == {DeliveryState.FAILED}
    assert (await replay_all(database, FAILED, 3)).replayed == 3


async def test_a_replay_by_filter_that_ran_out_of_time_is_completed_by_another(sqlite_database):
    for _ in range(3):
        await failed(sqlite_database)
    first = await replay_all(sqlite_database, FAILED, 3, seconds=0)

    assert (first.replayed, first.is_complete) == (0, False)
    assert (await replay_all(sqlite_database, FAILED, 3)).replayed == 3
    assert (await replay_all(sqlite_database, FAILED, 0)).is_complete


async def test_a_replay_by_filter_leaves_targets_that_are_not_configured(database):
    gone, here = await failed(database, CRM), await failed(database, APP)
    wanted = WantedReplay.of(FAILED, frozenset({"app"}))
    matching = await database.read(partial(replaying.count_deliveries, wanted=wanted))
    counts = await replay_all(database, FAILED, 1, configured=frozenset({"app"}))

    assert (matching.counts[DeliveryState.FAILED], matching.without_target) == (1, {"crm": 1})
    assert (counts.replayed, counts.is_complete) == (1, True)
    assert (await delivery_of(database, gone)).state == DeliveryState.FAILED
    assert (await delivery_of(database, here)).state == DeliveryState.WAITING


async def test_a_replay_of_what_waits_counts_each_once_and_attempts_in_progress(database, monkeypatch):
    monkeypatch.setattr(replaying, "BATCH", 1)
    waits, attempted = await forward(database), await forward(database)
    await attempt(database, waits, 503)
    await claim_delivery(database, attempted)
    await forward(database)
    counts = await replay_all(database, DeliveryFilter(state=DeliveryState.WAITING), 3)

    assert (counts.replayed, counts.already, counts.attempted, counts.is_complete) == (1, 1, 1, True)


async def test_replays_while_workers_make_attempts_lose_and_double_none(database):
    made = [await failed(database, received_at=utc_now() - HOUR) for _ in range(20)]
    await replay_all(database, FAILED, 20)

    async def work():
        claimed = [await claim_delivery(database, one) for one in made]
        return [one.id for one in claimed if one is not None]

    async def again():
        return [await replay(database, one) for one in made]

    first, second, *_ = await asyncio.gather(work(), work(), again(), again())
    rows = [await delivery_of(database, one) for one in made]

    assert sorted(first + second) == sorted(made), "each attempt was made by one worker"
    assert {(row.attempts, row.tries, row.state) for row in rows} == {(2, 1, DeliveryState.WAITING)}


# The routes


@pytest.fixture
def config(tmp_path):
    """The path of a configuration with the targets app, and crm for FAILED alone."""
    path = tmp_path / "mayfly.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return str(path)


@pytest.fixture
async def client(database, open_client, config):
    """A client of the web application whose configuration has the targets."""
    async with open_client(database, MAYFLY_CONFIG=config) as client:
        client.headers.update(HEADERS)
        yield client


async def test_a_webhooks_deliveries_are_listed_and_shown_by_the_routes(client):
    sent = webhook(status="FAILED")
    await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
    page = (await client.get("/api/forwards")).json()
    whole = (await client.get(f"/api/forwards/{page['items'][0]['id']}")).json()

    assert {(one["target"], one["generation"], one["state"]) for one in page["items"]} == {
        ("app", sent.id, "waiting"),
        ("crm", sent.id, "waiting"),
    }
    assert whole["body"].encode() == sent.body
    assert whole["signature"] == sent.headers["Sync-Signature"]
    assert "body" not in page["items"][0]
    assert "not-to-be-shown" not in str(page) + str(whole)


async def test_the_routes_filter_page_and_refuse_what_they_do_not_know(client, database):
    made = [await forward(database, CRM, account="studio", status="FAILED", id=f"g-{number}") for number in range(3)]
    await forward(database)
    query = "target=crm&state=waiting&account=studio&status=failed&from=2026-01-01T00:00:00Z"
    first = (await client.get(f"/api/forwards?{query}&limit=2")).json()
    second = (await client.get(f"/api/forwards?{query}&cursor={first['nextCursor']}")).json()
    refused = {
        query: (await client.get(f"/api/forwards?{query}")).status_code
        for query in ("stat=failed", "state=lost", "from=2026-01-01T00:00:00", "cursor=x", "limit=0", "limit=501")
    }

    assert [one["id"] for one in first["items"] + second["items"]] == made[::-1]
    assert second["nextCursor"] is None
    assert [one["id"] for one in (await client.get("/api/forwards?generation=g-1")).json()["items"]] == [made[1]]
    assert set(refused.values()) == {400}
    assert "did you mean state" in (await client.get("/api/forwards?stat=failed")).json()["detail"]


async def test_the_routes_of_deliveries_are_closed_without_the_token(client):
    for method, path in (
        ("GET", ""),
        ("GET", "/an-id"),
        ("POST", "/an-id/replay"),
        ("POST", "/replay"),
    ):
        answer = await client.request(method, f"/api/forwards{path}", headers={"Authorization": "Bearer wrong"})
        assert answer.status_code == 401, path


async def test_the_route_replays_one_delivery_and_enqueues_its_job(client, database, pool):
    made = await failed(database)
    answer = await client.post(f"/api/forwards/{made}/replay")
    for _ in range(40):
        jobs = await pool.zrange(queue_of_target("app"), 0, -1)
        if jobs:
            break
        await asyncio.sleep(0.05)

    assert (answer.status_code, answer.json()["state"], answer.json()["attempts"]) == (200, "waiting", 1)
    assert "body" not in answer.json()
    assert jobs == [f"forward:{made}:2".encode()]


async def test_the_route_refuses_what_cannot_be_replayed(client, database):
    leased, gone = await forward(database), await failed(database, CRM)
    await claim_delivery(database, leased)
    await alter(database, gone, target="old")
    during = await client.post(f"/api/forwards/{leased}/replay")
    removed = await client.post(f"/api/forwards/{gone}/replay")
    missing = await client.post("/api/forwards/none/replay")

    assert (during.status_code, removed.status_code, missing.status_code) == (409, 409, 404)
    assert "an attempt at this delivery is being made now" in during.json()["detail"]
    assert "target old is not in MAYFLY_CONFIG" in removed.json()["detail"]
    assert (await client.get("/api/forwards/none")).status_code == 404


async def test_the_route_counts_and_replays_what_matches(client, database):
    made = [await failed(database) for _ in range(3)]
    kept = await failed(database, id="other", status="FAILED")

    async def post(**body):
        return await client.post("/api/forwards/replay", json=body)

    chosen = {"target": "app", "status": "completed"}
    counted = await post(filter=chosen, dryRun=True)
    refused = await post(filter=chosen, expected=2)
    replayed = await post(filter=chosen, expected=3)

    assert counted.json() == {
        "matched": {"waiting": 0, "delivered": 0, "failed": 3},
        "withoutTarget": {},
        "result": None,
    }
    assert refused.status_code == 409
    assert replayed.json()["result"] == {"replayed": 3, "already": 0, "attempted": 0, "isComplete": True}
    assert {(await delivery_of(database, one)).state for one in made} == {DeliveryState.WAITING}
    assert (await delivery_of(database, kept)).state == DeliveryState.FAILED


REFUSED = [
    ({"filter": {}, "dryRun": True}, 400, "filter needs one of target, state"),
    ({"filter": {"state": "failed"}}, 400, "expected: the number of deliveries that dryRun shows"),
    ({"filter": {"from": "2026-01-01T00:00:00"}, "dryRun": True}, 400, "from"),
    ({"filter": {"projectId": "x"}, "dryRun": True}, 400, "projectId"),
    ({"filter": {"target": "old"}, "dryRun": True}, 409, "target old is not in MAYFLY_CONFIG"),
]


async def test_a_wrong_replay_by_filter_is_refused_with_a_sentence(open_client, sqlite_database, config):
    async with open_client(sqlite_database, MAYFLY_CONFIG=config) as client:
        for body, status, told in REFUSED:
            answer = await client.post("/api/forwards/replay", json=body, headers=HEADERS)

            assert (answer.status_code, told in answer.json()["detail"]) == (status, True), answer.text


# Metrics


async def test_waiting_and_failed_deliveries_are_counted_for_each_target(database):
    since = utc_now() - HOUR
    await forward(database, received_at=since)
    await forward(database)
    await failed(database)
    await attempt(database, await forward(database, CRM))
    counted = await database.read(count_open)

    assert counted == {"app": Open(2, 1, since), "crm": Open()}


async def test_the_metrics_count_no_more_than_a_scrape_has_time_for(sqlite_database, monkeypatch):
    monkeypatch.setattr(delivery_reading, "COUNTED", 2)
    since = utc_now() - HOUR
    for at in (None, since, None):
        await forward(sqlite_database, received_at=at)
        await failed(sqlite_database)

    assert await sqlite_database.read(count_open) == {"app": Open(2, 2, since)}


async def test_the_metrics_show_what_waits_and_failed_for_each_target(client, database):
    await forward(database, received_at=utc_now() - HOUR)
    gone = await failed(database, CRM)
    await alter(database, gone, target="old")
    numbers = await numbers_of(client)
    await alter(database, gone, target="app")
    later = await numbers_of(client)

    assert numbers["mayfly_forwards_waiting", "app"] == 1
    assert numbers["mayfly_forwards_waiting", "crm"] == numbers["mayfly_forwards_failed", "crm"] == 0
    assert numbers["mayfly_forwards_failed", "old"] == 1
    assert 3600 <= numbers["mayfly_forward_oldest_waiting_seconds", "app"] < 3700
    assert numbers["mayfly_forward_oldest_waiting_seconds", "crm"] == 0
    assert later["mayfly_forwards_failed", "app"] == 1
    assert ("mayfly_forwards_failed", "old") not in later


async def test_no_ordinary_query_of_deliveries_reads_the_whole_table(sqlite_database):
    for number in range(30):
        await forward(sqlite_database, (APP, CRM)[number % 2], id=f"g-{number}")
    asked = [
        DeliveryFilter(),
        DeliveryFilter(target="app"),
        FAILED,
        DeliveryFilter(target="app", state=DeliveryState.FAILED),
        DeliveryFilter(generation="g-1"),
        DeliveryFilter(account="default", status="FAILED"),
    ]

    def explain(connection, work):
        statements = []
        event.listen(
            connection,
            "before_cursor_execute",
            lambda *call: statements.append((call[2], call[3])) if "EXPLAIN" not in call[2] else None,
        )
        work(connection)
        return [
            row[3]
            for statement, values in statements
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
        ]

    works: list[Any] = [partial(list_deliveries, wanted=wanted, limit=5, cursor=None) for wanted in asked]
    works += [partial(replaying.count_deliveries, wanted=WantedReplay.of(one, CONFIGURED)) for one in asked]
    plans = [await sqlite_database.read(partial(explain, work=work)) for work in (*works, count_open)]

    scans = {step for plan in plans for step in plan if step.startswith("SCAN deliveries")}
    assert any("deliveries_waiting_since" in step for step in plans[-1])
    assert scans <= {
        # These end with the page, or with SEARCHED.
        "SCAN deliveries USING COVERING INDEX deliveries_received_at",
        "SCAN deliveries USING INDEX deliveries_received_at",
    }
