"""What a database of the ledger is: functions of a connection run in it, each in a transaction.

Statements are plain functions of a Connection, written once for both kinds.
"""

import sqlite3
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

T = TypeVar("T")

WRITE_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 10.0
# An index on a table of millions takes minutes; nobody waits for an answer meanwhile.
MIGRATION_SECONDS = 3600.0
# The classes of SQL states for values that do not fit: data exceptions, constraints, limits such as an index entry's.
_REFUSED_STATES = ("22", "23", "54")


class RefusedDataError(Exception):
    """The database cannot hold a value; the transaction it was in is undone, and would be again."""


class LedgerUnavailableError(Exception):
    """The database cannot be reached, or cannot commit; nothing is known to have been written."""


@runtime_checkable  # Litestar checks what it injects
class Database(Protocol):
    """A database that runs functions of a connection, each in a transaction of its own."""

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Run *function* in a transaction and return its result once that is durable.

        Raises: RefusedDataError, LedgerUnavailableError; whatever *function* raises. Nothing is
        written then.
        """

    async def read(self, function: Callable[[Connection], T]) -> T:
        """Run *function*, which only reads, and return its result; all of its statements see one state.

        Raises: LedgerUnavailableError.
        """

    async def close(self) -> None:
        """Close all connections, once what is under way has ended."""


def translate_error(error: Exception) -> Exception:
    """Translate a database error without its statement and parameters, which hold URLs and texts of users."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    is_refused = isinstance(cause, (sqlite3.DataError, sqlite3.IntegrityError))
    if is_refused or str(getattr(cause, "sqlstate", "")).startswith(_REFUSED_STATES):
        return RefusedDataError("the database cannot hold one of the values")
    if isinstance(error, TimeoutError):
        return LedgerUnavailableError("the database did not answer in time")
    return LedgerUnavailableError(f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"[:300])
