"""Receiving a webhook: verify it, store it, answer after the commit, enqueue its job in the background."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

import msgspec
import structlog
from sqlalchemy import Connection

from service.config.accounts import Account
from service.core.batch import is_finished_batch, read_batch
from service.core.generation import RUNNING, Generation, MalformedError, read_generation
from service.core.key import Key
from service.core.lifecycle import State
from service.core.overrides import url_of_request
from service.core.retention import Policy, decide_retention
from service.core.rules import read_facts
from service.core.signature import SignatureError, check_form, verify
from service.jobs.enqueue import BatchJob, CleanupJob, CopyJob, Job
from service.ledger import batches, receiving
from service.ledger.batches import BatchArrival
from service.ledger.database import (
    Database,
    LedgerUnavailableError,
    RefusedDataError,
    RowLockedError,
    UnknownOutcomeError,
)
from service.ledger.group_commit import GroupCommit
from service.ledger.receiving import Arrival, Receipt
from service.runtime.metrics import Metrics

log = structlog.get_logger()

T = TypeVar("T")


class Answer(msgspec.Struct, rename="camel", frozen=True, gc=False, omit_defaults=True):
    """The 202 of a webhook: *state* is the record's, ``batch`` for a finished batch, else ``ignored``."""

    id: str
    state: str
    due_at: datetime | None = None


def _secrets(account: Account) -> tuple[bytes, ...]:
    return tuple(secret.reveal().encode() for secret in account.keys.webhook_secrets)


class Intake:
    """Stores webhooks; each one is committed before it is answered."""

    def __init__(
        self,
        *,
        database: Database,
        enqueue: Callable[[Sequence[Job]], None],
        accounts: Sequence[Account],
        tolerance: timedelta,
        policy: Policy,
        now: Callable[[], datetime],
        metrics: Metrics,
        note_commit: Callable[..., None],  # of readiness: has_failed=
    ) -> None:
        self._database = database
        self._enqueue = enqueue
        self._secrets = {account.id: _secrets(account) for account in accounts}
        self._tolerance = tolerance
        self._policy = policy
        self._now = now
        self._metrics = metrics
        self._note_commit = note_commit
        self._stored = metrics.webhooks.labels("stored")
        self._known = metrics.webhooks.labels("known")
        self._group: GroupCommit[Arrival, Receipt] = GroupCommit(self._commit)

    def knows(self, account: str) -> bool:
        """Whether *account* is configured."""
        return account in self._secrets

    def check_form(self, header: str) -> None:
        """Return if *header* could be a signature, before the body has been read.

        Raises: SignatureError.
        """
        try:
            check_form(header, now=self._now(), tolerance=self._tolerance)
        except SignatureError as error:
            self._metrics.signatures_refused.labels(error.reason).inc()
            raise

    async def accept(self, account: str, header: str, body: bytes, *, query: str = "") -> Answer:
        """Verify, read and store one webhook; *query* is that of its request, which no signature covers.

        Raises: KeyError for an unknown *account*; SignatureError, MalformedError, RefusedDataError,
        LedgerUnavailableError. Nothing is stored then, unless it is an UnknownOutcomeError.
        """
        now = self._now()
        secrets = self._secrets[account]
        try:
            sent_at = verify(header, body, secrets=secrets, now=now, tolerance=self._tolerance)
        except SignatureError as error:
            self._metrics.signatures_refused.labels(error.reason).inc()
            raise
        try:
            generation = read_generation(body)
        except MalformedError as error:
            self._note_not_stored(error, account=account)
            raise
        is_batch = is_finished_batch(generation)
        if not is_batch and (generation.is_batch or not generation.is_terminal):
            self._count_ignored(generation)
            return Answer(generation.id, "ignored")
        try:
            if is_batch:
                return await self._store_batch(account, generation, body, query, sent_at=sent_at, now=now)
            return await self._store(account, generation, body, query, sent_at=sent_at, now=now)
        except Exception as error:
            self._note_not_stored(error, account=account, generation=generation.id)
            raise

    def _note_not_stored(self, error: Exception, **names: str) -> None:
        """Count and log each one: it is verified, so it comes from sync.so, which does not send it again by itself."""
        what_now = "it is not stored, nothing is deleted; send it again"
        match error:
            case UnknownOutcomeError():
                what_now = "it may be stored or not; send it again, that makes no second record"
                answer, reason = "unavailable", str(error)
            case LedgerUnavailableError():
                answer, reason = "unavailable", str(error)
            case MalformedError() | RefusedDataError():
                answer, reason = "malformed", str(error)
            case _:
                answer, reason = "crashed", type(error).__name__
        self._metrics.webhooks.labels(answer).inc()
        log.error("webhook.not_stored", **names, reason=reason, is_verified=True, what_now=what_now)

    async def _store(
        self, account: str, generation: Generation, body: bytes, query: str, *, sent_at: datetime, now: datetime
    ) -> Answer:
        retention = decide_retention(
            self._policy,
            read_facts(self._policy.rules, account, generation, is_complete=False),
            webhook_url=generation.webhook_url,
            request_url=url_of_request(query),
            sent_at=sent_at,
            now=now,
        )
        arrival = Arrival(
            Key(account, generation.id),
            generation,
            body.decode(),
            retention,
            received_at=now,
            sent_at=min(sent_at, now),
        )
        receipt = await self._group.submit(arrival)
        if receipt.is_conflict:
            self._metrics.conflicts.inc()
            log.warning("webhook.conflicted", generation=generation.id, what_now="the first body is kept")
        return Answer(generation.id, receipt.state, receipt.due_at)

    async def _store_batch(
        self, account: str, notification: Generation, body: bytes, query: str, *, sent_at: datetime, now: datetime
    ) -> Answer:
        """Store a finished batch; a worker finds its generations. Its own write: batches are rare."""
        key = Key(account, notification.id)
        arrival = BatchArrival(key, read_batch(notification, body), body.decode(), now, min(sent_at, now), query)
        _, is_new = await self._write(partial(batches.receive_batch, arrival=arrival))
        self._metrics.webhooks.labels("batch").inc()
        if is_new:
            self._enqueue([BatchJob(key, now)])
            what_now = "its generations are looked for"
            log.info("batch.stored", batch=key.id, expected=arrival.batch.total, what_now=what_now)
        return Answer(key.id, "batch")

    def _count_ignored(self, generation: Generation) -> None:
        self._metrics.webhooks.labels("ignored").inc()
        if not generation.is_batch and generation.status not in RUNNING:
            self._metrics.statuses_unknown.inc()
            names = {"generation": generation.id, "status": ascii(generation.status)[1:-1]}
            log.warning("webhook.status_unknown", **names, what_now="the webhook is ignored, nothing is deleted")

    async def _write(self, function: Callable[[Connection], T]) -> T:
        """Commit what *function* writes, and let readiness know whether that worked."""
        try:
            written = await self._database.write(function)
        except RowLockedError:
            raise  # the ledger itself works
        except LedgerUnavailableError:
            self._note_commit(has_failed=True)
            raise
        self._note_commit(has_failed=False)
        return written

    async def _commit(self, arrivals: Sequence[Arrival]) -> Sequence[Receipt]:
        receipts = await self._write(partial(receiving.receive, arrivals=arrivals))
        new = sum([receipt.is_new for receipt in receipts])
        self._stored.inc(new)
        self._known.inc(len(receipts) - new)
        self._metrics.receive_seconds.observe((self._now() - arrivals[0].received_at).total_seconds())
        self._enqueue(_jobs_to_enqueue(arrivals, receipts))
        for arrival, receipt in zip(arrivals, receipts, strict=True):
            _log_receipt(arrival, receipt)
        return receipts


def _log_receipt(arrival: Arrival, receipt: Receipt) -> None:
    """Log a new record, and an invalid override that changed a record; a repeated webhook logs nothing."""
    generation, invalid = arrival.key.id, arrival.retention.invalid
    if receipt.is_new:
        due_at = None if receipt.due_at is None else receipt.due_at.isoformat()
        log.info("webhook.stored", generation=generation, due_at=due_at, state=str(receipt.state))
    if receipt.is_moved and invalid is not None:
        names = {"generation": generation, "name": invalid.name, "value_length": invalid.value_length}
        log.warning("webhook.override_invalid", **names, what_now="held until an operator releases it")


def _jobs_to_enqueue(arrivals: Sequence[Arrival], receipts: Sequence[Receipt]) -> list[Job]:
    """Return the early looks of new records, and the jobs of the scheduled ones that are new or changed."""
    pairs = list(zip(arrivals, receipts, strict=True))
    looks: list[Job] = [CopyJob(arrival.key, arrival.received_at) for arrival, receipt in pairs if receipt.is_new]
    return looks + [
        CleanupJob(arrival.key, receipt.attempts + 1, receipt.due_at)
        for arrival, receipt in pairs
        if receipt.is_moved and receipt.state is State.SCHEDULED and receipt.due_at is not None
    ]
