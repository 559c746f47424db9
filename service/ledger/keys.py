"""Which records have a key, asked for every webhook: cheap in a ledger of millions.

On PostgreSQL a unique index tells. On SQLite one would have each insert write a page of its own, ids being random:
measured, 35 of the 58 µs that a record took, and more the larger the ledger. So an insert appends the key's hash to
key_buffer there; once many have gathered they are merged into key_index in the order of their hashes, many to a page.
Whoever inserts has key_buffer in memory as well.

That a key has one record is kept, on SQLite, by looking and inserting in one transaction that has the write lock.
"""

import hashlib
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import islice
from typing import Final

from sqlalchemy import ColumnElement, Connection, select, union_all

from service.generation import Key
from service.ledger.bulk import BulkInsert, driver_of
from service.ledger.database import REMEMBERED
from service.ledger.schema import key_buffer, key_index, records
from service.ledger.sequence import go_on_after

# With a million records a run of so many shares each page that it writes among three.
RUN: Final = 16_384
# How many entries are merged for each that is appended, so that no webhook waits for a whole run.
_PACE: Final = 4

_append = BulkInsert(key_buffer, ("seq", "hash"))
# Another process, or this one before it was killed, may have merged the same.
_merge = BulkInsert(key_index, ("hash", "seq"), ignores_known=True)
_MOST_HASHES: Final = 512
_look = {
    size: f"SELECT seq FROM key_index WHERE hash IN ({', '.join('?' * size)})"  # noqa: S608 - no values in it
    for size in (1 << power for power in range(_MOST_HASHES.bit_length()))
}
_IS_MERGED: Final = (
    "FROM key_buffer WHERE seq <= ? AND EXISTS "
    "(SELECT 1 FROM key_index WHERE key_index.hash = key_buffer.hash AND key_index.seq = key_buffer.seq)"
)
_MERGED: Final = f"SELECT hash, seq {_IS_MERGED}"
# None but those that the index is seen to have: a key that is in neither of the two would get a second record.
_TRIM: Final = f"DELETE {_IS_MERGED}"
_LEFT: Final = "SELECT seq FROM key_buffer WHERE seq <= ?"


@lru_cache(2 * _MOST_HASHES)  # asked for twice, before and after a look
def hash_of(key: Key) -> int:
    """Return the 64 bits that stand for *key*; two keys may share them, so that the record has the last word."""
    digest = hashlib.blake2b(f"{key.account}\0{key.id}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def is_record_of(connection: Connection, key: Key) -> ColumnElement[bool]:
    """Return the condition that picks the record of *key*, for whoever reads."""
    mine = (records.c.account == key.account) & (records.c.id == key.id)
    if connection.dialect.name != "sqlite":
        return mine
    number = hash_of(key)
    found = union_all(*(select(table.c.seq).where(table.c.hash == number) for table in (key_index, key_buffer)))
    return records.c.seq.in_(found) & mine


def are_perhaps_of(connection: Connection, keys: Collection[Key]) -> ColumnElement[bool] | None:
    """Return a condition that picks all records of *keys*, and perhaps others; None if *keys* have no records.

    For a transaction that may insert some, and so on SQLite has the write lock.
    """
    if connection.dialect.name != "sqlite":
        return records.c.account.in_({key.account for key in keys}) & records.c.id.in_([key.id for key in keys])
    buffer: _Buffer = connection.info.setdefault(REMEMBERED, _Buffer())
    buffer.catch_up(connection)
    found = buffer.find(connection, [hash_of(key) for key in keys])
    return records.c.seq.in_(found) if found else None


def add(connection: Connection, numbers: Sequence[tuple[Key, int]]) -> None:
    """Note that *numbers*, in their order, are about to be the records of these keys.

    For a transaction that has asked are_perhaps_of(), which reads what other processes have noted.
    """
    if connection.dialect.name == "sqlite" and numbers:
        connection.info[REMEMBERED].add(connection, [(hash_of(key), number) for key, number in numbers])


class _Buffer:
    """key_buffer in the memory of a connection that inserts, and how far its oldest entries are merged."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[int, int] = {}  # by hash, in the order of the numbers
        self._last = 0
        self._run: list[int] = []  # hashes that are still to be merged, the largest first
        self._run_end = 0  # the last number of the run that is under way
        self._has_foreign = False  # entries of another process, which may have merged some of them

    def catch_up(self, connection: Connection) -> None:
        """Read what other processes have appended: numbers grow with each commit, whoever makes it."""
        driver = driver_of(connection)
        last = driver.execute("SELECT max(seq) FROM key_buffer").fetchone()[0] or 0
        if last == self._last:
            return
        is_there = driver.execute("SELECT 1 FROM key_buffer WHERE seq = ?", (self._last,)).fetchone()
        # Without its last entry this is another ledger, an older one put in its place. And of those that others
        # append and merge it keeps all until it reads anew.
        if not is_there or len(self._numbers) > 4 * RUN:
            self._forget()
        rows = driver.execute("SELECT hash, seq FROM key_buffer WHERE seq > ? ORDER BY seq", (self._last,)).fetchall()
        self._remember(connection, rows, last)
        self._has_foreign = True
        go_on_after(last)

    def find(self, connection: Connection, hashes: list[int]) -> list[int]:
        """Return the numbers of all records that have one of *hashes*."""
        found = [self._numbers[one] for one in hashes if one in self._numbers]
        for start in range(0, len(hashes), _MOST_HASHES):
            part = hashes[start : start + _MOST_HASHES]
            size = 1 << (len(part) - 1).bit_length()  # of few sizes, so that there are few statements to prepare
            padded = [*part, *part[:1] * (size - len(part))]
            found += [number for (number,) in driver_of(connection).execute(_look[size], padded)]
        return found

    def add(self, connection: Connection, numbers: Sequence[tuple[int, int]]) -> None:
        """Append *numbers*, pairs of hash and number, and merge or trim a few of those before."""
        if not self._run_end and len(self._numbers) >= 2 * RUN:
            self._begin(connection)
        if self._run:
            self._merge(connection, _PACE * len(numbers))
        elif self._run_end:
            self._trim(connection, _PACE * len(numbers))
        _append(connection, [(number, one) for one, number in numbers])
        self._remember(connection, numbers, numbers[-1][1])

    def _remember(self, connection: Connection, numbers: Sequence[tuple[int, int]], last: int) -> None:
        # Of two keys with one hash the memory has the first; the second goes where it is looked for as well.
        _merge(connection, [pair for pair in numbers if self._numbers.setdefault(*pair) != pair[1]])
        self._last = last

    def _begin(self, connection: Connection) -> None:
        oldest = list(islice(self._numbers.items(), RUN))
        self._run_end = oldest[-1][1]
        # A run that was begun, by a process that was killed perhaps, goes on where it was: else it might never end.
        merged = set(driver_of(connection).execute(_MERGED, (self._run_end,))) if self._has_foreign else set()
        self._run = sorted((one for one, number in oldest if (one, number) not in merged), reverse=True)
        self._has_foreign = False

    def _merge(self, connection: Connection, count: int) -> None:
        part = self._run[-count:]
        del self._run[-count:]
        _merge(connection, [(one, self._numbers[one]) for one in reversed(part)])

    def _trim(self, connection: Connection, count: int) -> None:
        oldest = [pair for pair in islice(self._numbers.items(), count) if pair[1] <= self._run_end]
        end = oldest[-1][1] if len(oldest) == count else self._run_end
        driver = driver_of(connection)
        driver.execute(_TRIM, (end,))
        # Others trim as well: what is not in the table any more is in the index, whoever took it out.
        left = {number for (number,) in driver.execute(_LEFT, (end,))}
        gone = [one for one, number in oldest if number not in left]
        for one in gone:
            del self._numbers[one]
        if end == self._run_end or not gone:
            self._run_end = 0
