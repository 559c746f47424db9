"""Behind pgbouncer in transaction mode Mayfly says at once that it cannot work there (Debian's package)."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from sqlalchemy import URL

from service.ledger import migrating
from service.ledger.database import LedgerUnavailableError
from service.ledger.opening import open_database
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not on this machine")
USER = "nobody" if os.getuid() == 0 else None  # it refuses to run as root


@pytest.fixture
def folder(postgres_url):
    """The configuration of a pgbouncer in transaction mode."""
    folder = Path(tempfile.mkdtemp(prefix="mayfly-pgb-"))
    host = postgres_url.query.get("host") or postgres_url.host
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\nmayfly = host={host} dbname={postgres_url.database} user={postgres_url.username}\n"
        f"[pgbouncer]\npool_mode = transaction\nauth_type = any\nlisten_port = 6432\nunix_socket_dir = {folder}\n"
    )
    folder.chmod(0o755)
    if USER is not None:
        shutil.chown(folder, USER)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def pooled_url(folder, postgres_url):
    """The test's database through pgbouncer, which listens on a unix socket alone."""
    command = ["pgbouncer", "--quiet", str(folder / "pgbouncer.ini")]
    with subprocess.Popen(command, user=USER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as pooler:  # noqa: ASYNC220 - a test may block
        try:
            await eventually((folder / ".s.PGSQL.6432").exists)
            query = {"host": str(folder), "port": "6432"}
            yield URL.create("postgresql", postgres_url.username, database="mayfly", query=query)
        finally:
            pooler.terminate()
            pooler.wait(10)


async def test_pgbouncer_is_refused_at_the_first_connection(pooled_url):
    async with open_database(pooled_url) as database:
        with pytest.raises(LedgerUnavailableError, match="pgbouncer"):
            await database.read(migrating.check)
