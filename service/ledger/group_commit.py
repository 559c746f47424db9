"""Group commit: many callers share one transaction, and each returns once its own part is durable."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from service.ledger.database import LedgerUnavailableError
from service.runtime.tasks import set_outcome

Item = TypeVar("Item")
Result = TypeVar("Result")

# More would only make the first of a batch wait longer for the last.
MAX_BATCH = 128


class GroupCommit(Generic[Item, Result]):
    """Runs *commit* on all items that came while the last commit was running; one alone does not wait.

    If a batch fails, its items are committed one by one, so that only the bad one fails. A database that does not
    answer fails all of them at once.
    """

    def __init__(self, commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]) -> None:
        self._commit = commit
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result for *item* once its commit is durable.

        Cancelling the caller does not undo anything: its item may still be committed.

        Raises: LedgerUnavailableError; what *commit* raised for this very item.
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
        """Give way to the event loop for as long as each turn brings more items.

        Measured with 32 connections: after a single turn a batch had 16 items, and each batch waits for the disk.
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
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to one of the callers
            if len(batch) > 1:
                for pair in batch:
                    await self._commit_batch([pair])
                return
            results = [error]
        for (_, future), result in zip(batch, results, strict=True):
            set_outcome(future, result)
