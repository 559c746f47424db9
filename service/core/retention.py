"""When a generation may be deleted: pure decisions that take the time as *now*."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import msgspec

from service.core.durations import parse_instant, parse_ttl
from service.core.overrides import InvalidOverrideError, Overrides, read_overrides
from service.core.typos import FALSE

# The rule of a generation without an override.
DEFAULT_RULE: Final = "MAYFLY_TTL"
# The rule of a hold by an invalid override, and what its reason begins with.
INVALID_RULE: Final = "invalid override"

# A URL without any of these has no override.
_MARKS: Final = re.compile(r"[?#%&;=]")


@dataclass(frozen=True, slots=True)
class Policy:
    """How long terminal generations are kept: *ttl* (None: forever) by default, *min_ttl* at least."""

    ttl: timedelta | None
    min_ttl: timedelta


class InvalidOverride(msgspec.Struct, frozen=True, gc=False):
    """An invalid override, for the log; its value may be secret."""

    name: str
    value_length: int


class Retention(msgspec.Struct, frozen=True, gc=False):
    """How long one generation is kept: *rule* names what decided, *due_at* is None for one that is never deleted."""

    rule: str
    ttl: timedelta | None
    due_at: datetime | None
    hold_reason: str | None = None
    invalid: "InvalidOverride | None" = None

    def is_later_than(self, due_at: datetime | None) -> bool:
        """Whether this keeps the generation longer than *due_at* does; None means forever."""
        return due_at is not None and (self.due_at is None or self.due_at > due_at)


def decide_retention(
    policy: Policy, *, webhook_url: str | None, sent_at: datetime, now: datetime, request_url: str | None = None
) -> Retention:
    """Decide how long a terminal generation is kept: by the override in its *webhook_url*, else by *policy*.

    An override is ``ttl``, ``expires`` or ``hold`` in the query of the signed body's *webhook_url*. An invalid one, or
    what looks like one, puts the record on hold. In a URL that is not ours, and in *request_url*, which no signature
    covers, an override can only keep the generation longer. The clock starts at *sent_at*, the signed send time, or at
    *now* if that is earlier. Nothing is due before *now* plus the policy's min_ttl.
    """
    clock = _Clock(min(sent_at, now), now + policy.min_ttl)
    found = _decide_from(policy.ttl, webhook_url, clock)
    if not request_url or "?" not in request_url:
        return found
    return _keep_longer(found, _decide_from(found.ttl, request_url, clock, place="the URL of its request"))


def reconsider_retention(
    *, rule: str, due_at: datetime, ttl: timedelta | None, webhook_url: str | None
) -> Retention | None:
    """Decide again when the API shows an override in *webhook_url* that the webhook did not have.

    *rule*, *due_at* and *ttl* are the record's. Such an override can only keep the generation longer. None: no change.
    """
    if rule != DEFAULT_RULE or ttl is None:
        return None
    found = _decide_from(ttl, webhook_url, _Clock(due_at - ttl, due_at))
    return found if found.hold_reason is not None or found.is_later_than(due_at) else None


def _keep_longer(first: Retention, second: Retention) -> Retention:
    """Return what keeps the generation longer; a hold of either counts, the first one's before the second's."""
    timed = second if second.is_later_than(first.due_at) else first
    held = first if first.hold_reason is not None else second
    if held.hold_reason is None:
        return timed
    return Retention(held.rule, timed.ttl, timed.due_at, held.hold_reason, held.invalid)


class _Clock(msgspec.Struct, frozen=True, gc=False):
    """When the ttl starts to count, and the earliest due time that is allowed."""

    start: datetime
    earliest: datetime


def _decide_from(ttl: timedelta | None, url: str | None, clock: _Clock, *, place: str = "its webhookUrl") -> Retention:
    """Apply the overrides in *url*, or else *ttl*; *place* says where that URL was."""
    default = _apply_ttl(ttl, clock, DEFAULT_RULE)
    if not url or url.isspace() or (url.startswith("https://") and _MARKS.search(url) is None):
        return default
    try:
        overrides = read_overrides(url)
        timed = _apply_times(overrides, clock) or default
    except InvalidOverrideError as error:
        invalid = InvalidOverride(error.name, error.value_length)
        return Retention(INVALID_RULE, default.ttl, default.due_at, f"{INVALID_RULE} in {place}: {error}", invalid)
    # Another service may have put it into its own URL for itself.
    if not overrides.is_ours and not timed.is_later_than(default.due_at):
        timed = default
    return _apply_hold(overrides, timed)


def _apply_times(overrides: Overrides, clock: _Clock) -> Retention | None:
    """Apply ``ttl`` or ``expires``; None without either.

    Raises: InvalidOverrideError.
    """
    for name in ("ttl", "expires"):
        if (text := overrides.values.get(name)) is None:
            continue
        try:
            if name == "ttl":
                return _apply_ttl(_parse_ttl(text), clock, "override: ttl")
            due_at = max(parse_instant(text), clock.earliest)
        except (ValueError, OverflowError) as error:
            raise InvalidOverrideError(name, text, str(error)) from None
        return Retention("override: expires", due_at - clock.start, due_at)
    return None


def _apply_hold(overrides: Overrides, timed: Retention) -> Retention:
    """Apply ``hold``; a held record keeps the due time that a release brings back."""
    text = overrides.values.get("hold")
    if text is None or text.lower() in FALSE:
        return timed
    reason = text.replace("\0", "")[:500]  # NUL: PostgreSQL cannot store it
    return Retention("override: hold", timed.ttl, timed.due_at, hold_reason=reason or "no reason given")


def _apply_ttl(ttl: timedelta | None, clock: _Clock, rule: str) -> Retention:
    if ttl is None:
        return Retention(rule, None, None)
    due_at = max(clock.start + ttl, clock.earliest)
    return Retention(rule, due_at - clock.start, due_at)


def _parse_ttl(text: str) -> timedelta | None:
    """Parse a ttl in any case, except for ``M``: it could mean months."""
    return parse_ttl(text if text.endswith("M") else text.lower())
