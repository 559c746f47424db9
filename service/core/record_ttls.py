"""How long a record is kept after its generation is gone: as MAYFLY_RECORD_TTL says, or the rule that decided."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from service.core.rules import RuleSet


@dataclass(frozen=True, slots=True)
class RecordTtls:
    """The time of each rule that has its own, by what records call the rule, and the *default*; None is forever."""

    default: timedelta | None
    by_rule: Mapping[str, timedelta | None]

    @classmethod
    def of(cls, default: timedelta | None, rules: RuleSet) -> "RecordTtls":
        """Return the times of *rules*."""
        own = ((rule.name, rule.record_ttl) for rule in rules.rules if rule.record_ttl is not None)
        return cls(default, {name: ttl if isinstance(ttl, timedelta) else None for name, ttl in own})

    @property
    def is_forever(self) -> bool:
        """Whether no record is ever forgotten by itself."""
        return self.default is None and all(ttl is None for ttl in self.by_rule.values())

    def of_rule(self, rule: str) -> timedelta | None:
        """Return how long a record is kept that *rule* decided; None is forever.

        A rule that is not in the policy any more has no time of its own.
        """
        return self.by_rule.get(rule, self.default)
