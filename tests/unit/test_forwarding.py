"""Which targets get a webhook, when a delivery is tried again, and what an answer means for it."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.forwarding import (
    GIVE_UP_AFTER,
    MAX_ATTEMPTS,
    WAITS,
    DeliveryState,
    Outcome,
    Reply,
    Target,
    choose_targets,
    judge_reply,
    wait_after,
)
from service.core.generation import read_generation
from service.core.matchers import Pattern, Texts
from service.core.secret import Secret

HOUR = timedelta(hours=1)
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def texts(name: str, *patterns: str):
    return Texts(name, tuple(Pattern.of(text) for text in patterns))


def target(*matchers: Texts, name="crm"):
    return Target(name, Secret("https://crm.example.com/hooks"), matchers)


def chosen(*targets: Target, account="default", **fields):
    body = json.dumps({"id": "g-1", "status": "COMPLETED"} | fields).encode()
    return [one.id for one in choose_targets(targets, account, read_generation(body))]


# The schedule


def test_the_schedule_is_that_of_standard_webhooks_and_spans_three_days():
    assert [wait / SECOND for wait in WAITS] == [5, 60, 300, 1800, 7200, 18000, 36000, 50400, 72000, 72000]
    assert MAX_ATTEMPTS == 11
    assert timedelta(days=2.9) < sum(WAITS, timedelta(0)) < GIVE_UP_AFTER < timedelta(days=3.5)


@pytest.mark.parametrize("attempts", range(1, MAX_ATTEMPTS))
def test_each_failed_attempt_but_the_last_is_followed_by_its_wait(attempts):
    outcome = judge_reply(Reply(503), attempts=attempts, jitter=0.0)

    assert outcome == Outcome(DeliveryState.WAITING, WAITS[attempts - 1], "answered 503")


def test_the_eleventh_failed_attempt_is_the_last():
    for attempts in (11, 12, 30):
        outcome = judge_reply(Reply(None, error="not reached: ConnectError"), attempts=attempts, jitter=0.5)

        assert outcome.state is DeliveryState.FAILED
        assert outcome.wait is None
        assert outcome.error == f"no 2xx in {attempts} attempts; the last: not reached: ConnectError"


def test_the_last_attempt_may_succeed_and_the_one_after_a_lost_lease_as_well():
    assert judge_reply(Reply(204), attempts=40, jitter=1.0) == Outcome(DeliveryState.DELIVERED)


@given(st.integers(1, 20), st.floats(0, 1))
def test_jitter_makes_a_wait_longer_by_up_to_a_fifth(attempts, jitter):
    scheduled = WAITS[min(attempts, 10) - 1]

    assert scheduled <= wait_after(attempts, None, jitter=jitter) <= scheduled * 1.2


@pytest.mark.parametrize(
    ("asked", "attempts", "wait"),
    [
        (timedelta(seconds=7), 1, timedelta(seconds=7)),
        (timedelta(seconds=2), 1, timedelta(seconds=5)),
        (timedelta(seconds=0), 1, timedelta(seconds=5)),
        (timedelta(days=-400), 3, timedelta(minutes=5)),
        (timedelta(hours=1), 3, timedelta(hours=1)),
        (timedelta(days=400), 1, timedelta(hours=24)),
        (timedelta(hours=24), 10, timedelta(hours=24)),
    ],
)
def test_retry_after_makes_a_wait_longer_within_a_day_and_never_shorter(asked, attempts, wait):
    assert wait_after(attempts, asked, jitter=0.0) == wait
    for status in (429, 503, 500, 404):
        assert judge_reply(Reply(status, retry_after=asked), attempts=attempts, jitter=0.0).wait == wait


# What an answer means


@pytest.mark.parametrize("status", [200, 201, 202, 204, 226, 299])
def test_each_2xx_is_a_success(status):
    assert judge_reply(Reply(status, "whatever it says"), attempts=1, jitter=0.0) == Outcome(DeliveryState.DELIVERED)


@pytest.mark.parametrize("status", [100, 199, 300, 304, 400, 401, 403, 404, 408, 409, 418, 429, 500, 502, 504, 599])
def test_everything_else_is_tried_again(status):
    outcome = judge_reply(Reply(status, "its text"), attempts=1, jitter=0.0)

    assert outcome.state is DeliveryState.WAITING
    assert outcome.error is not None
    assert outcome.error.startswith(f"answered {status}")
    assert "its text" not in outcome.error


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_no_success_and_says_why(status):
    outcome = judge_reply(Reply(status), attempts=1, jitter=0.0)

    assert outcome.state is DeliveryState.WAITING
    assert outcome.error == f"answered {status}, a redirect, which is not followed"


@pytest.mark.parametrize("attempts", [1, 5, 11])
def test_410_ends_this_delivery_at_once(attempts):
    outcome = judge_reply(Reply(410, retry_after=HOUR), attempts=attempts, jitter=0.0)

    assert outcome == Outcome(DeliveryState.FAILED, None, "answered 410: it does not want this webhook")


def test_without_an_answer_the_error_is_kept():
    assert judge_reply(Reply(None, error="no answer within 15 s"), attempts=1, jitter=0.0).error == (
        "no answer within 15 s"
    )
    assert judge_reply(Reply(None), attempts=1, jitter=0.0).error == "no answer"


@pytest.mark.parametrize(
    ("state", "label"),
    [
        (DeliveryState.DELIVERED, "delivered"),
        (DeliveryState.WAITING, "deferred"),
        (DeliveryState.FAILED, "failed"),
    ],
)
def test_each_outcome_has_its_label(state, label):
    assert Outcome(state).label == label


@given(st.integers(100, 599) | st.none(), st.integers(1, 50), st.floats(0, 1), st.timedeltas() | st.none())
def test_only_a_waiting_delivery_has_a_wait_and_only_a_delivered_one_no_error(status, attempts, jitter, retry_after):
    outcome = judge_reply(Reply(status, retry_after=retry_after), attempts=attempts, jitter=jitter)

    assert (outcome.wait is not None) == (outcome.state is DeliveryState.WAITING)
    assert (outcome.error is None) == (outcome.state is DeliveryState.DELIVERED)
    assert (outcome.state is DeliveryState.DELIVERED) == (status is not None and 200 <= status < 300)
    if outcome.wait is not None:
        assert timedelta(seconds=5) <= outcome.wait <= timedelta(hours=24)


# Which targets


def test_a_target_without_matchers_gets_every_webhook():
    everything = target()

    for status in ("COMPLETED", "FAILED", "PROCESSING", "PENDING", "A_NEW_ONE"):
        assert chosen(everything, status=status) == ["crm"]
        assert chosen(everything, status=status, metrics={"total": 2}) == ["crm"]


def test_without_targets_no_webhook_has_one():
    assert chosen() == []


def test_a_target_gets_the_statuses_that_it_names():
    ended = target(texts("status", "COMPLETED", "FAILED"))

    assert chosen(ended) == chosen(ended, status="FAILED") == ["crm"]
    assert chosen(ended, status="PROCESSING") == chosen(ended, status="completed") == []


def test_a_target_gets_running_webhooks_if_it_names_them():
    running = target(texts("status", "P*ING"))

    assert chosen(running, status="PROCESSING") == chosen(running, status="PENDING") == ["crm"]
    assert chosen(running) == []


def test_a_batch_is_matched_by_its_status_too():
    ended = target(texts("status", "COMPLETED"))

    assert chosen(ended, metrics={"total": 2}) == ["crm"]
    assert chosen(ended, status="PROCESSING", metrics={"total": 2}) == []


def test_a_target_gets_the_accounts_that_it_names():
    studio = target(texts("account", "studio*"))

    assert chosen(studio, account="studio-2") == ["crm"]
    assert chosen(studio) == []


def test_a_target_gets_the_labels_that_it_names_all_of_them():
    acme = target(texts("label.customer", "acme*"), texts("label.kind", "film"))
    url = "https://hooks.example.com/webhooks/sync?label.customer=acme-eu"

    assert chosen(acme, webhookUrl=f"{url}&label.kind=film") == ["crm"]
    assert chosen(acme, webhookUrl=url) == []
    assert chosen(acme, webhookUrl=None) == chosen(acme) == chosen(acme, webhookUrl="") == []


@pytest.mark.parametrize(
    "url",
    [
        *("https://[", "no url", "https://x/?expires=never-ever", "https://x/?label.=x", "https://x/?ttl=5"),
        "https://x:99999/?label.customer=acme",
        f"https://x/?label.customer={'a' * 5000}",
    ],
)
def test_an_invalid_override_has_no_labels_and_loses_no_target(url):
    assert chosen(target(), target(texts("label.customer", "acme"), name="acme"), webhookUrl=url)[0] == "crm"


def test_each_target_is_chosen_by_itself_in_the_order_of_the_file():
    failures = target(texts("status", "FAILED"), name="failures")
    everything, ended = target(name="all"), target(texts("status", "COMPLETED"), name="ended")

    assert chosen(failures, everything, ended) == ["all", "ended"]
    assert chosen(ended, everything, failures, status="FAILED") == ["all", "failures"]


def test_no_representation_of_a_target_shows_its_url_or_its_secrets():
    shown = repr(Target("crm", Secret("https://crm.example.com/h?token=s3cr3t"), secrets=(Secret("whsec_hidden"),)))

    assert "s3cr3t" not in shown
    assert "example.com" not in shown
    assert "hidden" not in shown
