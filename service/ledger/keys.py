"""Which records have a key, asked for every webhook: cheap in a ledger of millions.

On PostgreSQL a unique index tells. On SQLite one would have each insert write a page of its own, ids being random:
measured, 35 of the 58 µs that a record took, and more the larger the ledger. So an insert appends the key's hash to
key_buffer there; once many have gathered they are merged into key_index in the order of their hashes, many to a page.
Whoever inserts has key_buffer in memory as well, and knows of most new hashes that key_index does not have them.

That a key has one record is kept, on SQLite, by looking and inserting in one transaction that has the write lock.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
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
_NEXT: Final = "SELECT hash FROM key_index WHERE hash >= ? ORDER BY hash LIMIT ?"
# 512 KB. With a million keys 21 of 100 new hashes are looked for in vain, with four million 61.
_FILTER_BITS: Final = 1 << 22
# How many hashes of an index that was there before are read for each that is asked for.
_LEARNT: Final = 16
_END: Final = 1 << 63  # behind the last hash


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
    buffer: _Buffer | None = connection.info.get(REMEMBERED)
    if buffer is None:
        buffer = connection.info[REMEMBERED] = _Buffer()
    buffer.catch_up(connection)
    found = buffer.find(connection, keys)
    return records.c.seq.in_(found) if found else None


def add(connection: Connection, numbers: Sequence[tuple[Key, int]]) -> None:
    """Note that *numbers*, in their order, are about to be the records of these keys.

    For a transaction that has asked are_perhaps_of() for them, which reads what other processes have noted.
    """
    if connection.dialect.name == "sqlite" and numbers:
        connection.info[REMEMBERED].add(connection, numbers)


class _Filter:
    """Tells of hashes that key_index does not have them, without reading a page of it: a Bloom filter of one bit each.

    It learns what is there already in the order of hashes, a little at a time, and says nothing of those behind.
    """

    def __init__(self) -> None:
        self._bits = bytearray(_FILTER_BITS // 8)
        self._end = -_END  # of what is learnt

    def note(self, hashes: Iterable[int]) -> None:
        """Have *hashes*, which the index has."""
        bits, last = self._bits, _FILTER_BITS - 1
        for one in hashes:
            bits[(one & last) >> 3] |= 1 << (one & 7)

    def pick(self, hashes: Sequence[int]) -> list[int]:
        """Return those of *hashes* that the index may have."""
        bits, last, end = self._bits, _FILTER_BITS - 1, self._end
        return [one for one in hashes if bits[(one & last) >> 3] >> (one & 7) & 1 or one >= end]

    def learn(self, connection: Connection, count: int) -> None:
        """Read the next *count* entries of the index, if there are some still."""
        if self._end == _END:
            return
        hashes = [one for (one,) in driver_of(connection).execute(_NEXT, (self._end, count))]
        self.note(hashes)
        self._end = hashes[-1] + 1 if len(hashes) == count else _END


class _Buffer:
    """key_buffer in the memory of a connection that inserts, and how far its oldest entries are merged."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[int, int] = {}  # by hash, in the order of the numbers
        self._last = 0
        self._run: list[int] = []  # hashes that are still to be merged, the largest first
        self._run_end = 0  # the last number of the run that is under way
        self._hashes: dict[Key, int] = {}  # of the keys that were asked for last
        self._has_foreign = False  # entries of another process, which may have merged some of them
        # Anew as well: others may have moved entries to the index that were never seen here.
        self._filter = _Filter()

    def catch_up(self, connection: Connection) -> None:
        """Read what other processes have appended: numbers grow with each commit, whoever makes it."""
        driver = driver_of(connection)
        last = driver.execute("SELECT max(seq) FROM key_buffer").fetchone()[0] or 0
        if last == self._last:
            return
        is_there = driver.execute("SELECT 1 FROM key_buffer WHERE seq = ?", (self._last,)).fetchone()
        # Without its last entry this is another ledger, an older one put in its place. And of those that others
        # append and merge it keeps all until it reads anew.
        if (self._last and not is_there) or len(self._numbers) > 4 * RUN:
            self._forget()
        rows = driver.execute("SELECT hash, seq FROM key_buffer WHERE seq > ? ORDER BY seq", (self._last,)).fetchall()
        self._remember(connection, rows, last)
        self._has_foreign = True
        go_on_after(last)

    def find(self, connection: Connection, keys: Collection[Key]) -> list[int]:
        """Return the numbers of all records that have the hash of one of *keys*."""
        self._hashes = {key: hash_of(key) for key in keys}
        hashes = list(self._hashes.values())
        found = [self._numbers[one] for one in hashes if one in self._numbers]
        self._filter.learn(connection, _LEARNT * len(hashes))
        wanted = self._filter.pick(hashes)
        for start in range(0, len(wanted), _MOST_HASHES):
            part = wanted[start : start + _MOST_HASHES]
            size = 1 << (len(part) - 1).bit_length()  # of few sizes, so that there are few statements to prepare
            padded = [*part, *part[:1] * (size - len(part))]
            found += [number for (number,) in driver_of(connection).execute(_look[size], padded)]
        return found

    def add(self, connection: Connection, numbers: Sequence[tuple[Key, int]]) -> None:
        """Append *numbers*, and merge or trim a few of those before."""
        if not self._run_end and len(self._numbers) >= 2 * RUN:
            self._begin(connection)
        if self._run:
            self._merge(connection, _PACE * len(numbers))
        elif self._run_end:
            self._trim(connection, _PACE * len(numbers))
        pairs = [(self._hashes[key], number) for key, number in numbers]
        _append(connection, [(number, one) for one, number in pairs])
        self._remember(connection, pairs, numbers[-1][1])

    def _remember(self, connection: Connection, numbers: Sequence[tuple[int, int]], last: int) -> None:
        # Of two keys with one hash the memory has the first; the second goes where it is looked for as well.
        seconds = [pair for pair in numbers if self._numbers.setdefault(*pair) != pair[1]]
        _merge(connection, seconds)
        self._filter.note(one for one, _ in seconds)
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
        gone = [one for one, number in oldest if number not in left] if left else [one for one, _ in oldest]
        self._filter.note(gone)
        for one in gone:
            del self._numbers[one]
        if end == self._run_end or not gone:
            self._run_end = 0
