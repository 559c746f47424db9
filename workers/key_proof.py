"""Whose refusal a 401 or 403 is: the key's or one record's. A call that concerns no generation tells."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Final

from service.sync.answers import Answer, explain_refusal
from service.sync.client import KEY_SECONDS, SyncApi

# The refusal must be committed before the lease ends.
_MARGIN: Final = timedelta(seconds=KEY_SECONDS + 1)


class KeyProof:
    """Proves the key by one call at a time, whose answer serves all attempts that wait for it.

    *call_slot* is a Cleaner's. *acquire* waits for the budget of an attempt, and returns whether there was any.
    """

    def __init__(
        self,
        api: SyncApi,
        *,
        call_slot: Callable[[datetime], AbstractAsyncContextManager[bool]],
        acquire: Callable[[], Awaitable[bool]],
    ) -> None:
        self._api = api
        self._call_slot = call_slot
        self._acquire = acquire
        self._asking: asyncio.Task[Answer | None] | None = None

    async def explain(self, refusal: Answer, *, until: datetime, is_in_budget: bool) -> Answer:
        """Return what *refusal* means for the record: see explain_refusal().

        *until* is the end of the lease. *is_in_budget*: the attempt has a call left, as after its GET.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(until - _MARGIN, is_in_budget=is_in_budget))
        # Shielded: others may wait for the same answer.
        return explain_refusal(refusal, await asyncio.shield(self._asking))

    async def _ask(self, until: datetime, *, is_in_budget: bool) -> Answer | None:
        if not is_in_budget and not await self._acquire():
            return None
        async with self._call_slot(until) as is_in_time:
            return await self._api.check_key() if is_in_time else None
