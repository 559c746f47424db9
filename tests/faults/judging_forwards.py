"""The verdict on what was forwarded: compares what came in and what the apps received (invariants I9 to I12)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import standardwebhooks

from service.core.forwarding import MAX_ATTEMPTS
from tests.faults.databases import DeliveryRow
from tests.support.app import App, Received
from tests.support.webhooks import SECRET, signature

FINAL_STATUSES = frozenset({"COMPLETED", "FAILED", "REJECTED"})
_GONE = 410
_SIGNATURE = re.compile(r"t=([0-9]+),v1=[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Told:
    """One webhook as it was sent, and whether a 202 came; instants are seconds since 1970."""

    id: str
    status: str
    body: bytes
    signature: str
    sent_at: float
    answered_at: float
    is_accepted: bool

    @property
    def is_final(self) -> bool:
        """Whether its generation had ended."""
        return self.status in FINAL_STATUSES

    def __str__(self) -> str:
        return f"the {self.status} webhook of {self.id}, accepted at {_clock(self.answered_at)}"


@dataclass(frozen=True, slots=True)
class Deletion:
    """A DELETE that reached the API *at* that instant; its record's copy was committed after *copied_at*."""

    id: str
    at: float
    copied_at: float


@dataclass(slots=True)
class Inbox:
    """A target and the app behind it; it wants webhooks with those *statuses*, or all."""

    target: str
    app: App
    signing: str
    statuses: frozenset[str] | None = None
    is_required: bool = False
    forged: list[str] = field(default_factory=list)
    _verified: int = 0

    def wants(self, one: Told) -> bool:
        """Whether the target gets it."""
        return self.statuses is None or one.status in self.statuses

    def verify_new(self) -> None:
        """Verify what has come since the last time: the signature of an attempt is good for five minutes alone."""
        requests = self.app.requests
        for received in requests[self._verified :]:
            try:
                verify(received, signing=self.signing)
            except (AssertionError, standardwebhooks.WebhookVerificationError) as error:
                self.forged.append(f"I11 {_name(self, received)} is not what was signed: {error!r}")
        self._verified = len(requests)


@dataclass(slots=True)
class Findings:
    """What the judge found about targets, one sentence each; nothing is good."""

    unasked: list[str] = field(default_factory=list)  # I9
    undelivered: list[str] = field(default_factory=list)  # I10
    changed: list[str] = field(default_factory=list)  # I11
    disordered: list[str] = field(default_factory=list)  # I12

    @property
    def all(self) -> list[str]:
        """Every breach."""
        return [*self.unasked, *self.undelivered, *self.changed, *self.disordered]


def verify(received: Received, *, signing: str) -> None:
    """Verify as the documentation of sync.so says, however late, and as the library of Standard Webhooks does.

    Raises: AssertionError, standardwebhooks.WebhookVerificationError.
    """
    header = received.header("sync-signature") or ""
    match = _SIGNATURE.fullmatch(header)
    assert match is not None, f"Sync-Signature {header!r}"
    assert header == signature(received.body, secret=SECRET, at=float(match[1])), "Sync-Signature of another body"
    standardwebhooks.Webhook(signing).verify(received.body, dict(received.headers))
    assert received.header("webhook-id") == received.delivery, "webhook-id is not Mayfly-Delivery"
    assert received.header("content-type") == "application/json", "another content type"


def judge_forwards(
    *, told: Sequence[Told], inboxes: Sequence[Inbox], rows: Sequence[DeliveryRow], deletions: Sequence[Deletion]
) -> Findings:
    """Judge a run after it was drained: webhooks as they were *told*, and what the apps behind *inboxes* received."""
    findings = Findings()
    for inbox in inboxes:
        inbox.verify_new()
        wanted = [one for one in told if inbox.wants(one)]
        mine = [row for row in rows if row.target == inbox.target]
        accepted, taken = _find_accepted(wanted), _find_taken(inbox.app.requests)
        if inbox.is_required:
            findings.unasked += _find_unasked(inbox, accepted.values(), taken, deletions)
        findings.undelivered += _judge_rows(inbox, accepted.values(), taken, mine)
        findings.changed += [*inbox.forged, *_judge_requests(inbox, wanted), *_find_uninvited(inbox, wanted, mine)]
        findings.disordered += _find_disordered(inbox, wanted, accepted, taken)
    return findings


def _find_accepted(wanted: Iterable[Told]) -> dict[bytes, Told]:
    """Return, by body, the sending whose 202 came first."""
    accepted: dict[bytes, Told] = {}
    for one in wanted:
        if one.is_accepted and (one.body not in accepted or one.answered_at < accepted[one.body].answered_at):
            accepted[one.body] = one
    return accepted


def _find_taken(requests: Iterable[Received]) -> dict[bytes, float]:
    """Return, by body, when the app began to answer 2xx for the first time."""
    taken: dict[bytes, float] = {}
    for one in requests:
        if one.begun is not None and 200 <= one.begun < 300 and one.begun_at is not None:
            taken[one.body] = min(one.begun_at, taken.get(one.body, one.begun_at))
    return taken


def _find_unasked(
    inbox: Inbox, accepted: Iterable[Told], taken: Mapping[bytes, float], deletions: Iterable[Deletion]
) -> list[str]:
    """Find DELETEs before the app had what counts for them: the webhooks whose 202 came before the record's copy.

    The copy is the border by design: a webhook that comes later can stop the DELETE no more.
    """
    of_id: dict[str, list[Told]] = {}
    for one in accepted:
        if one.is_final:
            of_id.setdefault(one.id, []).append(one)
    found = []
    for deletion in deletions:
        for one in of_id.get(deletion.id, ()):
            at = taken.get(one.body)
            if one.answered_at < deletion.copied_at and (at is None or at > deletion.at):
                when = "never has" if at is None else f"did so at {_clock(at)}"
                copied = f"copied at {_clock(deletion.copied_at)}"
                found.append(
                    f"I9 DELETE at {_clock(deletion.at)}, {copied}, before {inbox.target} answered 2xx to {one}: "
                    f"it {when}"
                )
    return found


def _judge_rows(
    inbox: Inbox, accepted: Iterable[Told], taken: Mapping[bytes, float], mine: Sequence[DeliveryRow]
) -> list[str]:
    of_body: dict[bytes, list[DeliveryRow]] = {}
    for row in mine:
        of_body.setdefault(row.body, []).append(row)
    found = []
    for one in accepted:
        rows = of_body.get(one.body, [])
        if len(rows) != 1:
            found.append(f"I10 {one}, has {len(rows)} deliveries to {inbox.target}")
        if one.body not in taken and not any(row.state == "failed" for row in rows):
            found.append(f"I10 {inbox.target} never answered 2xx to {one}, and nothing is listed as failed")
    for row in mine:
        name = f"delivery {row.id} of {row.generation} to {row.target}"
        if row.state == "waiting":
            found.append(f"I10 {name} still waits after {row.attempts} attempts: {row.last_error}")
        if row.state == "delivered" and row.body not in taken:
            found.append(f"I10 {name} is called delivered, and the app never answered 2xx")
    return found


def _judge_requests(inbox: Inbox, wanted: Sequence[Told]) -> list[str]:
    """Check each request: it has a body and signature that were sent, and a Mayfly-Delivery that is its webhook's."""
    signatures: dict[bytes, set[str]] = {}
    for one in wanted:
        signatures.setdefault(one.body, set()).add(one.signature)
    sent_as: dict[str | None, tuple[bytes, str | None]] = {}
    names: dict[bytes, str | None] = {}
    attempts: set[tuple[str | None, int]] = set()
    found = []
    for request in inbox.app.requests:
        name, signed = _name(inbox, request), request.header("sync-signature")
        if request.body not in signatures:
            found.append(f"I11 {name} has a body that nobody sent for this target")
        elif signed not in signatures[request.body]:
            found.append(f"I11 {name} has a Sync-Signature that did not come with its body")
        if sent_as.setdefault(request.delivery, (request.body, signed)) != (request.body, signed):
            found.append(f"I11 {name} differs from an earlier attempt, or is another webhook")
        if names.setdefault(request.body, request.delivery) != request.delivery:
            found.append(f"I11 {name} has another Mayfly-Delivery than before: {names[request.body]}")
        if request.attempt < 1 or (request.delivery, request.attempt) in attempts:
            found.append(f"I11 {name} has a number that is none, or was another attempt's")
        attempts.add((request.delivery, request.attempt))
    return found


def _find_uninvited(inbox: Inbox, wanted: Iterable[Told], mine: Iterable[DeliveryRow]) -> list[str]:
    bodies = {one.body for one in wanted}
    return [f"I11 delivery {row.id} to {inbox.target} is for no webhook" for row in mine if row.body not in bodies]


def _find_disordered(
    inbox: Inbox, wanted: Iterable[Told], accepted: Mapping[bytes, Told], taken: Mapping[bytes, float]
) -> list[str]:
    """Find webhooks that were taken before an earlier one of their generation, which had not failed.

    One is earlier if its 202 came before the other was first sent.
    """
    first_sent: dict[bytes, float] = {}
    of_id: dict[str, list[Told]] = {}
    for one in wanted:
        first_sent[one.body] = min(one.sent_at, first_sent.get(one.body, one.sent_at))
    for one in accepted.values():
        of_id.setdefault(one.id, []).append(one)
    failed = _find_failed(inbox.app.requests)
    return [
        f"I12 {inbox.target} took {later} before {one}"
        for theirs in of_id.values()
        for one in theirs
        for later in theirs
        if one.answered_at <= first_sent[later.body]
        and later.body in taken
        and taken.get(one.body, float("inf")) > taken[later.body]
        and one.body not in failed
    ]


def _find_failed(requests: Iterable[Received]) -> set[bytes]:
    """Return the bodies of deliveries that may have failed: refused for good, or tried as often as there are tries."""
    return {one.body for one in requests if one.begun == _GONE or one.attempt >= MAX_ATTEMPTS}


def _name(inbox: Inbox, received: Received) -> str:
    return f"attempt {received.attempt} at delivery {received.delivery} to {inbox.target}"


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S.%f}"
