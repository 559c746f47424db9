"""Receiving: verify the webhook, store what it announces, answer, enqueue later. The answer comes after the commit."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial

import msgspec
import structlog

from service.generation import RUNNING, Generation, Key, read
from service.grouping import Done, GroupCommit
from service.ledger import receiving
from service.ledger.database import Database
from service.ledger.receiving import Arrival, Receipt
from service.retention import Policy, decide
from service.signature import SignatureError, check_form, verify
from service.tasks import settle
from service.telemetry import Metrics

log = structlog.get_logger()

MAX_BODY_BYTES = 1024 * 1024
# What a body may always take while it arrives, which is more than a webhook has; and what all may take beyond that.
FREE_BODY_BYTES = 32 * 1024
MAX_UNREAD_BYTES = 32 * 1024 * 1024


class BodyError(Exception):
    """A body that cannot be taken: *status* 413 too large, 415 no JSON, 400 broken off, 503 too many at once."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Answer(msgspec.Struct, rename="camel", frozen=True, gc=False, omit_defaults=True):
    """The 202 of a webhook: *state* is its record's, or ``ignored`` for one that leads to no deletion."""

    id: str
    state: str
    due_at: datetime | None = None


class Intake:
    """Takes webhooks for one account: each one is durable before it is answered."""

    def __init__(
        self,
        *,
        database: Database,
        enqueue: Callable[[Sequence[Receipt], Sequence[Arrival]], None],
        secrets: Sequence[bytes],
        tolerance: timedelta,
        policy: Policy,
        now: Callable[[], datetime],
        metrics: Metrics,
    ) -> None:
        self._database = database
        self._enqueue = enqueue
        self._secrets = secrets
        self._tolerance = tolerance
        self._policy = policy
        self._now = now
        self._metrics = metrics
        self._stored = metrics.webhooks.labels("stored")
        self._known = metrics.webhooks.labels("known")
        self._group: GroupCommit[Arrival, Receipt] = GroupCommit(self._commit)

    def check_form(self, header: str) -> None:
        """Return if *header* could sign a body that is still to come.

        Raises: SignatureError.
        """
        try:
            check_form(header, now=self._now(), tolerance=self._tolerance)
        except SignatureError as error:
            self._metrics.signatures_refused.labels(error.reason).inc()
            raise

    async def accept(self, account: str, header: str, body: bytes) -> Answer:
        """Prove, read and store one webhook.

        Raises: SignatureError, MalformedError, LedgerUnavailableError; nothing is stored then.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.take(account, header, body, partial(settle, future))
        return await future

    def take(self, account: str, header: str, body: bytes, done: Done[Answer]) -> None:
        """Have *done* called with what accept() would return or raise, once the webhook is stored.

        Raises: SignatureError, MalformedError; *done* is not called then.
        """
        now = self._now()
        try:
            sent_at = verify(header, body, secrets=self._secrets, now=now, tolerance=self._tolerance)
        except SignatureError as error:
            self._metrics.signatures_refused.labels(error.reason).inc()
            raise
        generation = read(body)
        if generation.is_batch or not generation.is_terminal:
            self._note_ignored(generation)
            done(Answer(generation.id, "ignored"))
            return
        retention = decide(self._policy, webhook_url=generation.webhook_url, sent_at=sent_at, now=now)
        arrival = Arrival(Key(account, generation.id), generation, body.decode(), retention, now)
        self._group.add(arrival, partial(self._finish, generation.id, done))

    def _finish(self, generation: str, done: Done[Answer], receipt: Receipt | Exception) -> None:
        if isinstance(receipt, Exception):
            done(receipt)
            return
        if receipt.is_conflict:
            self._metrics.conflicts.inc()
            log.warning("webhook.conflicted", generation=generation, what_now="the first announcement is kept")
        done(Answer(generation, receipt.state, receipt.due_at))

    def _note_ignored(self, generation: Generation) -> None:
        self._metrics.webhooks.labels("batch" if generation.is_batch else "ignored").inc()
        if not generation.is_batch and generation.status not in RUNNING:
            self._metrics.statuses_unknown.inc()
            names = {"generation": generation.id, "status": ascii(generation.status)[1:-1]}
            log.warning("webhook.status_unknown", **names, what_now="it is ignored, nothing is deleted")

    async def _commit(self, arrivals: Sequence[Arrival]) -> Sequence[Receipt]:
        receipts = await self._database.write(partial(receiving.receive, arrivals=arrivals))
        new = sum([receipt.is_new for receipt in receipts])
        self._stored.inc(new)
        self._known.inc(len(receipts) - new)
        self._metrics.receive_seconds.observe((self._now() - arrivals[0].received_at).total_seconds())
        self._enqueue(receipts, arrivals)
        return receipts
