"""The arq job ``copy``: the early look at a generation, so that its record has from the beginning what the API knows.

Deletions come first: a look takes only what they leave of the budget. What is lost, the ledger finds again.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog

from service.core.attempts import Verdict, backoff
from service.core.generation import Generation
from service.core.key import Key
from service.core.refining import decide_ended_retention, refine_retention
from service.core.retention import Policy, Retention
from service.core.rules import read_facts
from service.ledger.database import LedgerUnavailableError
from service.ledger.looking import Ended, Known, Looked
from service.runtime.metrics import Metrics
from service.sync.answers import Answer
from service.sync.client import GET_SECONDS
from service.sync.rate_limit import SpareCalls

log = structlog.get_logger()

# How many looks may run and wait at once: they share arq's places with deletions.
AT_ONCE: Final = 20
_PLACES: Final = 4
_UNKNOWN: Final = "the API does not know this generation"
_ENDED: Final = {
    Ended.ENDED: "the API is asked again when it is due",
    Ended.PUT_OFF: "the API is asked again soon, as it may be new",
    Ended.WRONG_ID: "the record needs an operator: check the id and its account, then mayfly records retry",
}
_SLOT: Final = timedelta(seconds=2 * GET_SECONDS)


async def copy(ctx: dict[str, Any], account: str, generation_id: str) -> None:
    """Look at the generation of *account* and *generation_id*, if its record still wants it."""
    looks: Looks = ctx["looks"]
    await looks.run(Key(account, generation_id))


@dataclass(frozen=True, slots=True)
class LookLedger:
    """The ledger's calls that looks need."""

    is_wanted: Callable[[Key], Awaitable[bool]]
    store: Callable[[Key, Generation, str, Callable[[Known], Retention | None]], Awaitable[Looked | None]]
    put_off: Callable[[Key, Callable[[int], timedelta], timedelta | None, Generation | None], Awaitable[None]]
    end: Callable[[Key, str, Callable[[int], timedelta]], Awaitable[Ended]]


@dataclass(kw_only=True)
class Looks:
    """The job ``copy`` and its dependencies.

    *calls* are what deletions leave of the budget. *enqueue_cleanup* enqueues the attempt of that number at that time.
    """

    ledger: LookLedger
    get: Callable[[str], Awaitable[Answer]]
    call_slot: Callable[[datetime], AbstractAsyncContextManager[bool]]
    calls: SpareCalls
    enqueue_cleanup: Callable[[Key, int, datetime], Awaitable[None]]
    policy: Policy
    now: Callable[[], datetime]
    metrics: Metrics
    stopping: asyncio.Event

    def __post_init__(self) -> None:
        self._places = asyncio.Semaphore(_PLACES)
        self._present = 0

    async def run(self, key: Key) -> None:
        """See copy(). Raises nothing: the safety net enqueues what was not done."""
        if self.stopping.is_set() or self._present >= AT_ONCE or self.calls.is_spent:
            return
        self._present += 1
        try:
            async with self._places:
                await self._examine(key)
        except LedgerUnavailableError as error:
            what_now = "the look is made later"
            log.warning("copy.interrupted", generation=key.id, error=str(error), what_now=what_now)
        finally:
            self._present -= 1

    async def _examine(self, key: Key) -> None:
        if self.stopping.is_set() or not await self.ledger.is_wanted(key) or not await self.calls.take():
            return
        async with self.call_slot(self.now() + _SLOT) as is_in_time:
            answer = await self.get(key.id) if is_in_time else None
        if answer is None:
            return
        self.metrics.looks.labels(answer.verdict).inc()
        jitter = random.random()  # noqa: S311 - only spreads load
        wait = partial(backoff, retry_after=answer.retry_after, jitter=jitter)
        if answer.verdict is Verdict.DONE and answer.generation is not None and answer.body is not None:
            await self._store(key, answer.generation, answer.body)
        elif answer.verdict is Verdict.GONE:
            ended = await self.ledger.end(key, _UNKNOWN, wait)
            write = log.info if ended is Ended.PUT_OFF else log.warning
            write("copy.unknown", account=key.account, generation=key.id, what_now=_ENDED[ended])
        else:
            await self.ledger.put_off(key, wait, answer.throttle, answer.generation)

    async def _store(self, key: Key, generation: Generation, body: str) -> None:
        looked = await self.ledger.store(key, generation, body, partial(self._decide, key, generation))
        if looked is not None and looked.due_at is not None:
            await self.enqueue_cleanup(key, looked.attempts + 1, looked.due_at)

    def _decide(self, key: Key, generation: Generation, known: Known) -> Retention | None:
        found = self._decide_now(key, generation, known)
        if found is not None:
            due_at = None if found.due_at is None else found.due_at.isoformat()
            log.info("retention.refined", generation=key.id, rule=found.rule, due_at=due_at)
        return found

    def _decide_now(self, key: Key, generation: Generation, known: Known) -> Retention | None:
        facts = read_facts(self.policy.rules, key.account, generation, is_complete=True, labels=known.labels)
        if not known.has_ended:
            return decide_ended_retention(
                self.policy,
                facts,
                rule=known.rule,
                due_at=known.due_at,
                ttl=known.ttl,
                webhook_url=generation.webhook_url,
                sent_at=known.sent_at,
                now=self.now(),
            )
        if known.due_at is None:
            return None
        return refine_retention(
            self.policy,
            facts,
            rule=known.rule,
            due_at=known.due_at,
            ttl=known.ttl,
            webhook_url=generation.webhook_url,
            sent_at=known.sent_at,
            now=self.now(),
        )
