"""What an attempt to delete leads to, when to try again, and when to give up: pure decisions that take *now*."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from service.core.lifecycle import Move

MIN_BACKOFF: Final = timedelta(seconds=5)
MAX_BACKOFF: Final = timedelta(hours=1)
MIN_RETRY_AFTER: Final = timedelta(seconds=1)
MAX_RETRY_AFTER: Final = timedelta(hours=24)
# A 4xx that is about the request itself will not change by waiting; a few tries tell it from a deploy gone wrong.
MAX_REFUSALS: Final = 5
# A record that takes its worker down each time must not take down every worker in a tight loop.
MAX_FREE_LOSSES: Final = 3


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


def exclude_wait(progress: Progress, late: timedelta) -> Progress:
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
    asked = throttle_duration(retry_after)
    # A tenth on top spreads the rows that were all told the same moment.
    return asked + min(asked / 10, timedelta(seconds=30)) * jitter


def throttle_duration(retry_after: timedelta | None) -> timedelta:
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
