"""The rules of a retention policy: which generations a rule is about, and what it does. The first that matches counts.

Webhooks lack some facts that the API's answer has. A rule about those is left out until then.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from service.core.generation import Generation
from service.core.matchers import Facts, Seconds, Texts, values_of

# What a record's ``rule`` begins with when a rule of the policy decided.
RULE_PREFIX: Final = "rule: "


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the policy: what it is about, and exactly one of *ttl*, *expires*, *is_forever* and *hold*, a reason.

    All matchers must match; without any it is about every generation. *record_ttl* is how long the record is kept
    after its generation is gone; None: as MAYFLY_RECORD_TTL says.
    """

    id: str
    texts: tuple[Texts, ...] = ()
    duration: Seconds | None = None
    ttl: timedelta | None = None
    expires: datetime | None = None
    is_forever: bool = False
    hold: str | None = None
    record_ttl: timedelta | Literal["forever"] | None = None

    @property
    def name(self) -> str:
        """What the record's ``rule`` says when this rule decided."""
        return f"{RULE_PREFIX}{self.id}"

    def matches(self, facts: Facts) -> bool:
        """Whether all matchers match."""
        for matcher in self.texts:
            if not matcher.matches(facts):
                return False
        return self.duration is None or self.duration.matches(facts)

    def may_match(self, facts: Facts) -> bool:
        """Whether all matchers match, or ask about what is missing."""
        for matcher in self.texts:
            if values_of(facts, matcher.name) and not matcher.matches(facts):
                return False
        return self.duration is None or facts.output_duration is None or self.duration.matches(facts)

    def covers(self, other: "Rule") -> bool:
        """Whether it surely matches whatever *other* does, so that a later *other* would never count."""
        is_duration_covered = self.duration is None or (
            other.duration is not None and self.duration.covers(other.duration)
        )
        return is_duration_covered and all(any(mine.covers(one) for one in other.texts) for mine in self.texts)


# The most telling first: a rule is found by one of its matchers. Labels come after the project.
_BY: Final = (
    "project",
    "label",
    "output_file_name",
    "error_code",
    "source",
    "model",
    "input_type",
    "account",
    "status",
)


class _Index:
    """The places of rules by what one of their matchers asks of a text: the text itself, or how it begins."""

    def __init__(self) -> None:
        self._exact: dict[str, list[int]] = {}
        self._prefixes: dict[int, dict[str, list[int]]] = {}

    def add(self, matcher: Texts, place: int) -> None:
        for pattern in matcher.patterns:
            if pattern.is_glob:
                by_prefix = self._prefixes.setdefault(len(pattern.prefix), {})
                by_prefix.setdefault(pattern.prefix, []).append(place)
            else:
                self._exact.setdefault(pattern.text, []).append(place)

    def find(self, values: Iterable[str]) -> list[int]:
        """Return the places of the rules that may match one of *values*."""
        found: list[int] = []
        for value in values:
            found += self._exact.get(value, ())
            for length, by_prefix in self._prefixes.items():
                found += by_prefix.get(value[:length], ())
        return found


class RuleSet:
    """The rules of a policy in their order, indexed so that a decision looks at few of them."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = tuple(rules)
        # The facts that a rule asks about.
        self.asks_for = frozenset(matcher.name for rule in rules for matcher in rule.texts)
        self._indices: dict[str, _Index] = {}
        self._others: list[int] = []
        for place, rule in enumerate(rules):
            if (matcher := _most_telling(rule)) is None:
                self._others.append(place)
            else:
                self._indices.setdefault(matcher.name, _Index()).add(matcher, place)

    def candidates(self, facts: Facts) -> list[int]:
        """Return the places of the rules that may match, in their order."""
        found = self._others.copy()
        for name, index in self._indices.items():
            if values := values_of(facts, name):
                found += index.find(values)
        found.sort()
        return found

    def find(self, facts: Facts) -> Rule | None:
        """Return the first rule that matches."""
        for place in self.candidates(facts):
            if (rule := self.rules[place]).matches(facts):
                return rule
        return None

    def find_open(self, facts: Facts) -> Rule | None:
        """Return the first rule that may match instead of the one that find() returns once the API has answered."""
        if facts.is_complete:
            return None
        for rule in self.rules:
            if rule.matches(facts):
                return None
            if rule.may_match(facts):
                return rule
        return None


def _most_telling(rule: Rule) -> Texts | None:
    return min(rule.texts, key=lambda matcher: _BY.index(matcher.name.partition(".")[0]), default=None)


NO_RULES: Final = RuleSet()


def read_facts(
    rules: RuleSet, account: str, generation: Generation, *, is_complete: bool, labels: Mapping[str, str] | None = None
) -> Facts:
    """Return the facts about *generation*; *is_complete*: it is the API's answer, not a webhook.

    *labels* are those that are not in its webhookUrl. The types of the inputs are read only if a rule asks for them.
    """
    return Facts(
        account=account,
        status=generation.status,
        model=generation.model,
        error_code=generation.failure_code,
        project=generation.project_id,
        source=generation.source,
        output_file_name=generation.output_file_name,
        input_types=read_input_types(generation.input) if "input_type" in rules.asks_for else (),
        output_duration=generation.output_duration,
        labels=labels or {},
        is_complete=is_complete,
    )


def read_input_types(raw: bytes | memoryview) -> tuple[str, ...]:
    """Return the different types of the inputs; what is not documented counts as missing."""
    try:
        inputs = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):  # such as 1e999, which is valid JSON and not a float
        return ()
    types = [one.get("type") for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) else []
    return tuple(dict.fromkeys(one.lower() for one in types if isinstance(one, str)))
