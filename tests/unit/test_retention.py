"""When a generation may be deleted: durations, overrides, and when they start to count."""

from datetime import UTC, datetime, timedelta

import pytest

from service.core.durations import MAX_TTL, format_duration, parse_duration, parse_ttl
from service.core.matchers import Facts
from service.core.retention import (
    INVALID_RULE,
    Policy,
    Retention,
    decide_retention,
    keep_longer,
    reconsider_retention,
)
from service.core.rules import Rule, RuleSet

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DAY = timedelta(days=1)
POLICY = Policy(ttl=DAY, min_ttl=timedelta(minutes=1))


def decided(query="", *, policy=POLICY, sent_at=NOW, now=NOW):
    return decide_retention(
        policy, webhook_url=f"https://hooks.example.com/webhooks/sync?{query}", sent_at=sent_at, now=now
    )


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("24h", DAY),
        ("7d", 7 * DAY),
        ("2w", 14 * DAY),
        (" 1d ", DAY),
        ("0s", timedelta(0)),
        ("36500d", MAX_TTL),
    ],
)
def test_a_number_with_a_unit_is_a_duration(text, duration):
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text",
    [
        *("", "24", "h", "-1h", "+1h", "1.5h", "1 h", "24H", "1h30m", "1y", "1M", "forever", "٢h", "²h", "1e3s"),
        *("36501d", "5215w", "999999999w", "9999999999s"),
    ],
)
def test_any_other_duration_is_refused_and_not_repeated(text):
    with pytest.raises(ValueError, match="a number with a unit") as refusal:
        parse_duration(text)

    assert not text or len(text) < 3 or text not in str(refusal.value)


def test_forever_is_a_ttl_and_no_duration():
    assert parse_ttl("forever") is None
    assert parse_ttl("2w") == 14 * DAY
    with pytest.raises(ValueError, match="or forever"):
        parse_ttl("evermore")


@pytest.mark.parametrize("text", ["1s", "90s", "15m", "1h", "24h", "7d", "3w", "0s"])
def test_a_formatted_duration_reads_back_as_itself(text):
    seconds = int(parse_duration(text).total_seconds())

    assert parse_duration(format_duration(seconds)) == parse_duration(text)


def test_without_an_override_the_policy_decides():
    assert decided() == Retention("MAYFLY_TTL", DAY, NOW + DAY)
    assert decide_retention(POLICY, webhook_url=None, sent_at=NOW, now=NOW) == Retention("MAYFLY_TTL", DAY, NOW + DAY)


def test_a_policy_of_forever_keeps_the_generation():
    assert decided(policy=Policy(None, timedelta(minutes=1))) == Retention("MAYFLY_TTL", None, None)


def test_a_ttl_override_wins_over_the_policy():
    assert decided("ttl=72h") == Retention("override: ttl", 3 * DAY, NOW + 3 * DAY)
    assert decided("ttl=forever") == Retention("override: ttl", None, None)


def test_an_override_wins_over_a_policy_of_forever():
    assert decided("ttl=1h", policy=Policy(None, timedelta(minutes=1))).due_at == NOW + timedelta(hours=1)


@pytest.mark.parametrize("text", ["2026-12-31T00:00:00Z", "2026-12-31T01:00:00%2B01:00", "2026-12-30T19:00:00-05:00"])
def test_an_expires_override_is_converted_to_utc(text):
    retention = decided(f"expires={text}")

    assert retention.rule == "override: expires"
    assert retention.due_at == datetime(2026, 12, 31, tzinfo=UTC)
    assert retention.ttl == datetime(2026, 12, 31, tzinfo=UTC) - NOW


@pytest.mark.parametrize("query", ["ttl=1s", "ttl=59s", "expires=2026-11-23T12:00:30Z", "expires=2001-01-01T00:00:00Z"])
def test_no_override_keeps_a_generation_for_less_than_min_ttl(query):
    retention = decided(query)

    assert retention.due_at == NOW + POLICY.min_ttl
    assert retention.ttl == POLICY.min_ttl


def test_the_policys_ttl_is_never_less_than_min_ttl():
    assert decided(policy=Policy(timedelta(0), timedelta(hours=1))).due_at == NOW + timedelta(hours=1)


def test_a_hold_override_keeps_the_due_time_for_a_release():
    retention = decided("hold=legal%20case&ttl=72h")

    assert retention == Retention("override: hold", 3 * DAY, NOW + 3 * DAY, hold_reason="legal case")


def test_a_hold_without_a_reason_is_a_hold():
    assert decided("hold=").hold_reason == decided("hold").hold_reason == "no reason given"


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("30d", NOW + 30 * DAY),
        ("2030-12-31", datetime(2031, 1, 1, tzinfo=UTC)),
        ("2030-12-31T18:00:00%2B01:00", datetime(2030, 12, 31, 17, tzinfo=UTC)),
    ],
)
def test_the_hold_of_an_override_may_have_an_end(text, until):
    retention = decided(f"hold=legal&hold_until={text}&ttl=72h")

    assert retention == Retention("override: hold", 3 * DAY, NOW + 3 * DAY, "legal", hold_until=until)


@pytest.mark.parametrize(
    "query",
    [
        "hold_until=2030-12-31",
        "hold=legal&hold_until=soon",
        "hold=legal&hold_until=2020-12-31",  # an end that had passed when it was sent is a typo
        "hold=legal&hold_until=",
        "hold=legal&hold_until=30d&hold_until=60d",
        "hold=legal&holdUntil=30d",
        "hold=no&hold_until=soon",
    ],
)
def test_an_end_of_a_hold_that_cannot_be_read_holds_without_an_end(query):
    retention = decided(query)

    assert retention.rule == INVALID_RULE
    assert retention.hold_reason is not None
    assert retention.hold_until is None
    assert "hold" in retention.hold_reason


def test_of_two_holds_the_one_that_ends_later_counts():
    ends = Retention("a", DAY, NOW + DAY, "a", hold_until=NOW + DAY)
    later = Retention("b", DAY, NOW + DAY, "b", hold_until=NOW + 2 * DAY)
    never = Retention("c", DAY, NOW + DAY, "c")

    assert keep_longer(ends, later) == keep_longer(later, ends) == later
    assert keep_longer(ends, never) == keep_longer(never, ends) == never


def test_the_hold_of_a_rule_outlasts_that_of_an_override():
    rules = RuleSet([Rule("case", hold="legal case")])
    retention = decided("hold=mine&hold_until=30d", policy=Policy(DAY, timedelta(minutes=1), rules))

    assert (retention.hold_reason, retention.hold_until) == ("legal case", None)


def test_the_reason_of_a_hold_is_cut_to_what_a_list_can_show():
    assert len(decided("hold=" + "x" * 8000).hold_reason) == 500


@pytest.mark.parametrize(
    "query",
    [
        *("ttl=24", "ttl=", "ttl", "ttl=soon", "ttl=-1h", "ttl=0", "ttl=1.5h", "ttl=99999999w"),
        *("ttl=0s", "ttl=0w", "ttl=15M", "ttl=1%20h"),
        *("expires=", "expires=tomorrow", "expires=1761300005", "expires=2026-12-31T00:00:00", "expires=20261231"),
        "expires=2026-12-31%2000:00",
        *("ttl=1h&ttl=forever", "ttl=1h&expires=2026-12-31T00:00:00Z", "hold=a&hold=b"),
        *("expires=9999-12-31T23:59:59-14:00", "expires=0001-01-01T00:00:00%2B14:00", "expires=2500-01-01T00:00:00Z"),
    ],
)
def test_an_invalid_override_puts_the_record_on_hold(query):
    retention = decided(query)

    assert retention.rule == "invalid override"
    assert retention.hold_reason.startswith("invalid override in its webhookUrl: `")
    assert retention.due_at == NOW + DAY


@pytest.mark.parametrize(
    "url", ["http://[", "https://[::1/x?ttl=1h", "//[?", "not a url at all", "?" * 50, "\udcff", ""]
)
def test_an_invalid_webhook_url_never_shortens_the_ttl(url):
    retention = decide_retention(POLICY, webhook_url=url, sent_at=NOW, now=NOW)

    assert retention.due_at == NOW + DAY


@pytest.mark.parametrize("query", ["utm=1", "title=x", "t=1", "token=x", "url=x", "expiry=x", "id=hold"])
def test_other_query_parameters_are_no_overrides(query):
    assert decided(query).rule == "MAYFLY_TTL"


@pytest.mark.parametrize(
    "query",
    [
        *("x=ttl%3D1h", "tll=forever", "tl=forever", "tttl=forever", "hodl=legal", "hol=legal"),
        "expire=2027-01-01T00:00:00Z",
        *("ttl=forever&Ttl=1h", "#ttl=forever", "#a?hold=legal"),
    ],
)
def test_a_misspelt_or_misplaced_override_puts_the_record_on_hold(query):
    assert decided(query).rule == "invalid override"
    assert decided(query).hold_reason is not None


@pytest.mark.parametrize("query", ["", "ttl=1m", "expires=2026-11-23T12:00:00Z"])
def test_nothing_is_due_before_min_ttl_from_now(query):
    policy = Policy(timedelta(minutes=1), timedelta(minutes=1))

    assert decided(query, policy=policy, sent_at=NOW - timedelta(minutes=5)).due_at == NOW + policy.min_ttl


def reconsidered(query, rule="MAYFLY_TTL", ttl=DAY):
    url = f"https://h/webhooks/sync?{query}"
    return reconsider_retention(POLICY, Facts(), rule=rule, due_at=NOW + DAY, ttl=ttl, webhook_url=url)


def test_an_override_that_only_the_api_shows_extends_the_ttl():
    assert reconsidered("ttl=3d") == Retention("override: ttl", 3 * DAY, NOW + 3 * DAY)
    assert reconsidered("ttl=forever") == Retention("override: ttl", None, None)
    assert reconsidered("hold=legal").hold_reason == "legal"
    assert reconsidered("hodl=legal").rule == "invalid override"


@pytest.mark.parametrize("query", ["", "ttl=1h", "ttl=1d", "expires=2026-11-23T13:00:00Z", "utm=1"])
def test_an_override_that_only_the_api_shows_never_shortens_the_ttl(query):
    assert reconsidered(query) is None


def test_a_hold_that_only_the_api_shows_keeps_the_due_time():
    assert reconsidered("hold=legal").due_at == NOW + DAY


@pytest.mark.parametrize("rule", ["override: ttl", "override: hold", "invalid override", "kept by an operator"])
def test_a_decision_by_an_override_or_an_operator_is_not_reconsidered(rule):
    assert reconsidered("hold=legal", rule=rule) is None
    assert reconsidered("hold=legal", ttl=None) is None


def test_the_clock_starts_at_the_signed_send_time():
    assert decided(sent_at=NOW - timedelta(minutes=4)).due_at == NOW - timedelta(minutes=4) + DAY


def test_a_send_time_in_the_future_counts_as_now():
    assert decided(sent_at=NOW + timedelta(minutes=4)).due_at == NOW + DAY


@pytest.mark.parametrize(
    ("due_at", "other", "is_later"),
    [
        (NOW + DAY, NOW, True),
        (NOW, NOW, False),
        (NOW, NOW + DAY, False),
        (None, NOW, True),
        (NOW, None, False),
        (None, None, False),
    ],
)
def test_is_later_than_treats_none_as_forever(due_at, other, is_later):
    assert Retention("x", None, due_at).is_later_than(other) is is_later
