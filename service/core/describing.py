"""Who decided about a record, and who holds it, in plain words; parts of sentences, without a full stop."""

from service.core.holding import Hold
from service.core.obstacles import format_instant
from service.core.retention import ASKED_BY, DEFAULT_RULE, INVALID_RULE, OVERRIDE_PREFIX
from service.core.rules import RULE_PREFIX


def name_caller(caller: str) -> str:
    """Return who called the API, or a user of the command line."""
    return f"the {caller}" if caller in {"app", "operator"} else caller


def describe_rule(rule: str, after: str, ttl: str | None) -> str:
    """Say which *rule* set the due time; *after* says how long it is after what, or nothing."""
    if rule == DEFAULT_RULE:
        return f"MAYFLY_TTL decided this{after}"
    if rule == INVALID_RULE:
        return f"MAYFLY_TTL decided this{after}, because its override is invalid"
    if rule.startswith(OVERRIDE_PREFIX):
        asked, _, caller = rule.removeprefix(OVERRIDE_PREFIX).partition(ASKED_BY)
        whose = f"{asked} that {name_caller(caller)} asked for" if caller else f"override {asked} in its webhookUrl"
        return f"the {whose} decided this{after}"
    for words in ("kept by ", "released by "):
        if rule.startswith(words):
            return f"{rule.removeprefix(words)} {words.split()[0]} it" + (f", due after {ttl}" if ttl else "")
    return f"the rule {rule.removeprefix(RULE_PREFIX)} of MAYFLY_CONFIG decided this{after}"


def describe_hold(hold: Hold) -> str:
    """Say who holds a record, until when and why."""
    until = f" until {format_instant(hold.until)}" if hold.until else ""
    return f"by {hold.by}{until}" + (f" ({hold.reason})" if hold.reason else "")
