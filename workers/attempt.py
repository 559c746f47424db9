"""One attempt at a claimed record: GET the generation, commit a copy, DELETE it, commit the outcome.

The order is a promise: a DELETE is sent only after the copy is committed, and only while the lease is valid.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TypeVar

import msgspec
import structlog

from service.core.attempts import Step, Verdict, after_attempt, describe_unknown_id
from service.core.generation import Generation
from service.core.key import Key
from service.core.lifecycle import Move
from service.core.retention import Policy, Retention
from service.ledger.claiming import DRY_RUN, Claim
from service.ledger.database import LedgerUnavailableError
from service.ledger.outcomes import Copy, CopyResult, Settled, Settlement
from service.runtime.metrics import Metrics
from service.sync.answers import Answer
from service.sync.client import DELETE_SECONDS, GET_SECONDS, SyncApi
from workers.deciding import decide_again
from workers.key_proof import KeyProof

log = structlog.get_logger()

T = TypeVar("T")

# A DELETE must not be in progress when the lease ends and another attempt may start.
_DELETE_MARGIN = timedelta(seconds=DELETE_SECONDS + 1)
_ATTEMPT_MARGIN = _DELETE_MARGIN + timedelta(seconds=GET_SECONDS)
DRY_RUN_AGAIN = timedelta(hours=1)
# A commit that fails because the ledger is locked or unreachable is retried while the lease is valid.
_COMMIT_AGAIN_SECONDS = 1.0
# Results of a copy that no DELETE follows, with the record's last_error.
_NOT_DELETED = {CopyResult.LIMITED: "MAYFLY_MAX_DELETES_PER_DAY is reached", CopyResult.PAUSED: "deletions were paused"}

# What mayfly_settlements_total calls a step that confirms nothing.
_RESULTS = {Move.DEFER: "deferred", Move.GIVE_UP: "failed"}


@dataclass(frozen=True, slots=True)
class Cleaner:
    """The dependencies of an attempt: the API, two group commits, the clock and the limits.

    *enqueue_next(key, attempt, at)* enqueues the job of the next attempt after a deferral; it raises nothing.
    """

    api: SyncApi
    copy: Callable[[Copy], Awaitable[CopyResult]]
    settle: Callable[[Settlement], Awaitable[Settled]]
    enqueue_next: Callable[[Key, int, datetime], Awaitable[None]]
    # Waits for a place for one call to the API; yields False if there is none by the given instant.
    call_slot: Callable[[datetime], AbstractAsyncContextManager[bool]]
    now: Callable[[], datetime]
    give_up_after: timedelta
    policy: Policy
    is_dry_run: bool
    metrics: Metrics
    key_proof: KeyProof
    key_name: str  # the variable that has the key

    async def clean(self, claim: Claim) -> Verdict | None:
        """Make one attempt at a claimed record and return the verdict that ended it; None if there was none.

        Raises nothing. If the ledger does not answer, the lease ends and another attempt follows.
        """
        try:
            return await self._attempt(claim)
        except LedgerUnavailableError as error:
            log.warning(
                "cleanup.interrupted",
                **_log_fields(claim),
                error=str(error),
                what_now="retried when the lease has ended",
            )
        except Exception:
            # An internal error with one record must not stop the others.
            log.exception("cleanup.crashed", **_log_fields(claim))
            await self._settle_crash(claim)
        return None

    async def _attempt(self, claim: Claim) -> Verdict | None:
        async with self.call_slot(claim.lease_until - _ATTEMPT_MARGIN) as is_in_time:
            found = await self.api.get(claim.key.id) if is_in_time else None
        if found is None:
            return await self._give_back(claim, "its worker could not start in time")
        if found.verdict is not Verdict.DONE or found.generation is None or found.body is None:
            return await self._settle_answer(claim, found, "GET")
        if (later := decide_again(self.policy, claim, found.generation, now=self.now())) is not None:
            return await self._apply_retention(claim, later, found.generation)
        copied = Copy(claim, found.generation, found.body, is_rehearsal=self.is_dry_run)
        return await self._delete_if_allowed(claim, await self._commit(claim, lambda: self.copy(copied)))

    async def _apply_retention(self, claim: Claim, later: Retention, generation: Generation) -> Verdict | None:
        """Defer, hold or keep a generation because of what the API shows and the webhook did not have."""
        status = None if claim.has_ended else generation.status
        step = Step(Move.DEFER, claim.progress, retry_at=later.due_at or self.now())
        settlement = Settlement(
            claim, Verdict.DONE, step, is_key_good=True, is_shown=True, retention=later, status=status
        )
        if not await self._settle(settlement, "overridden"):
            return None
        log.info(
            "cleanup.overridden",
            **_log_fields(claim),
            rule=later.rule,
            what_now="kept as its webhookUrl or the policy says",
        )
        if (invalid := later.invalid) is not None:
            names = {"generation": claim.key.id, "name": invalid.name, "value_length": invalid.value_length}
            log.warning("webhook.override_invalid", **names, what_now="held until an operator releases it")
        return Verdict.DONE

    async def _delete_if_allowed(self, claim: Claim, copied: CopyResult) -> Verdict | None:
        """Delete the copied generation, unless the lease, the daily limit, a pause or the dry run forbids it."""
        if copied is CopyResult.LOST:
            return self._log_lost_lease(claim)
        if copied in _NOT_DELETED:
            return await self._give_back(claim, _NOT_DELETED[copied])
        if self.is_dry_run:
            return await self._settle_dry_run(claim)
        return await self._delete(claim)

    async def _delete(self, claim: Claim) -> Verdict | None:
        """Send the DELETE if the rest of the lease is long enough; the copy is committed."""
        async with self.call_slot(claim.lease_until - _DELETE_MARGIN) as is_in_time:
            deleted = await self.api.delete(claim.key.id) if is_in_time else None
        if deleted is None:
            return await self._give_back(claim, "its worker was too slow to delete", is_refund=True)
        return await self._settle_answer(claim, deleted, "DELETE")

    async def _settle_answer(self, claim: Claim, answer: Answer, method: str) -> Verdict | None:
        """Commit what follows from the answer that ended the attempt."""
        if answer.is_key_doubtful:
            is_in_budget = method == "GET"  # the call of the DELETE is left
            answer = await self.key_proof.explain(answer, until=claim.lease_until, is_in_budget=is_in_budget)
        now = self.now()
        step = after_attempt(
            answer.verdict,
            claim.progress,
            now=now,
            give_up_after=self.give_up_after,
            retry_after=answer.retry_after,
            jitter=random.random(),  # noqa: S311 - spreads retries, protects nothing
            has_unanswered_delete=claim.has_unanswered_delete,
            unseen_since=claim.unseen_since,
        )
        if claim.unseen_since is not None and answer.verdict is Verdict.GONE and step.move is Move.GIVE_UP:
            answer = replace(answer, error=describe_unknown_id(claim.key.account))
        receipt = _receipt_json(method, answer, now, step.detail) if step.move is Move.CONFIRM else None
        settlement = Settlement(
            claim,
            answer.verdict,
            step,
            receipt,
            error=None if receipt else answer.error,
            is_refund=method == "DELETE" and answer.is_undeleted,
            is_key_good=answer.is_key_good,
            is_shown=method == "DELETE" or answer.generation is not None,
            throttle=answer.throttle,
            status=None if claim.has_ended or answer.generation is None else answer.generation.status,
        )
        if not await self._settle(settlement, step.outcome or _RESULTS[step.move]):
            return None
        self.metrics.attempts.labels(answer.verdict).inc()
        if step.move is Move.CONFIRM:
            self.metrics.deletion_lag_seconds.observe((now - claim.due_at).total_seconds())
        _log_end(claim, answer, step, self.key_name)
        return answer.verdict

    async def _settle_dry_run(self, claim: Claim) -> Verdict | None:
        step = Step(Move.DEFER, claim.progress, retry_at=self.now() + DRY_RUN_AGAIN)
        settlement = Settlement(claim, Verdict.DONE, step, error=DRY_RUN, is_key_good=True, is_shown=True)
        if not await self._settle(settlement, "rehearsed"):
            return None
        log.info("cleanup.simulated", **_log_fields(claim), what_now="nothing is deleted while MAYFLY_DRY_RUN is on")
        return Verdict.DONE

    async def _give_back(self, claim: Claim, error: str, *, is_refund: bool = False) -> Verdict | None:
        """Schedule the record again as before the claim, without counting a failure."""
        step = Step(Move.DEFER, claim.progress, retry_at=self.now())
        settlement = Settlement(claim, Verdict.RETRY, step, error=error, is_refund=is_refund)
        if not await self._settle(settlement, "returned"):
            return None
        log.warning("cleanup.returned", **_log_fields(claim), error=error, what_now="retried at once")
        return None

    async def _settle(self, settlement: Settlement, result: str) -> bool:
        """Commit the outcome of the attempt, then enqueue the next attempt if there is one.

        Return False if something else than *result* became of it, which is logged.
        """
        claim = settlement.claim
        settled = await self._commit(claim, lambda: self.settle(settlement))
        if settled is Settled.LOST:
            self._log_lost_lease(claim)
        elif settled is Settled.DOUBTED:
            self.metrics.settlements.labels("doubted").inc()
            what_now = f"kept as scheduled; deletions are paused: check {self.key_name} with mayfly doctor"
            log.error("cleanup.doubted", **_log_fields(claim), error="the key knows no generation", what_now=what_now)
        else:
            self.metrics.settlements.labels(result).inc()
            if (at := _next_attempt_at(settlement)) is not None:
                await self.enqueue_next(claim.key, claim.attempt + 1, at)
        return settled in {Settled.SETTLED, Settled.ALREADY}

    async def _commit(self, claim: Claim, write: Callable[[], Awaitable[T]]) -> T:
        """Commit, and retry while the ledger does not answer and the lease is valid: only this attempt has the answer.

        Raises: LedgerUnavailableError when the lease is over.
        """
        while True:
            try:
                return await write()
            except LedgerUnavailableError as error:
                if self.now() + timedelta(seconds=_COMMIT_AGAIN_SECONDS) >= claim.lease_until:
                    raise
                log.warning("cleanup.not_committed", **_log_fields(claim), error=str(error), what_now="retrying")
                await asyncio.sleep(_COMMIT_AGAIN_SECONDS)

    async def _settle_crash(self, claim: Claim) -> None:
        fault = Answer(Verdict.REFUSED, error="an internal error; see Mayfly's log")
        try:
            await self._settle_answer(claim, fault, "none")
        except Exception:  # the record is retried when its lease has ended
            log.exception("cleanup.crashed_again", **_log_fields(claim))

    def _log_lost_lease(self, claim: Claim) -> Verdict | None:
        self.metrics.settlements.labels("lease_lost").inc()
        log.warning("cleanup.lease_lost", **_log_fields(claim), what_now="the next claim decides")
        return None


def _next_attempt_at(settlement: Settlement) -> datetime | None:
    later = settlement.retention
    is_stopped = later is not None and (later.due_at is None or later.hold_reason is not None)
    return None if is_stopped else settlement.step.retry_at


def _receipt_json(method: str, answer: Answer, now: datetime, detail: str | None) -> str:
    """Return the receipt of a deletion as JSON: the call, the time, and the API's answer unchanged."""
    receipt: dict[str, object] = {"method": method, "status": answer.status, "at": now, "body": answer.body}
    if detail:
        receipt["detail"] = detail
    return msgspec.json.encode(receipt).decode()


def _log_end(claim: Claim, answer: Answer, step: Step, key_name: str) -> None:
    names = _log_fields(claim) | {"verdict": answer.verdict, "status": answer.status}
    if step.move is Move.CONFIRM:
        log.info("cleanup.confirmed", **names, outcome=step.outcome)
    elif answer.verdict is Verdict.UNAUTHORIZED:
        what_now = f"deletions are paused; one record a minute tests the key: check {key_name}"
        log.error("deletions.paused", **names, error=answer.error, what_now=what_now)
    elif step.move is Move.GIVE_UP:
        what_now = "no further attempt until an operator retries the record"
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
