"""What is asked for with an id, and what is decided once its generation has ended."""

from datetime import UTC, datetime, timedelta

import pytest

from service.core.asking import read_asked
from service.core.matchers import Facts, Pattern, Texts
from service.core.overrides import InvalidOverrideError
from service.core.refining import decide_ended_retention
from service.core.retention import Bounds, Policy, decide_asked_retention
from service.core.rules import Rule, RuleSet

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
FAILURES = Rule("failures", (Texts("status", (Pattern.of("FAILED"),)),), ttl=HOUR)
FILM = Rule("film", (Texts("project", (Pattern.of("film"),)),), is_forever=True)
COURT = Rule("court", (Texts("project", (Pattern.of("court"),)),), hold="a court asked")
ACME = Rule("acme", (Texts("label.customer", (Pattern.of("acme"),)),), ttl=7 * DAY)


def policy(*rules: Rule, ttl: timedelta | None = DAY, max_ttl=None):
    return Policy(ttl, MINUTE, RuleSet(rules), {"default": Bounds(MINUTE, max_ttl)})


def asked(*rules: Rule, labels=None, max_ttl=None, **given):
    return decide_asked_retention(
        policy(*rules, max_ttl=max_ttl),
        Facts(),
        read_asked(labels=labels or {}, **given),
        by="app",
        now=NOW,
    )


@pytest.mark.parametrize(
    ("given", "rule", "due_in"),
    [
        ({}, "MAYFLY_TTL", DAY),
        ({"ttl": "72h"}, "override: ttl by app", 3 * DAY),
        ({"ttl": "72H "}, "override: ttl by app", 3 * DAY),
        ({"ttl": "1s"}, "override: ttl by app", MINUTE),
        ({"ttl": "forever"}, "override: ttl by app", None),
        ({"expires": "2026-11-30T12:00:00+00:00"}, "override: expires by app", 7 * DAY),
        ({"expires": "2026-11-23"}, "override: expires by app", 12 * HOUR),
        ({"expires": "2020-01-01"}, "override: expires by app", MINUTE),
        ({"hold": "legal"}, "override: hold by app", DAY),
        ({"hold": "False"}, "MAYFLY_TTL", DAY),
        ({"labels": {"customer": "acme"}}, "rule: acme", 7 * DAY),
        ({"labels": {"customer": "acme"}, "ttl": "2h"}, "override: ttl by app", 2 * HOUR),
    ],
)
def test_what_is_asked_for_counts_as_an_override_from_now_on(given, rule, due_in):
    found = asked(FAILURES, FILM, ACME, **given)

    assert (found.rule, found.due_at) == (rule, None if due_in is None else NOW + due_in)
    assert found.hold_reason == ("legal" if given.get("hold") == "legal" else None)
    assert found.labels == given.get("labels", {})


def test_what_is_asked_for_is_cut_to_the_max_ttl_of_the_account():
    found = asked(ttl="forever", max_ttl=30 * DAY)

    assert (found.rule, found.due_at) == ("override: ttl, cut to max_ttl by app", NOW + 30 * DAY)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"ttl": "24"}, "`ttl=24`: a number with a unit: 90s, 15m, 24h, 7d, 2w, or forever"),
        ({"ttl": "0s"}, "`ttl=0s`: more than zero"),
        ({"ttl": ""}, "`ttl`: a number with a unit"),
        ({"ttl": "5M"}, "`ttl=5M`: a number with a unit"),
        ({"expires": "tomorrow"}, "`expires=tomorrow`: an instant with its offset"),
        ({"expires": "2026-12-31T00:00:00"}, "an instant with its offset"),
        ({"ttl": "1h", "expires": "2026-12-31"}, "`ttl and expires`: at most one of ttl, expires and hold"),
        ({"ttl": "1h", "hold": "x"}, "`ttl and hold`: at most one of ttl, expires and hold"),
        ({"labels": {"Customer": "acme"}}, "`label.Customer=acme`: the name of a label has 1 to 63"),
        ({"labels": {"customer": "x" * 256}}, "a label has at most 255 characters"),
        ({"labels": {"customer": "a\x00"}}, "a label has no control characters"),
        ({"labels": {f"n{number}": "" for number in range(21)}}, "there are more than 20 labels"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_is_accepted(given, text):
    with pytest.raises(InvalidOverrideError) as refusal:
        asked(**given)

    assert text in str(refusal.value)


def ended(*rules: Rule, facts=None, rule="MAYFLY_TTL", due_in: timedelta | None = DAY, ttl=DAY, after=HOUR, url=None):
    """Decide *after* it was added at NOW."""
    return decide_ended_retention(
        policy(*rules),
        facts or Facts(status="COMPLETED", is_complete=True),
        rule=rule,
        due_at=None if due_in is None else NOW + due_in,
        ttl=ttl,
        webhook_url=url,
        sent_at=NOW,
        now=NOW + after,
    )


FAILED = Facts(status="FAILED", is_complete=True)
ALL = (FAILURES, FILM, COURT, ACME)


def of_project(name):
    return Facts(status="COMPLETED", project=name, is_complete=True)


@pytest.mark.parametrize(
    ("facts", "after", "rule", "due_in"),
    [
        (Facts(status="COMPLETED"), HOUR, "MAYFLY_TTL", DAY),
        (FAILED, 10 * MINUTE, "rule: failures", HOUR),
        (FAILED, 5 * HOUR, "rule: failures", 5 * HOUR + MINUTE),
        (of_project("film"), HOUR, "rule: film", None),
        (Facts(status="COMPLETED", labels={"customer": "acme"}), HOUR, "rule: acme", 7 * DAY),
        (Facts(status="COMPLETED"), 2 * DAY, "MAYFLY_TTL", 2 * DAY + MINUTE),
    ],
)
def test_the_policy_decides_once_the_generation_has_ended(facts, after, rule, due_in):
    found = ended(*ALL, facts=facts, after=after)

    assert (found.rule, found.due_at) == (rule, None if due_in is None else NOW + due_in)


def test_what_was_kept_for_lack_of_facts_is_decided_as_well():
    found = ended(FAILURES, facts=FAILED, ttl=None, due_in=None)

    assert (found.rule, found.due_at) == ("rule: failures", NOW + HOUR + MINUTE)


@pytest.mark.parametrize(
    ("after", "due_in"), [(HOUR, 2 * HOUR), (2 * HOUR - MINUTE, 2 * HOUR), (3 * HOUR, 3 * HOUR + MINUTE)]
)
def test_what_was_asked_for_stays_and_min_ttl_counts_from_the_end(after, due_in):
    found = ended(*ALL, facts=FAILED, rule="override: ttl by app", due_in=2 * HOUR, ttl=2 * HOUR, after=after)

    assert (found.rule, found.due_at, found.hold_reason) == ("override: ttl by app", NOW + due_in, None)


def test_the_hold_of_a_rule_counts_more_than_what_was_asked_for():
    found = ended(*ALL, facts=of_project("court"), rule="override: ttl by app", due_in=2 * HOUR, ttl=2 * HOUR)

    assert (found.rule, found.hold_reason, found.due_at) == ("rule: court", "a court asked", NOW + 2 * HOUR)


@pytest.mark.parametrize("rule", ["override: ttl by app", "kept by ann"])
def test_what_somebody_keeps_stays_kept(rule):
    assert ended(*ALL, facts=FAILED, rule=rule, due_in=None, ttl=None) is None


def test_under_a_hold_that_was_asked_for_the_policy_decides_the_due_time():
    found = ended(*ALL, facts=FAILED, rule="override: hold by app", after=MINUTE)

    assert (found.rule, found.due_at, found.hold_reason) == ("override: hold by app", NOW + HOUR, None)


def test_a_due_time_that_an_operator_moved_becomes_no_earlier():
    found = ended(*ALL, facts=FAILED, due_in=3 * DAY, after=MINUTE)

    assert found.due_at == NOW + 3 * DAY


@pytest.mark.parametrize(
    ("query", "rule", "due_in", "hold"),
    [
        ("ttl=9d", "override: ttl", 9 * DAY, None),
        ("ttl=1h", "override: ttl by app", 2 * DAY, None),
        ("hold=legal", "override: hold", 2 * DAY, "legal"),
        ("other=1", "override: ttl by app", 2 * DAY, None),
    ],
)
def test_an_override_that_only_the_api_shows_can_only_keep_it_longer(query, rule, due_in, hold):
    url = f"https://hooks.example.com/webhooks/sync?{query}"
    found = ended(rule="override: ttl by app", due_in=2 * DAY, ttl=2 * DAY, url=url)

    assert (found.rule, found.due_at, found.hold_reason) == (rule, NOW + due_in, hold)
