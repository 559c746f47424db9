"""Group commit: many callers share one transaction, and each returns after it is committed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from service.ledger.database import LedgerUnavailableError
from service.runtime.tasks import set_outcome

Item = TypeVar("Item")
Result = TypeVar("Result")

# In a larger batch the first item only waits longer for the last.
MAX_BATCH = 128


class GroupCommit(Generic[Item, Result]):
    """Runs *commit* on all items that arrived during the previous commit; a single item does not wait.

    If a batch fails, its items are committed one by one, so that only the bad one fails. If the database does not
    answer, the whole batch fails at once.
    """

    def __init__(self, commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]) -> None:
        self._commit = commit
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result for *item* after its commit.

        Cancelling the caller undoes nothing: its item may still be committed.

        Raises: LedgerUnavailableError; what *commit* raised for this item.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                await self._commit_batch(batch)
        finally:
            self._runner = None

    async def _gather(self) -> None:
        """Yield to the event loop for as long as each turn adds items.

        Measured with 32 connections: after a single turn a batch had 16 items, and each batch costs a disk sync.
        """
        before = 0
        while before < len(self._waiting) < MAX_BATCH:
            before = len(self._waiting)
            await asyncio.sleep(0)

    async def _commit_batch(self, batch: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results: Sequence[Result | Exception] = await self._commit([item for item, _ in batch])
        except LedgerUnavailableError as error:
            results = [error] * len(batch)
        except Exception as error:  # noqa: BLE001 - it is raised in the caller of the bad item
            if len(batch) > 1:
                for pair in batch:
                    await self._commit_batch([pair])
                return
            results = [error]
        for (_, future), result in zip(batch, results, strict=True):
            set_outcome(future, result)
