"""Which generations a sweep adopts, and when they are due: decided without I/O."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.core.adopting import POLLERS_TTL, Fit, Scope, decide_adopted_retention, is_our_webhook
from service.core.matchers import Pattern, Texts
from service.core.retention import Bounds, Policy
from service.core.rules import Rule, RuleSet
from tests.support.ledger import generation_of

BASE = "https://mayfly.example"
OURS = f"{BASE}/webhooks/sync"
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
DAY = timedelta(days=1)
POLICY = Policy(DAY, timedelta(minutes=1))


@pytest.mark.parametrize(
    ("url", "account", "base"),
    [
        (OURS, "default", BASE),
        (f"{OURS}/", "default", BASE),
        (f"{OURS}?ttl=7d&label.customer=Grüße aus Köln", "default", BASE),
        (f"{OURS}#part", "default", BASE),
        (f"{OURS}/default", "default", BASE),
        (f"{OURS}/acme", "acme", BASE),
        ("https://MAYFLY.example:443/webhooks/sync", "default", BASE),
        ("HTTPS://mayfly.example/webhooks/sync", "default", "https://Mayfly.Example:443"),
        ("https://mayfly.example:8443/hooks/webhooks/sync", "default", "https://mayfly.example:8443/hooks"),
    ],
)
def test_a_webhook_url_is_ours_however_it_is_written(url, account, base):
    assert is_our_webhook(url, base, account)


@pytest.mark.parametrize(
    "url",
    [
        None,
        "",
        BASE,
        f"{OURS}/acme",
        f"{OURS}/default/more",
        f"{OURS}hronous",
        f"{OURS}//",
        f"{BASE}/WEBHOOKS/sync",
        f"{BASE}/other/webhooks/sync",
        f"{BASE}/webhooks/../webhooks/sync",
        f"{BASE}/webhooks%2Fsync",
        f"{BASE}?/webhooks/sync",
        "http://mayfly.example/webhooks/sync",
        "https://mayfly.example:8443/webhooks/sync",
        "https://mayfly.example.evil.example/webhooks/sync",
        "https://evil.example/https://mayfly.example/webhooks/sync",
        "https://mayfly.example@evil.example/webhooks/sync",
        "https://user@mayfly.example/webhooks/sync",
        "https://evil.example\\@mayfly.example/webhooks/sync",
        "https://evil.example#@mayfly.example/webhooks/sync",
        "https://mayfly.example\t/webhooks/sync",
        " https://mayfly.example/webhooks/sync",
        "https://mayfly.example:port/webhooks/sync",
        "https://[mayfly.example/webhooks/sync",
        "//mayfly.example/webhooks/sync",
        "{}",
    ],
)
def test_a_webhook_url_that_is_not_certainly_ours_is_not(url):
    assert not is_our_webhook(url, BASE, "default")


def test_the_route_without_an_account_is_that_of_the_default_one():
    assert not is_our_webhook(OURS, BASE, "acme")
    assert not is_our_webhook(OURS, None, "default")


@given(st.text(max_size=60))
@example("@mayfly.example/webhooks/sync")
@example(":443/webhooks/sync")
def test_whatever_follows_another_host_is_never_ours(rest):
    assert not is_our_webhook(f"https://evil.example{rest}", BASE, "default")


@pytest.mark.parametrize(
    ("adopt", "url", "fit"),
    [
        ("ours", OURS, Fit.FITS),
        ("ours", None, Fit.FOREIGN),
        ("ours", "https://app.example/hook", Fit.FOREIGN),
        ("without-webhook", OURS, Fit.FITS),
        ("without-webhook", None, Fit.FITS),
        ("without-webhook", "", Fit.FITS),
        ("without-webhook", "https://app.example/hook", Fit.FOREIGN),
        ("all", "https://app.example/hook", Fit.FITS),
        ("all", None, Fit.FITS),
    ],
)
def test_adopt_says_whose_generations_fit(adopt, url, fit):
    assert Scope("default", BASE, adopt).find_fit(generation_of(webhookUrl=url)) is fit


@pytest.mark.parametrize(
    ("fields", "fit"),
    [
        ({"status": "PENDING"}, Fit.RUNNING),
        ({"status": "PROCESSING"}, Fit.RUNNING),
        ({"status": "ARCHIVED"}, Fit.UNKNOWN_STATUS),
        ({"status": "completed"}, Fit.UNKNOWN_STATUS),
        ({"status": "FAILED"}, Fit.FITS),
        ({"status": "REJECTED"}, Fit.FITS),
        ({"metrics": {"total_generations": 2}}, Fit.BATCH),
    ],
)
def test_only_generations_that_have_ended_fit(fields, fit):
    assert Scope("default", None, "all").find_fit(generation_of(**fields)) is fit


@pytest.mark.parametrize(
    ("created_at", "fit"),
    [
        ("2026-11-27T11:59:59.999Z", Fit.FITS),
        ("2026-11-27T12:00:00.000Z", Fit.RECENT),
        ("2026-11-27T13:00:00+02:00", Fit.FITS),
        ("2026-11-27T11:00:00", Fit.RECENT),  # without a zone it could be hours later
        ("yesterday", Fit.RECENT),
        (None, Fit.RECENT),
    ],
)
def test_what_does_not_say_that_it_is_old_enough_does_not_fit(created_at, fit):
    scope = Scope("default", None, "all", NOW - DAY)

    assert scope.find_fit(generation_of(createdAt=created_at)) is fit


def test_only_the_ids_that_are_asked_for_fit():
    wanted, other = generation_of(), generation_of()
    scope = Scope("default", None, "all", only={wanted.id})

    assert (scope.find_fit(wanted), scope.find_fit(other)) == (Fit.FITS, Fit.NOT_ASKED_FOR)


def test_without_a_public_url_and_adopt_there_is_nothing_to_sweep():
    assert Scope("default", None, "ours").is_empty
    assert not Scope("default", BASE, "ours").is_empty
    assert not Scope("default", None, "without-webhook").is_empty


def decide(generation, *, policy=POLICY, adopt="all", now=NOW):
    return decide_adopted_retention(policy, Scope("default", BASE, adopt), generation, now=now)


def test_an_old_generation_has_its_whole_ttl_from_its_adoption_on():
    found = decide(generation_of(webhookUrl=OURS, createdAt="2020-01-01T00:00:00.000Z"))

    assert (found.due_at, found.rule) == (NOW + DAY, "MAYFLY_TTL")


def test_an_override_in_the_webhook_url_counts():
    found = decide(generation_of(webhookUrl=f"{OURS}?ttl=2h&label.customer=acme"))

    assert (found.due_at, found.rule, found.labels) == (NOW + timedelta(hours=2), "override: ttl", {"customer": "acme"})
    assert decide(generation_of(webhookUrl=f"{OURS}?ttl=forever")).due_at is None
    assert decide(generation_of(webhookUrl=f"{OURS}?hold=legal")).hold_reason == "legal"


def test_a_rule_knows_all_facts_of_an_adopted_generation():
    film = Rule("film", (Texts("project", (Pattern.of("film"),)),), ttl=timedelta(hours=3))
    policy = Policy(DAY, timedelta(minutes=1), RuleSet([film]))
    found = decide(generation_of(webhookUrl=OURS, projectId="film"), policy=policy)

    assert (found.due_at, found.rule) == (NOW + timedelta(hours=3), "rule: film")


@pytest.mark.parametrize(
    ("url", "wait"),
    [
        (OURS, timedelta(minutes=1)),
        (None, POLLERS_TTL),
        ("https://app.example/hook", POLLERS_TTL),
        ("https://app.example/webhooks/sync?ttl=2m", POLLERS_TTL),
        (f"{OURS}/acme", POLLERS_TTL),
    ],
)
def test_who_polls_has_a_quarter_of_an_hour_at_least(url, wait):
    found = decide(generation_of(webhookUrl=url), policy=Policy(timedelta(minutes=1), timedelta(minutes=1)))

    assert (found.due_at, found.ttl) == (NOW + wait, wait)


def test_what_polls_and_is_kept_forever_stays_so():
    assert decide(generation_of(webhookUrl=None), policy=Policy(None, timedelta(minutes=1))).due_at is None


@given(
    ttl=st.timedeltas(timedelta(seconds=1), timedelta(days=3650)),
    min_ttl=st.timedeltas(timedelta(seconds=1), timedelta(days=30)),
    bound=st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=30)),
    url=st.sampled_from([OURS, None, "https://app.example/hook?x=1", f"{OURS}?expires=2020-01-01T00:00:00Z"]),
    created_at=st.datetimes(datetime(2000, 1, 2), datetime(2200, 1, 1)),  # noqa: DTZ001 - as text
    now=st.datetimes(datetime(2020, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
def test_nothing_is_due_before_its_whole_ttl(*, ttl, min_ttl, bound, url, created_at, now):
    bounds = {} if bound is None else {"default": Bounds(bound)}
    policy = Policy(ttl, min_ttl, bounds=bounds)
    generation = generation_of(webhookUrl=url, createdAt=f"{created_at.isoformat(timespec='milliseconds')}Z")
    found = decide(generation, policy=policy, now=now)

    assert found.due_at is not None
    least = policy.bounds_of("default").min_ttl
    assert found.due_at >= now + least
    if url is None or "expires" not in url:
        assert found.due_at == now + max(ttl, least, timedelta(0) if url == OURS else POLLERS_TTL)
