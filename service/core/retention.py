"""When a generation may be deleted: pure decisions that take the time as *now*."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import msgspec

from service.core.durations import parse_ttl

_OVERRIDES: Final = frozenset({"ttl", "expires", "hold"})
# The rule of what has no wish of its own.
DEFAULT_RULE: Final = "MAYFLY_TTL"


@dataclass(frozen=True, slots=True)
class Policy:
    """How long terminal generations are kept: *ttl* (None: forever) without a wish, never under *min_ttl*."""

    ttl: timedelta | None
    min_ttl: timedelta


class Retention(msgspec.Struct, frozen=True, gc=False):
    """What the policy makes of one generation: *due_at* None means it is kept; *rule* names what decided."""

    rule: str
    ttl: timedelta | None
    due_at: datetime | None
    hold_reason: str | None = None

    def is_later_than(self, due_at: datetime | None) -> bool:
        """Whether this keeps the generation longer than *due_at* does; None is for ever."""
        return due_at is not None and (self.due_at is None or self.due_at > due_at)


def decide_retention(policy: Policy, *, webhook_url: str | None, sent_at: datetime, now: datetime) -> Retention:
    """Decide how long a terminal generation is kept, by its own wish or else by *policy*.

    The wish stands in the query of the signed body's *webhook_url*: ``ttl``, ``expires`` or ``hold``. A wish that
    cannot be read, or looks like a slip of the pen, keeps the generation on hold, for a person to look at. The clock
    starts at *sent_at*, the signed send time, or at *now* if that is earlier; nothing is due before the policy's
    min_ttl from now.
    """
    return _apply(policy.ttl, webhook_url, _Clock(min(sent_at, now), now + policy.min_ttl))


def reconsider_retention(
    *, rule: str, due_at: datetime, ttl: timedelta | None, webhook_url: str | None
) -> Retention | None:
    """Decide again once the API shows the *webhook_url* of a generation whose webhook had none, or none with a wish.

    *rule*, *due_at* and *ttl* are the record's. None: it stays due; what the wish says can only keep it longer.
    """
    if rule != DEFAULT_RULE or ttl is None:
        return None
    found = _apply(ttl, webhook_url, _Clock(due_at - ttl, due_at))
    return found if found.hold_reason is not None or found.is_later_than(due_at) else None


class _Clock(msgspec.Struct, frozen=True, gc=False):
    """When the time began to run, and the earliest instant at which anything may be due."""

    start: datetime
    earliest: datetime


def _apply(ttl: timedelta | None, webhook_url: str | None, clock: _Clock) -> Retention:
    """Apply the wish in *webhook_url*, or else *ttl*."""
    if not webhook_url or ("?" not in webhook_url and "#" not in webhook_url):
        return _apply_ttl(ttl, clock, DEFAULT_RULE)
    try:
        return _apply_overrides(ttl, _read_overrides(webhook_url), clock)
    except ValueError:
        fallback = _apply_ttl(ttl, clock, DEFAULT_RULE)
        reason = "the wish in its webhookUrl cannot be read"
        return Retention("unreadable wish", fallback.ttl, fallback.due_at, hold_reason=reason)


def _read_overrides(webhook_url: str) -> dict[str, str]:
    """Return the wishes by name.

    Raises: ValueError where one stands twice, two may contradict, or a name is a slip of the pen.
    """
    parts = urlsplit(webhook_url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    # Behind a # it reaches nobody.
    slips = [name for name, _ in parse_qsl(parts.fragment.rpartition("?")[2], keep_blank_values=True)]
    slips = [name for name in slips if name in _OVERRIDES or _is_typo(name)]
    slips += [name for name, _ in pairs if name not in _OVERRIDES and _is_typo(name)]
    wishes = {name: value for name, value in pairs if name in _OVERRIDES}
    if slips or len(wishes) != sum(name in _OVERRIDES for name, _ in pairs) or {"ttl", "expires"} <= wishes.keys():
        raise ValueError("two wishes that may contradict, or one that is misspelt")
    return wishes


def _is_typo(name: str) -> bool:
    """Whether *name* looks like a wish written wrong: other case, an escaped ``&``, or a letter off."""
    plain = name.strip().lower().removeprefix("amp;")
    return any(_shortened_by_one(plain) & _shortened_by_one(wish) for wish in _OVERRIDES)


def _shortened_by_one(word: str) -> set[str]:
    """Return *word* and what is left of it without any one letter: words that are one slip apart share one of these."""
    return {word} | {word[:index] + word[index + 1 :] for index in range(min(len(word), 10))}


def _apply_overrides(ttl: timedelta | None, wishes: dict[str, str], clock: _Clock) -> Retention:
    """Apply the wishes: a hold stands beside the due time that a release would bring back."""
    if "ttl" in wishes:
        timed = _apply_ttl(parse_ttl(wishes["ttl"]), clock, "wish: ttl")
    elif "expires" in wishes:
        due_at = max(_parse_instant(wishes["expires"]), clock.earliest)
        timed = Retention("wish: expires", due_at - clock.start, due_at)
    else:
        timed = _apply_ttl(ttl, clock, DEFAULT_RULE)
    if "hold" in wishes:
        reason = wishes["hold"].replace("\0", "")[:500]  # NUL: PostgreSQL cannot hold it
        return Retention("wish: hold", timed.ttl, timed.due_at, hold_reason=reason or "no reason given")
    return timed


def _apply_ttl(ttl: timedelta | None, clock: _Clock, rule: str) -> Retention:
    if ttl is None:
        return Retention(rule, None, None)
    due_at = max(clock.start + ttl, clock.earliest)
    return Retention(rule, due_at - clock.start, due_at)


def _parse_instant(text: str) -> datetime:
    """Read an ISO 8601 instant with its offset; a local time is refused, for its zone would be a guess."""
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None or not 2000 <= instant.year <= 2200:
        raise ValueError("an instant with its offset, such as 2026-12-31T00:00:00Z")
    return instant.astimezone(UTC)
