"""Ending tasks for good, not waiting for those that end slowly, results for whoever still waits."""

import asyncio
from collections.abc import Awaitable, Collection
from typing import Any, TypeVar

T = TypeVar("T")

_CANCEL_AGAIN_SECONDS = 0.2


async def cancel_and_wait(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel *tasks* until they have ended.

    Once is not enough: redis-py waits for each write with asyncio.wait_for, which before Python 3.12 loses a
    cancellation that comes just as the write is done.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_SECONDS)


# Calls that were too slow and have still to end: asyncio itself keeps no hold of its tasks.
_slow: set[asyncio.Future[Any]] = set()


async def run_within(seconds: float, call: Awaitable[T]) -> T:
    """Return what *call* does, if it does so in time. One that does not is cancelled and not waited for.

    asyncio.timeout() would wait: the driver of a PostgreSQL that hangs takes two seconds to give up its connection.

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
    """Give *future* its result, or the error in its place, if it still waits."""
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _discard_slow(task: asyncio.Future[Any]) -> None:
    _slow.discard(task)
    if not task.cancelled():
        task.exception()  # asked for, so that asyncio does not log it
