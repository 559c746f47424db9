"""Explanations: what becomes of a record, which rule decided, what blocks it and what can be done."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace as replace_delivery

from service.core.explaining import Facts, Surroundings, explain_record, explain_unseen, find_obstacles
from service.core.forwarding import DeliveryState
from service.core.holding import Hold
from service.core.lifecycle import State
from service.core.obstacles import Obstacle
from service.core.requiring import OpenDelivery, describe_failed

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
FACTS = Facts(
    id="g1",
    state=State.SCHEDULED,
    status="COMPLETED",
    rule="MAYFLY_TTL",
    ttl="24h",
    due_at=NOW + HOUR,
    wake_at=NOW + HOUR,
    attempts=0,
    is_copied=False,
    has_copy=False,
    outcome=None,
    deleted_at=None,
    last_error=None,
    hold=None,
    look_at=None,
    looks=0,
)
AROUND = Surroundings(NOW, (), is_dry_run=False, worker_seen_at=NOW, ahead=0)
LATE = {"due_at": NOW - HOUR, "wake_at": NOW - HOUR}


WAITING = OpenDelivery(
    1, "d1", "crm", DeliveryState.WAITING, NOW - HOUR, attempts=2, next_at=NOW + HOUR, error="answered 500"
)
ENDED = replace_delivery(WAITING, state=DeliveryState.FAILED, next_at=None)
UNTRIED = replace_delivery(WAITING, attempts=0, error=None)


def pause(kind, *, until=None, actor="ann", reason="audit"):
    return Obstacle(kind, NOW - HOUR, actor, reason, until)


def explained(facts=None, **around):
    found, surroundings = replace(FACTS, **(facts or {})), replace(AROUND, **around)
    return explain_record(found, find_obstacles(found, surroundings), surroundings)


def kinds(facts=None, **around):
    return [one.kind for one in find_obstacles(replace(FACTS, **(facts or {})), replace(AROUND, **around))]


@pytest.mark.parametrize(
    ("facts", "sentences"),
    [
        (
            {},
            [
                "is scheduled.",
                "due at 2026-03-01 13:00:00 UTC: MAYFLY_TTL decided this, 24h after its webhook",
            ],
        ),
        ({"rule": "override: ttl"}, ["the override ttl in its webhookUrl decided this"]),
        ({"rule": "invalid override"}, ["because its override is invalid"]),
        ({"rule": "rule: fast", "ttl": "1h"}, ["the rule fast of MAYFLY_CONFIG decided this, 1h after"]),
        ({"rule": "released by ann", "ttl": "1m"}, ["ann released it, due after 1m"]),
        (LATE, ["Its next attempt is due now, and no other record is due before it."]),
        (
            {**LATE, "wake_at": NOW + HOUR, "attempts": 3, "last_error": "the API answered 500"},
            ["Attempt 3 did not delete it: the API answered 500.", "The next attempt is at 2026-03-01 13:00:00 UTC."],
        ),
        ({"look_at": NOW}, ["The early look at the API, which fills the record, is due at"]),
        ({"look_at": NOW, "looks": 2}, ["failed 2 times and is tried again at 2026-03-01 12:00:00 UTC"]),
        (
            {"state": State.DELETING, "attempts": 1, "wake_at": NOW + HOUR},
            ["being deleted now", "makes attempt 1", "so a hold still stops it"],
        ),
        ({"state": State.DELETING, "attempts": 1, "is_copied": True}, ["so a hold comes too late"]),
        (
            {"state": State.HELD, "wake_at": None, "hold": Hold("ann", "audit", None)},
            [
                "is on hold.",
                "held by ann (audit)",
                "until an operator releases",
                "its due time is",
                "records release g1",
            ],
        ),
        (
            {"state": State.HELD, "hold": Hold("ann", None, NOW + HOUR)},
            ["held by ann until 2026-03-01 13:00:00 UTC.", "no earlier than MAYFLY_MIN_TTL later"],
        ),
        (
            {"state": State.HELD, "due_at": None, "hold": Hold("ann", None, NOW)},
            ["hold has ended, it is kept."],
        ),
        ({"state": State.KEPT, "due_at": None, "rule": "kept by ann", "ttl": None}, ["never deleted: ann kept it."]),
        (
            {"state": State.KEPT, "rule": "override: ttl", "ttl": None},
            ["the override ttl in its", "release g1"],
        ),
        (
            {"state": State.FAILED, "attempts": 5, "last_error": "the API answered 400"},
            ["given up and needs an operator", "after 5 attempts; the last error: the API answered 400", "retry g1"],
        ),
        (
            {"state": State.DELETED, "outcome": "deleted", "deleted_at": NOW, "has_copy": True},
            ["sync.so confirmed the deletion at 2026-03-01 12:00:00 UTC", "The record stays"],
        ),
        ({"state": State.DELETED, "outcome": "already_gone"}, ["did not know it any more", "mayfly records reopen g1"]),
        ({"state": State.DELETED, "outcome": "already_gone", "has_copy": True}, ["The record stays, with its copy."]),
    ],
)
def test_each_state_says_what_comes_next_and_which_rule_decided(facts, sentences):
    text = explained(facts)

    assert [one for one in sentences if one not in text] == []
    assert text.startswith("Generation g1 (COMPLETED) is ")
    assert "Not deleted now" not in text


@pytest.mark.parametrize(
    ("around", "kind", "sentence"),
    [
        (
            {"pauses": [pause("operator")]},
            "operator",
            "since 2026-03-01 11:00:00 UTC by ann: audit. mayfly resume",
        ),
        ({"pauses": [pause("unauthorized")]}, "unauthorized", "check SYNC_API_KEY"),
        ({"pauses": [pause("daily_limit", until=NOW)]}, "daily_limit", "Deletions go on at 2026-03-01 12:00:00 UTC"),
        ({"pauses": [pause("wrong_organisation")]}, "wrong_organisation", "knows no generation"),
        ({"pauses": [pause("throttled", until=NOW)]}, "throttled", "no calls until 2026-03-01 12:00:00 UTC"),
        ({"pauses": [pause("circuit", reason="{x}")]}, "circuit", "deletions are paused (circuit) since"),
        ({"is_dry_run": True}, "dry_run", "MAYFLY_DRY_RUN is set here"),
        ({"worker_seen_at": None}, "no_worker", "no worker has been seen; mayfly up or mayfly worker deletes"),
        ({"worker_seen_at": NOW - 2 * HOUR}, "no_worker", "no worker has been seen for 120 min"),
    ],
)
def test_what_blocks_a_deletion_is_named_with_what_ends_it(around, kind, sentence):
    assert kinds(**around) == [kind]
    assert "Not deleted now: " in explained(**around)
    assert sentence in explained(**around)


@pytest.mark.parametrize("state", [State.KEPT, State.FAILED, State.DELETED])
def test_nothing_blocks_a_record_that_waits_for_no_deletion(state):
    assert kinds({"state": state}, pauses=[pause("operator")], is_dry_run=True, worker_seen_at=None) == []


def test_a_hold_blocks_a_held_record_and_one_whose_hold_no_claim_has_seen():
    hold = Hold("ann", "audit", NOW)

    assert find_obstacles(replace(FACTS, state=State.HELD, hold=hold), AROUND) == [
        Obstacle("hold", None, "ann", "audit", NOW)
    ]
    assert kinds({"hold": hold}) == ["hold"]
    assert "Not deleted now: ann holds it (audit)" in explained({"hold": hold})


@pytest.mark.parametrize(
    ("ahead", "sentence"), [(1, "1 record is due before"), (7, "7 records are"), (10_000, "10000 or more records are")]
)
def test_a_due_record_says_how_many_are_due_before_it(ahead, sentence):
    assert sentence in explained(LATE, ahead=ahead)


def test_a_generation_without_a_record_says_what_to_check():
    text = explain_unseen("g1", None)

    assert "There is no record of generation g1, so Mayfly will not delete it." in text
    assert [
        word for word in ("webhookUrl", "account", "once a generation has ended", "/webhooks/sync") if word not in text
    ] == []


def test_a_generation_that_is_held_before_its_webhook_says_by_whom():
    text = explain_unseen("g1", Hold("ann", "audit", NOW))

    assert "on hold before its first webhook, by ann until 2026-03-01 12:00:00 UTC (audit)" in text
    assert "mayfly records release g1 removes the hold" in text


@pytest.mark.parametrize(
    ("required", "sentences"),
    [
        (
            WAITING,
            [
                "it waits for target crm, which has not taken its webhook of 2026-03-01 11:00:00 UTC",
                "(delivery d1, 2 attempts, the last: answered 500); the next attempt is at 2026-03-01 13:00:00 UTC.",
            ],
        ),
        (UNTRIED, ["(delivery d1, not tried yet)"]),
        (ENDED, ["No attempt follows by itself, and the record fails once it is due: mayfly forwards replay"]),
    ],
)
def test_a_record_says_which_target_has_not_taken_its_webhook(required, sentences):
    facts = {**LATE, "wake_at": NOW + HOUR, "required": (required,)}
    text = explained(facts)

    assert [one for one in sentences if one not in text] == []
    assert kinds(facts) == ["forward"]
    assert "The next attempt is at" not in text


@pytest.mark.parametrize("state", [State.DELETING, State.HELD, State.KEPT, State.DELETED])
def test_a_target_blocks_only_what_is_scheduled(state):
    assert "forward" not in kinds({"state": state, "required": (WAITING,)})


def test_a_record_that_failed_because_of_a_target_says_what_leads_on():
    reason = describe_failed([ENDED])
    text = explained({"state": State.FAILED, "waits_for": "crm", "last_error": reason, "required": (ENDED,)})

    assert f"It is not deleted, because {reason}." in text
    assert "mayfly forwards replay d1 sends it again" in text
    assert "Once crm has answered 2xx, it is scheduled again by itself. mayfly records retry g1" in text
    assert "attempts" not in text


def test_a_reason_names_at_most_three_deliveries():
    many = [replace_delivery(ENDED, id=f"d{number}") for number in range(1, 6)]

    assert describe_failed(many) == (
        "target crm has not taken its webhook (answered 500) and 4 more; mayfly forwards replay d1 d2 d3 sends it again"
    )
    assert "(no attempt succeeded)" in describe_failed([replace_delivery(ENDED, error=None)])
