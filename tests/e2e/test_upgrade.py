"""A rolling upgrade: this release still runs on the tables that the next release has migrated."""

import pytest
from sqlalchemy import URL, text

from service.ledger import migrating
from service.ledger.opening import open_database
from tests.conftest import http_client
from tests.support.waiting import eventually
from tests.support.webhooks import webhook

# What a release may do while the one before it runs: add what the old code neither writes nor reads.
EXPAND = (
    "ALTER TABLE records ADD COLUMN archived TEXT",
    "ALTER TABLE events ADD COLUMN source TEXT DEFAULT 'unknown' NOT NULL",
    "CREATE INDEX records_model ON records (model)",
    "CREATE TABLE forwards (record BIGINT PRIMARY KEY, url TEXT NOT NULL)",
    "UPDATE alembic_version SET version_num = '9999'",
)


def expand(connection):
    """Bring the tables to a form that a later release might have."""
    for statement in EXPAND:
        connection.execute(text(statement))


@pytest.fixture(params=["sqlite", "postgresql"])
async def expanded_url(request, tmp_path, postgres):
    """A database of its own, of each kind, whose tables are those of a later release."""
    is_sqlite = request.param == "sqlite"
    url = URL.create("sqlite", database=str(tmp_path / "next.db")) if is_sqlite else await postgres.empty()
    async with open_database(url) as database:
        await database.write(migrating.migrate)
        await database.write(expand)
    yield url
    if not is_sqlite:
        await postgres.drop(url)


def shown(url):
    """Write *url* with its password, for the environment of a process."""
    return url.render_as_string(hide_password=False)


async def test_web_and_worker_of_this_release_run_on_the_tables_of_the_next(expanded_url, redis_url, simulator, mayfly):
    where = {"MAYFLY_DATABASE_URL": shown(expanded_url), "MAYFLY_REDIS_URL": redis_url}
    short = {"MAYFLY_TTL": "1s", "MAYFLY_MIN_TTL": "1s", "SYNC_BASE_URL": simulator.url}
    web = await mayfly("api", **where, **short).start()
    await mayfly("worker", **where, **short).start()
    generation = simulator.add(text_input=True)

    announcement = webhook(generation.notification())
    async with http_client(web.url) as client:
        answer = await client.post("/webhooks/sync", content=announcement.body, headers=announcement.headers)

    assert answer.status_code == 202
    assert await eventually(lambda: generation.id in simulator.deleted, seconds=30)


async def test_migrate_does_not_change_the_tables_of_the_next_release(expanded_url, mayfly):
    migrate = mayfly("migrate", MAYFLY_DATABASE_URL=shown(expanded_url))
    migrate.spawn()

    assert await migrate.wait() == 0
    assert "9999" in migrate.output()


async def test_two_web_and_three_worker_processes_share_the_work(mayfly, simulator, postgres_url, redis_url):
    where = {
        "MAYFLY_DATABASE_URL": shown(postgres_url),
        "MAYFLY_REDIS_URL": redis_url,
        "MAYFLY_API_RATE": "1000/second",
    }
    short = {"MAYFLY_TTL": "4s", "MAYFLY_MIN_TTL": "1s", "MAYFLY_CONCURRENCY": "4", "SYNC_BASE_URL": simulator.url}
    simulator.switches.latency_seconds = 0.02
    webs = [await mayfly("api", **where, **short).start() for _ in range(2)]
    workers = [await mayfly("worker", **where, **short).start() for _ in range(3)]
    generations = [simulator.add() for _ in range(150)]

    for index, generation in enumerate(generations):
        announcement = webhook(generation.notification())
        async with http_client(webs[index % 2].url) as client:
            answer = await client.post("/webhooks/sync", content=announcement.body, headers=announcement.headers)
        assert answer.status_code == 202

    def shares():
        return [len(worker.logs("cleanup.confirmed")) for worker in workers]

    await eventually(lambda: sum(shares()) == len(generations), seconds=60)

    assert len(simulator.deleted) == len(generations)
    assert min(shares()) >= len(generations) / 10, shares()
