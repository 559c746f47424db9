"""Waiting by polling."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


async def eventually(look: Callable[[], Any], *, seconds: float = 10.0) -> Any:  # noqa: ANN401 - whatever it finds
    """Return what *look*, a function or a coroutine function, finds once it is true; TimeoutError after *seconds*."""
    async with asyncio.timeout(seconds):
        while True:
            found = look()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.01)
