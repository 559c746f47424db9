"""Behind pgbouncer in transaction mode everything works as on PostgreSQL itself (Debian's package).

A transaction gets any of its two server connections, so nothing of a session outlives a transaction.
"""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import URL, text

from service.ledger import daily_limit, migrating
from service.ledger.database import LedgerUnavailableError
from service.ledger.opening import open_database
from tests.integration.test_cli_trying import examined
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    arrival,
    claim,
    confirmed,
    copy,
    count,
    lose_leases,
    receive,
    settle,
    store,
    utc_now,
)
from tests.support.waiting import eventually
from tests.support.webhooks import webhook

pytestmark = pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not on this machine")
SETTINGS = text(
    "SELECT current_setting('synchronous_commit'), current_setting('lock_timeout'), "
    "current_setting('idle_in_transaction_session_timeout'), current_setting('transaction_isolation'), pg_backend_pid()"
)


class Pgbouncer:
    """A pgbouncer in transaction mode in front of the test's databases, on a unix socket alone."""

    def __init__(self, folder: Path, server: URL, ignored: str = "") -> None:
        self._host = server.query.get("host") or server.host
        # It refuses to run as root, and must enter the folder of the server's socket.
        self._user = Path(str(self._host)).stat().st_uid if os.getuid() == 0 else None
        self._folder = folder
        self._server = server
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={self._host} user={server.username}\n"
            f"[pgbouncer]\npool_mode = transaction\ndefault_pool_size = 2\nauth_type = any\nlisten_port = 6432\n"
            f"unix_socket_dir = {folder}\nignore_startup_parameters = {ignored}\n"
        )
        if self._user is not None:
            shutil.chown(folder, self._user)

    def url(self, server: URL) -> URL:
        """Return the URL of the database at *server* through the pooler."""
        query = {"host": str(self._folder), "port": "6432"}
        return URL.create("postgresql", server.username, database=server.database, query=query)

    async def start(self) -> subprocess.Popen[bytes]:
        """Start it; who started it ends it."""
        command = ["pgbouncer", "--quiet", str(self._folder / "pgbouncer.ini")]
        process = subprocess.Popen(  # noqa: ASYNC220 - a test may block
            command, user=self._user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await eventually((self._folder / ".s.PGSQL.6432").exists)
        return process


@pytest.fixture(params=["", "extra_float_digits,options,search_path"])
async def pooler(request, postgres_url):
    """A running pgbouncer; it refuses parameters that it does not know, or drops some of them without a word."""
    folder = Path(tempfile.mkdtemp(prefix="mayfly-pgb-"))
    process = None
    try:
        pooler = Pgbouncer(folder, postgres_url, request.param)
        process = await pooler.start()
        yield pooler
    finally:
        if process is not None:
            process.terminate()
            process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def pooled_url(pooler, postgres_url):
    return pooler.url(postgres_url)


async def test_records_live_and_end_behind_a_pooler(pooled_url):
    async with open_database(pooled_url) as first, open_database(pooled_url) as second:
        sent = [[arrival() for _ in range(3)] for _ in range(40)]
        await asyncio.gather(*(receive((first, second)[n % 2], *some) for n, some in enumerate(sent)))
        ended = []
        while claims := await claim(first, limit=25):
            await asyncio.gather(*(copy((first, second)[n % 2], one) for n, one in enumerate(claims)))
            ended += await settle(second, *map(confirmed, claims))
        assert await lose_leases(first) == 0

        assert len(ended) == await count(second) == 120
        assert await first.read(lambda c: c.scalar(text("SELECT count(*) FROM records WHERE state = 'deleted'"))) == 120


async def test_the_settings_hold_in_each_transaction_behind_a_pooler(pooled_url, postgres_url):
    owner = await asyncpg.connect(user=postgres_url.username, host=postgres_url.query["host"], database="mayfly")

    def look(connection):
        return connection.execute(SETTINGS).one()

    try:
        await owner.execute("ALTER DATABASE mayfly SET synchronous_commit = off")
        await owner.execute("ALTER DATABASE mayfly SET default_transaction_isolation = serializable")
        async with open_database(pooled_url) as database:
            seen = await asyncio.gather(*(database.write(look) for _ in range(40)))
            read = await asyncio.gather(*(database.read(look) for _ in range(40)))
        others = await owner.fetch("SELECT pid FROM pg_stat_activity WHERE datname = 'mayfly'")
        left = [await setting_left(pooled_url) for _ in range(len(others))]
    finally:
        await owner.execute("ALTER DATABASE mayfly RESET ALL")
        await owner.close()

    assert {tuple(one[:4]) for one in seen} == {("on", "500ms", "20s", "read committed")}
    assert {tuple(one[:4]) for one in read} == {("on", "500ms", "20s", "repeatable read")}
    assert len({one[4] for one in seen}) == 2  # else this has not shown anything
    assert set(left) == {"0"}  # others who share the pooler find their own settings


async def setting_left(url):
    """Return a setting as another user of the pooler finds it."""
    other = await asyncpg.connect(
        user=url.username, host=url.query["host"], port=6432, database="mayfly", statement_cache_size=0
    )
    try:
        return await other.fetchval("SELECT current_setting('lock_timeout')")
    finally:
        await other.close()


async def test_no_prepared_statement_is_left_on_a_server_connection(pooled_url):
    async with open_database(pooled_url) as database:
        await asyncio.gather(*(store(database) for _ in range(20)))
        names = await database.read(
            lambda connection: connection.scalars(text("SELECT name FROM pg_prepared_statements")).all()
        )

    assert list(names) in ([], [""])


async def test_migrations_run_once_behind_a_pooler(pooler, postgres):
    empty = await postgres.empty()
    try:
        async with open_database(pooler.url(empty)) as first, open_database(pooler.url(empty)) as second:
            found = await asyncio.gather(first.write(migrating.migrate), second.write(migrating.migrate))
            await first.read(migrating.check)
    finally:
        await postgres.drop(empty)

    assert Counter(found) == {(None, migrating.HEAD): 1, (migrating.HEAD, migrating.HEAD): 1}


async def test_the_daily_limit_is_never_exceeded_behind_a_pooler(pooled_url):
    reserve = partial(daily_limit.reserve_deletes, wanted=2, limit=15, now=utc_now(), actor=ACTOR, account=ACCOUNT)
    async with open_database(pooled_url) as first, open_database(pooled_url) as second:
        allowed = await asyncio.gather(*((first, second)[n % 2].write(reserve) for n in range(12)))

    assert sum(allowed) == 15


async def test_a_pooler_that_ends_is_reconnected(pooler, pooled_url):
    async with open_database(pooled_url) as database:
        await store(database)
        # As at a failover of the server behind it: pgbouncer's own connections end.
        owner = await asyncpg.connect(user="postgres", host=pooler._host, database="mayfly")
        await owner.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND datname = 'mayfly'"
        )
        await owner.close()
        await store(database)

        assert await count(database) == 2


async def test_webhooks_are_stored_and_readiness_holds_behind_a_pooler(pooled_url, open_client):
    async with open_database(pooled_url) as database, open_client(database) as client:
        sent = [webhook() for _ in range(50)]
        answers = await asyncio.gather(
            *(client.post("/webhooks/sync", content=one.body, headers=one.headers) for one in sent)
        )
        ready = await client.get("/health/ready")

    assert {answer.status_code for answer in answers} == {202}
    assert ready.status_code == 200


async def test_doctor_passes_behind_a_pooler(tmp_path, simulator, pooled_url, redis_url):
    code, lines = await examined(
        tmp_path,
        simulator,
        MAYFLY_DATABASE_URL=pooled_url.render_as_string(hide_password=False),
        MAYFLY_REDIS_URL=redis_url,
    )

    assert code == 0, lines
    assert lines["ledger"]["status"] == "ok"


@pytest.mark.parametrize("pooler", [""], indirect=True)
async def test_a_parameter_that_pgbouncer_refuses_is_explained(pooled_url):
    async with open_database(pooled_url.update_query_dict({"options": "-c search_path=public"})) as database:
        with pytest.raises(LedgerUnavailableError, match=r"pgbouncer refuses a parameter .* options"):
            await database.read(migrating.check)
