"""What becomes of a record, and why, in plain words: pure functions from facts to sentences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final

from service.core.attempts import Outcome
from service.core.describing import describe_hold, describe_rule, name_caller
from service.core.generation import TERMINAL, UNSEEN
from service.core.holding import Hold
from service.core.lifecycle import State
from service.core.obstacles import Obstacle, describe_obstacle, format_instant, obstacle_of
from service.core.requiring import OpenDelivery

# A worker writes every ten seconds.
WORKER_GONE_AFTER: Final = timedelta(minutes=1)
# The states of a record that waits for a deletion.
WAITING: Final = frozenset({State.SCHEDULED, State.DELETING})
# The largest number of records due before this one that is counted.
MAX_AHEAD: Final = 10_000
_CHECKS: Final = (
    "If you expect one: sync.so sends a webhook only once a generation has ended, and only to the webhookUrl that it "
    "was created with. Check that this is Mayfly's address and ends in /webhooks/sync, that the account is the one "
    "asked for here, and whether Mayfly's log shows a refused signature at that time."
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the ledger knows of one record; *wake_at* is the next attempt, or the end of the lease of a deletion."""

    id: str
    state: State
    status: str
    rule: str
    ttl: str | None  # in the form of MAYFLY_TTL
    due_at: datetime | None
    wake_at: datetime | None
    attempts: int
    is_copied: bool  # this attempt has its copy, so that its DELETE may be in progress
    has_copy: bool
    outcome: str | None
    deleted_at: datetime | None
    last_error: str | None
    hold: Hold | None  # its own, or one that came before its first webhook
    look_at: datetime | None  # the next early look at the API, None once it is over
    looks: int
    is_adopted: bool = False  # by a sweep: no webhook told of it
    is_of_batch: bool = False  # the webhook of its batch told of it
    waits_for: str | None = None  # the target for which it waits, or because of which it has failed
    required: Sequence[OpenDelivery] = ()  # what targets have not taken
    added_by: str | None = None  # who added it by its id; then it may not have ended yet

    @property
    def waits_to_end(self) -> bool:
        """Whether its generation is not known to have ended."""
        return self.added_by is not None and self.status not in TERMINAL


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What concerns all records: the pauses, the dry run, the worker, and how many are due before this one."""

    now: datetime
    pauses: Sequence[Obstacle]
    is_dry_run: bool
    worker_seen_at: datetime | None
    ahead: int


def find_obstacles(facts: Facts, around: Surroundings) -> list[Obstacle]:
    """Return what blocks the deletion of a record that is held or waits for one; nothing for all others."""
    hold = facts.hold
    found = [] if hold is None else [Obstacle("hold", None, hold.by, hold.reason, hold.until)]
    if facts.state not in WAITING:
        return found
    if facts.state is State.SCHEDULED:
        found += [obstacle_of(one) for one in facts.required]
    found += around.pauses
    if around.is_dry_run:
        found.append(Obstacle("dry_run", None, None, "MAYFLY_DRY_RUN is set", None))
    seen_at = around.worker_seen_at
    if seen_at is None or around.now - seen_at >= WORKER_GONE_AFTER:
        found.append(Obstacle("no_worker", seen_at, None, "no worker runs", None))
    return found


def explain_record(facts: Facts, obstacles: Sequence[Obstacle], around: Surroundings) -> str:
    """Return one paragraph: what the record waits for, which rule decided, what blocks it and what can be done."""
    sentences = [
        f"Generation {facts.id} ({facts.status}) is {_IS.get(facts.state, facts.state)}.",
        *_explain_added(facts),
        *_EXPLAINED[facts.state](facts, around),
        *_explain_look(facts),
        *(describe_obstacle(one, now=around.now) for one in obstacles if facts.state in WAITING),
    ]
    return " ".join(sentences)


def explain_unseen(generation_id: str, hold: Hold | None) -> str:
    """Return one paragraph on a generation that has no record: what is stored for it, and what to check."""
    if hold is None:
        return f"There is no record of generation {generation_id}, so Mayfly will not delete it. {_CHECKS}"
    return (
        f"There is no record of generation {generation_id} yet. It is on hold before its first webhook, "
        f"{describe_hold(hold)}: its record will be held from the beginning. "
        f"mayfly records release {generation_id} removes the hold. {_CHECKS}"
    )


_IS: Final[Mapping[State, str]] = MappingProxyType(
    {
        State.DELETING: "being deleted now",
        State.FAILED: "given up and needs an operator",
        State.HELD: "on hold",
        State.DELETED: "deleted",
    }
)


def _explain_scheduled(facts: Facts, around: Surroundings) -> list[str]:
    if facts.due_at is None or facts.wake_at is None:
        return ["It has no due time."]
    sentences = [f"It is due at {format_instant(facts.due_at)}: {_describe_rule(facts)}."]
    if facts.last_error and facts.attempts:
        sentences.append(f"Attempt {facts.attempts} did not delete it: {facts.last_error}.")
    if facts.required:
        return sentences
    if facts.wake_at > max(around.now, facts.due_at):
        sentences.append(f"The next attempt is at {format_instant(facts.wake_at)}.")
    elif facts.wake_at <= around.now:
        sentences.append(_describe_turn(around))
    return sentences


def _describe_turn(around: Surroundings) -> str:
    if not around.ahead:
        return "Its next attempt is due now, and no other record is due before it."
    number = f"{around.ahead} or more" if around.ahead >= MAX_AHEAD else str(around.ahead)
    records = "record is" if around.ahead == 1 else "records are"
    return f"Its next attempt is due now; {number} {records} due before it, and MAYFLY_API_RATE bounds the calls."


def _explain_deleting(facts: Facts, around: Surroundings) -> list[str]:  # noqa: ARG001 - all have these arguments
    who = f"A worker makes attempt {facts.attempts}, for a minute at most"
    lease = f", until {format_instant(facts.wake_at)}" if facts.wake_at else ""
    due = [f"It was due at {format_instant(facts.due_at)}: {_describe_rule(facts)}."] if facts.due_at else []
    if facts.is_copied:
        return [*due, f"{who}{lease}; its copy is stored and the DELETE may be in progress, so a hold comes too late."]
    return [*due, f"{who}{lease}; its copy is not stored yet, so a hold still stops it."]


def _explain_held(facts: Facts, around: Surroundings) -> list[str]:  # noqa: ARG001 - as above
    hold = facts.hold or Hold("somebody", None, None)
    sentences = [f"It is held {describe_hold(hold)}."]
    then = "it is due no earlier than MAYFLY_MIN_TTL later" if facts.due_at else "it is kept"
    sentences.append(
        f"When the hold has ended, {then}." if hold.until else "It stays so until an operator releases or keeps it."
    )
    if facts.due_at:
        sentences.append(f"Without the hold its due time is {format_instant(facts.due_at)}: {_describe_rule(facts)}.")
    if facts.last_error:
        sentences.append(f"Its last error: {facts.last_error}.")
    return [*sentences, f"mayfly records release {facts.id} ends the hold, mayfly records keep {facts.id} keeps it."]


def _explain_kept(facts: Facts, around: Surroundings) -> list[str]:  # noqa: ARG001 - as above
    return [
        f"It is never deleted: {_describe_rule(facts)}.",
        f"mayfly records release {facts.id} lets it be deleted after MAYFLY_MIN_TTL.",
    ]


def _explain_failed(facts: Facts, around: Surroundings) -> list[str]:
    if facts.waits_for:
        again = [describe_obstacle(obstacle_of(one), now=around.now) for one in facts.required if not one.is_failed]
        return [
            f"It is not deleted, because {facts.last_error}.",
            *again,
            f"Once {facts.waits_for} has answered 2xx, it is scheduled again by itself.",
            f"mayfly records retry {facts.id} sends the webhook again, too; hold or keep stops it.",
        ]
    attempts = "1 attempt" if facts.attempts == 1 else f"{facts.attempts} attempts"
    error = f"; the last error: {facts.last_error}" if facts.last_error else ""
    return [
        f"Mayfly gave it up after {attempts}{error}." if facts.attempts else f"Mayfly gave it up{error}.",
        f"There is no further attempt by itself: mayfly records retry {facts.id} tries again, hold or keep stops it.",
    ]


def _explain_deleted(facts: Facts, around: Surroundings) -> list[str]:  # noqa: ARG001 - as above
    at = f" at {format_instant(facts.deleted_at)}" if facts.deleted_at else ""
    if facts.outcome == Outcome.DELETED:
        return [f"sync.so confirmed the deletion{at}; {_describe_rule(facts)}. The record stays, with its copy."]
    sentences = [f"sync.so did not know it any more{at}, before any DELETE of Mayfly's."]
    if facts.has_copy:
        return [*sentences, "The record stays, with its copy."]
    wrong_key = "No copy was made. If SYNC_API_KEY was another organisation's at that time,"
    return [*sentences, wrong_key, f"mayfly records reopen {facts.id} schedules it again."]


_EXPLAINED: Final[Mapping[State, Callable[[Facts, Surroundings], list[str]]]] = MappingProxyType(
    {
        State.SCHEDULED: _explain_scheduled,
        State.DELETING: _explain_deleting,
        State.HELD: _explain_held,
        State.KEPT: _explain_kept,
        State.FAILED: _explain_failed,
        State.DELETED: _explain_deleted,
    }
)


def _explain_added(facts: Facts) -> list[str]:
    """Say who added it by its id, and that nothing is deleted before its generation has ended."""
    if facts.added_by is None:
        return []
    added = f"It was added by its id, by {name_caller(facts.added_by)}"
    if not facts.waits_to_end:
        return [f"{added}."]
    seen = "sync.so has not shown it yet" if facts.status == UNSEEN else "sync.so still processes it"
    if facts.state in WAITING:
        return [f"{added}; {seen}, and it is not deleted before it has ended."]
    error = f": {facts.last_error}" if facts.last_error and facts.state is State.KEPT else ""
    return [f"{added}; {seen}{error}."]


def _explain_look(facts: Facts) -> list[str]:
    """Say that the record still has only what the webhook said; this delays no deletion."""
    if facts.look_at is None or facts.state is State.DELETED:
        return []
    if facts.waits_to_end:
        return [f"Mayfly looks again at {format_instant(facts.look_at)}."]
    failed = f" failed {facts.looks} times and is tried again" if facts.looks else " is due"
    return [f"The early look at the API, which fills the record,{failed} at {format_instant(facts.look_at)}."]


def _describe_rule(facts: Facts) -> str:
    """Say which rule set the due time; no full stop."""
    since = "a sweep adopted it" if facts.is_adopted else "its webhook was sent"
    since = "the webhook of its batch was sent" if facts.is_of_batch else since
    since = "it was added" if facts.added_by else since
    return describe_rule(facts.rule, f", {facts.ttl} after {since}" if facts.ttl else "", facts.ttl)
