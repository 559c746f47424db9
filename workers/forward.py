"""The arq job ``forward``: one attempt to bring one webhook to its target.

Each target has a queue and an arq worker of its own: one that is slow or away delays no other, and no deletion.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import structlog

from service.core.circuit import Circuit
from service.core.forwarding import DeliveryState, Reply, Target, describe_reply, judge_reply
from service.forwarding.posting import Outgoing
from service.jobs.enqueue import Job
from service.ledger.database import LedgerUnavailableError
from service.ledger.delivering import ClaimedDelivery, Due, Ended
from service.runtime.metrics import Metrics
from workers.cleanup import Attempts

log = structlog.get_logger()

# How many get a job in one round of the net.
AT_ONCE: Final = 200
# How long a target must have been away, as this worker sees it, before what has waited for days is given up: after a
# time without a worker it is tried first.
AWAY: Final = timedelta(hours=1)
# What is due for so long while no attempt is made has a job that does not start: arq blocks the id of a job whose
# worker was killed before its claim, for as long as a job may take.
_STUCK: Final = timedelta(seconds=10)
_SETTLE_AGAIN_SECONDS: Final = 1.0
# Below these the target itself works: what it says is about this one webhook, or about how it is set up.
_TOO_LATE: Final = 408
_TOO_MANY: Final = 429
_SERVER_ERRORS: Final = 500


async def forward(ctx: dict[str, Any], delivery: str, attempt: int) -> None:
    """Make attempt number *attempt*, from 1, at the *delivery* of that id, if it is due.

    A duplicate or stale job does nothing. What is not done now, the net enqueues again.
    """
    forwards: Forwards = ctx["forwards"]
    await forwards.run(delivery, attempt)


class DeliveryCalls(Protocol):
    """The ledger's calls about the deliveries of one target. Each may raise LedgerUnavailableError."""

    async def claim(self, due: Due) -> ClaimedDelivery | None:
        """Claim a delivery that is due."""

    async def settle(self, ended: Ended) -> Sequence[Job]:
        """Commit what an attempt led to, and return the jobs that follow."""

    async def find_due(self, late: timedelta, limit: int) -> Sequence[Due]:
        """Return up to *limit* deliveries that have been due for longer than *late*."""

    async def give_up(self) -> None:
        """End what has waited for days."""


class Forwards:
    """The attempts at deliveries to one target; *enqueue* enqueues jobs in the background."""

    def __init__(
        self,
        target: Target,
        *,
        ledger: DeliveryCalls,
        post: Callable[[Outgoing], Awaitable[Reply]],
        enqueue: Callable[[Sequence[Job]], None],
        now: Callable[[], datetime],
        metrics: Metrics,
        stopping: asyncio.Event,
    ) -> None:
        self.target = target
        self._ledger = ledger
        self._post = post
        self._enqueue = enqueue
        self._now = now
        self._metrics = metrics
        self._stopping = stopping
        self._circuit = Circuit()
        self.attempts = Attempts(self._attempt, limit=target.concurrency)
        metrics.forward_circuit.labels(target.id).set(0)

    async def find_due(self, late: timedelta, limit: int) -> Sequence[Due]:
        """Return what the net enqueues; while the target does not answer, one delivery each half a minute."""
        if self._circuit.is_open_for(AWAY, self._now()):
            await self._ledger.give_up()
        if not self._circuit.allows(self._now()):
            return ()
        return await self._ledger.find_due(late, 1 if self._circuit.is_open else limit)

    async def run(self, delivery: str, attempt: int) -> None:
        """See forward(). Raises nothing."""
        if (task := await self._begin(Due(self.target.id, delivery, attempt))) is not None:
            await asyncio.shield(task)

    async def run_without_queue(self, due: Sequence[Due]) -> None:
        """Begin the first attempts of those that are *due*, as many as there is room for, without jobs."""
        await asyncio.gather(*(self._begin(one) for one in due[: self.attempts.room]))

    async def take_over(self) -> None:
        """Begin attempts whose jobs do not start."""
        if self.attempts.running == 0 and self._circuit.allows(self._now()):
            await self.run_without_queue(await self._ledger.find_due(_STUCK, self.target.concurrency))

    async def _begin(self, due: Due) -> asyncio.Task[object] | None:
        if self._stopping.is_set() or not self._circuit.begin(self._now()):
            return None
        claimed = None
        try:
            claimed = await self._ledger.claim(due)
        except LedgerUnavailableError as error:
            what_now = "the worker tries again within seconds"
            log.warning("forward.not_started", delivery=due.id, error=str(error), what_now=what_now)
        if claimed is None:
            self._circuit.cancel(self._now())
            return None
        return self.attempts.begin(claimed)

    async def _attempt(self, claimed: ClaimedDelivery) -> None:
        outgoing = Outgoing(claimed.id, claimed.attempt, claimed.body, claimed.content_type, claimed.signature)
        reply = await self._post(outgoing)
        self._note_reply(reply)
        jitter = random.random()  # noqa: S311 - only spreads load
        ended = Ended(claimed, reply, judge_reply(reply, attempts=claimed.tries, jitter=jitter))
        self._note_outcome(ended)
        self._enqueue(await self._commit(ended))

    async def _commit(self, ended: Ended) -> Sequence[Job]:
        """Commit what an attempt led to, and again until its lease ends; then another attempt is made."""
        deadline = self._now() + lease_of(self.target) - self.target.timeout
        while True:
            try:
                return await self._ledger.settle(ended)
            except LedgerUnavailableError as error:
                is_over = self._stopping.is_set() or self._now() >= deadline
                what_now = "the target may get it again, with the same Mayfly-Delivery" if is_over else "trying again"
                names = {"delivery": ended.claimed.id, "target": self.target.id}
                log.warning("forward.not_stored", **names, error=str(error), what_now=what_now)
                if is_over:
                    return ()
            await asyncio.sleep(_SETTLE_AGAIN_SECONDS)

    def _note_reply(self, reply: Reply) -> None:
        """Open or close the circuit."""
        target, gauge = self.target.id, self._metrics.forward_circuit.labels(self.target.id)
        is_away = reply.status is None or reply.status in (_TOO_LATE, _TOO_MANY) or reply.status >= _SERVER_ERRORS
        if not is_away:
            if self._circuit.note_success():
                gauge.set(0)
                log.info("target.answers", target=target, what_now="what waits is sent")
        elif self._circuit.note_failure(self._now()):
            gauge.set(1)
            what_now = "one webhook is tried each half a minute; nothing is lost, and no other target waits"
            log.error("target.away", target=target, error=describe_reply(reply), what_now=what_now)

    def _note_outcome(self, ended: Ended) -> None:
        claimed, outcome = ended.claimed, ended.outcome
        self._metrics.forwards.labels(self.target.id, outcome.label).inc()
        names = {
            "generation": claimed.key.id,
            "target": self.target.id,
            "delivery": claimed.id,
            "attempt": claimed.attempt,
        }
        if outcome.state is DeliveryState.DELIVERED:
            seconds = (self._now() - claimed.received_at).total_seconds()
            self._metrics.forward_seconds.labels(self.target.id).observe(max(0.0, seconds))
            log.info("forward.delivered", **names)
        elif outcome.wait is not None:
            wait = round(outcome.wait.total_seconds(), 1)
            log.warning("forward.deferred", **names, error=outcome.error, what_now=f"again in {wait} s")
        else:
            what_now = f"not sent again, unless you say: mayfly forwards replay {claimed.id}"
            log.error("forward.failed", **names, error=outcome.error, what_now=what_now)


def lease_of(target: Target) -> timedelta:
    """Return the lease of an attempt: its timeout, and time for two commits and the start of the answer's body."""
    return target.timeout + timedelta(seconds=30)
