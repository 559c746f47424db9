"""What the keys of a rule and of an account accept, and what is made of their values."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from service.config.parsers import read_rate
from service.config.rules_shape import LengthTable
from service.core.durations import DURATION_FORMS, parse_duration, parse_instant, parse_ttl
from service.core.labels import LABEL_NAME
from service.core.matchers import Pattern, Seconds, Texts
from service.core.secret import Secret

_COMPARISON: Final = re.compile(r"\s*(<=|>=|<|>)\s*([0-9]{1,9}[smhdw])\s*", re.ASCII)
# What HTTP clients take for an IPv4 or IPv6 address.
_LIKE_AN_ADDRESS: Final = re.compile(r"[0-9]+(\.[0-9]+){3}|.*:.*", re.ASCII)
_COMMON_STATUSES: Final = "COMPLETED, FAILED, REJECTED, CANCELED or TIMED_OUT, or a list of them"


class Key(NamedTuple):
    """One key: *parse* takes its value, in the type of the table's shape, and raises ValueError for a wrong one."""

    accepts: str
    parse: Callable[[Any], Any]


def _same(value: object) -> object:
    return value


def _parse_patterns(value: str | list[str]) -> tuple[Pattern, ...]:
    return tuple(Pattern.of(text) for text in ([value] if isinstance(value, str) else value))


def _parse_types(value: str | list[str]) -> tuple[Pattern, ...]:
    return _parse_patterns(value.lower() if isinstance(value, str) else [text.lower() for text in value])


def _parse_labels(value: dict[str, str | list[str]]) -> tuple[Texts, ...]:
    for name in value:
        if not LABEL_NAME.fullmatch(name):
            raise ValueError("names of labels with 1 to 63 of a-z, 0-9, dot, dash and underscore")
    return tuple(Texts(f"label.{name}", _parse_patterns(texts)) for name, texts in value.items())


def _parse_length(value: str | LengthTable) -> Seconds:
    if isinstance(value, LengthTable):
        low = parse_duration(value.min or "0s").total_seconds()
        high = parse_duration(value.max).total_seconds() if value.max else float("inf")
        if value.min is None and value.max is None:
            raise ValueError
        found = Seconds(low, high)
    elif (match := _COMPARISON.fullmatch(value)) is None:
        raise ValueError
    else:
        seconds = parse_duration(match[2]).total_seconds()
        is_out = match[1] in "<>"
        found = (
            Seconds(low=seconds, is_low_out=is_out) if match[1][0] == ">" else Seconds(high=seconds, is_high_out=is_out)
        )
    if found.low > found.high or (found.high == 0 and found.is_high_out):
        raise ValueError("bounds that a length can be within")
    return found


def _parse_kept_for(value: str) -> timedelta | Literal["forever"]:
    return parse_ttl(value) or "forever"


def _parse_expires(value: str) -> datetime:
    try:
        return parse_instant(value)
    except (ValueError, OverflowError):
        raise ValueError from None


def _parse_forever(value: bool) -> bool:  # noqa: FBT001 - a parser takes its value
    if not value:
        raise ValueError
    return value


def _parse_bound(value: str) -> timedelta:
    duration = parse_duration(value)
    if not duration:
        raise ValueError(f"more than zero: {DURATION_FORMS}")
    return duration


def _parse_target_url(value: str) -> Secret:
    if not value.isascii() or not value.isprintable() or " " in value or "#" in value:
        raise ValueError
    try:
        parts = urlsplit(value)
        host, port = parts.hostname or "", parts.port
        if _LIKE_AN_ADDRESS.fullmatch(host):
            ip_address(host)
    except ValueError:  # it repeats a part of the URL
        raise ValueError from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError
    if parts.username is not None:
        raise ValueError("an http or https URL without a user and password; use secret_env to prove who sends")
    return Secret(value)


def _parse_variable(value: str) -> str:
    if value.lower().startswith("whsec_"):  # a secret that was pasted, and that may have no other character than a name
        raise ValueError
    return value


def _parse_timeout(value: str) -> timedelta:
    duration = parse_duration(value)
    if not timedelta(seconds=1) <= duration <= timedelta(minutes=1):
        raise ValueError
    return duration


_TEXTS: Final = "a text of 1 to 255 characters, or a list of such; * ? [ ] make it a glob"
_RULE_ID: Final = "1 to 63 of a-z, 0-9, dot, dash and underscore, the first a letter or a number"
_TTL: Final = f"{DURATION_FORMS}, or forever"
RULE_KEYS: Final[Mapping[str, Key]] = {
    "id": Key(_RULE_ID, _same),
    "status": Key(_COMMON_STATUSES, _parse_patterns),
    "model": Key(_TEXTS, _parse_patterns),
    "project": Key(_TEXTS, _parse_patterns),
    "source": Key(_TEXTS, _parse_patterns),
    "account": Key(_TEXTS, _parse_patterns),
    "error_code": Key(_TEXTS, _parse_patterns),
    "input_type": Key("video, audio, image or text, or a list of such", _parse_types),
    "output_duration": Key('">= 60s", "< 10s", or { min = "10s", max = "5m" }', _parse_length),
    "output_file_name": Key(_TEXTS, _parse_patterns),
    "labels": Key('a table such as { customer = "acme*" }', _parse_labels),
    "ttl": Key(_TTL, _parse_kept_for),
    "expires": Key("an instant with its offset, such as 2026-12-31T00:00:00Z, or a date", _parse_expires),
    "forever": Key("true; leave it out otherwise", _parse_forever),
    "hold": Key("a reason of 1 to 255 characters", _same),
    "record_ttl": Key(_TTL, _parse_kept_for),
}
_VARIABLE: Final = "the name of an environment variable, not what is in it"
ACCOUNT_KEYS: Final[Mapping[str, Key]] = {
    "id": Key("1 to 63 of a-z, 0-9, dash and underscore, the first a letter or a number", _same),
    "api_key_env": Key(_VARIABLE, _parse_variable),
    "webhook_secret_env": Key(_VARIABLE, _parse_variable),
    "min_ttl": Key(DURATION_FORMS, _parse_bound),
    "max_ttl": Key(DURATION_FORMS, _parse_bound),
    "rate": Key("a number per second, minute or hour: 300/minute", read_rate),
    "adopt": Key('"ours", "without-webhook" or "all"', _same),
}
FORWARD_KEYS: Final[Mapping[str, Key]] = {
    "id": Key("1 to 63 of a-z, 0-9, dash and underscore, the first a letter or a number", _same),
    "url": Key("an http or https URL, such as https://app.example.com/webhooks", _parse_target_url),
    "statuses": Key(f"PENDING, PROCESSING, {_COMMON_STATUSES}", _parse_patterns),
    "accounts": Key(_TEXTS, _parse_patterns),
    "labels": Key('a table such as { customer = "acme*" }', _parse_labels),
    "timeout": Key("a duration from 1s to 60s", _parse_timeout),
    "concurrency": Key("a whole number from 1 to 100", _same),
    "secret_env": Key(_VARIABLE, _parse_variable),
    "required": Key("true or false", _same),
}
