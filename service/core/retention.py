"""When a generation may be deleted: pure decisions that take the time as *now*."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import msgspec

from service.core.durations import parse_ttl

_OVERRIDES: Final = frozenset({"ttl", "expires", "hold"})
# The rule of a generation without an override.
DEFAULT_RULE: Final = "MAYFLY_TTL"


@dataclass(frozen=True, slots=True)
class Policy:
    """How long terminal generations are kept: *ttl* (None: forever) by default, *min_ttl* at least."""

    ttl: timedelta | None
    min_ttl: timedelta


class Retention(msgspec.Struct, frozen=True, gc=False):
    """How long one generation is kept: *rule* names what decided, *due_at* is None for one that is never deleted."""

    rule: str
    ttl: timedelta | None
    due_at: datetime | None
    hold_reason: str | None = None

    def is_later_than(self, due_at: datetime | None) -> bool:
        """Whether this keeps the generation longer than *due_at* does; None means forever."""
        return due_at is not None and (self.due_at is None or self.due_at > due_at)


def decide_retention(policy: Policy, *, webhook_url: str | None, sent_at: datetime, now: datetime) -> Retention:
    """Decide how long a terminal generation is kept: by the override in its *webhook_url*, else by *policy*.

    An override is ``ttl``, ``expires`` or ``hold`` in the query of the signed body's *webhook_url*. An invalid one, or
    a name that looks like a typo, puts the record on hold. The clock starts at *sent_at*, the signed send time, or at
    *now* if that is earlier. Nothing is due before *now* plus the policy's min_ttl.
    """
    return _decide_from(policy.ttl, webhook_url, _Clock(min(sent_at, now), now + policy.min_ttl))


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


class _Clock(msgspec.Struct, frozen=True, gc=False):
    """When the ttl starts to count, and the earliest due time that is allowed."""

    start: datetime
    earliest: datetime


def _decide_from(ttl: timedelta | None, webhook_url: str | None, clock: _Clock) -> Retention:
    """Apply the overrides in *webhook_url*, or else *ttl*."""
    if not webhook_url or ("?" not in webhook_url and "#" not in webhook_url):
        return _apply_ttl(ttl, clock, DEFAULT_RULE)
    try:
        return _apply_overrides(ttl, _read_overrides(webhook_url), clock)
    except ValueError:
        fallback = _apply_ttl(ttl, clock, DEFAULT_RULE)
        reason = "invalid override in its webhookUrl"
        return Retention("invalid override", fallback.ttl, fallback.due_at, hold_reason=reason)


def _read_overrides(webhook_url: str) -> dict[str, str]:
    """Return the overrides by name.

    Raises: ValueError for a duplicate, for ``ttl`` together with ``expires``, and for a name that looks like a typo.
    """
    parts = urlsplit(webhook_url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    # sync.so never sends the fragment, so an override in it is a mistake.
    typos = [name for name, _ in parse_qsl(parts.fragment.rpartition("?")[2], keep_blank_values=True)]
    typos = [name for name in typos if name in _OVERRIDES or _is_typo(name)]
    typos += [name for name, _ in pairs if name not in _OVERRIDES and _is_typo(name)]
    overrides = {name: value for name, value in pairs if name in _OVERRIDES}
    is_ambiguous = {"ttl", "expires"} <= overrides.keys()
    if typos or len(overrides) != sum(name in _OVERRIDES for name, _ in pairs) or is_ambiguous:
        raise ValueError("duplicate, contradictory or misspelt overrides")
    return overrides


def _is_typo(name: str) -> bool:
    """Whether *name* looks like a misspelt override: other case, an escaped ``&``, or one letter off."""
    plain = name.strip().lower().removeprefix("amp;")
    return any(_shortened_by_one(plain) & _shortened_by_one(override) for override in _OVERRIDES)


def _shortened_by_one(word: str) -> set[str]:
    """Return *word* and *word* without any one letter; two words that differ by one letter share an element."""
    return {word} | {word[:index] + word[index + 1 :] for index in range(min(len(word), 10))}


def _apply_overrides(ttl: timedelta | None, overrides: dict[str, str], clock: _Clock) -> Retention:
    """Apply *overrides*; a held record keeps the due time that a release brings back."""
    if "ttl" in overrides:
        timed = _apply_ttl(parse_ttl(overrides["ttl"]), clock, "override: ttl")
    elif "expires" in overrides:
        due_at = max(_parse_instant(overrides["expires"]), clock.earliest)
        timed = Retention("override: expires", due_at - clock.start, due_at)
    else:
        timed = _apply_ttl(ttl, clock, DEFAULT_RULE)
    if "hold" in overrides:
        reason = overrides["hold"].replace("\0", "")[:500]  # NUL: PostgreSQL cannot store it
        return Retention("override: hold", timed.ttl, timed.due_at, hold_reason=reason or "no reason given")
    return timed


def _apply_ttl(ttl: timedelta | None, clock: _Clock, rule: str) -> Retention:
    if ttl is None:
        return Retention(rule, None, None)
    due_at = max(clock.start + ttl, clock.earliest)
    return Retention(rule, due_at - clock.start, due_at)


def _parse_instant(text: str) -> datetime:
    """Parse an ISO 8601 instant with its offset; a time without one is refused as ambiguous."""
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None or not 2000 <= instant.year <= 2200:
        raise ValueError("an instant with its offset, such as 2026-12-31T00:00:00Z")
    return instant.astimezone(UTC)
