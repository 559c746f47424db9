"""Rules and targets that are valid and hardly meant: found at each start and by ``mayfly policy check``."""

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Final
from urllib.parse import urlsplit

from service.config.parsers import is_near
from service.config.rules_file import Forward, RulesFile
from service.core.durations import format_duration
from service.core.generation import TERMINAL
from service.core.rules import Rule

_INPUT_TYPES: Final = ("video", "audio", "image", "text")
# sync.so keeps only these of a name that it is given.
_FILE_NAME: Final = re.compile(r"[\w*?\[\]!-]*", re.ASCII)


def find_warnings(file: RulesFile, *, min_ttl: timedelta, now: datetime) -> list[str]:
    """Return what is odd about the rules and targets, each with its place."""
    of_rules = [
        f'{file.path}:{file.lines.get(rule.id, 1)}: rule "{rule.id}": {warning}'
        for rule in file.rules.rules
        for warning in _warn(rule, min_ttl, now)
    ]
    return of_rules + [
        f'{file.path}: forward "{one.target.id}": {warning}' for one in file.forwards for warning in _warn_target(one)
    ]


def _warn_target(forward: Forward) -> Iterator[str]:
    parts = urlsplit(forward.target.url.reveal())
    if parts.scheme == "http" and not is_near(parts.hostname or ""):
        yield "its url is http: URLs of your generations, which open them, go through the internet in clear text"
    statuses = [pattern.text for one in forward.target.texts if one.name == "status" for pattern in one.patterns]
    if forward.target.is_required and statuses and not TERMINAL.intersection(statuses):
        yield "required has no effect: it counts for webhooks of generations that have ended, and it gets none of those"


def _warn(rule: Rule, min_ttl: timedelta, now: datetime) -> Iterator[str]:
    least = format_duration(int(min_ttl.total_seconds()))
    if rule.expires is not None and rule.expires <= now:
        yield f"expires has passed: what it matches is deleted after MAYFLY_MIN_TTL, {least}"
    if rule.ttl is not None and rule.ttl < min_ttl:
        yield f"ttl is less than MAYFLY_MIN_TTL: what it matches is kept for {least}"
    named = {matcher.name: [pattern.text for pattern in matcher.patterns] for matcher in rule.texts}
    if unknown := [text for text in named.get("input_type", ()) if text not in _INPUT_TYPES]:
        yield f"input_type {', '.join(unknown)} may never match: sync.so knows {', '.join(_INPUT_TYPES)}"
    if "error_code" in named and named.get("status") == ["COMPLETED"]:
        yield "it never matches: a COMPLETED generation has no error_code"
    if odd := [text for text in named.get("output_file_name", ()) if not _FILE_NAME.fullmatch(text)]:
        yield f"output_file_name {', '.join(odd)} never matches: sync.so keeps letters, digits, - and _ of a name"
