"""When a generation may be deleted: pure decisions that take the time as *now*."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from service.core.durations import parse_instant, parse_ttl
from service.core.holding import NO_REASON, parse_until
from service.core.matchers import Facts
from service.core.overrides import InvalidOverrideError, Overrides, read_overrides
from service.core.rules import NO_RULES, RULE_PREFIX, RuleSet
from service.core.typos import FALSE

# The rule of a generation without an override.
DEFAULT_RULE: Final = "MAYFLY_TTL"
# The rule of a hold by an invalid override, and what its reason begins with.
INVALID_RULE: Final = "invalid override"

# What the rule of an override begins with.
OVERRIDE_PREFIX: Final = "override: "
# What stands between the override and who asked for it, where no webhookUrl has it.
ASKED_BY: Final = " by "
HOLD_RULE: Final = f"{OVERRIDE_PREFIX}hold"
NO_FACTS: Final = Facts()
_NEVER: Final = datetime.max.replace(tzinfo=UTC)

# A URL without any of these has no override.
_MARKS: Final = re.compile(r"[?#%&;=]")


class Bounds(msgspec.Struct, frozen=True, gc=False):
    """What limits how long an account's generations are kept.

    Nothing is kept for less than *min_ttl*. An override, which an application asks for, does not keep anything for
    longer than *max_ttl* (None: no limit). The operator's own rules and holds are not limited by it.
    """

    min_ttl: timedelta
    max_ttl: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """How long terminal generations are kept: as *rules* say, else for *ttl* (None: forever), and *min_ttl* at least.

    *bounds* has the accounts with bounds of their own.
    """

    ttl: timedelta | None
    min_ttl: timedelta
    rules: RuleSet = NO_RULES
    bounds: Mapping[str, Bounds] = field(default_factory=dict)

    def bounds_of(self, account: str) -> Bounds:
        """Return the bounds of *account*."""
        return self.bounds.get(account) or Bounds(self.min_ttl)


class InvalidOverride(msgspec.Struct, frozen=True, gc=False):
    """An invalid override, for the log; its value may be secret."""

    name: str
    value_length: int


class Retention(msgspec.Struct, frozen=True, gc=False):
    """How long one generation is kept: *rule* names what decided, *due_at* is None for one that is never deleted.

    *labels* are those of its webhookUrl. A hold ends at *hold_until*, None: with a release.
    """

    rule: str
    ttl: timedelta | None
    due_at: datetime | None
    hold_reason: str | None = None
    invalid: "InvalidOverride | None" = None
    labels: Mapping[str, str] = {}
    hold_until: datetime | None = None

    def held_by(self, actor: str) -> str | None:
        """Return whose hold it is, None without one: the policy's, or else *actor*'s, who brought the override."""
        if self.hold_reason is None:
            return None
        return "policy" if self.rule.startswith(RULE_PREFIX) else actor

    def is_later_than(self, due_at: datetime | None) -> bool:
        """Whether this keeps the generation longer than *due_at* does; None means forever."""
        return due_at is not None and (self.due_at is None or self.due_at > due_at)


def decide_retention(
    policy: Policy,
    facts: Facts = NO_FACTS,
    *,
    webhook_url: str | None,
    sent_at: datetime,
    now: datetime,
    request_url: str | None = None,
    request_place: str = "the URL of its request",
) -> Retention:
    """Decide how long a terminal generation is kept: by the override in its *webhook_url*, else by *policy*.

    An override is ``ttl``, ``expires`` or ``hold`` in the query of the signed body's *webhook_url*. An invalid one, or
    what looks like one, puts the record on hold. In a URL that is not ours, and in *request_url*, which no signature
    covers and of which *request_place* says where it stood, an override can only keep the generation longer. Without an
    override the first rule that matches *facts* and the labels in *webhook_url* decides, else the policy's ttl. A hold
    counts, whoever asks for it: the override, or the rule. The clock starts at *sent_at*, the signed send time, or at
    *now* if that is earlier. Nothing is due before *now* plus the account's min_ttl.
    """
    bounds = policy.bounds_of(facts.account)
    # In another zone, a day that is added would be one of its calendar, which may have 23 hours.
    sent_at, now = sent_at.astimezone(UTC), now.astimezone(UTC)
    clock = _Clock(min(sent_at, now), now + bounds.min_ttl, bounds.max_ttl)
    found = _decide_from(policy, facts, webhook_url, clock)
    if not request_url or "?" not in request_url:
        return found
    base = Retention(found.rule, found.ttl, found.due_at)
    return keep_longer(found, _apply_overrides(base, _read_url(request_url), clock, place=request_place))


def decide_asked_retention(policy: Policy, facts: Facts, asked: Overrides, *, by: str, now: datetime) -> Retention:
    """Decide how long a generation is kept that *by* adds by its id, with what is *asked* for: from *now* on.

    It counts as an override in its own webhookUrl does. Without any, the rules decide by what is known, else the
    policy's ttl.

    Raises: InvalidOverrideError, where a webhook's record would be held: who asks is told, and asks again.
    """
    now = now.astimezone(UTC)
    bounds = policy.bounds_of(facts.account)
    clock = _Clock(now, now + bounds.min_ttl, bounds.max_ttl)
    base = _apply_rules(policy, msgspec.structs.replace(facts, labels=asked.labels), clock, None)
    found = _apply_hold(asked, base, _apply_times(asked, base, clock), clock)
    rule = f"{found.rule}{ASKED_BY}{by}" if found.rule.startswith(OVERRIDE_PREFIX) else found.rule
    return msgspec.structs.replace(found, rule=rule, labels=asked.labels)


def reconsider_retention(
    policy: Policy, facts: Facts, *, rule: str, due_at: datetime, ttl: timedelta | None, webhook_url: str | None
) -> Retention | None:
    """Decide again just before the DELETE, with the *facts* and the *webhook_url* that the API shows.

    *rule*, *due_at* and *ttl* are the record's. An override that the webhook did not have and a rule that did not
    decide before can only keep the generation longer, or hold it. None: no change.
    """
    is_decided = rule != DEFAULT_RULE and not rule.startswith(RULE_PREFIX)
    if ttl is None or (is_decided and not rule.startswith(OVERRIDE_PREFIX)):
        return None
    clock = _Clock(due_at - ttl, due_at, policy.bounds_of(facts.account).max_ttl)
    found = _decide_from(policy, facts, webhook_url, clock, known=Retention(rule, ttl, due_at))
    if is_decided and not (found.hold_reason is not None and found.rule.startswith(RULE_PREFIX)):
        return None  # only a rule's hold counts more than an override
    return found if found.hold_reason is not None or found.is_later_than(due_at) else None


def keep_longer(first: Retention, second: Retention) -> Retention:
    """Return what keeps the generation longer; a hold of either counts, the first one's before the second's."""
    timed = second if second.is_later_than(first.due_at) else first
    holds = [one for one in (first, second) if one.hold_reason is not None]
    # One without an end is the longest; of two that end at once the first counts.
    held = max(holds, key=lambda one: one.hold_until or _NEVER, default=timed)
    return Retention(held.rule, timed.ttl, timed.due_at, held.hold_reason, held.invalid, first.labels, held.hold_until)


class _Clock(msgspec.Struct, frozen=True, gc=False):
    """When the ttl starts to count, the earliest due time that is allowed, and the longest ttl of an override."""

    start: datetime
    earliest: datetime
    max_ttl: timedelta | None = None


def _decide_from(
    policy: Policy, facts: Facts, url: str | None, clock: _Clock, *, known: Retention | None = None
) -> Retention:
    """Apply the overrides in the webhookUrl *url*, else the rules, else *known*, by default the policy's ttl."""
    found = _read_url(url)
    labels = found.labels if isinstance(found, Overrides) else {}
    if labels:
        facts = msgspec.structs.replace(facts, labels={**labels, **facts.labels})
    timed = _apply_overrides(_apply_rules(policy, facts, clock, known), found, clock, place="its webhookUrl")
    return msgspec.structs.replace(timed, labels=labels) if labels else timed


def _read_url(url: str | None) -> Overrides | InvalidOverrideError | None:
    """Return the overrides in *url*, or what is wrong with them; None for a URL that has none."""
    if not url or url.isspace() or (url.startswith("https://") and _MARKS.search(url) is None):
        return None
    try:
        return read_overrides(url)
    except InvalidOverrideError as error:
        return error


def _apply_rules(policy: Policy, facts: Facts, clock: _Clock, known: Retention | None) -> Retention:
    """Apply the first rule that matches *facts*; *known*, or the policy's ttl, without one or if that rule did it."""
    default = known or _apply_ttl(policy.ttl, clock, DEFAULT_RULE)
    rule = policy.rules.find(facts) if policy.rules.rules else None
    if rule is None or rule.name == default.rule:
        return default
    if rule.hold is not None:
        return Retention(rule.name, default.ttl, default.due_at, rule.hold)
    if rule.expires is not None:
        due_at = max(rule.expires, clock.earliest)
        return Retention(rule.name, due_at - clock.start, due_at)
    return _apply_ttl(rule.ttl, clock, rule.name)


def _apply_overrides(
    base: Retention, found: Overrides | InvalidOverrideError | None, clock: _Clock, *, place: str
) -> Retention:
    """Apply the overrides that were *found* in a URL, whose *place* is said, to what else would count."""
    if found is None:
        return base
    try:
        if isinstance(found, InvalidOverrideError):
            raise found
        timed = _apply_times(found, base, clock)
        _read_hold_until(found, clock)
    except InvalidOverrideError as error:
        invalid = InvalidOverride(error.name, error.value_length)
        return Retention(INVALID_RULE, base.ttl, base.due_at, f"{INVALID_RULE} in {place}: {error}", invalid)
    # Another service may have put it into its own URL for itself.
    if not found.is_ours and not timed.is_later_than(base.due_at):
        timed = base
    return _apply_hold(found, base, timed, clock)


def _apply_times(overrides: Overrides, base: Retention, clock: _Clock) -> Retention:
    """Apply ``ttl`` or ``expires``, up to max_ttl; *base* without either.

    Raises: InvalidOverrideError.
    """
    for name in ("ttl", "expires"):
        if (text := overrides.values.get(name)) is None:
            continue
        try:
            if name == "ttl":
                return _cut(_apply_ttl(_parse_ttl(text), clock, "override: ttl"), base, clock)
            due_at = max(parse_instant(text), clock.earliest)
        except (ValueError, OverflowError) as error:
            raise InvalidOverrideError(name, text, str(error)) from None
        return _cut(Retention("override: expires", due_at - clock.start, due_at), base, clock)
    return base


def _cut(timed: Retention, base: Retention, clock: _Clock) -> Retention:
    """Cut what an override asks for to the account's max_ttl, or to *base* if that is later."""
    if clock.max_ttl is None:
        return timed
    latest = max(clock.start + clock.max_ttl, clock.earliest)
    if not timed.is_later_than(latest):
        return timed
    cut = Retention(f"{timed.rule}, cut to max_ttl", latest - clock.start, latest)
    return base if base.is_later_than(latest) else cut


def _read_hold_until(overrides: Overrides, clock: _Clock) -> datetime | None:
    """Return when the hold ends, a duration counts from the clock's start; None without an end.

    Raises: InvalidOverrideError, also for an end that had passed then.
    """
    if (text := overrides.values.get("hold_until")) is None:
        return None
    try:
        return parse_until(text, now=clock.start)
    except ValueError as error:
        raise InvalidOverrideError("hold_until", text, str(error)) from None


def _apply_hold(overrides: Overrides, base: Retention, timed: Retention, clock: _Clock) -> Retention:
    """Apply ``hold``, else the hold of a rule; a held record keeps the due time that a release brings back."""
    text = overrides.values.get("hold")
    if text is not None and text.lower() not in FALSE:
        reason = text.replace("\0", "")[:500]  # NUL: PostgreSQL cannot store it
        until = _read_hold_until(overrides, clock)
        if until is not None and base.hold_reason is not None:  # a rule's hold has no end
            return Retention(base.rule, timed.ttl, timed.due_at, base.hold_reason)
        return Retention(HOLD_RULE, timed.ttl, timed.due_at, reason or NO_REASON, hold_until=until)
    if base.hold_reason is not None:
        return Retention(base.rule, timed.ttl, timed.due_at, base.hold_reason)
    return timed


def _apply_ttl(ttl: timedelta | None, clock: _Clock, rule: str) -> Retention:
    if ttl is None:
        return Retention(rule, None, None)
    due_at = max(clock.start + ttl, clock.earliest)
    return Retention(rule, due_at - clock.start, due_at)


def _parse_ttl(text: str) -> timedelta | None:
    """Parse a ttl in any case, except for ``M``: it could mean months."""
    return parse_ttl(text if text.endswith("M") else text.lower())
