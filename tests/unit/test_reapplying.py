"""What a changed policy does to a record that exists: a table of cases, and what always holds."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.lifecycle import Move, State, state_after
from service.core.matchers import Facts, Pattern, Texts
from service.core.reapplying import Change, Effect, Existing, Left, reapply_policy
from service.core.record_ttls import RecordTtls
from service.core.retention import Bounds, Policy, decide_retention
from service.core.rules import Rule, RuleSet

SENT = datetime(2026, 11, 23, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
NOW = SENT + 2 * HOUR
OURS = "https://hooks.example.com/webhooks/sync"
ANSWER = Facts(status="COMPLETED", project="film", is_complete=True)


def rule(name, *, ttl=None, **about):
    does = {key: about.pop(key) for key in ("expires", "is_forever", "hold") if key in about}
    return Rule(name, tuple(Texts(key, (Pattern.of(text),)) for key, text in about.items()), ttl=ttl, **does)


def policy(*rules: Rule, ttl=DAY, **bounds):
    return Policy(ttl, MINUTE, RuleSet(rules), {"default": Bounds(**bounds)} if bounds else {})


def existing(ttl=DAY, **changes):
    """Return a record that is due *ttl* after its webhook was sent; None: it is kept."""
    state = State.KEPT if ttl is None else State.SCHEDULED
    found = Existing(state, "MAYFLY_TTL", None if ttl is None else SENT + ttl, ttl, SENT, OURS, ANSWER)
    return replace(found, **changes)


def change_of(changed, record):
    """Return the change that there is."""
    found = reapply_policy(changed, record, now=NOW)
    assert isinstance(found, Change)
    return found


FILM = {"project": "film"}
CASES = {
    "raised": (existing(), policy(ttl=3 * DAY), Effect.LATER, "MAYFLY_TTL", 3 * DAY),
    "lowered": (existing(), policy(ttl=6 * HOUR), Effect.EARLIER, "MAYFLY_TTL", 6 * HOUR),
    "lowered below its age": (existing(), policy(ttl=HOUR), Effect.EARLIER, "MAYFLY_TTL", 2 * HOUR + MINUTE),
    "a new rule": (existing(), policy(rule("f", ttl=6 * HOUR, **FILM)), Effect.EARLIER, "rule: f", 6 * HOUR),
    "a rule is gone": (existing(HOUR * 3, rule="rule: f"), policy(), Effect.LATER, "MAYFLY_TTL", DAY),
    "a rule is renamed": (existing(rule="rule: a"), policy(rule("b", ttl=DAY)), Effect.SAME_TIME, "rule: b", DAY),
    "forever": (existing(), policy(ttl=None), Effect.FOREVER, "MAYFLY_TTL", None),
    "no longer forever": (existing(None, rule="rule: f"), policy(), Effect.RELEASED, "MAYFLY_TTL", DAY),
    "no longer forever, and old": (existing(None), policy(ttl=HOUR), Effect.RELEASED, "MAYFLY_TTL", 2 * HOUR + MINUTE),
    "held": (existing(), policy(rule("h", hold="case 7")), Effect.HELD, "rule: h", DAY),
    "held, and due later": (existing(3 * DAY), policy(rule("h", hold="case 7")), Effect.HELD, "rule: h", 3 * DAY),
    "kept, then held": (existing(None), policy(rule("h", hold="case 7")), Effect.HELD, "rule: h", DAY),
    "the minimum of its account": (
        existing(),
        policy(ttl=HOUR, min_ttl=3 * HOUR),
        Effect.EARLIER,
        "MAYFLY_TTL",
        5 * HOUR,
    ),
    "an override of another service keeps longer": (
        existing(webhook_url="https://gw.example.com/hook?ttl=12h"),
        policy(ttl=6 * HOUR),
        Effect.EARLIER,
        "override: ttl",
        12 * HOUR,
    ),
    "an unsigned override shortens nothing": (
        existing(webhook_url=f"{OURS}?ttl=1h"),
        policy(ttl=6 * HOUR),
        Effect.EARLIER,
        "MAYFLY_TTL",
        6 * HOUR,
    ),
    "an unsigned label shortens nothing": (
        existing(webhook_url=f"{OURS}?label.customer=acme"),
        policy(rule("acme", ttl=HOUR, **{"label.customer": "acme"}), ttl=6 * HOUR),
        Effect.EARLIER,
        "MAYFLY_TTL",
        6 * HOUR,
    ),
    "a stored label": (
        existing(facts=Facts(labels={"customer": "acme"}), webhook_url=None),
        policy(rule("acme", ttl=6 * HOUR, **{"label.customer": "acme"})),
        Effect.EARLIER,
        "rule: acme",
        6 * HOUR,
    ),
    "adopted by a sweep": (
        existing(has_webhook=False),
        policy(ttl=MINUTE),
        Effect.EARLIER,
        "MAYFLY_TTL",
        2 * HOUR + MINUTE,
    ),
}


@pytest.mark.parametrize(("record", "changed", "effect", "name", "due_in"), CASES.values(), ids=CASES)
def test_a_policy_changes_a_record_from_the_time_at_which_it_was_sent(record, changed, effect, name, due_in):
    found = change_of(changed, record)

    assert (found.effect, found.retention.rule) == (effect, name)
    assert found.retention.due_at == (None if due_in is None else SENT + due_in)
    assert found.retention.ttl == due_in


ACME = rule("acme", ttl=3 * DAY, project="acme")
LEFT = {
    "the same policy": (existing(), policy(), Left.UNCHANGED),
    "the same policy, forever": (existing(None), policy(ttl=None), Left.UNCHANGED),
    "forever by another rule": (existing(None), policy(rule("f", is_forever=True)), Left.UNCHANGED),
    "an override": (existing(rule="override: ttl"), policy(ttl=HOUR), Left.OPERATOR),
    "an invalid override": (existing(rule="invalid override"), policy(ttl=HOUR), Left.OPERATOR),
    "kept by an operator": (existing(None, rule="kept by ada"), policy(), Left.OPERATOR),
    "released by an operator": (existing(rule="released by ada"), policy(ttl=3 * DAY), Left.OPERATOR),
    "a hold that an operator released": (
        existing(rule="rule: h", is_decided_by_operator=True),
        policy(rule("h", hold="case 7")),
        Left.OPERATOR,
    ),
    "a project that is not known yet": (existing(facts=Facts()), policy(ACME, ttl=6 * HOUR), Left.UNKNOWN),
    "kept, of a project that is not known yet": (existing(None, facts=Facts()), policy(ACME), Left.UNKNOWN),
    "a later second webhook": (existing(due_at=SENT + DAY + HOUR), policy(ttl=6 * HOUR), Left.MOVED),
    "a due time without a ttl": (replace(existing(), ttl=None), policy(ttl=6 * HOUR), Left.MOVED),
    "about to be deleted": (existing(2 * HOUR + MINUTE / 2), policy(ttl=HOUR), Left.UNCHANGED),
    "overdue": (existing(HOUR), policy(ttl=MINUTE), Left.UNCHANGED),
    "adopted by a sweep": (existing(15 * MINUTE, has_webhook=False), policy(ttl=MINUTE), Left.UNCHANGED),
}


@pytest.mark.parametrize(("record", "changed", "left"), LEFT.values(), ids=LEFT)
def test_a_policy_leaves_what_is_not_its_to_decide(record, changed, left):
    assert reapply_policy(changed, record, now=NOW) is left


def test_what_is_not_known_can_keep_longer_and_hold():
    unknown = existing(facts=Facts())

    assert change_of(policy(ACME, ttl=3 * DAY), unknown).retention.due_at == SENT + 3 * DAY
    assert change_of(policy(ACME, rule("h", hold="x")), unknown).effect is Effect.HELD


def test_a_rule_about_what_is_not_known_does_not_decide():
    short = rule("short", ttl=HOUR, project="film")

    assert reapply_policy(policy(short), existing(facts=Facts()), now=NOW) is Left.UNCHANGED


def test_after_a_second_webhook_the_clock_starts_at_the_second():
    found = change_of(policy(ttl=3 * DAY), existing(due_at=SENT + DAY + HOUR))

    assert (found.retention.due_at, found.retention.ttl) == (SENT + 3 * DAY + HOUR, 3 * DAY)


@pytest.mark.parametrize("effect", Effect)
@pytest.mark.parametrize("state", [State.SCHEDULED, State.KEPT])
def test_the_moves_of_a_change_are_legal(effect, state):
    possible = {State.SCHEDULED: {*Effect} - {Effect.RELEASED}, State.KEPT: {Effect.RELEASED, Effect.HELD}}
    if effect not in possible[state]:
        return
    moves = Change(effect, decide_retention(policy(), webhook_url=None, sent_at=SENT, now=SENT)).moves(state)
    ends = {Effect.FOREVER: State.KEPT, Effect.HELD: State.HELD}

    assert state_after(state, *moves) is ends.get(effect, State.SCHEDULED)
    assert moves[-1] in (Move.RESCHEDULE, Move.KEEP, Move.RELEASE, Move.HOLD)


# What always holds

_TTLS = st.integers(1, 400 * 86_400).map(lambda seconds: timedelta(seconds=seconds))
_ZONES = st.sampled_from(
    [UTC, timezone(timedelta(hours=14)), ZoneInfo("Europe/Berlin"), ZoneInfo("Australia/Lord_Howe")]
)
_AGES = st.timedeltas(timedelta(0), timedelta(days=500))
_NAMES = ("status", "model", "project", "source")
_FACTS = st.builds(
    Facts,
    status=st.sampled_from("ab"),
    model=st.sampled_from("ab"),
    project=st.none() | st.sampled_from("ab"),
    is_complete=st.just(value=True),
) | st.builds(Facts, status=st.sampled_from("ab"), model=st.sampled_from("ab"))
_DOES = st.one_of(
    _TTLS.map(lambda ttl: {"ttl": ttl}),
    st.just({"is_forever": True}),
    st.just({"hold": "x"}),
    _TTLS.map(lambda after: {"expires": SENT + after}),
)
_RULES = st.lists(
    st.tuples(st.dictionaries(st.sampled_from(_NAMES), st.sampled_from("ab*"), max_size=2), _DOES), max_size=4
).map(lambda made: [rule(f"r{number}", **about, **does) for number, (about, does) in enumerate(made)])
_POLICIES = st.builds(lambda rules, ttl: policy(*rules, ttl=ttl), _RULES, st.none() | _TTLS)


def received(by, facts):
    """Return the record that *by* made of a webhook; None if it is held."""
    found = decide_retention(by, facts, webhook_url=OURS, sent_at=SENT, now=SENT)
    ttl = None if found.ttl is None else timedelta(seconds=int(found.ttl.total_seconds()))
    state = State.SCHEDULED if found.due_at else State.KEPT
    return None if found.hold_reason else Existing(state, found.rule, found.due_at, ttl, SENT, OURS, facts)


def changed(record, change):
    """Return the record after *change*, which holds nothing."""
    found = change.retention
    ttl = None if found.ttl is None else timedelta(seconds=int(found.ttl.total_seconds()))
    state = state_after(record.state, *change.moves(record.state))
    return replace(record, state=state, rule=found.rule, due_at=found.due_at, ttl=ttl)


@given(policy=_POLICIES, facts=_FACTS, age=_AGES)
def test_the_policy_in_force_changes_nothing(policy, facts, age):
    record = received(policy, facts)

    assert record is None or reapply_policy(policy, record, now=SENT + age) is Left.UNCHANGED


@given(before=_POLICIES, after=_POLICIES, facts=_FACTS, age=_AGES, later=_AGES, zone=_ZONES)
def test_applying_a_policy_twice_changes_nothing_the_second_time(*, before, after, facts, age, later, zone):
    record = received(before, facts)
    now = (SENT + age).astimezone(zone)
    change = None if record is None else reapply_policy(after, record, now=now)
    if record is None or not isinstance(change, Change) or change.effect is Effect.HELD:
        return

    again = reapply_policy(after, changed(record, change), now=now.astimezone(UTC) + later)
    assert again is Left.UNCHANGED


@given(before=_POLICIES, after=_POLICIES, facts=_FACTS, age=_AGES, zone=_ZONES)
def test_no_change_makes_a_record_due_before_the_minimum(*, before, after, facts, age, zone):
    record = received(before, facts)
    now = (SENT + age).astimezone(zone)
    change = None if record is None else reapply_policy(after, record, now=now)
    if record is None or not isinstance(change, Change) or change.retention.due_at is None:
        return

    is_same = change.retention.due_at == record.due_at
    assert is_same or change.retention.due_at >= now.astimezone(UTC) + MINUTE


@given(rules=_RULES, ttl=_TTLS, more=_TTLS, facts=_FACTS, age=_AGES)
def test_raising_a_ttl_makes_no_record_due_earlier(*, rules, ttl, more, facts, age):
    record = received(policy(*rules, ttl=ttl), facts)
    raised = policy(*(replace(one, ttl=one.ttl and one.ttl + more) for one in rules), ttl=ttl + more)
    change = None if record is None else reapply_policy(raised, record, now=SENT + age)
    if record is None or not isinstance(change, Change):
        return

    assert change.effect in (Effect.LATER, Effect.FOREVER)
    assert change.retention.due_at is None or change.retention.due_at > record.due_at


@given(before=_POLICIES, after=_POLICIES, added=_RULES, age=_AGES, status=st.sampled_from("ab"))
def test_a_rule_about_what_is_not_known_makes_no_record_due_earlier(*, before, after, added, age, status):
    facts = Facts(status=status, model="a")
    record = received(before, facts)
    asking = [replace(one, id=f"new-{one.id}") for one in added if {"project", "source"} & {m.name for m in one.texts}]
    more = replace(after, rules=RuleSet([*asking, *after.rules.rules]))
    if record is None:
        return
    without, with_them = (reapply_policy(one, record, now=SENT + age) for one in (after, more))

    if isinstance(with_them, Change):
        assert with_them == without


# How long the record itself is kept


def test_a_record_is_kept_as_its_rule_says_else_as_the_setting_says():
    rules = [replace(rule("short", ttl=DAY), record_ttl=HOUR), replace(rule("film", ttl=DAY), record_ttl="forever")]
    ttls = RecordTtls.of(30 * DAY, RuleSet([*rules, rule("other", ttl=DAY)]))
    names = ("rule: short", "rule: film", "rule: other", "rule: gone", "MAYFLY_TTL", "override: ttl", "short")

    assert [ttls.of_rule(name) for name in names] == [HOUR, None, *[30 * DAY] * 5]


def test_no_record_is_forgotten_if_neither_a_rule_nor_the_setting_says_when():
    film = replace(rule("film", ttl=DAY), record_ttl="forever")

    assert RecordTtls.of(None, RuleSet([film])).is_forever
    assert not RecordTtls.of(DAY, RuleSet([film])).is_forever
    assert not RecordTtls.of(None, RuleSet([replace(film, record_ttl=DAY)])).is_forever
