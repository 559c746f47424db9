"""One look at a finished batch: its results, else the list; then the generations that neither says enough of."""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import structlog

from service.core.adopting import read_created_at
from service.core.attempts import Verdict, backoff
from service.core.batch import BatchState, Tally, read_output_url
from service.core.generation import Generation
from service.core.key import Key
from service.core.overrides import url_of_request
from service.core.reapplying import is_decided_by_policy
from service.core.retention import Policy, decide_retention, keep_longer
from service.core.rules import read_facts
from service.ledger import adopting, pausing
from service.ledger.batches import Claimed, Resolution
from service.ledger.database import Database, RefusedDataError
from service.ledger.inserting import Arrival, Receipt
from service.ledger.requiring import inherit_requirements
from service.sync.answers import Answer
from service.sync.client import SyncApi
from service.sync.listing import WAIT_SECONDS, list_generations
from service.sync.results import Results, ResultsReader

log = structlog.get_logger()

ACTOR: Final = "batch"
# One transaction; webhooks wait for it on SQLite.
_ADOPT_AT_ONCE: Final = 200
# How much earlier than the batch, and later than its webhook, one of its generations may have been created: clocks.
_MARGIN: Final = timedelta(minutes=10)

Adopt = Callable[[Sequence[Arrival]], Awaitable[list[Receipt | None]]]


class _InterruptedError(Exception):
    """There is no budget for the next call, or the worker stops: nothing was learnt."""


@dataclass(slots=True)
class _Found:
    """What was found so far: generations by id; *copies* has what the API itself showed of some of them.

    *ended* are the ids of those that are known to have ended, *pending* counts those that have not, or of which the
    API told nothing. *problems* are sentences about what could not be read.
    """

    generations: dict[str, Generation] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    pending: int = 0
    errors: int = 0
    unread: int = 0
    has_results: bool = False
    retry_after: timedelta | None = None
    sources: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class BatchLook:
    """A look at the batch *claimed*; *acquire* waits until one call may be made, and returns False to end.

    *list_wait_seconds* is how long a failed page of the list waits.
    """

    claimed: Claimed
    policy: Policy
    database: Database
    open_api: Callable[[], AbstractAsyncContextManager[SyncApi]]
    reader: ResultsReader
    acquire: Callable[[], Awaitable[bool]]
    now: Callable[[], datetime]
    list_wait_seconds: float = WAIT_SECONDS

    async def resolve(self, adopt: Adopt) -> Resolution | None:
        """Find the generations of the batch and *adopt* those that have ended and have no record.

        None: the look was interrupted, so that it says nothing. What was adopted until then stays.

        Raises: LedgerUnavailableError.
        """
        found = _Found()
        try:
            async with self.open_api() as api:
                await self._read_results(api, found)
                if self._tally(found).missing or found.unread or found.errors:
                    await self._read_list(api, found)
                known = await self._find_known(found)
                await self._adopt_ended(adopt, found, known)
                await self._ask_for_others(api, adopt, found, known)
        except _InterruptedError:
            return None
        return await self._conclude(found)

    async def _read_results(self, api: SyncApi, found: _Found) -> None:
        """Read the results by the webhook's URL; if that fails, by the one that the API now gives."""
        results = Results(failure="the webhook has no outputUrl")
        if self.claimed.output_url is not None:
            results = await self._fetch(self.claimed.output_url)
        if results.failure is not None:
            answer = await self._call(lambda: api.get_batch(self.claimed.key.id), found)
            url = answer.location or read_output_url(answer.body or "")
            if answer.verdict is Verdict.DONE and url is not None:
                again = await self._fetch(url)
                results = again if again.failure is None or not results.lines else results
        for generation, is_ended in results.generations.values():
            found.generations[generation.id] = generation
            if is_ended:
                found.ended.add(generation.id)
        found.errors, found.unread = results.errors, results.unread
        found.has_results = results.failure is None
        if results.failure is not None:
            found.problems.append(results.failure)
        if results.unread:
            found.problems.append(f"{results.unread} lines of the results cannot be read")
        if results.lines:
            found.sources.append("results")

    async def _fetch(self, url: str) -> Results:
        if not await self.acquire():
            raise _InterruptedError
        return await self.reader.read(url)

    async def _read_list(self, api: SyncApi, found: _Found) -> None:
        """Add what the API lists in the time of the batch with exactly its webhookUrl."""
        created_at, webhook_url = self.claimed.created_at, self.claimed.webhook_url
        if created_at is None or webhook_url is None:
            found.problems.append("the webhook has no created_at or no webhookUrl, so the list was not searched")
            return
        window = _Window(created_at - _MARGIN, self.claimed.sent_at + _MARGIN, webhook_url)
        listing = await list_generations(
            api,
            acquire=self.acquire,
            wanted=window.contains,
            begin=window.begin,
            is_enough=window.is_passed,
            wait_seconds=self.list_wait_seconds,
        )
        if listing.failure is not None:
            found.unread += found.errors  # the list could have had their generations
            await self._note_answer(listing.answer, found)
            found.problems.append(f"the list could not be read: {listing.failure}")
            return
        new = [item for item in listing.items if item.generation.id not in found.ended]
        # What the list has beside the results may be what a line could not be read for, or had an error alone for.
        beside = sum(item.generation.id not in found.generations for item in new)
        found.errors, beside = max(0, found.errors - beside), max(0, beside - found.errors)
        found.unread = max(0, found.unread - beside)
        for item in new:
            found.generations[item.generation.id] = item.generation
            if item.generation.is_terminal:
                found.ended.add(item.generation.id)
                found.copies[item.generation.id] = item.body
        if listing.items:
            found.sources.append("list")

    async def _find_known(self, found: _Found) -> Mapping[str, adopting.Known]:
        ids = [*found.generations]
        return await self.database.read(partial(adopting.find_known, account=self.claimed.key.account, ids=ids))

    async def _adopt_ended(self, adopt: Adopt, found: _Found, known: Mapping[str, adopting.Known]) -> None:
        """Adopt what has ended, and let an override count for what the policy alone has decided about before."""
        keys = [Key(self.claimed.key.account, one) for one in known]
        await self.database.write(partial(inherit_requirements, batch=self.claimed.key, keys=keys))
        theirs = [self._arrival(found, one) for one in found.generations if one in known or one in found.ended]
        arrivals = [one for one in theirs if one.key.id not in known or _is_overridden(one, known[one.key.id])]
        for start in range(0, len(arrivals), _ADOPT_AT_ONCE):
            await self._adopt(arrivals[start : start + _ADOPT_AT_ONCE], adopt, found)

    async def _adopt(self, arrivals: Sequence[Arrival], adopt: Adopt, found: _Found) -> None:
        try:
            await adopt(arrivals)
        except RefusedDataError as error:
            if len(arrivals) > 1:
                for arrival in arrivals:
                    await self._adopt([arrival], adopt, found)
                return
            found.pending += 1
            found.problems.append(f"generation {arrivals[0].key.id}: {error}")

    async def _ask_for_others(self, api: SyncApi, adopt: Adopt, found: _Found, known: Mapping[str, object]) -> None:
        """Ask the API about the generations that are not known to have ended; adopt those that have."""
        for one in [one for one in found.generations if one not in found.ended and one not in known]:
            answer = await self._call(partial(api.get, one), found)
            if answer.verdict is Verdict.DONE and answer.generation is not None and answer.body is not None:
                found.generations[one], found.copies[one] = answer.generation, answer.body
                await self._adopt([self._arrival(found, one)], adopt, found)
            elif answer.verdict is Verdict.GONE:
                found.gone.add(one)
            else:
                found.pending += 1
                found.problems.append(f"generation {one}: {answer.error}")

    async def _call(self, call: Callable[[], Awaitable[Answer]], found: _Found) -> Answer:
        if not await self.acquire():
            raise _InterruptedError
        answer = await call()
        await self._note_answer(answer, found)
        return answer

    async def _note_answer(self, answer: Answer | None, found: _Found) -> None:
        """Let deletions wait, too, when the API asks for it."""
        if answer is None:
            return
        found.retry_after = answer.retry_after or found.retry_after
        if answer.throttle is not None:
            throttle = partial(pausing.throttle, wait=answer.throttle, account=self.claimed.key.account, actor=ACTOR)
            await self.database.write(partial(throttle, now=self.now()))

    def _arrival(self, found: _Found, generation_id: str) -> Arrival:
        """Return the arrival of a generation that has ended, with its retention.

        The signed webhook of the batch decides; no signature covers the generation's own webhookUrl, and the URL of the
        batch's request.
        """
        account, generation, now = self.claimed.key.account, found.generations[generation_id], self.now()
        copy = found.copies.get(generation_id)
        is_same = self.claimed.webhook_url == generation.webhook_url
        decide = partial(
            decide_retention,
            self.policy,
            read_facts(self.policy.rules, account, generation, is_complete=copy is not None),
            webhook_url=self.claimed.webhook_url,
            sent_at=self.claimed.sent_at,
            now=now,
        )
        own = decide(request_url=None if is_same else generation.webhook_url, request_place="its own webhookUrl")
        retention = keep_longer(own, decide(request_url=url_of_request(self.claimed.request_query or "")))
        key, sent_at = Key(account, generation_id), min(self.claimed.sent_at, now)
        return Arrival(
            key, generation, copy or "", retention, now, sent_at, is_adopted=True, is_partial=copy is None, actor=ACTOR
        )

    async def _conclude(self, found: _Found) -> Resolution:
        recorded = len(await self._find_known(found))
        tally = self._tally(found)
        if tally.missing:
            number = tally.missing if self.claimed.expected is not None else "an unknown number"
            found.problems.append(f"of {number} generations nothing was found")
        error = "; ".join(found.problems[:_SHOWN])[:_LONGEST] or None
        if len(found.problems) > _SHOWN:
            error = f"{error}; and {len(found.problems) - _SHOWN} more"
        wait = None
        if tally.unresolved:
            jitter = random.random()  # noqa: S311 - only spreads load
            wait = backoff(self.claimed.tries, retry_after=found.retry_after, jitter=jitter)
        state = BatchState.UNRESOLVED if tally.unresolved else BatchState.RESOLVED
        source = "+".join(found.sources) or "none"
        return Resolution(state, recorded, found.errors, tally.unresolved, source, error, wait)

    def _tally(self, found: _Found) -> Tally:
        return Tally(
            self.claimed.expected, len(found.generations), found.errors, found.unread, found.pending, found.has_results
        )


def _is_overridden(arrival: Arrival, known: adopting.Known) -> bool:
    return is_decided_by_policy(known.rule) and not is_decided_by_policy(arrival.retention.rule)


_SHOWN: Final = 3
_LONGEST: Final = 1000


@dataclass(slots=True)
class _Window:
    """The generations that were created between *begin_at* and *end_at*, with exactly this webhookUrl."""

    begin_at: datetime
    end_at: datetime
    webhook_url: str
    oldest: datetime | None = None

    def begin(self) -> None:
        """The list begins anew."""
        self.oldest = None

    def contains(self, generation: Generation) -> bool:
        """Whether *generation* belongs to the batch, as far as one can tell; note how old it is."""
        created_at = read_created_at(generation.created_at)
        if created_at is None:
            return False
        self.oldest = created_at
        is_theirs = generation.webhook_url == self.webhook_url and not generation.is_batch
        return is_theirs and self.begin_at <= created_at <= self.end_at

    def is_passed(self) -> bool:
        """Whether what follows in the list is older than the batch."""
        return self.oldest is not None and self.oldest < self.begin_at
