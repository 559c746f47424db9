"""The interface of the ledger's database, for SQLite and PostgreSQL alike."""

import sqlite3
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

T = TypeVar("T")

WRITE_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 10.0
# Creating an index on millions of rows takes minutes.
MIGRATION_SECONDS = 3600.0
# The classes of SQLSTATE for values that do not fit: data exceptions, constraints, limits such as an index entry's.
_REFUSED_STATES = ("22", "23", "54")
# A character that the database's encoding does not have: the database is at fault, not the value.
_UNTRANSLATABLE = "22P05"
# A lock that another transaction did not give back in time, and a deadlock with one.
_LOCKED_STATES = ("55P03", "40P01")


class RefusedDataError(Exception):
    """The database refuses a value; its transaction was rolled back, and a retry would fail again."""


class LedgerUnavailableError(Exception):
    """The database cannot be reached, or cannot commit; nothing was written."""


class UnknownOutcomeError(LedgerUnavailableError):
    """The database did not confirm a commit: it is not known whether anything was written."""


class RowLockedError(LedgerUnavailableError):
    """Another transaction has locked one of the rows for too long; nothing was written, and other rows are free."""


class LedgerMovedError(LedgerUnavailableError):
    """The ledger's file is not at its path any more: what is written into it would be lost."""


@runtime_checkable  # Litestar checks what it injects
class Database(Protocol):
    """Runs functions of a Connection, each in a transaction."""

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Run *function* in a transaction and return its result after the commit.

        Raises: RefusedDataError; LedgerUnavailableError, also as UnknownOutcomeError or RowLockedError; whatever
        *function* raises, after a rollback.
        """

    async def read(self, function: Callable[[Connection], T]) -> T:
        """Run *function*, which only reads, and return its result; all its statements see one snapshot.

        Raises: LedgerUnavailableError.
        """

    async def close(self) -> None:
        """Close all connections after the calls in progress."""


def translate_error(error: Exception) -> Exception:
    """Translate a database error, without its statement and parameters, which contain URLs and users' texts."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    is_refused = isinstance(cause, (sqlite3.DataError, sqlite3.IntegrityError))
    state = str(getattr(cause, "sqlstate", ""))
    if is_refused or (state.startswith(_REFUSED_STATES) and state != _UNTRANSLATABLE):
        return RefusedDataError("the database refuses one of the values")
    if isinstance(error, TimeoutError):
        return LedgerUnavailableError("the database did not answer in time")
    if state in _LOCKED_STATES:
        return RowLockedError("another transaction has locked what this one needs; try again")
    if "unsupported startup parameter" in str(cause):
        advice = "remove application_name or options from MAYFLY_DATABASE_URL"
        return LedgerUnavailableError(f"pgbouncer refuses a parameter of the connection: {advice}")
    return LedgerUnavailableError(f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"[:300])
