"""What a policy of 500 rules adds to the decision about one webhook, in processor time."""

from datetime import UTC, datetime, timedelta
from statistics import median
from time import process_time

from service.core.generation import Generation
from service.core.key import DEFAULT_ACCOUNT
from service.core.matchers import Pattern, Texts
from service.core.retention import Policy, decide_retention
from service.core.rules import Rule, RuleSet, read_facts

RULES = 500
_CALLS = 5_000
_ROUNDS = 7
_NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
_URL = "https://mayfly.example.com/webhooks/sync?label.customer=customer-499-east"


def rules_by(name: str, pattern: str, **also: str) -> RuleSet:
    """Return RULES rules that differ in what they say about *name*, and a last one about every COMPLETED generation."""
    others = tuple(Texts(key, (Pattern.of(text),)) for key, text in also.items())
    rules = [
        Rule(f"r{place}", (Texts(name, (Pattern.of(pattern.format(place)),)), *others), ttl=timedelta(days=2))
        for place in range(RULES)
    ]
    return RuleSet([*rules, Rule("rest", (Texts("status", (Pattern.of("COMPLETED"),)),), ttl=timedelta(days=1))])


POLICIES = {
    "no rules": RuleSet(),
    "by project": rules_by("project", "612bb64a-e7f4-40c1-977b-{:012}"),
    "by a label": rules_by("label.customer", "customer-{:03}-east", status="COMPLETED"),
    "by a glob of a label": rules_by("label.customer", "customer-{:03}-*"),
    "by a glob of the model": rules_by("model", "lipsync-{:03}*", input_type="text"),
}


def decide_microseconds() -> dict[str, float]:
    """Return the microseconds of processor time that one decision takes under each policy."""
    generation = Generation(id="a", status="COMPLETED", model="lipsync-2", webhook_url=_URL, output_duration=9.98)
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    for _ in range(_ROUNDS):  # in turns: the machine may be slower for a while
        for name, rules in POLICIES.items():
            policy = Policy(timedelta(days=1), timedelta(minutes=1), rules)
            start = process_time()
            for _ in range(_CALLS):
                facts = read_facts(rules, DEFAULT_ACCOUNT, generation, is_complete=False)
                decide_retention(policy, facts, webhook_url=_URL, sent_at=_NOW, now=_NOW)
            found[name].append((process_time() - start) / _CALLS * 1e6)
    return {name: median(times) for name, times in found.items()}
