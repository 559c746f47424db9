"""Overrides as tools leave them in a URL: read, or held; and ordinary queries, which are no overrides."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.core.retention import Policy, Retention, decide_retention

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
POLICY = Policy(ttl=DAY, min_ttl=timedelta(minutes=1))
OURS = "https://hooks.example.com/webhooks/sync"
RELAY = "https://gw.example.com/relay"
DEFAULT = Retention("MAYFLY_TTL", DAY, NOW + DAY)
ORDINARY = (Path(__file__).parent / "ordinary_queries.txt").read_text(encoding="utf-8").splitlines()


def decided(url, *, policy=POLICY, request_url=None):
    return decide_retention(policy, webhook_url=url, request_url=request_url, sent_at=NOW, now=NOW)


# Held, with the piece and what it may mean


@pytest.mark.parametrize(
    ("rest", "piece", "near"),
    [
        ("?keep=forever", "keep=forever", "ttl"),
        ("?keep", "keep", "ttl"),
        ("?expires_at=2030-01-01T00:00:00Z", "expires_at=2030-01-01T00:00:00Z", "expires"),
        ("?expiresAt=2030-01-01", "expiresat=2030-01-01", "expires"),
        ("?retention=7d", "retention=7d", "ttl"),
        ("?retention_days=30", "retention_days=30", "ttl"),
        ("?ttl_days=30", "ttl_days=30", "ttl"),
        ("?ttl:forever", "ttl:forever", "ttl"),
        ("?keepUntil=2030-01-01", "keepuntil=2030-01-01", "ttl"),
        ("?metadata[ttl]=72h", "metadata[ttl]=72h", "ttl"),
        ('?metadata={"ttl":"72h"}', "ttl=72h", "ttl"),
        ("?a=1,ttl=forever", "ttl=forever", "ttl"),
        ("?job=1%26ttl=forever", "ttl=forever", "ttl"),
        ("?tl=72h", "tl=72h", "ttl"),
        ("?tts=forever", "tts=forever", "ttl"),
        ("?expire=1861300005", "expire=1861300005", "expires"),
        ("?exipres=2030-01-01", "exipres=2030-01-01", "expires"),
        ("?hodl=legal", "hodl=legal", "hold"),
        ("?legal_hold=true", "legal_hold=true", "hold"),
        ("#ttl=forever", "ttl=forever", "ttl"),
        ("/ttl=forever", "ttl=forever", "ttl"),
        ("%3Fttl=forever", "ttl=forever", "ttl"),
        ("&ttl=forever", "ttl=forever", "ttl"),
    ],
)
def test_a_word_of_retention_elsewhere_is_held_and_quoted(rest, piece, near):
    retention = decided(OURS + rest)

    assert retention.rule == "invalid override"
    assert f"`{piece}`" in retention.hold_reason
    assert f"did you mean `{near}`?" in retention.hold_reason
    assert retention.due_at == NOW + DAY


@pytest.mark.parametrize("query", ["ttl=0s", "ttl=0m", "ttl=24", "ttl%3D24", "ttl[]=1h&ttl[]=2h", "ttl=1h&TTL=2h"])
def test_a_value_that_is_no_time_is_held(query):
    assert decided(f"{OURS}?{query}").rule == "invalid override"


def test_only_the_piece_is_quoted_and_cut_short():
    retention = decided(f"{OURS}?token=abcdef123456&keep={'x' * 500}%0A%1B%60&sig=98765")

    assert "abcdef" not in retention.hold_reason
    assert "98765" not in retention.hold_reason
    assert len(retention.hold_reason) < 150
    assert retention.hold_reason.isprintable()
    assert (retention.invalid.name, retention.invalid.value_length) == ("keep", 503)


@pytest.mark.parametrize("url", ["{}", "7", "[]", '["https://hooks.example.com"]', "true", "not a url at all"])
def test_a_webhook_url_that_is_no_url_is_held(url):
    assert "not a URL" in decided(url).hold_reason


@pytest.mark.parametrize("value", ["x" * 20_000, "%" + "25" * 40 + "41"])
def test_a_url_that_is_too_long_or_encoded_too_often_is_held(value):
    assert decided(f"{OURS}?x={value}").rule == "invalid override"


# Read


@pytest.mark.parametrize(
    "query",
    [
        *("ttl%3Dforever", "ttl%253Dforever", "%74%74%6C=forever", "ttl%5B%5D=forever", "ttl[0]=forever"),
        *("TTL=forever", "Ttl=FOREVER", "ttl%20=forever", "%20ttl=+forever+", "ttl%0A=forever", "%EF%BD%94tl=forever"),
        *("job=1?ttl=forever", "?ttl=forever", "job=1;ttl=forever", "job=1&amp;ttl=forever"),
        *("job=1&amp;amp;ttl=forever", "job=1&#38;ttl&#61;forever", "job%3D1%26ttl%3Dforever", "ttl%E2%80%8B=forever"),
    ],
)
def test_a_mangled_override_is_read(query):
    assert decided(f"{OURS}?{query}") == Retention("override: ttl", None, None)


@pytest.mark.parametrize(
    ("text", "due_at"),
    [
        ("2030-01-01T00:00:00+02:00", datetime(2029, 12, 31, 22, tzinfo=UTC)),
        ("2030-01-01T00:00+0200", datetime(2029, 12, 31, 22, tzinfo=UTC)),
        ("2030-01-01T00%3A00%3A00.5%252B02%3A00", datetime(2029, 12, 31, 22, 0, 0, 500_000, tzinfo=UTC)),
        ("2030-01-01t00:00:00z", datetime(2030, 1, 1, tzinfo=UTC)),
        ("2030-01-01", datetime(2030, 1, 2, tzinfo=UTC)),
    ],
)
def test_an_instant_is_read_with_a_blank_for_plus_and_as_a_date(text, due_at):
    assert decided(f"{OURS}?expires={text}").due_at == due_at


@pytest.mark.parametrize("value", ["false", "0", "no", "off", "False", "NO"])
def test_a_hold_that_says_no_is_none(value):
    assert decided(f"{OURS}?hold={value}") == DEFAULT
    assert decided(f"{OURS}?hold={value}&ttl=3d") == Retention("override: ttl", 3 * DAY, NOW + 3 * DAY)


# Another URL than ours


@pytest.mark.parametrize("query", ["ttl=30s", "expires=2026-11-23T12:30:00Z", "ttl=1d"])
def test_an_override_in_another_url_never_shortens_the_ttl(query):
    assert decided(f"{RELAY}?{query}") == DEFAULT
    assert decided(f"{RELAY}?{query}", policy=Policy(None, HOUR)).due_at is None


def test_an_override_in_another_url_can_lengthen_and_hold():
    assert decided(f"{RELAY}?ttl=9d").due_at == NOW + 9 * DAY
    assert decided(f"{RELAY}?ttl=30s&hold=legal") == Retention("override: hold", DAY, NOW + DAY, "legal")
    assert decided(f"{RELAY}?redirect={quote(OURS + '?ttl=1m', safe='')}").rule == "invalid override"


@pytest.mark.parametrize("path", ["", "/", "/acme", "/acme/"])
def test_the_path_of_our_route_may_have_a_prefix_and_an_account(path):
    assert decided(f"https://gw.example.com/mayfly/webhooks/sync{path}?ttl=1h").due_at == NOW + HOUR
    assert decided(f"https://gw.example.com/webhooks/synced{path}?ttl=1h").due_at == NOW + DAY


@pytest.mark.parametrize("url", [OURS, RELAY])
def test_unix_seconds_beside_a_signature_are_no_override(url):
    assert decided(f"{url}?expires=1761300005&signature=9f86d081") == DEFAULT
    assert decided(f"{url}?expires=1761300005").rule == "invalid override"


@pytest.mark.parametrize(
    ("body", "request_query", "due_at"),
    [
        ("", "ttl=forever", None),
        ("", "ttl=3d", NOW + 3 * DAY),
        ("", "ttl=1s", NOW + DAY),
        ("?ttl=1h", "ttl=1h", NOW + HOUR),
        ("?ttl=1h", "ttl=2h", NOW + 2 * HOUR),
        ("?ttl=1h", "job=1", NOW + HOUR),
        ("?ttl=forever", "ttl=1h", None),
    ],
)
def test_the_query_of_the_request_can_only_lengthen_the_ttl(body, request_query, due_at):
    assert decided(OURS + body, request_url=f"{OURS}?{request_query}").due_at == due_at


def test_the_query_of_the_request_can_hold():
    held = decided(f"{OURS}?ttl=1h", request_url=f"{OURS}?hold=legal")

    assert held == Retention("override: hold", HOUR, NOW + HOUR, "legal")
    assert "the URL of its request: `keep=1`" in decided(None, request_url=f"{OURS}?keep=1").hold_reason
    assert decided(f"{OURS}?hold=a", request_url=f"{OURS}?hold=b&ttl=2d") == Retention(
        "override: hold", 2 * DAY, NOW + 2 * DAY, "a"
    )


# Ordinary


def test_the_ordinary_queries_are_two_hundred_and_more():
    assert len(set(ORDINARY)) == len(ORDINARY) >= 200


@pytest.mark.parametrize("url", [OURS, RELAY, f"{OURS}?id=1&name=x", f"{OURS}?a=1#top"])
def test_no_ordinary_query_is_held(url):
    separator = "&" if "?" in url else "?"
    held = {query: found for query in ORDINARY if (found := decided(url + separator + query)) != DEFAULT}

    assert held == {}


@given(st.lists(st.sampled_from(ORDINARY), min_size=1, max_size=4))
def test_ordinary_queries_together_are_not_held(queries):
    assert decided(f"{OURS}?{'&'.join(queries)}") == DEFAULT


# Mangled in every way


OVERRIDES = [
    *("ttl=72h", "ttl=forever", "ttl=30m", "ttl=2w", "expires=2030-01-01T00:00:00Z", "expires=2030-01-01"),
    *("expires=2030-01-01T00:00:00%2B02:00", "hold=legal", "hold=legal%20case&ttl=3d"),
]


_SEPARATOR = re.compile("&(?!#|amp;)")  # not that of an entity


def _names(change):
    """Change the names of all parameters, not their values."""

    def mangle(query):
        pairs = [pair.partition("=") for pair in _SEPARATOR.split(query)]
        return "&".join(change(name) + equals + value for name, equals, value in pairs)

    return mangle


MANGLERS = {
    "encoded once": lambda query: quote(query, safe=""),
    "encoded twice": lambda query: quote(quote(query, safe=""), safe=""),
    "each letter encoded": _names(lambda name: "".join(f"%{letter:02X}" for letter in name.encode())),
    "equals encoded": lambda query: query.replace("=", "%3D"),
    "separators encoded": lambda query: _SEPARATOR.sub("%26", query),
    "encoding undone": lambda query: query.replace("%2B", "+").replace("%20", " "),
    "entities": lambda query: query.replace("&", "&amp;"),
    "entities twice": lambda query: query.replace("&", "&amp;amp;"),
    "numeric entities": lambda query: query.replace("&", "&#38;").replace("=", "&#x3d;"),
    "arrays": _names(lambda name: name + "[]"),
    "indices": _names(lambda name: name + "%5B0%5D"),
    "semicolons": lambda query: _SEPARATOR.sub(";", query),
    "question marks": lambda query: _SEPARATOR.sub("?", query),
    "upper case": str.upper,
    "title case": _names(str.title),
    "blanks": _names(lambda name: f" {name}%20"),
    "pluses": _names(lambda name: f"+{name}+"),
    "lines": _names(lambda name: f"{name}%0D%0A"),
    "no-break spaces": _names(lambda name: f"{name}\u00a0"),
    "in a fragment": lambda query: "#" + query,
    "in another value": lambda query: "next=" + quote(f"/a?{query}", safe=""),
    "a comma before": lambda query: "x=1," + query,
}


@given(
    st.sampled_from(OVERRIDES),
    st.lists(st.sampled_from(sorted(MANGLERS)), min_size=1, max_size=3),
    st.sampled_from(["", "job=1&", "utm_source=x&lang=de&"]),
    st.sampled_from([timedelta(minutes=10), DAY]),
)
@example("ttl=forever", ["equals encoded"], "", HOUR)
@example("ttl=forever", ["question marks"], "job=1&", HOUR)
def test_no_mangled_override_is_deleted_before_its_time(override, ways, before, ttl):
    query = before + override
    for way in ways:
        query = MANGLERS[way](query)
    policy = Policy(ttl, timedelta(minutes=1))
    meant, found = (decided(f"{OURS}?{one}", policy=policy) for one in (override, query))

    is_kept_longer = found.due_at is None or (meant.due_at is not None and found.due_at >= meant.due_at)
    assert found.hold_reason is not None or (is_kept_longer and meant.hold_reason is None)


@given(st.text(max_size=60), st.sampled_from([OURS, RELAY, ""]))
def test_any_url_is_read_without_an_error(text, url):
    assert decided(url + text).due_at is None or decided(url + text).due_at >= NOW + POLICY.min_ttl
