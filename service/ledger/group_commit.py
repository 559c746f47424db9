"""Group commit: many callers share one transaction, and each returns after it is committed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from service.ledger.database import LedgerUnavailableError, RowLockedError
from service.runtime.tasks import set_outcome

Item = TypeVar("Item")
Result = TypeVar("Result")

# In a larger batch the first item only waits longer for the last.
MAX_BATCH = 128
# How many items of batches with a locked row are committed at a time, each on a connection of the pool's 15; between
# two tries the locked ones leave the connections to the others.
_ALONE_AT_ONCE = 10
_LOCKED_AGAIN_SECONDS = 0.5
# Then the sender is told to send the webhook again, while it still waits for the answer.
_LOCKED_SECONDS = 5.0


class GroupCommit(Generic[Item, Result]):
    """Runs *commit* on all items that arrived during the previous commit; a single item does not wait.

    If a batch fails, its items are committed one by one, so that only the bad one fails. If a row is locked, they are
    committed one by one in the background: only the one whose row it is waits. If the database does not answer, the
    whole batch fails at once.
    """

    def __init__(self, commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]) -> None:
        self._commit = commit
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._runner: asyncio.Task[None] | None = None
        self._places = asyncio.Semaphore(_ALONE_AT_ONCE)
        self._alone: set[asyncio.Task[None]] = set()

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
        except RowLockedError:
            for item, future in batch:
                task = asyncio.create_task(self._commit_alone(item, future))
                self._alone.add(task)
                task.add_done_callback(self._alone.discard)
            return
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

    async def _commit_alone(self, item: Item, future: asyncio.Future[Result]) -> None:
        """Commit one item, and again while its row is locked."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LOCKED_SECONDS
        while True:
            async with self._places:
                try:
                    (result,) = await self._commit([item])
                except RowLockedError as error:
                    if loop.time() >= deadline:
                        return set_outcome(future, error)
                except Exception as error:  # noqa: BLE001 - it is raised in the caller of the item
                    return set_outcome(future, error)
                else:
                    return set_outcome(future, result)
            await asyncio.sleep(_LOCKED_AGAIN_SECONDS)
