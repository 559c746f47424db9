"""Labels of a generation in the query of its webhookUrl: ``label.customer=acme``."""

import re
from typing import Final

from service.core.typos import is_near

LABEL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
MAX_LABELS: Final = 20
MAX_VALUE: Final = 255

# label.customer, and label[customer] as tools write that make queries of nested values; with the brackets of an array.
_LABEL: Final = re.compile(r"label(?:\.([^\[\]]*)|\[([^\[\]]*)\])(?:\[[0-9]*\])?")
_NEARLY: Final = re.compile(r"([a-z]{3,8})[.:\[](.+?)\]?", re.DOTALL)
_CONTROL: Final = re.compile("[\0-\x1f\x7f-\x9f\N{REPLACEMENT CHARACTER}]")


def find_label(name: str) -> str | None:
    """Return the label's name in the name of a parameter, which is in lower case; None if it is no label."""
    match = _LABEL.fullmatch(name)
    return None if match is None else match[1] or match[2] or ""


def suggest_label(name: str, value: str) -> str | None:
    """Return the label that the parameter *name* seems to mean, None for an ordinary parameter."""
    if name in ("label", "labels"):
        return "label.NAME=VALUE" if "=" in value or ":" in value else None
    match = _NEARLY.fullmatch(name)
    is_meant = match is not None and (match[1] == "labels" or is_near(match[1], "label"))
    return f"label.{match[2]}" if match is not None and is_meant else None


def parse_label(text: str) -> tuple[str, str]:
    """Parse ``customer=acme``, as filters have it.

    Raises: ValueError, which says what is accepted.
    """
    name, equals, value = text.partition("=")
    name = name.strip().lower().removeprefix("label.")
    if not equals or not LABEL_NAME.fullmatch(name) or "\0" in value:
        raise ValueError("NAME=VALUE, such as customer=acme")
    return name, value


def check_label(name: str, value: str) -> str | None:
    """Return what a label must be if this one cannot be stored."""
    if not LABEL_NAME.fullmatch(name):
        return "the name of a label has 1 to 63 of a-z, 0-9, dot, dash and underscore"
    if len(value) > MAX_VALUE:
        return f"a label has at most {MAX_VALUE} characters"
    return "a label has no control characters" if _CONTROL.search(value) else None
