"""Receiving a webhook: verify it, store it, answer after the commit, enqueue its job in the background."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial

import msgspec
import structlog

from service.config.accounts import Account
from service.core.batch import is_finished_batch, read_batch
from service.core.forwarding import Target, choose_targets
from service.core.generation import RUNNING, Generation, MalformedError, read_generation
from service.core.key import Key
from service.core.lifecycle import State
from service.core.overrides import url_of_request
from service.core.retention import Policy, decide_retention
from service.core.rules import read_facts
from service.core.signature import SignatureError, check_form, verify
from service.jobs.enqueue import BatchJob, CleanupJob, CopyJob, ForwardJob, Job
from service.ledger.batches import BatchArrival
from service.ledger.database import (
    Database,
    LedgerUnavailableError,
    RefusedDataError,
    RowLockedError,
    UnknownOutcomeError,
)
from service.ledger.deliveries import Forwarding
from service.ledger.group_commit import GroupCommit
from service.ledger.receiving import Arrival, Receipt
from service.ledger.taking import Taken, Webhook, take
from service.runtime.metrics import Metrics

log = structlog.get_logger()


class Answer(msgspec.Struct, rename="camel", frozen=True, gc=False, omit_defaults=True):
    """The 202 of a webhook: *state* is the record's, ``batch`` for a finished batch, else ``ignored``."""

    id: str
    state: str
    due_at: datetime | None = None


class _Came(msgspec.Struct, frozen=True, gc=False):
    """A verified webhook, and how it came."""

    key: Key
    generation: Generation
    body: bytes
    header: str  # its signature
    content_type: str
    query: str
    sent_at: datetime
    now: datetime


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
        targets: Sequence[Target] = (),
        now: Callable[[], datetime],
        metrics: Metrics,
        note_commit: Callable[..., None],  # of readiness: has_failed=
    ) -> None:
        self._database = database
        self._enqueue = enqueue
        self._secrets = {account.id: _secrets(account) for account in accounts}
        self._tolerance = tolerance
        self._policy = policy
        self._targets = targets
        self._now = now
        self._metrics = metrics
        self._note_commit = note_commit
        self._stored = metrics.webhooks.labels("stored")
        self._known = metrics.webhooks.labels("known")
        self._group: GroupCommit[Webhook, Receipt | None] = GroupCommit(self._commit)

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

    async def accept(
        self, account: str, header: str, body: bytes, *, query: str = "", content_type: str = ""
    ) -> Answer:
        """Verify, read and store one webhook; *query* is that of its request, which no signature covers.

        *content_type* is passed on to the targets as it came.

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
        came = _Came(Key(account, generation.id), generation, body, header, content_type, query, sent_at, now)
        try:
            return await self._store(came)
        except Exception as error:
            self._note_not_stored(error, account=account, generation=generation.id)
            raise

    async def _store(self, came: "_Came") -> Answer:
        """Store what the webhook brings: a record, a batch whose generations a worker finds, or deliveries alone."""
        webhook = self._read(came)
        receipt = None if webhook == Webhook() else await self._group.submit(webhook)
        if webhook.batch is not None:
            self._metrics.webhooks.labels("batch").inc()
            return Answer(came.key.id, "batch")
        if receipt is None:
            self._count_ignored(came.generation)
            return Answer(came.key.id, "ignored")
        if receipt.is_conflict:
            self._metrics.conflicts.inc()
            log.warning("webhook.conflicted", generation=came.key.id, what_now="the first body is kept")
        return Answer(came.key.id, receipt.state, receipt.due_at)

    def _read(self, came: "_Came") -> Webhook:
        """Decide what is stored."""
        key, generation = came.key, came.generation
        is_batch = is_finished_batch(generation)
        is_final = is_batch or (generation.is_terminal and not generation.is_batch)
        forwarding = None
        if targets := choose_targets(self._targets, key.account, generation):
            form = (came.body, came.content_type, came.header)
            forwarding = Forwarding(key, generation.status, *form, came.now, targets, is_final)
        if not is_final:
            return Webhook(forwarding=forwarding)
        sent_at, body = min(came.sent_at, came.now), came.body.decode()
        if is_batch:
            batch = BatchArrival(key, read_batch(generation, came.body), body, came.now, sent_at, came.query)
            return Webhook(batch=batch, forwarding=forwarding)
        retention = decide_retention(
            self._policy,
            read_facts(self._policy.rules, key.account, generation, is_complete=False),
            webhook_url=generation.webhook_url,
            request_url=url_of_request(came.query),
            sent_at=came.sent_at,
            now=came.now,
        )
        arrival = Arrival(key, generation, body, retention, received_at=came.now, sent_at=sent_at)
        return Webhook(arrival=arrival, forwarding=forwarding)

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

    def _count_ignored(self, generation: Generation) -> None:
        self._metrics.webhooks.labels("ignored").inc()
        if not generation.is_batch and generation.status not in RUNNING:
            self._metrics.statuses_unknown.inc()
            names = {"generation": generation.id, "status": ascii(generation.status)[1:-1]}
            log.warning("webhook.status_unknown", **names, what_now="the webhook is ignored, nothing is deleted")

    async def _commit(self, webhooks: Sequence[Webhook]) -> Sequence[Receipt | None]:
        taken = await self._write(webhooks)
        pairs = [
            (webhook.arrival, receipt)
            for webhook, receipt in zip(webhooks, taken.receipts, strict=True)
            if webhook.arrival is not None and receipt is not None
        ]
        new = sum([receipt.is_new for _, receipt in pairs])
        self._stored.inc(new)
        self._known.inc(len(pairs) - new)
        if pairs:
            self._metrics.receive_seconds.observe((self._now() - pairs[0][0].received_at).total_seconds())
        found = [one.batch for one, is_new in zip(webhooks, taken.are_new_batches, strict=True) if one.batch and is_new]
        self._enqueue(
            [
                *(ForwardJob(one.target, one.id, 1, one.received_at) for one in taken.deliveries),
                *_jobs_to_enqueue(pairs),
                *(BatchJob(batch.key, batch.received_at) for batch in found),
            ]
        )
        for arrival, receipt in pairs:
            _log_receipt(arrival, receipt)
        for batch in found:
            what_now = "its generations are looked for"
            log.info("batch.stored", batch=batch.key.id, expected=batch.batch.total, what_now=what_now)
        return taken.receipts

    async def _write(self, webhooks: Sequence[Webhook]) -> Taken:
        """Commit *webhooks*, and let readiness know whether that worked."""
        try:
            taken = await self._database.write(partial(take, webhooks=webhooks))
        except RowLockedError:
            raise  # the ledger itself works
        except LedgerUnavailableError:
            self._note_commit(has_failed=True)
            raise
        self._note_commit(has_failed=False)
        return taken


def _log_receipt(arrival: Arrival, receipt: Receipt) -> None:
    """Log a new record, and an invalid override that changed a record; a repeated webhook logs nothing."""
    generation, invalid = arrival.key.id, arrival.retention.invalid
    if receipt.is_new:
        due_at = None if receipt.due_at is None else receipt.due_at.isoformat()
        log.info("webhook.stored", generation=generation, due_at=due_at, state=str(receipt.state))
    if receipt.is_moved and invalid is not None:
        names = {"generation": generation, "name": invalid.name, "value_length": invalid.value_length}
        log.warning("webhook.override_invalid", **names, what_now="held until an operator releases it")


def _jobs_to_enqueue(pairs: Sequence[tuple[Arrival, Receipt]]) -> list[Job]:
    """Return the early looks of new records, and the jobs of the scheduled ones that are new or changed."""
    looks: list[Job] = [CopyJob(arrival.key, arrival.received_at) for arrival, receipt in pairs if receipt.is_new]
    return looks + [
        CleanupJob(arrival.key, receipt.attempts + 1, receipt.due_at)
        for arrival, receipt in pairs
        if receipt.is_moved and receipt.state is State.SCHEDULED and receipt.due_at is not None
    ]
