"""When a generation may go, when to try again, and when to give up: pure decisions that take the time as *now*."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from service.lifecycle import Move

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)
DURATION_FORMS: Final = "a number with a unit: 90s, 15m, 24h, 7d, 2w"

_WISHES: Final = frozenset({"ttl", "expires", "hold"})
# The rule of what has no wish of its own.
WITHOUT_WISH: Final = "MAYFLY_TTL"

# Beyond it an instant might not fit a database column; nobody means it either.
MAX_TTL: Final = timedelta(days=36500)

MIN_BACKOFF: Final = timedelta(seconds=5)
MAX_BACKOFF: Final = timedelta(hours=1)
MIN_RETRY_AFTER: Final = timedelta(seconds=1)
MAX_RETRY_AFTER: Final = timedelta(hours=24)
# A 4xx that is about the request itself will not change by waiting; a few tries tell it from a deploy gone wrong.
MAX_REFUSALS: Final = 5
# A record that takes its worker down each time must not take down every worker in a tight loop.
MAX_FREE_LOSSES: Final = 3


def parse_duration(text: str) -> timedelta:
    """Read ``90s``, ``15m``, ``24h``, ``7d`` or ``2w``; a bare number is refused, for its unit would be a guess.

    Raises: ValueError, which says what is accepted and does not repeat *text*.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(DURATION_FORMS)
    number, unit = match.groups()
    try:
        duration = timedelta(**{_UNITS[unit]: int(number)})
    except OverflowError:
        duration = timedelta.max
    if duration > MAX_TTL:
        raise ValueError(f"{DURATION_FORMS}; at most 100 years")
    return duration


def format_duration(seconds: int) -> str:
    """Write whole *seconds* in their largest fitting unit: the inverse of parse_duration."""
    for unit, size in (("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def parse_ttl(text: str) -> timedelta | None:
    """Read a duration, or ``forever`` as None.

    Raises: ValueError, which says what is accepted.
    """
    if text.strip() == "forever":
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{error}, or forever") from None


@dataclass(frozen=True, slots=True)
class Policy:
    """How long terminal generations are kept: *ttl* (None: forever) without a wish, never under *min_ttl*."""

    ttl: timedelta | None
    min_ttl: timedelta


@dataclass(frozen=True, slots=True)
class Retention:
    """What the policy makes of one generation: *due_at* None means it is kept; *rule* names what decided."""

    rule: str
    ttl: timedelta | None
    due_at: datetime | None
    hold_reason: str | None = None

    def is_later_than(self, due_at: datetime | None) -> bool:
        """Whether this keeps the generation longer than *due_at* does; None is for ever."""
        return due_at is not None and (self.due_at is None or self.due_at > due_at)


def decide(policy: Policy, *, webhook_url: str | None, sent_at: datetime, now: datetime) -> Retention:
    """Decide how long a terminal generation is kept, by its own wish or else by *policy*.

    The wish stands in the query of the signed body's *webhook_url*: ``ttl``, ``expires`` or ``hold``. A wish that
    cannot be read, or looks like a slip of the pen, keeps the generation on hold, for a person to look at. The clock
    starts at *sent_at*, the signed send time, or at *now* if that is earlier; nothing is due before the policy's
    min_ttl from now.
    """
    return _decide(policy.ttl, webhook_url, _Clock(min(sent_at, now), now + policy.min_ttl))


def reconsider(*, rule: str, due_at: datetime, ttl: timedelta | None, webhook_url: str | None) -> Retention | None:
    """Decide again once the API shows the *webhook_url* of a generation whose webhook had none, or none with a wish.

    *rule*, *due_at* and *ttl* are the record's. None: it stays due; what the wish says can only keep it longer.
    """
    if rule != WITHOUT_WISH or ttl is None:
        return None
    found = _decide(ttl, webhook_url, _Clock(due_at - ttl, due_at))
    return found if found.hold_reason is not None or found.is_later_than(due_at) else None


@dataclass(frozen=True, slots=True)
class _Clock:
    """When the time began to run, and the earliest instant at which anything may be due."""

    start: datetime
    earliest: datetime


def _decide(ttl: timedelta | None, webhook_url: str | None, clock: _Clock) -> Retention:
    """Apply the wish in *webhook_url*, or else *ttl*."""
    try:
        return _by_wish(ttl, _wishes(webhook_url or ""), clock)
    except ValueError:
        fallback = _by_ttl(ttl, clock, WITHOUT_WISH)
        reason = "the wish in its webhookUrl cannot be read"
        return Retention("unreadable wish", fallback.ttl, fallback.due_at, hold_reason=reason)


def _wishes(webhook_url: str) -> dict[str, str]:
    """Return the wishes by name.

    Raises: ValueError where one stands twice, two may contradict, or a name is a slip of the pen.
    """
    if "?" not in webhook_url and "#" not in webhook_url:
        return {}
    parts = urlsplit(webhook_url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    # Behind a # it reaches nobody.
    slips = [name for name, _ in parse_qsl(parts.fragment.rpartition("?")[2], keep_blank_values=True)]
    slips = [name for name in slips if name in _WISHES or _is_slip(name)]
    slips += [name for name, _ in pairs if name not in _WISHES and _is_slip(name)]
    wishes = {name: value for name, value in pairs if name in _WISHES}
    if slips or len(wishes) != sum(name in _WISHES for name, _ in pairs) or {"ttl", "expires"} <= wishes.keys():
        raise ValueError("two wishes that may contradict, or one that is misspelt")
    return wishes


def _is_slip(name: str) -> bool:
    """Whether *name* looks like a wish written wrong: other case, an escaped ``&``, or a letter off."""
    plain = name.strip().lower().removeprefix("amp;")
    return any(_less_one(plain) & _less_one(wish) for wish in _WISHES)


def _less_one(word: str) -> set[str]:
    """Return *word* and what is left of it without any one letter: words that are one slip apart share one of these."""
    return {word} | {word[:index] + word[index + 1 :] for index in range(min(len(word), 10))}


def _by_wish(ttl: timedelta | None, wishes: dict[str, str], clock: _Clock) -> Retention:
    """Apply the wishes: a hold stands beside the due time that a release would bring back."""
    if "ttl" in wishes:
        timed = _by_ttl(parse_ttl(wishes["ttl"]), clock, "wish: ttl")
    elif "expires" in wishes:
        due_at = max(_instant(wishes["expires"]), clock.earliest)
        timed = Retention("wish: expires", due_at - clock.start, due_at)
    else:
        timed = _by_ttl(ttl, clock, WITHOUT_WISH)
    if "hold" in wishes:
        reason = wishes["hold"].replace("\0", "")[:500]  # NUL: PostgreSQL cannot hold it
        return Retention("wish: hold", timed.ttl, timed.due_at, hold_reason=reason or "no reason given")
    return timed


def _by_ttl(ttl: timedelta | None, clock: _Clock, rule: str) -> Retention:
    if ttl is None:
        return Retention(rule, None, None)
    due_at = max(clock.start + ttl, clock.earliest)
    return Retention(rule, due_at - clock.start, due_at)


def _instant(text: str) -> datetime:
    """Read an ISO 8601 instant with its offset; a local time is refused, for its zone would be a guess."""
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None or not 2000 <= instant.year <= 2200:
        raise ValueError("an instant with its offset, such as 2026-12-31T00:00:00Z")
    return instant.astimezone(UTC)


class Verdict(StrEnum):
    """What one answer of the API means for the generation it was asked about."""

    DONE = "done"  # 2xx with the generation asked for
    GONE = "gone"  # 404, 410: there is nothing left to delete
    RUNNING = "running"  # still processing: by its status, or a 409
    RETRY = "retry"  # 429, 5xx, network, timeout, redirect, unreadable: says nothing of the generation
    REFUSED = "refused"  # another 4xx: this row's own trouble
    UNAUTHORIZED = "unauthorized"  # 401, 403: the key's trouble, not the row's


class Outcome(StrEnum):
    """How a record came to be deleted."""

    DELETED = "deleted"  # the API confirmed our DELETE
    ALREADY_GONE = "already_gone"  # the API no longer knew it


@dataclass(frozen=True, slots=True)
class Progress:
    """How the attempts at one record went so far."""

    failing_since: datetime | None  # the first of the failures in a row; None after none
    failures: int
    refusals: int


def waited(progress: Progress, late: timedelta) -> Progress:
    """Return *progress* for an attempt that begins *late*: that it could not be made is no time of failing."""
    if progress.failing_since is None or late <= timedelta(0):
        return progress
    return Progress(progress.failing_since + late, progress.failures, progress.refusals)


@dataclass(frozen=True, slots=True)
class Step:
    """What one attempt leads to; *retry_at* is set for a DEFER, *outcome* for a CONFIRM."""

    move: Move
    progress: Progress
    retry_at: datetime | None = None
    outcome: Outcome | None = None


def after_attempt(
    verdict: Verdict,
    progress: Progress,
    *,
    now: datetime,
    give_up_after: timedelta,
    retry_after: timedelta | None,
    jitter: float,
) -> Step:
    """Decide what the *verdict* that ended an attempt leads to.

    *retry_after* is what the API asked for, *jitter* a random number from 0 to 1. A retryable failure is given up by
    age alone, never by count; a refusal after a few; trouble with the key uses nothing up.
    """
    if verdict is Verdict.DONE or verdict is Verdict.GONE:
        outcome = Outcome.DELETED if verdict is Verdict.DONE else Outcome.ALREADY_GONE
        return Step(Move.CONFIRM, progress, outcome=outcome)
    if verdict is Verdict.UNAUTHORIZED:
        wait = backoff(1, retry_after=retry_after, jitter=jitter)
        return Step(Move.DEFER, Progress(None, 0, progress.refusals), retry_at=now + wait)
    refusals = progress.refusals + 1 if verdict is Verdict.REFUSED else 0
    since = progress.failing_since or now
    later = Progress(since, progress.failures + 1, refusals)
    if refusals >= MAX_REFUSALS or now - since >= give_up_after:
        return Step(Move.GIVE_UP, later)
    return Step(Move.DEFER, later, retry_at=now + backoff(later.failures, retry_after=retry_after, jitter=jitter))


def backoff(failures: int, *, retry_after: timedelta | None, jitter: float) -> timedelta:
    """Return how long to wait after the *failures*-th failure in a row, which counts from 1.

    Exponential from 5 s to 1 h with full jitter, but never under 2.5 s; what the API asked for, clamped to
    1 s … 24 h, is never undercut.
    """
    ceiling = min(MAX_BACKOFF, MIN_BACKOFF * (1 << min(failures - 1, 20)))
    wait = MIN_BACKOFF / 2 + (ceiling - MIN_BACKOFF / 2) * jitter
    if retry_after is None:
        return wait
    asked = throttle(retry_after)
    # A tenth on top spreads the rows that were all told the same moment.
    return asked + min(asked / 10, timedelta(seconds=30)) * jitter


def throttle(retry_after: timedelta | None) -> timedelta:
    """Return how long all calls wait after a 429 that asked for *retry_after*."""
    return MIN_BACKOFF if retry_after is None else min(max(retry_after, MIN_RETRY_AFTER), MAX_RETRY_AFTER)


def after_lost_lease(progress: Progress, *, now: datetime) -> Step:
    """Decide when a record is tried again whose worker died: at once, and slower only if that keeps happening.

    It is never given up for it: restarts of ours are not the generation's fault.
    """
    failures = progress.failures + 1
    wait = (
        timedelta(0) if failures <= MAX_FREE_LOSSES else backoff(failures - MAX_FREE_LOSSES, retry_after=None, jitter=1)
    )
    return Step(Move.LOSE_LEASE, Progress(progress.failing_since, failures, progress.refusals), retry_at=now + wait)
