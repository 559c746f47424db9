"""Ending tasks for good."""

import asyncio
from collections.abc import Collection
from typing import Any

_CANCEL_AGAIN_SECONDS = 0.2


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel *tasks* until they have ended.

    Once is not enough: redis-py waits for each write with asyncio.wait_for, which before Python 3.12 loses a
    cancellation that comes just as the write is done.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_SECONDS)
