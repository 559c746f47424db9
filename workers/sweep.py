"""The sweep: it lists the generations of an account at the API and adopts those that no webhook told of.

Nothing is deleted here. What is adopted is kept for its whole ttl from then on. An adopted record is never adopted
again, so a sweep that was killed at any point is simply made again.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final

import structlog
from arq.cron import CronJob, cron

from service.core.adopting import Fit, Scope, decide_adopted_retention
from service.core.generation import Generation
from service.core.holding import Hold
from service.core.key import Key
from service.core.lifecycle import State
from service.core.retention import Policy, Retention
from service.jobs.connection import QUEUE_ERRORS
from service.jobs.enqueue import CleanupJob
from service.ledger import adopting, pausing
from service.ledger.adopting import Known
from service.ledger.database import Database, LedgerUnavailableError, RefusedDataError
from service.ledger.inserting import Arrival, Receipt
from service.runtime.metrics import Metrics
from service.runtime.tasks import cancel_and_wait
from service.sync.client import SyncApi
from service.sync.listing import Listed, Listing, list_generations

log = structlog.get_logger()

ACTOR: Final = "sweep"
# One transaction; webhooks wait for it on SQLite.
_ADOPT_AT_ONCE: Final = 200
_NEXT_TIME: Final = "tried again by the next sweep, within the hour"


@dataclass(slots=True)
class Found:
    """What a complete or failed *listing* has: how many generations *fits* how, and which of those that fit are known.

    *unknown* are those without a record, *held* the reasons of holds that were made before there is one.
    """

    listing: Listing
    fits: Counter[Fit] = field(default_factory=Counter)
    known: Mapping[str, Known] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)
    unknown: Sequence[Listed] = ()


@dataclass(frozen=True, kw_only=True)
class Sweeper:
    """Lists and adopts the generations of one account that are in *scope*.

    *acquire* waits until one call may be made, and returns False to end.
    """

    scope: Scope
    policy: Policy
    database: Database
    open_api: Callable[[], AbstractAsyncContextManager[SyncApi]]
    acquire: Callable[[], Awaitable[bool]]
    now: Callable[[], datetime]
    metrics: Metrics
    actor: str = ACTOR

    async def find(self, progress: Callable[[Listing], None] = lambda _listing: None) -> Found:
        """List everything, then look up what the ledger knows. Nothing is changed.

        Raises: LedgerUnavailableError. A list that is not complete is in the result.
        """
        fits: Counter[Fit] = Counter()

        def is_wanted(generation: Generation) -> bool:
            fit = self.scope.find_fit(generation)
            fits[fit] += 1
            return fit is Fit.FITS

        async with self.open_api() as api:
            listing = await list_generations(
                api, acquire=self.acquire, wanted=is_wanted, begin=fits.clear, progress=progress
            )
        if listing.failure is not None:
            return Found(listing, fits)
        ids = [item.generation.id for item in listing.items]
        known, held = await self.database.read(
            lambda connection: (
                adopting.find_known(connection, self.scope.account, ids),
                adopting.find_held(connection, self.scope.account, ids),
            )
        )
        unknown = [item for item in listing.items if item.generation.id not in known]
        return Found(listing, fits, known, held, unknown)

    def decide(self, generation: Generation, *, now: datetime) -> Retention:
        """Decide how long a generation is kept that is adopted *now*."""
        return decide_adopted_retention(self.policy, self.scope, generation, now=now)

    async def adopt(
        self, items: Sequence[Listed], *, holds: Mapping[str, str] | None = None, stopping: asyncio.Event | None = None
    ) -> "Adopted":
        """Adopt those of *items* without a record, in small transactions; *holds* has reasons to hold some, by id.

        Raises: LedgerUnavailableError, with what was adopted before committed.
        """
        adopted = Adopted()
        for start in range(0, len(items), _ADOPT_AT_ONCE):
            if stopping is not None and stopping.is_set():
                break
            await self._adopt_some(items[start : start + _ADOPT_AT_ONCE], holds or {}, adopted)
        return adopted

    async def _adopt_some(self, items: Sequence[Listed], holds: Mapping[str, str], adopted: "Adopted") -> None:
        arrivals = [self._arrival(item, holds.get(item.generation.id)) for item in items]
        try:
            receipts = await self.database.write(partial(adopting.adopt, arrivals=arrivals))
        except RefusedDataError:
            if len(items) > 1:
                for item in items:
                    await self._adopt_some([item], holds, adopted)
                return
            adopted.refused += 1
            what_now = "it is not adopted, and stays at sync.so"
            log.warning("sweep.refused", generation=items[0].generation.id, what_now=what_now)
            return
        for arrival, receipt in zip(arrivals, receipts, strict=True):
            adopted.add(arrival, receipt)
        self.metrics.sweep_adopted.inc(sum(receipt is not None for receipt in receipts))

    def _arrival(self, item: Listed, hold: str | None) -> Arrival:
        now = self.now()
        retention = self.decide(item.generation, now=now)
        return Arrival(
            Key(self.scope.account, item.generation.id),
            item.generation,
            item.body,
            retention,
            received_at=now,
            sent_at=now,
            is_adopted=True,
            actor=self.actor,
            hold=None if hold is None else Hold(self.actor, hold, None),
        )


@dataclass(slots=True)
class Adopted:
    """What was adopted: how many in each state, the first due time, and the attempts at those that are scheduled."""

    states: Counter[State] = field(default_factory=Counter)
    first_due_at: datetime | None = None
    known: int = 0  # a webhook, or another sweep, was first
    refused: int = 0  # by the database
    jobs: list[CleanupJob] = field(default_factory=list)

    def add(self, arrival: Arrival, receipt: Receipt | None) -> None:
        """Count one."""
        if receipt is None:
            self.known += 1
            return
        self.states[receipt.state] += 1
        if receipt.state is State.SCHEDULED and receipt.due_at is not None:
            self.first_due_at = min(receipt.due_at, self.first_due_at or receipt.due_at)
            self.jobs.append(CleanupJob(arrival.key, receipt.attempts + 1, receipt.due_at))


class Sweep:
    """The sweeps of one account in a worker; *enqueue* enqueues the jobs of what is due soon."""

    def __init__(
        self,
        sweeper: Sweeper,
        *,
        enqueue: Callable[[Sequence[CleanupJob]], Awaitable[object]],
        stopping: asyncio.Event,
    ) -> None:
        self._sweeper = sweeper
        self._account = sweeper.scope.account
        self._enqueue = enqueue
        self._stopping = stopping
        self._running: asyncio.Task[None] | None = None

    def cron_job(self, *, minute: int) -> CronJob:
        """Return arq's cron job: at the start of a worker, then at *minute* of each hour, in one of the workers."""
        # Its name has the account: arq's ids of jobs are the same for all queues. It only begins the sweep: arq blocks
        # the id of every job of a killed worker for the longest timeout of all functions, and a sweep takes minutes.
        return cron(self._begin_job, name=f"sweep:{self._account}", minute=minute, run_at_startup=True)

    async def _begin_job(self, ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - arq's signature
        self.begin()

    def begin(self) -> None:
        """Begin a sweep, unless one is in progress or the worker stops."""
        if self._stopping.is_set() or (self._running is not None and not self._running.done()):
            return
        self._running = asyncio.create_task(self._run())

    async def wait(self) -> None:
        """Wait until no sweep is in progress; after *stopping* that is soon."""
        if self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        """Sweep once. Raises nothing: whatever fails, the next sweep adopts the rest."""
        try:
            if await self._may_begin():
                await self._sweep()
        except LedgerUnavailableError as error:
            self._note_failure(str(error))
        except Exception:  # the worker must survive every error
            self._sweeper.metrics.loops_failed.labels("sweep").inc()
            log.exception("sweep.crashed", account=self._account, what_now=_NEXT_TIME)

    async def _may_begin(self) -> bool:
        now, database = self._sweeper.now(), self._sweeper.database
        if not await database.write(partial(adopting.take_turn, account=self._account, now=now)):
            return False  # another worker's sweep
        closing = await database.read(partial(pausing.find_closing, account=self._account, now=now))
        if closing is not None:
            log.warning("sweep.skipped", account=self._account, error=closing.reason, what_now=_NEXT_TIME)
        return closing is None

    async def _sweep(self) -> None:
        begun = time.monotonic()
        found = await self._find()
        if found is None:
            return
        listing = found.listing
        self._sweeper.metrics.sweep_unreadable.inc(listing.unreadable)
        if listing.unreadable:
            what_now = "they are not adopted, and stay at sync.so"
            log.warning(
                "sweep.unreadable",
                account=self._account,
                items=listing.unreadable,
                such_as=listing.oddities[:3],
                what_now=what_now,
            )
        if listing.failure is not None:
            await self._note_throttle(listing)
            self._note_failure(listing.failure, read=listing.read)
            return
        adopted = await self._sweeper.adopt(found.unknown, stopping=self._stopping)
        await self._enqueue_jobs(adopted.jobs)
        if self._stopping.is_set():
            return
        complete = partial(adopting.note_complete, account=self._account, now=self._sweeper.now())
        await self._sweeper.database.write(complete)
        counts = {fit.value: found.fits[fit] for fit in Fit if fit is not Fit.FITS and found.fits[fit]}
        log.info(
            "sweep.completed",
            account=self._account,
            read=listing.read,
            adopted=sum(adopted.states.values()),
            known=len(found.known) + adopted.known,
            **counts,
            seconds=round(time.monotonic() - begun, 1),
        )

    async def _find(self) -> Found | None:
        """List, and let go of it at a stop; then return None."""
        finding = asyncio.create_task(self._sweeper.find())
        waiting = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([finding, waiting], return_when=asyncio.FIRST_COMPLETED)
            return finding.result() if finding.done() else None
        finally:
            await cancel_and_wait([finding, waiting])

    async def _note_throttle(self, listing: Listing) -> None:
        """Let deletions wait, too, when the API asks for it."""
        if listing.answer is None or listing.answer.throttle is None:
            return
        throttle = partial(pausing.throttle, wait=listing.answer.throttle, account=self._account, actor=ACTOR)
        await self._sweeper.database.write(partial(throttle, now=self._sweeper.now()))

    async def _enqueue_jobs(self, jobs: Sequence[CleanupJob]) -> None:
        try:
            await self._enqueue(jobs)
        except QUEUE_ERRORS:
            self._sweeper.metrics.enqueue_failures.inc(len(jobs))  # the safety net finds them when they are due

    def _note_failure(self, error: str, **counts: int) -> None:
        self._sweeper.metrics.loops_failed.labels("sweep").inc()
        log.warning("sweep.failed", account=self._account, error=error, **counts, what_now=_NEXT_TIME)
