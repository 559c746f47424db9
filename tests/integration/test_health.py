"""Health checks, metrics, and the OpenAPI document."""

import asyncio
import sqlite3
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from litestar import get
from sqlalchemy import URL, text

from service.core.secret import Secret
from service.jobs import connection
from service.ledger import pausing
from service.ledger.opening import open_database
from service.ledger.pausing import Kind, Pause
from service.web.app import make_app
from service.web.security_headers import SECURITY_HEADERS
from service.web.server import serving
from tests.conftest import API_TOKEN, http_client
from tests.support.ledger import HOUR, claim, confirmed, given_up, settle, store
from tests.support.metrics import numbers_of
from tests.support.waiting import eventually
from tests.support.webhooks import webhook


@pytest.fixture
def serve(settings, metrics):
    """Serve the application over what may not be there."""

    def client_of(database, pool):
        app = make_app(settings(), database, pool, metrics)
        return serving(app, "127.0.0.1", 0)

    return client_of


async def test_health_is_ok_with_all_parts_ok(app_client):
    async def well():
        answer = await app_client.get("/health/ready")
        return answer if answer.status_code == 200 else None

    live = await app_client.get("/health/live")
    ready = await eventually(well)  # a busy machine may need more than a second for the first connection

    assert (live.status_code, live.json()["status"]) == (200, "ok")
    assert ready.json() == {
        "status": "ok",
        "parts": {"ledger": {"status": "ok"}, "redis": {"status": "ok"}, "deletions": {"status": "ok"}},
    }


async def test_an_unreachable_redis_degrades_health_and_is_named(serve, sqlite_database, tmp_path):
    pool = connection.connect(Secret(f"unix://{tmp_path}/none.sock"), retries=0)
    async with serve(sqlite_database, pool) as port, http_client(f"http://127.0.0.1:{port}") as client:
        answer = await client.get("/health/ready")
    await pool.aclose(close_connection_pool=True)

    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["parts"]["redis"]["status"] == "failing"
    assert "Redis does not answer" in answer.json()["parts"]["redis"]["detail"]


@pytest.mark.parametrize(
    "url",
    [
        URL.create("postgresql", "mayfly", "verysecret", "127.0.0.1", 1, "mayfly"),
        URL.create("sqlite", database="/nowhere/verysecret.db"),
    ],
    ids=["postgresql", "sqlite"],
)
async def test_an_unreachable_ledger_is_503_and_named_while_the_process_is_alive(serve, pool, url):
    async with (
        open_database(url) as database,
        serve(database, pool) as port,
        http_client(f"http://127.0.0.1:{port}") as client,
    ):
        ready = await client.get("/health/ready")
        live = await client.get("/health/live")
        sent = webhook()
        taken = await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
        numbers = await numbers_of(client)

    assert (ready.status_code, ready.json()["status"]) == (503, "failing")
    assert ready.json()["parts"]["ledger"]["status"] == "failing"
    assert "verysecret" not in ready.text + taken.text
    assert (live.status_code, taken.status_code) == (200, 503)
    assert numbers["mayfly_ledger_up",] == 0


async def test_tables_of_another_release_are_503_with_what_to_do(app_client, database):
    await database.write(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '0000'")))
    answer = await app_client.get("/health/ready")

    assert answer.status_code == 503
    assert "run mayfly migrate" in answer.json()["parts"]["ledger"]["detail"]


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (Kind.OPERATOR, "mayfly resume ends it"),
        (Kind.UNAUTHORIZED, "check SYNC_API_KEY"),
        (Kind.DAILY_LIMIT, "MAYFLY_MAX_DELETES_PER_DAY is reached"),
        (Kind.THROTTLED, "after the time that the API asked for"),
    ],
)
async def test_a_pause_degrades_health_and_names_its_actor_reason_and_end(sqlite_database, open_client, kind, advice):
    since = datetime(2026, 11, 23, 12, tzinfo=UTC)
    wanted = Pause(kind, since, "an operator", "moving house", since + timedelta(days=999))
    await sqlite_database.write(partial(pausing.pause, wanted=wanted))
    async with open_client(sqlite_database) as client:
        answer = await client.get("/health/ready")
        numbers = await numbers_of(client)

    part = answer.json()["parts"]["deletions"]
    assert (answer.status_code, answer.json()["status"], part["status"]) == (200, "degraded", "paused")
    assert part["detail"].startswith("since 2026-11-23 12:00:00 UTC by an operator: moving house; ")
    assert advice in part["detail"]
    assert {one: numbers["mayfly_pauses", one] for one in Kind} == {one: float(one is kind) for one in Kind}


async def test_a_ledger_that_refuses_writes_is_503(serve, pool, sqlite_url, postgres_url):
    blocker = sqlite3.connect(sqlite_url.database, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    reads_only = postgres_url.update_query_dict({"options": "-c default_transaction_read_only=on"})
    parts = []
    for url in (sqlite_url, reads_only):
        async with (
            open_database(url) as database,
            serve(database, pool) as port,
            http_client(f"http://127.0.0.1:{port}") as client,
        ):
            answer = await client.get("/health/ready")
            parts.append((answer.status_code, answer.json()["parts"]["ledger"]))
            blocker.close()

    detail = "the database accepts no writes: webhooks are answered 503, and nothing is deleted, until it does"
    assert parts == [(503, {"status": "failing", "detail": detail})] * 2


async def test_late_deletions_and_a_dry_run_degrade_health(sqlite_database, open_client):
    await store(sqlite_database, due_in=-HOUR)
    async with open_client(sqlite_database) as client, open_client(sqlite_database, MAYFLY_DRY_RUN="true") as dry:
        late, rehearsed = [(await one.get("/health/ready")).json() for one in (client, dry)]
    await settle(sqlite_database, *(confirmed(item) for item in await claim(sqlite_database)))
    async with open_client(sqlite_database) as client:
        well = (await client.get("/health/ready")).json()

    assert (late["status"], late["parts"]["deletions"]["status"]) == ("degraded", "late")
    assert "60 min overdue: check that a worker runs" in late["parts"]["deletions"]["detail"]
    assert rehearsed["parts"]["deletions"] == {"status": "paused", "detail": "MAYFLY_DRY_RUN is on: nothing is deleted"}
    assert well["parts"]["deletions"] == {"status": "ok"}


async def test_the_numbers_of_the_ledger_are_in_the_metrics(app_client, database):
    await store(database, due_in=-HOUR)
    await store(database, due_in=-2 * HOUR)
    await settle(database, given_up((await claim(database, limit=1))[0]))
    await store(database, due_in=HOUR)
    await store(database, due_in=None)
    numbers = await numbers_of(app_client)

    assert numbers["mayfly_ledger_up",] == 1
    assert numbers["mayfly_due_records",] == 1
    assert numbers["mayfly_failed_records",] == 1
    assert 3590 < numbers["mayfly_oldest_overdue_seconds",] < 3700


async def test_held_records_are_counted_by_what_holds_them(app_client):
    held = {"ttl=0s": 3, "hold=legal": 2, "ttl=9d": 1}
    for query, number in held.items():
        for _ in range(number):
            sent = webhook(webhookUrl=f"https://hooks.example.com/webhooks/sync?{query}")
            await app_client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
    token = {"Authorization": f"Bearer {API_TOKEN}"}
    await app_client.post(f"/api/records/{sent.id}/hold", json={"reason": "invalid override"}, headers=token)
    numbers = await numbers_of(app_client)

    causes = {"invalid_override": 3.0, "override": 2.0, "operator": 1.0}
    assert {one: numbers["mayfly_held_records", one] for one in causes} == causes


async def test_a_claimed_record_is_not_overdue(sqlite_database, open_client):
    await store(sqlite_database)
    items = await claim(sqlite_database)
    async with open_client(sqlite_database) as client:
        during = await numbers_of(client)
        await settle(sqlite_database, *(confirmed(item) for item in items))
        after = await numbers_of(client)

    assert during["mayfly_oldest_overdue_seconds",] == during["mayfly_due_records",] == 0
    assert after["mayfly_oldest_overdue_seconds",] == 0


async def test_webhooks_are_counted_by_how_they_were_answered(sqlite_database, open_client):
    known, running = webhook(), webhook(status="PROCESSING")
    broken, forged = webhook(b"{}"), webhook(secret="whsec_of_another_account_entirely")
    async with open_client(sqlite_database) as client:
        for sent in (known, known, running, broken, forged):
            await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
        numbers = await numbers_of(client)

    answers = ("stored", "known", "ignored", "malformed", "refused")
    assert [numbers["mayfly_webhooks_total", answer] for answer in answers] == [1, 1, 1, 1, 1]
    assert numbers["mayfly_signatures_refused_total", "mismatch"] == 1


async def test_another_body_for_a_known_generation_is_counted(sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        for sent in (webhook(id="g1"), webhook(id="g1", error="another")):
            await client.post("/webhooks/sync", content=sent.body, headers=sent.headers)
        numbers = await numbers_of(client)

    assert numbers["mayfly_conflicts_total",] == 1


async def test_openapi_has_every_route_and_says_which_need_the_token(sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        described = (await client.get("/schema/openapi.json")).json()

    assert {"/webhooks/sync", "/health/live", "/health/ready", "/metrics", "/api/records"} <= described["paths"].keys()
    assert described["paths"]["/api/records"]["get"]["security"] == [{"bearer": []}]
    assert described["paths"]["/webhooks/sync"]["post"]["responses"].keys() >= {
        "202",
        "400",
        "401",
        "408",
        "413",
        "415",
        "503",
    }


async def test_openapi_says_which_bodies_are_optional(sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        paths = (await client.get("/schema/openapi.json")).json()["paths"]
    routes = ("/webhooks/sync", "/api/pause", "/api/records/{generation_id}/{move}")

    assert [paths[route]["post"]["requestBody"]["required"] for route in routes] == [True, False, False]
    assert [one["name"] for one in paths["/webhooks/sync"]["post"]["parameters"]] == ["Sync-Signature"]


async def test_an_unknown_path_is_answered_with_a_problem(sqlite_database, open_client):
    paths = ["/", "/nowhere", "/webhooks", "/webhooks/sync/", "/api", "/%00", "/..%2f..%2fetc"]
    async with open_client(sqlite_database) as client:
        statuses = {path: (await client.get(path)).status_code for path in paths}

    assert set(statuses.values()) <= {401, 403, 404, 405}


async def test_every_response_has_security_headers_and_no_server_name(sqlite_database, open_client):
    paths = ("/health/live", "/metrics", "/schema", "/api/records", "/nowhere", "/webhooks/sync")
    async with open_client(sqlite_database) as client:
        answers = [await client.get(path, headers={"origin": "https://elsewhere.example"}) for path in paths]
        answers.append(await client.options("/api/records", headers={"origin": "https://elsewhere.example"}))

    assert [answer.status_code for answer in answers[:-1]] == [200, 200, 200, 401, 404, 405]
    for answer in answers:
        headers = answer.headers
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert "server" not in headers
        assert not [name for name in headers if name.startswith("access-control-")]


async def test_openapi_is_json_and_not_a_page_with_foreign_scripts(sqlite_database, open_client):
    pages = ("/schema/swagger", "/schema/redoc", "/schema/elements", "/schema/rapidoc", "/schema/scalar")
    async with open_client(sqlite_database) as client:
        described = await client.get("/schema")
        statuses = [(await client.get(page)).status_code for page in pages]

    assert described.headers["content-type"].startswith("application/vnd.oai.openapi+json")
    assert described.json()["info"]["title"] == "Mayfly"
    assert statuses == [404] * len(pages)


async def test_health_reports_two_hanging_parts_within_a_second(serve):
    async def swallow(reader, writer):
        await reader.read()
        writer.close()

    async with await asyncio.start_server(swallow, "127.0.0.1", 0) as hole:
        port = hole.sockets[0].getsockname()[1]
        pool = connection.connect(Secret(f"redis://127.0.0.1:{port}"), retries=0)
        url = URL.create("postgresql", "mayfly", host="127.0.0.1", port=port, database="mayfly")
        async with (
            open_database(url) as database,
            serve(database, pool) as own,
            http_client(f"http://127.0.0.1:{own}") as client,
        ):
            begun = asyncio.get_running_loop().time()
            ready = await client.get("/health/ready")
            between = asyncio.get_running_loop().time()
            numbers = await numbers_of(client)
            took = (between - begun, asyncio.get_running_loop().time() - between)
        await pool.aclose(close_connection_pool=True)

    assert ready.status_code == 503
    assert {name: part["status"] for name, part in ready.json()["parts"].items()} == {
        "ledger": "failing",
        "redis": "failing",
        "deletions": "failing",
    }
    assert numbers["mayfly_ledger_up",] == 0
    assert max(took) < 1.2


async def test_every_error_has_the_security_headers_and_a_route_may_have_its_own(
    sqlite_database, settings, pool, metrics
):
    @get("/page", response_headers={"Content-Security-Policy": "default-src 'self'"})
    async def page() -> str:
        return ""

    @get("/crash")
    async def crash() -> str:
        raise RuntimeError("a fault of ours")

    app = make_app(settings(), sqlite_database, pool, metrics)
    for handler in (page, crash):
        app.register(handler)
    async with serving(app, "127.0.0.1", 0) as port, http_client(f"http://127.0.0.1:{port}") as client:
        own = await client.get("/page")
        wrong = {
            500: await client.get("/crash"),
            404: await client.get("/nowhere"),
            405: await client.get("/webhooks/sync"),
            401: await client.post("/webhooks/sync"),
        }

    assert own.headers["content-security-policy"] == "default-src 'self'"
    assert own.headers["x-content-type-options"] == "nosniff"
    for status, answer in wrong.items():
        assert answer.status_code == status == answer.json()["status"]
        assert answer.headers["content-type"] == "application/problem+json"
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
