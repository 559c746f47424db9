"""Group commit: many callers, one transaction, and each is answered only after its own part is durable."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from service.ledger.database import LedgerUnavailableError

Item = TypeVar("Item")
Result = TypeVar("Result")

# More would only make the first of a batch wait longer for the last.
MAX_BATCH = 128


class GroupCommit(Generic[Item, Result]):
    """Runs *commit* on all items that came while the last commit was under way; one alone does not wait.

    An item that makes its batch fail fails alone: the batch is then committed one by one. A ledger that is away
    fails all of them.
    """

    def __init__(self, commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]) -> None:
        self._commit = commit
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result for *item* once its commit is durable.

        A caller that is cancelled takes nothing back: its item may be committed all the same.

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
                # One turn of the loop, so that what it has read by now is in the batch as well.
                await self._gather()
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                await self._settle(batch)
        finally:
            self._runner = None

    async def _gather(self) -> None:
        """Let the loop turn for as long as each turn brings more: what it has to read already is in the batch as well.

        Measured with 32 connections: one turn alone made batches of 16, each of which waits for the disk.
        """
        before = 0
        while before < len(self._waiting) < MAX_BATCH:
            before = len(self._waiting)
            await asyncio.sleep(0)

    async def _settle(self, batch: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._commit([item for item, _ in batch])
        except LedgerUnavailableError as error:
            _fail(batch, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to one of the callers
            if len(batch) == 1:
                _fail(batch, error)
            else:
                for pair in batch:
                    await self._settle([pair])
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)


def _fail(batch: Sequence[tuple[Item, asyncio.Future[Result]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
