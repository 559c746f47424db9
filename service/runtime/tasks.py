"""Helpers for asyncio tasks: reliable cancellation, a timeout that does not wait, results for futures."""

import asyncio
from collections.abc import Awaitable, Collection
from typing import Any, TypeVar

T = TypeVar("T")

_CANCEL_AGAIN_SECONDS = 0.2


async def cancel_and_wait(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel *tasks* until all have ended.

    Once is not enough: redis-py waits for each write with asyncio.wait_for, which before Python 3.12 loses a
    cancellation that arrives just as the write completes.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_SECONDS)


# Calls that timed out and have not ended yet: asyncio keeps only weak references to tasks.
_slow: set[asyncio.Future[Any]] = set()


async def run_within(seconds: float, call: Awaitable[T]) -> T:
    """Return the result of *call* if it ends in time. Otherwise cancel it, without waiting for its end.

    asyncio.timeout() would wait: with a PostgreSQL that hangs, the driver takes two seconds to close its connection.

    Raises: TimeoutError, and whatever *call* raises.
    """
    task = asyncio.ensure_future(call)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            _slow.add(task)
            task.add_done_callback(_discard_slow)
    if not done:
        raise TimeoutError
    return task.result()


def set_outcome(future: asyncio.Future[T], outcome: T | BaseException) -> None:
    """Set the result or the error of *future*, unless it is done."""
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _discard_slow(task: asyncio.Future[Any]) -> None:
    _slow.discard(task)
    if not task.cancelled():
        task.exception()  # retrieved, so that asyncio does not log it
