"""Labels in the query of a webhookUrl: read in whatever form tools leave them, or held."""

from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.overrides import InvalidOverrideError, read_overrides
from service.core.retention import Policy, Retention, decide_retention

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DAY = timedelta(days=1)
OURS = "https://hooks.example.com/webhooks/sync"


def decided(url):
    return decide_retention(Policy(DAY, timedelta(minutes=1)), webhook_url=url, sent_at=NOW, now=NOW)


@pytest.mark.parametrize(
    ("query", "labels"),
    [
        ("label.customer=acme", {"customer": "acme"}),
        ("label.customer=acme&label.shot=7&ttl=1h", {"customer": "acme", "shot": "7"}),
        ("label.Customer=Acme", {"customer": "Acme"}),
        ("label[customer]=acme", {"customer": "acme"}),
        ("label%5Bcustomer%5D=acme", {"customer": "acme"}),
        ("label.customer[]=acme", {"customer": "acme"}),
        ("label.customer%3Dacme", {"customer": "acme"}),
        ("label%252Ecustomer=ac%2520me", {"customer": "ac me"}),
        ("label.customer=Gr%C3%B6%C3%9Fe+%E2%9C%82", {"customer": "Größe ✂"}),
        ("a=1;label.customer=acme", {"customer": "acme"}),
        ("a=1?label.customer=acme", {"customer": "acme"}),
        ("a=1&amp;label.customer=acme", {"customer": "acme"}),
        ("label.customer=", {"customer": ""}),
        ("label.customer", {"customer": ""}),
        ("label.ttl=7d", {"ttl": "7d"}),
        ("label.a.b-c_d=x", {"a.b-c_d": "x"}),
        ("label.customer=" + "x" * 255, {"customer": "x" * 255}),
        ("&".join(f"label.n{n}=x" for n in range(20)), {f"n{n}": "x" for n in range(20)}),
    ],
)
def test_a_label_is_read(query, labels):
    assert read_overrides(f"{OURS}?{query}").labels == labels
    assert decided(f"{OURS}?{query}").labels == labels


def test_a_label_changes_no_due_time_by_itself():
    assert decided(f"{OURS}?label.customer=acme") == Retention(
        "MAYFLY_TTL", DAY, NOW + DAY, labels={"customer": "acme"}
    )


@pytest.mark.parametrize(
    ("rest", "advice"),
    [
        ("?label.=acme", "the name of a label has 1 to 63"),
        ("?label.-x=acme", "the name of a label has 1 to 63"),
        ("?label.größe=acme", "the name of a label has 1 to 63"),
        ("?label." + "n" * 64 + "=acme", "the name of a label has 1 to 63"),
        ("?label.customer=" + "x" * 256, "a label has at most 255 characters"),
        ("?label.customer=a%00b", "a label has no control characters"),
        ("?label.customer=a%0Ab", "a label has no control characters"),
        ("?label.customer=a%FFb", "a label has no control characters"),
        ("?label.a=1&label.a=1", "more than once"),
        ("?label.a=1&label[A]=2", "more than once"),
        ("?" + "&".join(f"label.n{n}=x" for n in range(21)), "more than 20 labels"),
        ("#label.customer=acme", "only in the query itself is it a label"),
        ("/label.customer=acme", "only in the query itself is it a label"),
        ("?next=%2F%3Flabel.customer%3Dacme", "only in the query itself is it a label"),
        ("?labels.customer=acme", "did you mean `label.customer`?"),
        ("?lable.customer=acme", "did you mean `label.customer`?"),
        ("?labels[customer]=acme", "did you mean `label.customer`?"),
        ("?label:customer=acme", "did you mean `label.customer`?"),
        ("?label=customer=acme", "did you mean `label.NAME=VALUE`?"),
        ("?labels=customer:acme", "did you mean `label.NAME=VALUE`?"),
        ("?label.customer=acme%26ttl=7d", "only in the query itself is it an override"),
    ],
)
def test_a_label_that_cannot_be_read_holds(rest, advice):
    url = OURS + rest if rest.startswith(("?", "#")) else f"https://hooks.example.com{rest}/webhooks/sync"
    found = decided(url)

    assert found.rule == "invalid override"
    assert advice in found.hold_reason
    assert found.labels == {}


@pytest.mark.parametrize(
    "query", ["label=a", "labels=a,b", "label_id=7", "label-id=7", "table.row=5", "level.a=1", "lab=2"]
)
def test_an_ordinary_parameter_is_no_label(query):
    assert decided(f"{OURS}?{query}") == Retention("MAYFLY_TTL", DAY, NOW + DAY)


@pytest.mark.parametrize("query", ["label.customer=acme", "labels.customer=acme", "label.a=1&label.a=2", "label.=x"])
def test_labels_in_the_url_of_another_service_are_its_own(query):
    url = f"https://gw.example.com/relay?{query}"

    assert read_overrides(url).labels == {}
    assert decided(url) == Retention("MAYFLY_TTL", DAY, NOW + DAY)


_words = st.text(st.characters(exclude_categories=["C"], exclude_characters="\ufffd"), max_size=20).map(str.strip)


@given(st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True), _words, max_size=5))
def test_percent_encoded_labels_read_back_or_hold(labels):
    query = "&".join(f"label.{name}={quote(value, safe='')}" for name, value in labels.items())
    try:
        found = read_overrides(f"{OURS}?{query}").labels
    except InvalidOverrideError:
        return  # such as a value that has an override in it

    assert found == labels or any(mark in value for value in labels.values() for mark in "%&")
