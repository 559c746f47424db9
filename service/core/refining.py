"""The retention of a record decided again, at the first sight of what its webhook lacked: pure decisions."""

from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from service.core.matchers import Facts
from service.core.reapplying import is_decided_by_policy
from service.core.retention import (
    DEFAULT_RULE,
    HOLD_RULE,
    OVERRIDE_PREFIX,
    Policy,
    Retention,
    decide_retention,
    keep_longer,
)
from service.core.rules import RULE_PREFIX

# ttl_seconds has no fractions.
_SAME: Final = timedelta(seconds=1)


def refine_retention(
    policy: Policy,
    facts: Facts,
    *,
    rule: str,
    due_at: datetime,
    ttl: timedelta | None,
    webhook_url: str | None,
    sent_at: datetime,
    now: datetime,
) -> Retention | None:
    """Decide again about a scheduled record, with the *facts* and the *webhook_url* of the API's first answer.

    *rule*, *due_at*, *ttl* and *sent_at* are the record's. What another rule or an override says counts from the same
    *sent_at*, and may be earlier or later, but not before *now* plus min_ttl. None: no change, as when the same rule
    decides, so that a changed configuration alone moves nothing; or when an override or an operator has decided.
    """
    if rule != DEFAULT_RULE and not rule.startswith(RULE_PREFIX):
        return None
    found = decide_retention(policy, facts, webhook_url=webhook_url, sent_at=sent_at, now=now)
    if found.rule == rule:
        return None
    # An operator or a second webhook has moved the due time: it does not become earlier.
    is_moved = _is_moved(due_at, ttl, sent_at)
    # No signature covers an override that only the API shows: it can only keep the generation longer.
    is_unsigned = found.rule.startswith(OVERRIDE_PREFIX)
    # Without what only the API says another rule would have decided, so the configuration has changed since.
    known = msgspec.structs.replace(facts, project=None, source=None, output_file_name=None, is_complete=False)
    first = decide_retention(policy, known, webhook_url=webhook_url, sent_at=sent_at, now=now)
    is_reconfigured = first.rule != rule
    if found.hold_reason is not None and not found.is_later_than(due_at):
        # The hold counts, and a release brings back the due time that was announced.
        return msgspec.structs.replace(found, ttl=ttl, due_at=due_at)
    if (is_moved or is_unsigned or is_reconfigured) and not found.is_later_than(due_at):
        return None
    return found


def decide_ended_retention(
    policy: Policy,
    facts: Facts,
    *,
    rule: str,
    due_at: datetime | None,
    ttl: timedelta | None,
    webhook_url: str | None,
    sent_at: datetime,
    now: datetime,
) -> Retention | None:
    """Decide about a record that was added by its id, once the API first shows that its generation has ended.

    The *facts* are complete; *rule*, *due_at*, *ttl* and *sent_at* are the record's. What the policy had to decide is
    decided only now. What was asked for stays, and so does an operator's word; the hold of a rule counts. An override
    in the *webhook_url*, which no signature covers, can only keep the generation longer. Nothing is due before *now*
    plus min_ttl. None: it is kept because somebody said so.
    """
    now = now.astimezone(UTC)
    earliest = now + policy.bounds_of(facts.account).min_ttl
    by_policy = decide_retention(policy, facts, webhook_url=None, sent_at=sent_at, now=now)
    shown = decide_retention(policy, facts, webhook_url=webhook_url, sent_at=sent_at, now=now)
    is_open = is_decided_by_policy(rule)
    if is_open or rule.startswith(HOLD_RULE):
        found = by_policy if is_open else Retention(rule, by_policy.ttl, by_policy.due_at)
        # An operator who released it with a grace has moved the due time.
        if due_at is not None and _is_moved(due_at, ttl, sent_at) and not found.is_later_than(due_at):
            found = msgspec.structs.replace(found, ttl=ttl, due_at=max(due_at, earliest))
    elif due_at is None:
        return None
    else:
        found = Retention(rule, ttl if due_at >= earliest else earliest - sent_at, max(due_at, earliest))
        if by_policy.hold_reason is not None:
            found = msgspec.structs.replace(found, rule=by_policy.rule, hold_reason=by_policy.hold_reason)
    return keep_longer(found, shown) if is_open or not is_decided_by_policy(shown.rule) else found


def _is_moved(due_at: datetime, ttl: timedelta | None, sent_at: datetime) -> bool:
    """Whether an operator or a second webhook has moved the due time."""
    return ttl is None or abs(due_at - sent_at - ttl) >= _SAME
