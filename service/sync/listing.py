"""The whole list of an organisation's generations, page by page, complete before anybody acts on it.

Source: sync.so API v2 reference, "List generations": newest first with a limit; the cursor is the id of the last item.
What becomes of a cursor whose generation is deleted meanwhile is not documented: the list begins anew.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import msgspec

from service.core.attempts import Verdict
from service.core.generation import Generation, MalformedError, read_generation
from service.sync.answers import Answer
from service.sync.client import PAGE_LIMIT, SyncApi

# So often one call may fail in a row before the list is given up.
_TRIES: Final = 4
WAIT_SECONDS: Final = 2.0
_LONGEST_WAIT: Final = timedelta(seconds=60)
_RESTARTS: Final = 5
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Listed:
    """A generation of the list, and its part of the answer as received."""

    generation: Generation
    body: str


@dataclass(slots=True)
class Listing:
    """What was read. *failure* says why the list is not complete, None for a complete one; then nobody may act on it.

    *items* are those that were asked for, *read* counts all, each generation once. *unreadable* counts items that are
    no generations; *oddities* describes some of these.
    """

    items: list[Listed] = field(default_factory=list)
    read: int = 0
    unreadable: int = 0
    oddities: list[str] = field(default_factory=list)
    pages: int = 0
    failure: str | None = None
    answer: Answer | None = None  # the last one, if it is the failure


class _DeadCursorError(Exception):
    """The generation of the cursor is gone, so that the next page may be anything."""


class _EndedError(Exception):
    """The list cannot be completed."""

    def __init__(self, reason: str, answer: Answer | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer


async def list_generations(
    api: SyncApi,
    *,
    acquire: Callable[[], Awaitable[bool]],
    wanted: Callable[[Generation], bool],
    begin: Callable[[], None] = lambda: None,
    is_enough: Callable[[], bool] = lambda: False,
    progress: Callable[[Listing], None] = lambda _listing: None,
    wait_seconds: float = WAIT_SECONDS,
) -> Listing:
    """Read the whole list and keep the generations that are *wanted*.

    *is_enough* is asked after each page whether older generations are of no interest: the newest come first.
    *acquire* waits until one call may be made, and returns False to end. *begin* is called when the list begins, also
    when it begins anew; then *wanted* once for each generation, and *progress* after each page. Failures are in the
    result; a few in a row are retried, the first after *wait_seconds*, each one after twice the time.
    """
    listing, calls = Listing(), _Calls(api, acquire, wait_seconds)
    for _ in range(_RESTARTS + 1):
        listing = Listing()
        begin()
        try:
            await _read_pages(calls, listing, wanted, is_enough, progress)
        except _DeadCursorError:
            continue
        except _EndedError as end:
            listing.failure, listing.answer = end.reason, end.answer
        return listing
    listing.failure = f"generations were deleted while they were listed, {_RESTARTS + 1} times over"
    return listing


async def _read_pages(
    calls: "_Calls",
    listing: Listing,
    wanted: Callable[[Generation], bool],
    is_enough: Callable[[], bool],
    progress: Callable[[Listing], None],
) -> None:
    """Read pages until one is not full, or *is_enough*.

    Raises: _DeadCursorError, _EndedError.
    """
    seen: set[str | int] = set()
    used: set[str] = set()
    cursor: str | None = None
    while True:
        items = await calls.list_page(cursor)
        listing.pages += 1
        if cursor is not None and not items and await calls.is_gone(cursor):
            raise _DeadCursorError
        last = _add_page(items, listing, seen, wanted)
        progress(listing)
        if len(items) < PAGE_LIMIT or is_enough():
            return
        if last is None or last in used:
            # An API that begins anew at a dead cursor comes here, too.
            if cursor is not None and await calls.is_gone(cursor):
                raise _DeadCursorError
            raise _EndedError("the API shows the same page again, or one that cannot be read")
        used.add(last)
        cursor = last


def _add_page(
    items: list[msgspec.Raw], listing: Listing, seen: set[str | int], wanted: Callable[[Generation], bool]
) -> str | None:
    """Add the *items* that were not *seen*; return the id of the last one, None if none can be read."""
    last = None
    for raw in items:
        body = bytes(raw)
        try:
            generation = read_generation(body)
        except MalformedError as error:
            _add_oddity(body, str(error), listing, seen)
            continue
        last = generation.id
        if generation.id in seen:
            continue
        seen.add(generation.id)
        listing.read += 1
        if wanted(generation):
            listing.items.append(Listed(generation, body.decode()))
    return last


def _add_oddity(body: bytes, why: str, listing: Listing, seen: set[str | int]) -> None:
    """Count an item that cannot be read, once although pages may overlap."""
    digest = hash(body)
    if digest in seen:
        return
    seen.add(digest)
    listing.unreadable += 1
    if len(listing.oddities) < _SHOWN:
        listing.oddities.append(why)


class _Calls:
    """The calls of one list, each one within the budget; a few failures in a row are retried."""

    def __init__(self, api: SyncApi, acquire: Callable[[], Awaitable[bool]], wait_seconds: float) -> None:
        self._api = api
        self._acquire = acquire
        self._wait = timedelta(seconds=wait_seconds)

    async def list_page(self, cursor: str | None) -> list[msgspec.Raw]:
        """Return the items of one page.

        Raises: _DeadCursorError, _EndedError.
        """
        answer = await self._call(lambda: self._api.list_page(cursor))
        if answer.verdict is Verdict.DONE and answer.body is not None:
            return msgspec.json.decode(answer.body, type=list[msgspec.Raw])
        if cursor is not None and answer.verdict in (Verdict.REFUSED, Verdict.GONE) and await self.is_gone(cursor):
            raise _DeadCursorError
        raise _EndedError(answer.error or "the API gave no list", answer)

    async def is_gone(self, generation_id: str) -> bool:
        """Whether the API does not know a generation any more.

        Raises: _EndedError, if it does not say.
        """
        answer = await self._call(lambda: self._api.get(generation_id))
        if answer.verdict is Verdict.GONE:
            return True
        if answer.generation is None:
            raise _EndedError(answer.error or "the API gave no answer", answer)
        return False

    async def _call(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        for failures in range(_TRIES):
            if not await self._acquire():
                raise _EndedError("deletions needed all calls, or Mayfly was stopped")
            answer = await call()
            wait = max(answer.retry_after or timedelta(0), self._wait * 2**failures)
            if answer.verdict is not Verdict.RETRY or answer.generation is not None or wait > _LONGEST_WAIT:
                return answer
            if failures + 1 < _TRIES:
                await asyncio.sleep(wait.total_seconds())
        return answer
