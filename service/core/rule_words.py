"""Rules and targets in plain words, for people."""

from datetime import UTC, timedelta

from service.core.durations import format_duration
from service.core.forwarding import Target
from service.core.matchers import Seconds, Texts
from service.core.rules import Rule


def describe_subject(rule: Rule) -> str:
    """Say which generations *rule* is about."""
    parts = [describe_texts(matcher) for matcher in rule.texts]
    if rule.duration is not None:
        parts.append(_describe_length(rule.duration))
    return " and ".join(parts) or "every generation"


def describe_webhooks(target: Target) -> str:
    """Say which webhooks *target* gets."""
    parts = " and ".join(describe_texts(matcher) for matcher in target.texts)
    return f"webhooks whose {parts}" if parts else "every webhook"


def describe_effect(rule: Rule) -> str:
    """Say what *rule* does, and for how long it keeps the record."""
    kept = f"; its record is kept {_describe_ttl(rule.record_ttl)}" if rule.record_ttl else ""
    if rule.hold is not None:
        return f"held: {rule.hold}{kept}"
    if rule.expires is not None:
        return f"deleted after {rule.expires.astimezone(UTC):%Y-%m-%d %H:%M} UTC{kept}"
    return f"{describe_ttl(rule.ttl)}{kept}"


def describe_ttl(ttl: timedelta | None) -> str:
    """Say what happens to a generation that is kept for *ttl*, None: forever."""
    return "never deleted" if ttl is None else f"deleted after {format_duration(int(ttl.total_seconds()))}"


def describe_texts(matcher: Texts) -> str:
    """Say what *matcher* asks for."""
    kind, _, label = matcher.name.partition(".")
    subject = f"label {label}" if label else kind.replace("_", " ")
    verb = "like" if any(pattern.is_glob for pattern in matcher.patterns) else "is"
    return f"{subject} {verb} {' or '.join(pattern.text for pattern in matcher.patterns)}"


def _describe_ttl(ttl: timedelta | str) -> str:
    return f"for {format_duration(int(ttl.total_seconds()))}" if isinstance(ttl, timedelta) else "forever"


def _describe_length(bounds: Seconds) -> str:
    parts = []
    if bounds.low or bounds.is_low_out:
        parts.append(f"{'more than' if bounds.is_low_out else 'at least'} {bounds.low:g} s")
    if bounds.high < float("inf"):
        parts.append(f"{'less than' if bounds.is_high_out else 'at most'} {bounds.high:g} s")
    return f"output is {' and '.join(parts) or 'of any length'}"
