"""What follows from an attempt: done, a retry and when, or an operator."""

from datetime import UTC, datetime, timedelta

import pytest

from service.core.attempts import (
    ANSWER_LOST,
    MAX_FREE_LOSSES,
    MAX_REFUSALS,
    SHOWN_WITHIN,
    Outcome,
    Progress,
    Step,
    Verdict,
    after_attempt,
    after_lost_lease,
    backoff,
    describe_unknown_id,
)
from service.core.lifecycle import Move

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
WEEK = timedelta(days=7)
FRESH = Progress(None, 0, 0)
LONG_AGO = Progress(NOW - WEEK, 900, 0)
RETRYABLE = [Verdict.RETRY, Verdict.RUNNING]


def judged(verdict, progress=FRESH, *, retry_after=None, jitter=0.5):
    return after_attempt(verdict, progress, now=NOW, give_up_after=WEEK, retry_after=retry_after, jitter=jitter)


@pytest.mark.parametrize("progress", [FRESH, LONG_AGO])
@pytest.mark.parametrize(
    ("verdict", "outcome"), [(Verdict.DONE, Outcome.DELETED), (Verdict.GONE, Outcome.ALREADY_GONE)]
)
def test_a_generation_that_is_gone_is_confirmed_at_any_age(verdict, outcome, progress):
    assert judged(verdict, progress) == Step(Move.CONFIRM, progress, outcome=outcome)


@pytest.mark.parametrize(
    ("verdict", "has_unanswered_delete", "outcome", "detail"),
    [
        (Verdict.DONE, False, Outcome.DELETED, None),
        (Verdict.DONE, True, Outcome.DELETED, None),
        (Verdict.GONE, False, Outcome.ALREADY_GONE, None),
        (Verdict.GONE, True, Outcome.DELETED, ANSWER_LOST),
    ],
)
def test_a_lost_answer_to_our_delete_explains_a_generation_not_found(verdict, has_unanswered_delete, outcome, detail):
    step = after_attempt(
        verdict,
        FRESH,
        now=NOW,
        give_up_after=WEEK,
        retry_after=None,
        jitter=0.5,
        has_unanswered_delete=has_unanswered_delete,
    )

    assert step == Step(Move.CONFIRM, FRESH, outcome=outcome, detail=detail)


@pytest.mark.parametrize("verdict", [*RETRYABLE, Verdict.REFUSED])
def test_the_first_failure_is_deferred_and_starts_the_give_up_clock(verdict):
    step = judged(verdict)

    assert step.move is Move.DEFER
    assert step.progress == Progress(NOW, 1, int(verdict is Verdict.REFUSED))
    assert step.retry_at is not None
    assert step.retry_at > NOW


@pytest.mark.parametrize("verdict", RETRYABLE)
def test_a_retryable_failure_is_never_given_up_because_of_its_count(verdict):
    step = judged(verdict, Progress(NOW - WEEK + timedelta(seconds=1), 10**6, 0))

    assert step.move is Move.DEFER
    assert step.progress.failures == 10**6 + 1
    assert step.progress.failing_since == NOW - WEEK + timedelta(seconds=1)


@pytest.mark.parametrize("verdict", [*RETRYABLE, Verdict.REFUSED])
def test_a_failure_older_than_give_up_after_is_given_up(verdict):
    step = judged(verdict, LONG_AGO)

    assert step.move is Move.GIVE_UP
    assert step.retry_at is None


def test_a_refusal_is_given_up_after_a_few_in_a_row():
    moves, progress = [], FRESH
    for _ in range(MAX_REFUSALS):
        step = judged(Verdict.REFUSED, progress)
        moves.append(step.move)
        progress = step.progress

    assert moves == [Move.DEFER] * (MAX_REFUSALS - 1) + [Move.GIVE_UP]


def test_another_answer_between_refusals_resets_their_count():
    step = judged(Verdict.RETRY, Progress(NOW, 4, MAX_REFUSALS - 1))

    assert step.progress == Progress(NOW, 5, 0)


@pytest.mark.parametrize("progress", [FRESH, LONG_AGO, Progress(NOW - 9 * WEEK, 9, 2)])
def test_a_refused_key_counts_as_no_failure(progress):
    step = judged(Verdict.UNAUTHORIZED, progress)

    assert step.move is Move.DEFER
    assert step.progress == Progress(None, 0, progress.refusals)


def test_retry_after_is_obeyed():
    step = judged(Verdict.RETRY, retry_after=timedelta(minutes=10), jitter=0)

    assert step.retry_at == NOW + timedelta(minutes=10)


@pytest.mark.parametrize(
    ("failures", "low", "high"),
    [(1, 2.5, 5), (2, 2.5, 10), (3, 2.5, 20), (10, 2.5, 2560), (11, 2.5, 3600), (12, 2.5, 3600), (10**9, 2.5, 3600)],
)
def test_the_wait_grows_from_five_seconds_to_an_hour_with_full_jitter(failures, low, high):
    assert backoff(failures, retry_after=None, jitter=0) == timedelta(seconds=low)
    assert backoff(failures, retry_after=None, jitter=1) == timedelta(seconds=high)


@pytest.mark.parametrize(
    ("asked", "low", "high"),
    [(-3600, 1, 1.1), (0, 1, 1.1), (2, 2, 2.2), (600, 600, 630), (86400, 86400, 86430), (10**8, 86400, 86430)],
)
def test_retry_after_is_clamped_and_the_wait_is_never_shorter(asked, low, high):
    assert backoff(5, retry_after=timedelta(seconds=asked), jitter=0) == timedelta(seconds=low)
    assert backoff(5, retry_after=timedelta(seconds=asked), jitter=1) == timedelta(seconds=high)


def test_a_record_whose_worker_died_is_tried_again_at_once():
    step = after_lost_lease(Progress(None, 0, 1), now=NOW)

    assert step == Step(Move.LOSE_LEASE, Progress(None, 1, 1), retry_at=NOW)


def test_a_record_that_crashes_workers_is_retried_more_slowly_and_never_given_up():
    steps, progress = [], Progress(NOW - 9 * WEEK, 0, 0)
    for _ in range(30):
        steps.append(after_lost_lease(progress, now=NOW))
        progress = steps[-1].progress
    waits = [step.retry_at - NOW for step in steps if step.retry_at]

    assert len(waits) == len(steps)
    assert waits[:MAX_FREE_LOSSES] == [timedelta(0)] * MAX_FREE_LOSSES
    assert waits[MAX_FREE_LOSSES:] == sorted(waits[MAX_FREE_LOSSES:])
    assert waits[MAX_FREE_LOSSES] > timedelta(0)
    assert waits[-1] == timedelta(hours=1)
    assert {step.move for step in steps} == {Move.LOSE_LEASE}


@pytest.mark.parametrize(
    ("age", "move"),
    [
        (timedelta(0), Move.DEFER),
        (SHOWN_WITHIN - timedelta(seconds=1), Move.DEFER),
        (SHOWN_WITHIN, Move.GIVE_UP),
        (WEEK, Move.GIVE_UP),
    ],
)
def test_an_added_id_that_was_never_shown_is_given_up_and_never_called_gone(age, move):
    step = after_attempt(
        Verdict.GONE, FRESH, now=NOW, give_up_after=WEEK, retry_after=None, jitter=0.5, unseen_since=NOW - age
    )

    assert (step.move, step.outcome) == (move, None)
    assert (step.retry_at is None) == (move is Move.GIVE_UP)


@pytest.mark.parametrize("verdict", [Verdict.RUNNING, Verdict.RETRY])
def test_other_answers_about_an_added_id_are_as_for_any_record(verdict):
    step = after_attempt(
        verdict, FRESH, now=NOW, give_up_after=WEEK, retry_after=None, jitter=0.5, unseen_since=NOW - WEEK
    )

    assert step == judged(verdict)


def test_the_error_of_a_wrong_id_says_what_to_check_and_names_the_account():
    text = describe_unknown_id("studio")

    assert "sync.so does not know this id" in text
    assert "account studio" in text
    assert "mayfly records retry" in text
