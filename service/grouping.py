"""Group commit: many callers, one transaction, and each is answered only after its own part is durable."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import structlog

from service.ledger.database import LedgerUnavailableError
from service.tasks import settle

log = structlog.get_logger()

Item = TypeVar("Item")
Result = TypeVar("Result")
# Is told a result, or the error in its place.
Done = Callable[[Result | Exception], None]

# More would only make the first of a batch wait longer for the last.
MAX_BATCH = 128


class GroupCommit(Generic[Item, Result]):
    """Runs *commit* on all items that came while the last commit was under way; one alone does not wait.

    An item that makes its batch fail fails alone: the batch is then committed one by one. A ledger that is away
    fails all of them.
    """

    def __init__(self, commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]) -> None:
        self._commit = commit
        self._waiting: list[tuple[Item, Done[Result]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result for *item* once its commit is durable.

        A caller that is cancelled takes nothing back: its item may be committed all the same.

        Raises: LedgerUnavailableError; what *commit* raised for this very item.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.add(item, partial(settle, future))
        return await future

    def add(self, item: Item, done: Done[Result]) -> None:
        """Have *done* called, on the loop, with what submit() would return or raise for *item*."""
        self._waiting.append((item, done))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
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

    async def _settle(self, batch: Sequence[tuple[Item, Done[Result]]]) -> None:
        try:
            results: Sequence[Result | Exception] = await self._commit([item for item, _ in batch])
        except LedgerUnavailableError as error:
            results = [error] * len(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to one of the callers
            if len(batch) > 1:
                for pair in batch:
                    await self._settle([pair])
                return
            results = [error]
        for (_, done), result in zip(batch, results, strict=True):
            try:
                done(result)
            except Exception:
                log.exception("group.crashed")  # a fault of ours, which must not keep the others from their results
