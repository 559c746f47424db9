"""What a policy would do to a record that exists: a pure decision. Nothing moves by a changed configuration alone."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum, auto
from typing import Final

import msgspec

from service.core.adopting import POLLERS_TTL
from service.core.lifecycle import Move, State
from service.core.matchers import Facts
from service.core.retention import DEFAULT_RULE, Policy, Retention, decide_retention, keep_longer
from service.core.rules import RULE_PREFIX

# ttl_seconds has no fractions.
_SAME: Final = timedelta(seconds=1)


class Effect(StrEnum):
    """What a policy does to a record."""

    EARLIER = auto()  # it is due earlier than before
    LATER = auto()
    SAME_TIME = auto()  # another rule says the same, or it is about to be deleted in any case
    FOREVER = auto()  # it was scheduled, and is kept
    RELEASED = auto()  # it was kept, and is scheduled
    HELD = auto()


class Left(StrEnum):
    """Why a record stays as it is."""

    UNCHANGED = auto()  # the policy says what it said before
    OPERATOR = auto()  # an operator released, retried or reopened it
    UNKNOWN = auto()  # it would be due earlier, but a rule may protect it that asks for what only the API says
    MOVED = auto()  # it would be due earlier, but a second webhook or the end of a hold has set its due time


@dataclass(frozen=True, slots=True)
class Existing:
    """What a record says of its retention; *ttl* and *due_at* are None for one that is kept.

    *facts* are complete once there is a copy. *has_webhook* is false for one that a sweep adopted.
    """

    state: State
    rule: str
    due_at: datetime | None
    ttl: timedelta | None
    sent_at: datetime
    webhook_url: str | None
    facts: Facts
    has_webhook: bool = True
    is_decided_by_operator: bool = False


class Change(msgspec.Struct, frozen=True, gc=False):
    """What becomes of a record: the *retention* that it gets."""

    effect: Effect
    retention: Retention

    def moves(self, state: State) -> list[Move]:
        """Return the moves from *state*, which is scheduled or kept."""
        last = {Effect.FOREVER: [Move.KEEP], Effect.RELEASED: [Move.RELEASE], Effect.HELD: [Move.HOLD]}
        moves = last.get(self.effect, [Move.RESCHEDULE])
        return [Move.RELEASE, *moves] if state is State.KEPT and self.effect is Effect.HELD else moves


def is_decided_by_policy(rule: str) -> bool:
    """Whether *rule*, of a record, is the policy's, and not an override or an operator's word."""
    return rule == DEFAULT_RULE or rule.startswith(RULE_PREFIX)


def reapply_policy(policy: Policy, record: Existing, *, now: datetime) -> Change | Left:
    """Decide what *policy* would do to *record*, which is scheduled or kept, as if it had been in force from the start.

    The ttl counts from the same instant as before, but nothing becomes due before *now* plus min_ttl. What an
    operator decided stays. What a second webhook or the end of a hold has moved, and what a rule may protect whose
    facts are not known yet, becomes due no earlier.
    """
    if record.is_decided_by_operator or not is_decided_by_policy(record.rule):
        return Left.OPERATOR
    found = _decide_from_start(policy, record)
    earliest = now.astimezone(UTC) + policy.bounds_of(record.facts.account).min_ttl
    if found.hold_reason is not None:
        return Change(Effect.HELD, _with_due(found, record, _later_due(found, record, earliest)))
    if found.due_at is not None:
        return _move_due(policy, found, record, earliest)
    return Left.UNCHANGED if record.due_at is None else Change(Effect.FOREVER, found)


def _move_due(policy: Policy, found: Retention, record: Existing, earliest: datetime) -> Change | Left:
    """Decide about a record that *found* gives a due time."""
    natural = found.due_at or earliest
    due_at = max(natural, earliest)
    if record.due_at is None or due_at <= record.due_at - _SAME:
        effect = Effect.RELEASED if record.due_at is None else Effect.EARLIER
        return _find_protection(policy, record) or Change(effect, _with_due(found, record, due_at))
    if natural >= record.due_at + _SAME:
        return Change(Effect.LATER, _with_due(found, record, due_at))
    if found.rule == record.rule:
        return Left.UNCHANGED
    return Change(Effect.SAME_TIME, Retention(found.rule, record.ttl, record.due_at))


def _decide_from_start(policy: Policy, record: Existing) -> Retention:
    """Return what *policy* says, as if it were the moment at which the clock of *record* starts.

    The labels that are stored are those of the signed webhook, while its URL may be the API's. So whatever only the
    URL says can keep it longer, and cannot shorten. Nothing that a sweep adopted is kept for less than POLLERS_TTL.
    """
    start = _start(record)
    found = decide_retention(policy, record.facts, webhook_url=record.webhook_url, sent_at=start, now=start)
    if not is_decided_by_policy(found.rule) or found.labels != record.facts.labels:
        plain = decide_retention(policy, record.facts, webhook_url=None, sent_at=start, now=start)
        found = keep_longer(plain, found)
    if record.has_webhook or found.due_at is None or found.due_at >= start + POLLERS_TTL:
        return found
    return msgspec.structs.replace(found, ttl=POLLERS_TTL, due_at=start + POLLERS_TTL)


def _start(record: Existing) -> datetime:
    """Return when the clock starts: at *sent_at*, or later by as much as its due time was moved."""
    if record.ttl is None or record.due_at is None:
        return record.sent_at
    start = record.due_at - record.ttl
    return start if start - record.sent_at >= _SAME else record.sent_at


def _later_due(found: Retention, record: Existing, earliest: datetime) -> datetime | None:
    """Return the due time that a release of the held record brings back, None for forever."""
    if found.due_at is None:
        return None
    return max(found.due_at, earliest, record.due_at or earliest)


def _with_due(found: Retention, record: Existing, due_at: datetime | None) -> Retention:
    ttl = None if due_at is None else due_at - _start(record)
    return Retention(found.rule, ttl, due_at, found.hold_reason)


def _find_protection(policy: Policy, record: Existing) -> Left | None:
    """Return why *record* must not become due earlier."""
    has_no_start = record.due_at is not None and record.ttl is None
    if has_no_start or _start(record) != record.sent_at:
        return Left.MOVED
    return Left.UNKNOWN if policy.rules.find_open(record.facts) is not None else None
