"""What a policy of rules, overrides and bounds decides: the order, the later looks, and what always holds."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.matchers import Facts, Pattern, Texts
from service.core.refining import refine_retention
from service.core.retention import (
    Bounds,
    Policy,
    Retention,
    decide_retention,
    reconsider_retention,
)
from service.core.rules import Rule, RuleSet

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
OURS = "https://hooks.example.com/webhooks/sync"


def rule(name, *, ttl=None, **about):
    does = {key: about.pop(key) for key in ("expires", "is_forever", "hold") if key in about}
    return Rule(name, tuple(Texts(key, (Pattern.of(text),)) for key, text in about.items()), ttl=ttl, **does)


def policy(*rules: Rule, ttl=DAY, **bounds):
    return Policy(ttl, MINUTE, RuleSet(rules), {"default": Bounds(**bounds)} if bounds else {})


def decided(rules, facts=None, query="", **options):
    facts = facts or Facts(status="FAILED")
    return decide_retention(rules, facts, webhook_url=f"{OURS}?{query}", sent_at=NOW, now=NOW, **options)


# The order: a hold, the override, the rules, MAYFLY_TTL


def test_a_rule_that_matches_counts_more_than_the_default():
    rules = policy(rule("fast", status="FAILED", ttl=HOUR))

    assert decided(rules) == Retention("rule: fast", HOUR, NOW + HOUR)
    assert decided(rules, Facts(status="COMPLETED")) == Retention("MAYFLY_TTL", DAY, NOW + DAY)


def test_a_rule_can_keep_a_generation_forever_or_until_an_instant():
    until = NOW + 3 * DAY

    assert decided(policy(rule("film", is_forever=True))) == Retention("rule: film", None, None)
    assert decided(policy(rule("film", expires=until))) == Retention("rule: film", 3 * DAY, until)


def test_a_rule_whose_instant_has_passed_keeps_for_the_minimum():
    assert decided(policy(rule("old", expires=NOW - DAY))).due_at == NOW + MINUTE


def test_a_rule_that_holds_keeps_the_due_time_for_a_release():
    assert decided(policy(rule("legal", hold="case 7"))) == Retention("rule: legal", DAY, NOW + DAY, "case 7")


def test_an_override_counts_more_than_a_rule():
    assert decided(policy(rule("film", is_forever=True)), query="ttl=1h").due_at == NOW + HOUR


def test_a_rules_hold_counts_more_than_an_override_of_the_time():
    found = decided(policy(rule("legal", hold="case 7")), query="ttl=2h")

    assert found == Retention("rule: legal", 2 * HOUR, NOW + 2 * HOUR, "case 7")


def test_the_overrides_hold_counts_more_than_a_rules():
    assert decided(policy(rule("legal", hold="case 7")), query="hold=mine").hold_reason == "mine"


def test_an_invalid_override_holds_with_the_due_time_of_the_rule():
    found = decided(policy(rule("fast", ttl=HOUR)), query="tttl=3d")

    assert (found.rule, found.due_at) == ("invalid override", NOW + HOUR)
    assert found.hold_reason is not None


def test_an_override_in_a_foreign_url_does_not_shorten_what_a_rule_says():
    rules = policy(rule("long", ttl=3 * DAY))
    url = "https://gw.example.com/relay?ttl=2d"

    found = decide_retention(rules, Facts(), webhook_url=url, sent_at=NOW, now=NOW)
    assert found == Retention("rule: long", 3 * DAY, NOW + 3 * DAY)


def test_an_unsigned_override_only_keeps_longer_than_the_rule():
    rules = policy(rule("long", ttl=3 * DAY))

    assert decided(rules, request_url=f"{OURS}?ttl=1h") == Retention("rule: long", 3 * DAY, NOW + 3 * DAY)
    assert decided(rules, request_url=f"{OURS}?ttl=4d").due_at == NOW + 4 * DAY


def test_a_rule_about_a_label_reads_it_from_the_webhook_url():
    rules = policy(Rule("acme", (Texts("label.customer", (Pattern.of("acme*"),)),), is_forever=True))

    assert decided(rules, query="label.customer=acme-west") == Retention(
        "rule: acme", None, None, labels={"customer": "acme-west"}
    )
    assert decided(rules, query="label.customer=other").rule == "MAYFLY_TTL"
    assert decided(rules, Facts(labels={"customer": "acme"})).rule == "rule: acme"


def test_labels_in_a_foreign_or_unsigned_url_do_not_count():
    rules = policy(Rule("acme", (Texts("label.customer", (Pattern.of("acme"),)),), ttl=HOUR))
    url = "https://gw.example.com/relay?label.customer=acme"

    found = decide_retention(rules, Facts(), webhook_url=url, sent_at=NOW, now=NOW)
    assert found == Retention("MAYFLY_TTL", DAY, NOW + DAY)
    assert decided(rules, request_url=f"{OURS}?label.customer=acme") == Retention("MAYFLY_TTL", DAY, NOW + DAY)


# Bounds


def test_an_override_is_cut_to_max_ttl():
    rules = policy(ttl=HOUR, min_ttl=MINUTE, max_ttl=DAY)

    for query in ("ttl=2d", "ttl=forever", "expires=2030-01-01"):
        found = decided(rules, query=query)
        assert (found.due_at, found.ttl) == (NOW + DAY, DAY)
        assert found.rule.endswith(", cut to max_ttl")
    assert decided(rules, query="ttl=1d") == Retention("override: ttl", DAY, NOW + DAY)


def test_max_ttl_does_not_limit_what_the_operator_says():
    rules = policy(rule("long", status="FAILED", ttl=3 * DAY), ttl=2 * DAY, min_ttl=MINUTE, max_ttl=DAY)

    assert decided(rules).due_at == NOW + 3 * DAY
    assert decided(rules, Facts()).due_at == NOW + 2 * DAY
    assert decided(rules, query="ttl=4d").due_at == NOW + 3 * DAY
    assert decided(rules, query="hold=legal&ttl=4d").hold_reason == "legal"


def test_min_ttl_of_an_account_counts_for_that_account():
    rules = policy(rule("fast", ttl=MINUTE), min_ttl=HOUR)

    assert decided(rules).due_at == NOW + HOUR
    assert decided(rules, Facts(account="other")).due_at == NOW + MINUTE


# The early look


def refined(rules, facts=None, *, by="MAYFLY_TTL", due_at=NOW + DAY, ttl=DAY, url=OURS, now=NOW):
    return refine_retention(
        rules,
        facts or Facts(project="film", is_complete=True),
        rule=by,
        due_at=due_at,
        ttl=ttl,
        webhook_url=url,
        sent_at=NOW,
        now=now,
    )


def test_a_label_of_the_signed_webhook_counts_before_the_one_that_the_api_shows():
    signed = Facts(project="film", labels={"customer": "acme"}, is_complete=True)
    rules = policy(rule("acme", is_forever=True, **{"project": "film", "label.customer": "acme"}))

    assert refined(rules, signed, url=f"{OURS}?label.customer=other").rule == "rule: acme"


@pytest.mark.parametrize("ttl", [HOUR, 3 * DAY])
@pytest.mark.parametrize("by", ["MAYFLY_TTL", "rule: other"])
def test_what_the_early_look_shows_moves_the_due_time_both_ways(ttl, by):
    rules = [rule("film", project="film", ttl=ttl), *([rule("other", ttl=DAY)] if by != "MAYFLY_TTL" else [])]

    assert refined(policy(*rules), by=by) == Retention("rule: film", ttl, NOW + ttl)


@pytest.mark.parametrize("by", ["MAYFLY_TTL", "rule: gone"])
@pytest.mark.parametrize("about", [{}, {"status": "COMPLETED"}])
def test_a_rule_that_is_new_in_the_configuration_shortens_nothing_at_the_look(by, about):
    shown = Facts(status="COMPLETED", project="film", is_complete=True)

    assert refined(policy(rule("new", ttl=HOUR, **about)), shown, by=by) is None
    assert refined(policy(ttl=HOUR), shown, by="rule: gone") is None
    assert refined(policy(rule("new", ttl=3 * DAY, **about)), shown, by=by).due_at == NOW + 3 * DAY


def test_what_the_early_look_shows_can_keep_or_hold():
    assert refined(policy(rule("film", project="film", is_forever=True))).due_at is None
    assert refined(policy(rule("film", project="film", hold="x"))).hold_reason == "x"
    assert refined(policy(), url=f"{OURS}?ttl=7d").due_at == NOW + 7 * DAY
    assert refined(policy(), url=f"{OURS}?ttl=1h") is None  # no signature covers it
    assert refined(policy(), url=f"{OURS}?hold=x").hold_reason == "x"


def test_a_late_look_makes_nothing_due_before_the_minimum():
    found = refined(policy(rule("film", project="film", ttl=MINUTE)), now=NOW + 2 * HOUR)

    assert found.due_at == NOW + 2 * HOUR + MINUTE


@pytest.mark.parametrize("by", ["override: ttl", "invalid override", "kept by an operator", "released by an operator"])
def test_a_decision_by_an_override_or_an_operator_is_not_refined(by):
    assert refined(policy(rule("film", project="film", is_forever=True)), by=by) is None


def test_a_changed_configuration_alone_moves_nothing():
    assert refined(policy(ttl=7 * DAY)) is None
    assert refined(policy(rule("film", project="film", ttl=7 * DAY)), by="rule: film") is None


@pytest.mark.parametrize(("ttl", "due_at"), [(HOUR, None), (7 * DAY, NOW + 7 * DAY)])
def test_a_due_time_that_an_operator_moved_is_not_made_earlier(ttl, due_at):
    found = refined(policy(rule("film", project="film", ttl=ttl)), due_at=NOW + 5 * DAY)

    assert (found and found.due_at) == due_at


def test_a_hold_of_the_early_look_brings_back_the_later_due_time():
    court = policy(rule("court", project="film", hold="x"))
    moved, unsigned = refined(court, due_at=NOW + 5 * DAY), refined(policy(), url=f"{OURS}?ttl=1h&hold=x")

    assert (moved.hold_reason, moved.due_at) == ("x", NOW + 5 * DAY)
    assert (unsigned.hold_reason, unsigned.due_at, unsigned.ttl) == ("x", NOW + DAY, DAY)
    assert refined(policy(), url=f"{OURS}?ttl=7d&hold=x").due_at == NOW + 7 * DAY


# The look before the DELETE


def reconsidered(rules, facts=None, *, by="MAYFLY_TTL", url=OURS):
    facts = facts or Facts(project="film", is_complete=True)
    return reconsider_retention(rules, facts, rule=by, due_at=NOW + DAY, ttl=DAY, webhook_url=url)


@pytest.mark.parametrize("by", ["MAYFLY_TTL", "rule: other"])
def test_the_last_look_lets_a_rule_keep_longer_and_never_shorter(by):
    assert reconsidered(policy(rule("film", project="film", ttl=3 * DAY)), by=by).due_at == NOW + 3 * DAY
    assert reconsidered(policy(rule("film", project="film", is_forever=True)), by=by).due_at is None
    assert reconsidered(policy(rule("film", project="film", ttl=HOUR)), by=by) is None
    assert reconsidered(policy(rule("film", project="film", expires=NOW)), by=by) is None


@pytest.mark.parametrize("by", ["MAYFLY_TTL", "rule: other", "override: ttl"])
def test_the_last_look_lets_a_rule_hold(by):
    found = reconsidered(policy(rule("legal", project="film", hold="case 7")), by=by)

    assert found == Retention("rule: legal", DAY, NOW + DAY, "case 7")


def test_a_hold_that_was_released_does_not_come_back():
    assert reconsidered(policy(rule("legal", project="film", hold="case 7")), by="rule: legal") is None


@pytest.mark.parametrize("by", ["override: ttl", "invalid override", "kept by an operator", "released by an operator"])
def test_the_last_look_does_not_let_a_rule_change_another_decision(by):
    assert reconsidered(policy(rule("film", project="film", is_forever=True)), by=by) is None


def test_a_rule_with_another_ttl_since_the_decision_moves_nothing_at_the_last_look():
    assert reconsidered(policy(rule("film", project="film", ttl=7 * DAY)), by="rule: film") is None
    assert reconsidered(policy(ttl=7 * DAY)) is None


# What always holds

_ZONES = st.sampled_from(
    [
        UTC,
        timezone(timedelta(hours=14)),
        timezone(timedelta(hours=-12)),
        ZoneInfo("Europe/Berlin"),
        ZoneInfo("America/New_York"),
        ZoneInfo("Australia/Lord_Howe"),
    ]
)
# With the hours in which clocks change, and the days that only leap years have.
_INSTANTS = st.one_of(
    st.datetimes(datetime(2024, 1, 1), datetime(2032, 12, 31)),  # noqa: DTZ001 - the zone is added below
    st.sampled_from(
        [datetime(2026, 10, 25, 2, 30), datetime(2026, 3, 29, 2, 30), datetime(2028, 2, 29, 23, 59, 59)]  # noqa: DTZ001
    ),
)
_MOMENTS = st.builds(lambda at, zone, fold: at.replace(tzinfo=zone, fold=fold), _INSTANTS, _ZONES, st.integers(0, 1))
_TTLS = st.timedeltas(timedelta(seconds=1), timedelta(days=400)).map(
    lambda ttl: timedelta(seconds=int(ttl.total_seconds()))
)
_KNOWN = ("status", "model")
_UNKNOWN = ("project", "source", "output_file_name")
_JUMPS = st.timedeltas(timedelta(days=-2), timedelta(days=2))


def _rules(names, max_size=4):
    does = st.one_of(
        _TTLS.map(lambda ttl: {"ttl": ttl}),
        st.just({"is_forever": True}),
        st.just({"hold": "x"}),
        _MOMENTS.map(lambda at: {"expires": at.astimezone(UTC)}),
    )
    one = st.builds(
        lambda about, what: rule("r", **about, **what),
        st.dictionaries(st.sampled_from(names), st.sampled_from("ab*")),
        does,
    )
    return st.lists(one, max_size=max_size).map(
        lambda found: [
            Rule(f"r{n}", r.texts, None, r.ttl, r.expires, r.is_forever, r.hold) for n, r in enumerate(found)
        ]
    )


_WEBHOOKS = st.builds(Facts, status=st.sampled_from("ab"), model=st.sampled_from("ab"))
_ANSWERS = st.builds(
    Facts,
    status=st.sampled_from("ab"),
    model=st.sampled_from("ab"),
    project=st.none() | st.sampled_from("ab"),
    source=st.none() | st.sampled_from("ab"),
)
_QUERIES = st.one_of(st.just(""), _TTLS.map(lambda ttl: f"ttl={int(ttl.total_seconds())}s"), st.just("ttl=forever"))


def is_not_earlier(found, before):
    return found.due_at is None or (before.due_at is not None and found.due_at >= before.due_at)


@given(
    rules=_rules(_KNOWN + _UNKNOWN),
    facts=_ANSWERS | _WEBHOOKS,
    sent_at=_MOMENTS,
    jump=_JUMPS,
    ttl=_TTLS,
    query=_QUERIES,
)
def test_nothing_is_due_before_the_minimum_has_passed(*, rules, facts, sent_at, jump, ttl, query):
    now = sent_at + jump  # the clock may jump between the two
    found = decide_retention(policy(*rules, ttl=ttl), facts, webhook_url=f"{OURS}?{query}", sent_at=sent_at, now=now)

    assert found.due_at is None or found.due_at >= now.astimezone(UTC) + MINUTE


@given(_rules(_KNOWN), _WEBHOOKS, _MOMENTS, _TTLS, _TTLS)
def test_raising_a_ttl_never_shortens(rules, facts, now, ttl, more):
    def decide(raised):
        longer = [Rule(r.id, r.texts, None, r.ttl and r.ttl + raised, r.expires, r.is_forever, r.hold) for r in rules]
        return decide_retention(policy(*longer, ttl=ttl + raised), facts, webhook_url=None, sent_at=now, now=now)

    assert is_not_earlier(decide(more), decide(timedelta(0)))


@given(rules=_rules(_KNOWN), added=_rules(_UNKNOWN), data=st.data(), facts=_WEBHOOKS, now=_MOMENTS, query=_QUERIES)
def test_adding_rules_about_what_is_not_known_changes_nothing_at_receipt(*, rules, added, data, facts, now, query):
    extra = [replace(one, id=f"extra-{one.id}") for one in added if one.texts]
    more = [*rules]
    for one in extra:
        more.insert(data.draw(st.integers(0, len(more))), one)

    def decide(chosen):
        return decide_retention(policy(*chosen), facts, webhook_url=f"{OURS}?{query}", sent_at=now, now=now)

    assert decide(more) == decide(rules)


@given(
    rules=_rules(_KNOWN + _UNKNOWN),
    webhook=_WEBHOOKS,
    answer=_ANSWERS,
    sent_at=_MOMENTS,
    jump=_JUMPS,
    ttl=_TTLS,
    query=_QUERIES,
)
def test_the_last_look_never_makes_a_record_due_earlier(*, rules, webhook, answer, sent_at, jump, ttl, query):
    chosen = policy(*rules, ttl=ttl)
    first = decide_retention(chosen, webhook, webhook_url=OURS, sent_at=sent_at, now=sent_at + jump)
    if first.due_at is None or first.hold_reason is not None:
        return
    last = reconsider_retention(
        chosen, answer, rule=first.rule, due_at=first.due_at, ttl=first.ttl, webhook_url=f"{OURS}?{query}"
    )

    assert last is None or last.hold_reason is not None or last.due_at is None or last.due_at > first.due_at


@given(
    rules=_rules(_KNOWN + _UNKNOWN),
    webhook=_WEBHOOKS,
    answer=_ANSWERS,
    sent_at=_MOMENTS,
    jump=_JUMPS,
    query=_QUERIES,
)
def test_the_early_look_makes_nothing_due_before_the_minimum(*, rules, webhook, answer, sent_at, jump, query):
    chosen = policy(*rules)
    first = decide_retention(chosen, webhook, webhook_url=OURS, sent_at=sent_at, now=sent_at)
    if first.due_at is None or first.hold_reason is not None:
        return
    now = sent_at + jump
    found = refine_retention(
        chosen,
        answer,
        rule=first.rule,
        due_at=first.due_at,
        ttl=first.ttl,
        webhook_url=f"{OURS}?{query}",
        sent_at=sent_at,
        now=now,
    )

    assert found is None or found.due_at is None or found.due_at >= now.astimezone(UTC) + MINUTE


@given(_MOMENTS, _TTLS)
def test_a_ttl_is_a_length_of_time_and_not_of_the_calendar(now, ttl):
    found = decide_retention(policy(ttl=ttl), Facts(), webhook_url=None, sent_at=now, now=now)

    assert found.due_at is not None
    assert found.due_at - now.astimezone(UTC) == max(ttl, MINUTE)
