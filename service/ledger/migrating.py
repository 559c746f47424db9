"""Migrating the tables to this release, and checking their revision."""

from datetime import datetime
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, text

from service.core.errors import ExplainedError
from service.ledger import heartbeats

# The newest revision; a test compares it with the folder. A constant, because only a migration needs to load Alembic.
HEAD: Final = "0001"
_LOCK = 0x6D6179666C79  # arbitrary, for an advisory lock of PostgreSQL


class SchemaError(ExplainedError):
    """The tables do not have a revision that this release can use."""


def migrate(connection: Connection) -> tuple[str | None, str]:
    """Run the missing migrations and return the revisions before and after; concurrent calls run one by one.

    Raises: SchemaError for a database that cannot store every text.
    """
    _check_encoding(connection)
    from alembic import command  # noqa: PLC0415 - 10 MB that api and worker never need
    from alembic.config import Config  # noqa: PLC0415

    if connection.dialect.name == "postgresql":
        # Another process may migrate for minutes.
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        # A migration that waits for a long reader, such as a backup, blocks every webhook that comes after it.
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
    before = current(connection)
    if before is not None and before > HEAD:
        return before, before  # by a newer release: each migration keeps the code of the previous release running
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
    _check_encoding(connection)
    revision = current(connection)
    if revision is None or revision < HEAD:
        found = f"at {revision}" if revision else "missing"
        raise SchemaError(f"the ledger's tables are {found}, {HEAD} is needed: run mayfly migrate")
    # Newer tables are fine: each migration keeps the code of the previous release running (expand, then contract).
    # But revisions 0002 and 0003 existed before the first release, and left this index.
    if revision > HEAD and inspect(connection).has_index("records", "records_state_seq"):
        raise SchemaError("a version before the first release made this ledger; it cannot be upgraded: use a new one")


def check_writable(connection: Connection) -> None:
    """Return if this release can write to the tables; a read-only or locked database raises its own error.

    Raises: SchemaError.
    """
    check(connection)
    # It changes nothing, but fails where the tables are read-only; on SQLite the transaction itself takes the lock.
    connection.execute(text("UPDATE alembic_version SET version_num = version_num WHERE 1 = 0"))


def check_commits(connection: Connection, *, now: datetime) -> None:
    """Write a row: with the commit that follows, it also fails on a full disk, which check_writable() does not.

    Raises: SchemaError.
    """
    check(connection)
    heartbeats.record_beat(connection, heartbeats.READINESS, now=now)


def _check_encoding(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.scalar(text("SELECT current_setting('server_encoding')"))
    if encoding != "UTF8":
        advice = "make another with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        raise SchemaError(f"the database's encoding is {encoding} and cannot store every text: {advice}")


def current(connection: Connection) -> str | None:
    """Return the revision of the tables, None where there are none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
