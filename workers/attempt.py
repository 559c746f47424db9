"""One attempt at a claimed record: look at the generation, keep a copy, delete it, write down how it went.

The order is the promise. Nothing reaches the DELETE but a copy that is committed, under a lease that still holds.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

import msgspec
import structlog

from service.core.attempts import Step, Verdict, after_attempt
from service.core.generation import Generation
from service.core.key import Key
from service.core.lifecycle import Move
from service.core.retention import Retention, reconsider_retention
from service.ledger.claiming import Claim
from service.ledger.database import LedgerUnavailableError
from service.ledger.settling import Copy, CopyResult, Settlement
from service.runtime.metrics import Metrics
from service.sync.answers import Answer
from service.sync.client import DELETE_SECONDS, GET_SECONDS, SyncApi

log = structlog.get_logger()

T = TypeVar("T")

# A DELETE that might still be under way when the lease ends would meet its successor.
_DELETE_MARGIN = timedelta(seconds=DELETE_SECONDS + 1)
_ATTEMPT_MARGIN = _DELETE_MARGIN + timedelta(seconds=GET_SECONDS)
DRY_RUN_AGAIN = timedelta(hours=1)
# A commit that meets a locked or absent ledger is tried again for as long as the lease holds.
_COMMIT_AGAIN_SECONDS = 1.0
# Copies that are durable and not followed by a DELETE, with what is said of it.
_NOT_DELETED = {CopyResult.LIMITED: "MAYFLY_MAX_DELETES_PER_DAY is reached", CopyResult.PAUSED: "deletions were paused"}


@dataclass(frozen=True, slots=True)
class Cleaner:
    """What an attempt takes: the API, the two commits (grouped with those of other records), the clock and the limits.

    *enqueue_next(key, attempt, at)* enqueues the job of the next attempt once this one is put off; it raises nothing.
    """

    api: SyncApi
    copy: Callable[[Copy], Awaitable[CopyResult]]
    settle: Callable[[Settlement], Awaitable[bool]]
    enqueue_next: Callable[[Key, int, datetime], Awaitable[None]]
    # For one call: waits for a place at the API, and tells whether it has one by the instant given.
    call_slot: Callable[[datetime], AbstractAsyncContextManager[bool]]
    now: Callable[[], datetime]
    give_up_after: timedelta
    is_dry_run: bool
    metrics: Metrics

    async def clean(self, claim: Claim) -> Verdict | None:
        """Make one attempt at a claimed record and return what ended it; None when the lease was lost on the way.

        Raises nothing: a ledger that is away leaves the record to the next attempt, once the lease ends.
        """
        try:
            return await self._attempt(claim)
        except LedgerUnavailableError as error:
            log.warning(
                "cleanup.interrupted",
                **_log_fields(claim),
                error=str(error),
                what_now="tried again after its lease",
            )
        except Exception:
            # A fault of ours in this one record must not take the others along.
            log.exception("cleanup.crashed", **_log_fields(claim))
            await self._settle_crash(claim)
        return None

    async def _attempt(self, claim: Claim) -> Verdict | None:
        async with self.call_slot(claim.lease_until - _ATTEMPT_MARGIN) as is_in_time:
            found = await self.api.get(claim.key.id) if is_in_time else None
        if found is None:
            return await self._give_back(claim, "the worker that had it could not begin in time")
        if found.verdict is not Verdict.DONE or found.generation is None or found.body is None:
            return await self._settle_answer(claim, found, "GET")
        if (later := self._reconsider(claim, found.generation)) is not None:
            return await self._apply_override(claim, later)
        copied = Copy(claim, found.generation, found.body)
        return await self._delete_if_allowed(claim, await self._commit(claim, lambda: self.copy(copied)))

    def _reconsider(self, claim: Claim, generation: Generation) -> Retention | None:
        return reconsider_retention(
            rule=claim.rule, due_at=claim.due_at, ttl=claim.ttl, webhook_url=generation.webhook_url
        )

    async def _apply_override(self, claim: Claim, later: Retention) -> Verdict | None:
        """Put off, hold or keep a generation whose wish the API shows and the webhook did not."""
        step = Step(Move.DEFER, claim.progress, retry_at=later.due_at or self.now())
        if not await self._settle(Settlement(claim, Verdict.DONE, step, is_key_good=True, retention=later)):
            return self._log_lost_lease(claim)
        log.info("cleanup.spared", **_log_fields(claim), rule=later.rule, what_now="it is kept as its wish says")
        return Verdict.DONE

    async def _delete_if_allowed(self, claim: Claim, copied: CopyResult) -> Verdict | None:
        """Delete what is copied, unless the lease, the day's limit or the dry run is against it."""
        if copied is CopyResult.LOST:
            return self._log_lost_lease(claim)
        if copied in _NOT_DELETED:
            return await self._give_back(claim, _NOT_DELETED[copied])
        if self.is_dry_run:
            return await self._settle_dry_run(claim)
        return await self._delete(claim)

    async def _delete(self, claim: Claim) -> Verdict | None:
        """Send the DELETE, now that the copy is durable, if the lease is still long enough for it."""
        async with self.call_slot(claim.lease_until - _DELETE_MARGIN) as is_in_time:
            deleted = await self.api.delete(claim.key.id) if is_in_time else None
        if deleted is None:
            return await self._give_back(claim, "the worker that had it was too slow to delete", is_refund=True)
        return await self._settle_answer(claim, deleted, "DELETE")

    async def _settle_answer(self, claim: Claim, answer: Answer, method: str) -> Verdict | None:
        """Write down what the answer that ended the attempt leads to."""
        now = self.now()
        step = after_attempt(
            answer.verdict,
            claim.progress,
            now=now,
            give_up_after=self.give_up_after,
            retry_after=answer.retry_after,
            jitter=random.random(),  # noqa: S311 - spreads retries, protects nothing
        )
        receipt = _receipt_json(method, answer, now) if step.move is Move.CONFIRM else None
        settlement = Settlement(
            claim,
            answer.verdict,
            step,
            receipt,
            error=None if receipt else answer.error,
            is_refund=method == "DELETE" and answer.is_undeleted,
            is_key_good=answer.is_key_good,
            throttle=answer.throttle,
        )
        if not await self._settle(settlement):
            return self._log_lost_lease(claim)
        self.metrics.attempts.labels(answer.verdict).inc()
        _log_end(claim, answer, step)
        return answer.verdict

    async def _settle_dry_run(self, claim: Claim) -> Verdict | None:
        step = Step(Move.DEFER, claim.progress, retry_at=self.now() + DRY_RUN_AGAIN)
        error = "dry run: it would have been deleted"
        if not await self._settle(Settlement(claim, Verdict.DONE, step, error=error, is_key_good=True)):
            return self._log_lost_lease(claim)
        log.info("cleanup.rehearsed", **_log_fields(claim), what_now="nothing is deleted while MAYFLY_DRY_RUN is on")
        return Verdict.DONE

    async def _give_back(self, claim: Claim, error: str, *, is_refund: bool = False) -> Verdict | None:
        """Put a record back to where it was before the claim; its failures stay as they were."""
        step = Step(Move.DEFER, claim.progress, retry_at=self.now())
        if not await self._settle(Settlement(claim, Verdict.RETRY, step, error=error, is_refund=is_refund)):
            return self._log_lost_lease(claim)
        log.warning("cleanup.given_back", **_log_fields(claim), error=error)
        return None

    async def _settle(self, settlement: Settlement) -> bool:
        """Commit how the attempt ended, then enqueue the next one if there is to be one."""
        claim = settlement.claim
        is_mine = await self._commit(claim, lambda: self.settle(settlement))
        if is_mine and (at := _next_attempt_at(settlement)) is not None:
            await self.enqueue_next(claim.key, claim.attempt + 1, at)
        return is_mine

    async def _commit(self, claim: Claim, write: Callable[[], Awaitable[T]]) -> T:
        """Commit, again while the ledger is away and the lease holds: nobody else has what the API said.

        Raises: LedgerUnavailableError once the lease is over.
        """
        while True:
            try:
                return await write()
            except LedgerUnavailableError as error:
                if self.now() + timedelta(seconds=_COMMIT_AGAIN_SECONDS) >= claim.lease_until:
                    raise
                log.warning(
                    "cleanup.waits", **_log_fields(claim), error=str(error), what_now="committed once it can be"
                )
                await asyncio.sleep(_COMMIT_AGAIN_SECONDS)

    async def _settle_crash(self, claim: Claim) -> None:
        fault = Answer(Verdict.REFUSED, error="a fault of Mayfly's own; its log tells more")
        try:
            await self._settle_answer(claim, fault, "none")
        except Exception:  # the lease ends by itself
            log.exception("cleanup.crashed_again", **_log_fields(claim))

    def _log_lost_lease(self, claim: Claim) -> Verdict | None:
        log.warning("cleanup.lease_lost", **_log_fields(claim), what_now="whoever claimed it next decides")
        return None


def _next_attempt_at(settlement: Settlement) -> datetime | None:
    later = settlement.retention
    is_stopped = later is not None and (later.due_at is None or later.hold_reason is not None)
    return None if is_stopped else settlement.step.retry_at


def _receipt_json(method: str, answer: Answer, now: datetime) -> str:
    """Keep the answer that proves the deletion: which call, when, what the API said, word for word."""
    receipt = {"method": method, "status": answer.status, "at": now, "body": answer.body}
    return msgspec.json.encode(receipt).decode()


def _log_end(claim: Claim, answer: Answer, step: Step) -> None:
    names = _log_fields(claim) | {"verdict": answer.verdict, "status": answer.status}
    if step.move is Move.CONFIRM:
        log.info("cleanup.confirmed", **names, outcome=step.outcome)
    elif answer.verdict is Verdict.UNAUTHORIZED:
        what_now = "all deletions wait; one record a minute tries whether the key works again: check SYNC_API_KEY"
        log.error("deletions.paused", **names, error=answer.error, what_now=what_now)
    elif step.move is Move.GIVE_UP:
        what_now = "nothing more is tried until an operator retries it"
        log.error("cleanup.given_up", **names, error=answer.error, what_now=what_now)
    else:
        log.info(
            "cleanup.deferred",
            **names,
            error=answer.error,
            retry_at=step.retry_at and step.retry_at.isoformat(),
        )


def _log_fields(claim: Claim) -> dict[str, object]:
    return {"account": claim.key.account, "generation": claim.key.id, "attempt": claim.attempt}
