"""The migrations make the tables that the code expects, once, also when they run concurrently or again."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, inspect, text

from service.ledger import migrating, schema
from service.ledger.database import LedgerUnavailableError
from service.ledger.migrating import SchemaError
from service.ledger.opening import open_database

FOLDER = Path(migrating.__file__).parent / "migrations"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request, tmp_path):
    """A database without tables."""
    if request.param == "sqlite":
        return URL.create("sqlite", database=str(tmp_path / "empty.db"))
    return request.getfixturevalue("empty_postgres_url")


@pytest.fixture
async def empty_postgres_url(postgres):
    url = await postgres.empty()
    yield url
    await postgres.drop(url)


@pytest.fixture
async def empty(empty_url):
    async with open_database(empty_url) as database:
        yield database


async def test_a_migration_waits_for_another_one(empty_postgres_url):
    def migrate_slowly(connection):
        migrating.migrate(connection)
        connection.execute(text("SELECT pg_sleep(1.2)"))  # longer than any other statement waits for a lock

    async with open_database(empty_postgres_url) as first, open_database(empty_postgres_url) as second:
        slow = asyncio.create_task(first.write(migrate_slowly))
        await asyncio.sleep(0.3)
        found = await second.write(migrating.migrate)
        await slow

    assert found == (migrating.HEAD, migrating.HEAD)


async def set_revision(database, revision):
    statement = text("UPDATE alembic_version SET version_num = :revision")
    await database.write(lambda connection: connection.execute(statement, {"revision": revision}))


async def test_the_migrations_lead_from_nothing_to_the_tables_of_the_code(empty):
    assert await empty.write(migrating.migrate) == (None, migrating.HEAD)

    def differences(connection):
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return compare_metadata(context, schema.metadata)

    assert await empty.read(differences) == []


def indexes(connection):
    """Return the columns of each index of the records, whether it is unique and on which rows."""
    return {
        index["name"]: (
            index["column_names"],
            bool(index["unique"]),
            str(index["dialect_options"].get(f"{connection.dialect.name}_where")),
        )
        for index in inspect(connection).get_indexes("records")
    }


async def test_the_migration_makes_the_same_indexes_as_the_tables_of_the_code(empty):
    await empty.write(migrating.migrate)
    migrated = await empty.read(indexes)
    await empty.write(schema.metadata.drop_all)
    await empty.write(schema.metadata.create_all)

    assert await empty.read(indexes) == migrated
    assert [name for name, (_, is_unique, _) in migrated.items() if is_unique] == ["records_account_id"]


async def test_the_migration_makes_the_same_tables_as_the_code_on_sqlite(tmp_path):
    async def made_by(function, name):
        async with open_database(URL.create("sqlite", database=str(tmp_path / name))) as database:
            await database.write(function)
            tables = text("SELECT sql FROM sqlite_master WHERE type = 'table' AND name != 'alembic_version'")
            return await database.read(lambda connection: sorted(connection.scalars(tables)))

    assert await made_by(migrating.migrate, "migrated.db") == await made_by(schema.metadata.create_all, "made.db")


def test_the_head_that_the_code_knows_is_that_of_the_folder():
    assert ScriptDirectory(str(FOLDER)).get_current_head() == migrating.HEAD


async def test_migrating_again_changes_nothing(empty):
    await empty.write(migrating.migrate)

    assert await empty.write(migrating.migrate) == (migrating.HEAD, migrating.HEAD)


async def test_concurrent_migrations_run_one_after_another(empty_url):
    @asynccontextmanager
    async def pair():
        async with open_database(empty_url) as one, open_database(empty_url) as other:
            yield one, other

    async with pair() as databases:
        results = await asyncio.gather(*(database.write(migrating.migrate) for database in databases))

    assert sorted(before or "" for before, _ in results) == ["", migrating.HEAD]


async def test_missing_and_old_tables_are_reported_with_what_to_do(empty):
    with pytest.raises(SchemaError, match=r"^the ledger's tables are missing, 0\d+ is needed: run mayfly mig"):
        await empty.read(migrating.check)
    await empty.write(migrating.migrate)
    await set_revision(empty, "0000")

    with pytest.raises(SchemaError, match="are at 0000, 0"):
        await empty.read(migrating.check)


async def test_the_tables_of_this_release_and_of_a_newer_one_are_usable(database):
    await database.read(migrating.check)
    await set_revision(database, "9999")
    await database.read(migrating.check)

    assert await database.read(migrating.current) == "9999"


async def test_a_ledger_of_before_the_first_release_is_refused(database):
    await database.write(lambda connection: connection.execute(text("CREATE INDEX records_state_seq ON records (seq)")))
    await set_revision(database, "0003")

    with pytest.raises(SchemaError, match="before the first release made this ledger; it cannot be upgraded"):
        await database.read(migrating.check)


async def test_the_tables_of_a_newer_release_are_not_changed(database):
    await set_revision(database, "9999")

    assert await database.write(migrating.migrate) == ("9999", "9999")


async def test_a_failed_migration_is_rolled_back(empty):
    def migrate_and_fail(connection):
        migrating.migrate(connection)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await empty.write(migrate_and_fail)
    assert await empty.read(lambda connection: inspect(connection).get_table_names()) == []


async def test_the_error_of_an_unreachable_database_has_no_password():
    url = URL.create("postgresql", "mayfly", "verysecret", "127.0.0.1", 1, "mayfly")
    async with open_database(url) as database:
        with pytest.raises(LedgerUnavailableError) as trouble:
            await database.read(migrating.check)

    assert "verysecret" not in f"{trouble.value} {trouble.value!r}"


async def test_a_missing_folder_makes_the_ledger_unavailable(tmp_path):
    async with open_database(URL.create("sqlite", database=str(tmp_path / "gone" / "ledger.db"))) as database:
        with pytest.raises(LedgerUnavailableError, match="unable to open"):
            await database.read(migrating.check)


async def test_sqlite_commits_reach_the_disk(sqlite_database):
    pragmas = ("journal_mode", "synchronous")
    values = await sqlite_database.write(
        lambda connection: [connection.scalar(text(f"PRAGMA {pragma}")) for pragma in pragmas]
    )

    assert values == ["wal", 2]
