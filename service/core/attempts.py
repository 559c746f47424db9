"""What follows from an attempt to delete: done, retry and when, or give up. Pure decisions that take *now*."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from service.core.lifecycle import Move

MIN_BACKOFF: Final = timedelta(seconds=5)
MAX_BACKOFF: Final = timedelta(hours=1)
MIN_RETRY_AFTER: Final = timedelta(seconds=1)
MAX_RETRY_AFTER: Final = timedelta(hours=24)
# Waiting does not change a 4xx about the request itself. A few tries tell it from a faulty deploy of the API.
MAX_REFUSALS: Final = 5
# A record that crashes its worker each time must not crash all workers in a tight loop.
MAX_FREE_LOSSES: Final = 3
ANSWER_LOST: Final = "answer lost, confirmed by a later 404"
# The API may not show a generation at once that was just created.
SHOWN_WITHIN: Final = timedelta(minutes=1)


class Verdict(StrEnum):
    """What one answer of the API means for the generation it was asked about."""

    DONE = "done"  # 2xx with the generation asked for
    GONE = "gone"  # 404, 410 with the API's own generation_not_found: there is nothing left to delete
    RUNNING = "running"  # still processing: by its status, or a 409
    RETRY = "retry"  # 429, 5xx, any other 404, network, timeout, redirect, unreadable: says nothing about it
    REFUSED = "refused"  # another 4xx: concerns this record alone
    UNAUTHORIZED = "unauthorized"  # 401, 402, 403: concerns the key, unless a call about no generation is accepted


class Outcome(StrEnum):
    """How a record came to be deleted."""

    DELETED = "deleted"  # the API confirmed our DELETE, or no longer knew it after a DELETE whose answer was lost
    ALREADY_GONE = "already_gone"  # the API no longer knew it


@dataclass(frozen=True, slots=True)
class Progress:
    """The failures of one record so far."""

    failing_since: datetime | None  # the first failure of the current series; None without one
    failures: int
    refusals: int


def exclude_wait(progress: Progress, delay: timedelta) -> Progress:
    """Return *progress* for an attempt that starts after *delay*: time paused or without a worker does not count."""
    if progress.failing_since is None or delay <= timedelta(0):
        return progress
    return Progress(progress.failing_since + delay, progress.failures, progress.refusals)


@dataclass(frozen=True, slots=True)
class Step:
    """What follows from one attempt; *retry_at* is set for a DEFER, *outcome* for a CONFIRM, *detail* explains it."""

    move: Move
    progress: Progress
    retry_at: datetime | None = None
    outcome: Outcome | None = None
    detail: str | None = None


def describe_unknown_id(account: str) -> str:
    """Say that no such generation was ever seen; a sentence without its full stop, for a record's last error."""
    return (
        f"sync.so does not know this id, and never showed it: check the id, and that it belongs to the organisation of "
        f"account {account}; then mayfly records retry asks again"
    )


def is_wrong_id(added_at: datetime, *, now: datetime) -> bool:
    """Whether an id that was added at *added_at*, and that the API never showed and does not know, is a wrong one."""
    return now - added_at >= SHOWN_WITHIN


def after_attempt(
    verdict: Verdict,
    progress: Progress,
    *,
    now: datetime,
    give_up_after: timedelta,
    retry_after: timedelta | None,
    jitter: float,
    has_unanswered_delete: bool = False,
    unseen_since: datetime | None = None,
) -> Step:
    """Decide what follows from the *verdict* that ended an attempt.

    *retry_after* is what the API asked for, *jitter* a random number from 0 to 1. A retryable failure is given up
    because of its age, never because of a count. A refusal is given up after MAX_REFUSALS. A refused key counts as
    neither. *has_unanswered_delete*: an earlier attempt may have sent its DELETE, and the answer is not known.
    *unseen_since*: its id was added then, and neither the API nor a webhook has ever shown it. It is not called gone.
    """
    if verdict is Verdict.DONE:
        return Step(Move.CONFIRM, progress, outcome=Outcome.DELETED)
    if verdict is Verdict.GONE and has_unanswered_delete:
        return Step(Move.CONFIRM, progress, outcome=Outcome.DELETED, detail=ANSWER_LOST)
    if verdict is Verdict.GONE and unseen_since is None:
        return Step(Move.CONFIRM, progress, outcome=Outcome.ALREADY_GONE)
    if verdict is Verdict.UNAUTHORIZED:
        wait = backoff(1, retry_after=retry_after, jitter=jitter)
        return Step(Move.DEFER, Progress(None, 0, progress.refusals), retry_at=now + wait)
    refusals = progress.refusals + 1 if verdict is Verdict.REFUSED else 0
    since = progress.failing_since or now
    later = Progress(since, progress.failures + 1, refusals)
    is_wrong = verdict is Verdict.GONE and unseen_since is not None and is_wrong_id(unseen_since, now=now)
    if is_wrong or refusals >= MAX_REFUSALS or now - since >= give_up_after:
        return Step(Move.GIVE_UP, later)
    return Step(Move.DEFER, later, retry_at=now + backoff(later.failures, retry_after=retry_after, jitter=jitter))


def backoff(failures: int, *, retry_after: timedelta | None, jitter: float) -> timedelta:
    """Return how long to wait after *failures* failures in a row, 1 or more.

    Exponential from 5 s to 1 h with full jitter, but at least 2.5 s. A *retry_after* is clamped to 1 s … 24 h, and
    the wait is never shorter than that.
    """
    ceiling = min(MAX_BACKOFF, MIN_BACKOFF * (1 << min(failures - 1, 20)))
    wait = MIN_BACKOFF / 2 + (ceiling - MIN_BACKOFF / 2) * jitter
    if retry_after is None:
        return wait
    asked = throttle_duration(retry_after)
    # A tenth on top spreads the records that were given the same time.
    return asked + min(asked / 10, timedelta(seconds=30)) * jitter


def throttle_duration(retry_after: timedelta | None) -> timedelta:
    """Return how long all calls stop after a 429 that asked for *retry_after*."""
    return MIN_BACKOFF if retry_after is None else min(max(retry_after, MIN_RETRY_AFTER), MAX_RETRY_AFTER)


def after_lost_lease(progress: Progress, *, now: datetime) -> Step:
    """Decide when to retry a record whose worker died: at once, and later if that keeps happening.

    It is never given up for this reason: a restart of a worker says nothing about the generation.
    """
    failures = progress.failures + 1
    wait = (
        timedelta(0) if failures <= MAX_FREE_LOSSES else backoff(failures - MAX_FREE_LOSSES, retry_after=None, jitter=1)
    )
    return Step(Move.LOSE_LEASE, Progress(progress.failing_since, failures, progress.refusals), retry_at=now + wait)
