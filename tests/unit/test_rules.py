"""Rules: what each matcher matches, the first rule that counts, and the index that finds it."""

from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.generation import read_generation
from service.core.matchers import Facts, Pattern, Seconds, Texts
from service.core.rules import Rule, RuleSet, read_facts

HOUR = timedelta(hours=1)
TEXT_FACTS = ("status", "model", "error_code", "project", "source", "output_file_name", "account")


def texts(name, *patterns: str):
    return Texts(name, tuple(Pattern.of(text) for text in patterns))


def rule(name, *matchers: Texts, **does):
    return Rule(name, matchers, **(does or {"ttl": HOUR}))


def found(rules, **facts):
    match = RuleSet(rules).find(Facts(**facts))
    return match and match.id


def facts_of(known: dict[str, Any]) -> Facts:
    return Facts(**known)


# Patterns


@pytest.mark.parametrize(
    ("pattern", "text", "is_match"),
    [
        ("lipsync-2", "lipsync-2", True),
        ("lipsync-2", "lipsync-2-pro", False),
        ("lipsync-2", "Lipsync-2", False),
        ("lipsync-*", "lipsync-2-pro", True),
        ("*-pro", "lipsync-2-pro", True),
        ("*", "", True),
        ("take_??", "take_07", True),
        ("take_??", "take_7", False),
        ("take_[0-4]", "take_3", True),
        ("take_[!0-4]", "take_3", False),
        ("a[[]b*", "a[bc", True),
        ("a.c", "abc", False),
        ("a*", "a\nb", True),
    ],
)
def test_a_pattern_matches_the_whole_text(pattern, text, is_match):
    assert Pattern.of(pattern).matches(text) is is_match


@pytest.mark.parametrize("text", ["[", "a[b", "a[]", "a[!]x", "x*[0-9"])
def test_a_glob_with_an_open_bracket_is_refused(text):
    with pytest.raises(ValueError, match="for each"):
        Pattern.of(text)


def test_a_glob_with_many_stars_fails_fast():
    assert not Pattern.of("a*" * 60 + "b").matches("a" * 20_000)


@given(st.text("ab*?", max_size=6), st.text("ab*?", max_size=6), st.text("ab", max_size=8))
def test_a_pattern_that_covers_another_matches_what_that_matches(wide, narrow, text):
    if Pattern.of(wide).covers(Pattern.of(narrow)) and Pattern.of(narrow).matches(text):
        assert Pattern.of(wide).matches(text)


@pytest.mark.parametrize(
    ("wide", "narrow", "is_covered"),
    [
        ("*", "a[bc]", True),
        ("a*", "ab*", True),
        ("a*", "abc", True),
        ("a[bc]", "ab", True),
        ("a[bc]", "a[bc]", True),
        ("a?", "a*", False),
        ("ab*", "a*", False),
        ("a[bc]", "a[b]", False),
        ("abc", "a*", False),
    ],
)
def test_which_patterns_cover_which(wide, narrow, is_covered):
    assert Pattern.of(wide).covers(Pattern.of(narrow)) is is_covered


# Matchers


@pytest.mark.parametrize("name", TEXT_FACTS)
def test_a_matcher_of_a_text_matches_one_of_its_patterns(name):
    matcher = texts(name, "x", "y*")

    assert matcher.matches(facts_of({name: "x"}))
    assert matcher.matches(facts_of({name: "yz"}))
    assert not matcher.matches(facts_of({name: "z"}))


@pytest.mark.parametrize("name", [name for name in TEXT_FACTS if name != "account"])
def test_no_pattern_matches_a_missing_fact(name):
    assert not texts(name, "*").matches(Facts())
    assert not texts(name, "*").matches(facts_of({name: ""}))


def test_a_matcher_of_input_types_matches_any_input():
    assert texts("input_type", "text").matches(Facts(input_types=("video", "text")))
    assert not texts("input_type", "text").matches(Facts(input_types=("video",)))
    assert not texts("input_type", "*").matches(Facts())


def test_a_matcher_of_a_label_matches_its_value():
    matcher = texts("label.customer", "acme*")

    assert matcher.matches(Facts(labels={"customer": "acme-west"}))
    assert not matcher.matches(Facts(labels={"customer": "other"}))
    assert not matcher.matches(Facts(labels={"client": "acme-west"}))


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Seconds(low=60), [60, 61], [59.9]),
        (Seconds(low=60, is_low_out=True), [60.1], [60]),
        (Seconds(high=60), [0, 60], [60.1]),
        (Seconds(high=60, is_high_out=True), [59.9], [60]),
        (Seconds(10, 20), [10, 20], [9, 21]),
    ],
)
def test_a_matcher_of_the_duration_knows_its_bounds(bounds, inside, outside):
    assert all(bounds.matches(Facts(output_duration=seconds)) for seconds in inside)
    assert not any(bounds.matches(Facts(output_duration=seconds)) for seconds in outside)
    assert not bounds.matches(Facts())


_bounds = st.builds(
    Seconds, st.sampled_from([0, 1, 2]), st.sampled_from([2, 3, float("inf")]), st.booleans(), st.booleans()
)


@given(_bounds, _bounds, st.sampled_from([0, 0.5, 1, 1.5, 2, 2.5, 3, 4]))
def test_bounds_that_cover_others_match_what_those_match(wide, narrow, seconds):
    facts = Facts(output_duration=seconds)

    assert not (wide.covers(narrow) and narrow.matches(facts)) or wide.matches(facts)


# Rules


def test_the_first_rule_that_matches_counts():
    rules = [rule("one", texts("model", "a")), rule("two", texts("status", "FAILED")), rule("three")]

    assert found(rules, model="a", status="FAILED") == "one"
    assert found(rules, model="b", status="FAILED") == "two"
    assert found(rules, model="b") == "three"
    assert found(rules[:2], model="b") is None


def test_all_matchers_of_a_rule_must_match():
    rules = [Rule("one", (texts("model", "a"), texts("project", "p")), Seconds(low=10), ttl=HOUR)]

    assert found(rules, model="a", project="p", output_duration=10) == "one"
    assert found(rules, model="a", project="p", output_duration=9) is None
    assert found(rules, model="a", output_duration=10) is None


def test_an_open_rule_is_one_that_the_answer_of_the_api_may_make_count():
    rules = RuleSet([rule("film", texts("project", "p"), texts("model", "a")), rule("rest", texts("model", "a", "b"))])

    assert rules.find_open(Facts(model="a")) == rules.rules[0]
    assert rules.find_open(Facts(model="a", is_complete=True)) is None
    assert rules.find_open(Facts(model="b")) is None
    assert rules.find_open(Facts(model="a", project="p")) is None


def _patterns(name):
    return st.lists(st.text("ab*", min_size=1, max_size=3), min_size=1, max_size=3).map(
        lambda found: texts(name, *found)
    )


_names = ("project", "model", "status", "input_type", "label.x", "label.y", "output_file_name")
_rules = st.lists(
    st.builds(
        lambda matchers, duration: Rule("r", tuple(matchers), duration, ttl=HOUR),
        st.lists(st.sampled_from(_names), unique=True, max_size=3).flatmap(
            lambda names: st.tuples(*[_patterns(name) for name in names])
        ),
        st.none() | _bounds,
    ),
    max_size=12,
)
_value = st.none() | st.text("ab", max_size=3)
_facts = st.builds(
    Facts,
    project=_value,
    model=_value,
    status=_value,
    output_file_name=_value,
    input_types=st.lists(st.text("ab", max_size=2), max_size=2).map(tuple),
    labels=st.dictionaries(st.sampled_from(["x", "y", "z"]), st.text("ab", max_size=2)),
    output_duration=st.none() | st.sampled_from([0, 1, 2, 3]),
)


@given(_rules, _facts)
def test_the_index_finds_the_rule_that_a_search_through_all_would_find(rules, facts):
    assert RuleSet(rules).find(facts) is next((one for one in rules if one.matches(facts)), None)


@given(_rules, _facts)
def test_a_rule_that_covers_another_matches_what_that_matches(rules, facts):
    for wide in rules:
        for narrow in rules:
            assert not (wide.covers(narrow) and narrow.matches(facts)) or wide.matches(facts)


def test_a_decision_looks_at_few_of_many_rules():
    rules = [
        *[rule(f"p{n}", texts("project", f"project-{n}"), texts("status", "COMPLETED")) for n in range(300)],
        *[rule(f"l{n}", texts("label.customer", f"customer-{n:03}-*"), texts("model", "*")) for n in range(200)],
    ]
    facts = Facts(status="COMPLETED", model="m", project="project-299", labels={"customer": "customer-007-x"})

    assert len(RuleSet(rules).candidates(facts)) == 2
    assert RuleSet(rules).candidates(Facts(status="COMPLETED", model="m")) == []


# Facts


def generation(**fields):
    return read_generation(msgspec.json.encode({"id": "g", "status": "FAILED", **fields}))


TYPED = RuleSet([rule("typed", texts("input_type", "x"))])


def test_facts_are_read_from_a_generation():
    body = generation(
        model="m",
        errorCode="e",
        projectId="p",
        source="s",
        outputFileName="f",
        outputDuration=1.5,
        input=[{"type": "Video"}],
    )

    assert read_facts(TYPED, "film", body, is_complete=True, labels={"a": "b"}) == Facts(
        account="film",
        status="FAILED",
        model="m",
        error_code="e",
        project="p",
        source="s",
        output_file_name="f",
        input_types=("video",),
        output_duration=1.5,
        labels={"a": "b"},
        is_complete=True,
    )


@pytest.mark.parametrize(
    "inputs", [None, {}, {"type": "video"}, "video", 5, ["video"], [None, 1], [{"type": 1}], [{"kind": "video"}], [[]]]
)
def test_inputs_in_another_shape_count_as_missing(inputs):
    assert read_facts(TYPED, "default", generation(input=inputs), is_complete=False).input_types == ()


def test_inputs_that_a_reader_cannot_read_count_as_missing():
    body = b'{"id": "g", "status": "FAILED", "input": [{"type": "video", "x": 1e999}]}'

    assert read_facts(TYPED, "default", read_generation(body), is_complete=False).input_types == ()


def test_inputs_are_not_read_without_a_rule_that_asks_for_them():
    assert read_facts(RuleSet(), "default", generation(input=[{"type": "video"}]), is_complete=False).input_types == ()
