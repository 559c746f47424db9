"""Bringing the tables to the form of this release, and telling whether they are in it."""

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, text

from service.core.errors import ExplainedError

# The newest step; a test holds it to the folder. Looked at instead of Alembic, which only a migration needs to load.
HEAD: Final = "0001"
_LOCK = 0x6D6179666C79  # any number that no one else locks


class SchemaError(ExplainedError):
    """The tables are not in the form that this release needs."""


def migrate(connection: Connection) -> tuple[str | None, str]:
    """Run the steps that are missing and return the revisions before and after; two at once wait for each other."""
    from alembic import command  # noqa: PLC0415 - 10 MB that api and worker never need
    from alembic.config import Config  # noqa: PLC0415

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        # A step that waits for a long reader, a backup perhaps, would keep every webhook waiting behind it.
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
    before = current(connection)
    if before is not None and before > HEAD:
        return before, before  # left so by a newer release: each step keeps the code of the release before it running
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return before, HEAD


def check(connection: Connection) -> None:
    """Return if this release can run on the tables.

    Raises: SchemaError, which says what to do.
    """
    revision = current(connection)
    if revision is None or revision < HEAD:
        raise SchemaError(
            f"the ledger's tables are {revision or 'not there yet'}, {HEAD} is needed: run mayfly migrate"
        )
    # Newer tables are fine: each step keeps the code of the release before it running (expand, then contract).
    # But steps called 0002 and 0003 were there once before the first release, and left this index.
    if revision > HEAD and inspect(connection).has_index("records", "records_state_seq"):
        raise SchemaError(
            "the ledger was made by a version before the first release, and is not upgraded: use a new one"
        )


def check_writable(connection: Connection) -> None:
    """Return if this release can write to the tables: a database that only reads, or is locked, raises its own error.

    Raises: SchemaError.
    """
    check(connection)
    # Changes nothing, and is refused like any other write; on SQLite the transaction itself takes the lock.
    connection.execute(text("UPDATE alembic_version SET version_num = version_num WHERE 1 = 0"))


def current(connection: Connection) -> str | None:
    """Return the revision of the tables, None where there are none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
