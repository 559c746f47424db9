"""Overrides of the retention time and labels in a URL: read whatever tools do to URLs, and find typos.

An override is ``ttl``, ``expires`` or ``hold``, which may have an end in ``hold_until``; a label is ``label.NAME``. One
that cannot be read for certain is invalid: it holds the record.
"""

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import unquote

from service.core.labels import MAX_LABELS, check_label, find_label, suggest_label
from service.core.typos import is_signature, suggest_override

WEBHOOK_PATH: Final = "/webhooks/sync"
NAMES: Final = frozenset({"ttl", "expires", "hold", "hold_until"})
MAX_URL_LENGTH: Final = 8_192
# Each tool that a URL passes through may encode it once more.
_MAX_ENCODINGS: Final = 6
_MAX_QUOTED: Final = 40

_OUR_ROUTE: Final = re.compile(r".*" + re.escape(WEBHOOK_PATH) + r"(/[^/]+)?/?", re.DOTALL)
_SCHEME: Final = re.compile(r"\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE | re.ASCII)
_SEPARATORS: Final = re.compile(r"[&;?]")
_ENTITY: Final = re.compile(r"&(#[0-9]{1,7}|#x[0-9a-f]{1,6}|[a-z]{1,32});", re.IGNORECASE | re.ASCII)
_ARRAY: Final = re.compile(r"[\[(].*$", re.DOTALL)
# A pair within another value, a path or a fragment: name=value, or "name": "value" as in JSON. The look-behind and the
# possessive quantifiers keep it linear.
_NESTED: Final = re.compile(
    r"""(?<![\w.\[\]-])([\w.\[\]-]++(?:[\s+]*+\[[^\]=]{0,20}\])?)"""
    r"""(?:[\s+]*+=[\s+]*+|["']\s*+:\s*+["']?)([^&;?#\s"'{},|<>]++)"""
)
_UNIX_SECONDS: Final = re.compile(r"[0-9]{9,13}", re.ASCII)


class InvalidOverrideError(ValueError):
    """An override that cannot be read, or what looks like one."""

    def __init__(self, name: str, value: str, advice: str) -> None:
        self.name = _printable(name)
        self.value_length = len(value)
        # Only this piece is quoted, cut short: the rest of a URL may be secret.
        piece = f"{self.name}={_printable(value)}" if value else self.name
        super().__init__(f"`{piece}`: {advice}")


@dataclass(frozen=True, slots=True)
class Overrides:
    """The overrides and labels in a URL, by name; *is_ours* if the URL's path ends in Mayfly's route for webhooks.

    A URL that is not ours has no labels.
    """

    values: dict[str, str]
    labels: dict[str, str]
    is_ours: bool


class _Pair(NamedTuple):
    """A decoded name and value; *is_nested* if it is not a parameter of the URL's own query."""

    name: str
    value: str
    is_nested: bool


def url_of_request(query: str) -> str | None:
    """Return the URL in which overrides of a webhook's request are read; None without a *query*."""
    return f"https://mayfly{WEBHOOK_PATH}?{query}" if query else None


def read_overrides(url: str) -> Overrides:
    """Return the overrides and labels in the query of *url*.

    Undone first: repeated percent-encoding, HTML entities, brackets of arrays, ``;`` or a second ``?`` for ``&``,
    upper case and blanks in names.

    Raises: InvalidOverrideError for a duplicate, for ``ttl`` together with ``expires``, for what looks like an override
    or a label in another place or with a typo, and for a label that cannot be stored.
    """
    if len(url) > MAX_URL_LENGTH:
        raise InvalidOverrideError("URL", "", f"longer than {MAX_URL_LENGTH} characters")
    if not _SCHEME.match(url):
        raise InvalidOverrideError("URL", "", "not a URL")
    # The entity &#61; has a # of its own. A fragment is never sent, so an override in it is a mistake.
    address, _, fragment = _unescape(url).partition("#")
    address, _, query = address.partition("?")
    path = "/" + address.partition("://")[2].partition("/")[2]
    is_ours = _OUR_ROUTE.fullmatch(path) is not None
    pairs = [*_pairs_of_query(query), *_nested_pairs(_decode(path)), *_nested_pairs("#" + _decode(fragment))]
    labels = _select_labels(pairs) if is_ours else {}
    others = [pair for pair in pairs if find_label(pair.name) is None] if labels else pairs
    return Overrides(_select(others, is_ours=is_ours), labels, is_ours)


def _select_labels(pairs: Sequence[_Pair]) -> dict[str, str]:
    """Return the labels among *pairs*; raises InvalidOverrideError if one cannot be read or stored."""
    labels: dict[str, str] = {}
    for name, value, is_nested in pairs:
        if (label := find_label(name)) is None:
            if (near := suggest_label(name, value)) is not None:
                raise InvalidOverrideError(name, value, f"did you mean `{near}`?")
            continue
        if is_nested:
            raise InvalidOverrideError(name, value, "only in the query itself is it a label")
        if label in labels:
            raise InvalidOverrideError(name, value, "more than once")
        if (advice := check_label(label, value)) is not None:
            raise InvalidOverrideError(name, value, advice)
        labels[label] = value
    if len(labels) > MAX_LABELS:
        raise InvalidOverrideError("label", "", f"there are more than {MAX_LABELS} labels")
    return labels


def _select(pairs: Sequence[_Pair], *, is_ours: bool) -> dict[str, str]:
    """Return the overrides among *pairs*; raises InvalidOverrideError if any pair is invalid or near one."""
    is_signed = any(is_signature(pair.name, is_ours=is_ours) for pair in pairs)
    values: dict[str, str] = {}
    for pair in pairs:
        if is_signed and pair.name == "expires" and _UNIX_SECONDS.fullmatch(pair.value):
            continue  # the end of a signed URL, such as Laravel's and CloudFront's
        if pair.name in NAMES and not pair.is_nested:
            if pair.name in values:
                raise InvalidOverrideError(pair.name, pair.value, "more than once")
            values[pair.name] = pair.value
        elif (near := suggest_override(pair.name, pair.value, is_signed=is_signed)) is not None:
            advice = f"only in the query itself is it an override; did you mean `{near}`?" if near == pair.name else ""
            raise InvalidOverrideError(pair.name, pair.value, advice or f"did you mean `{near}`?")
    if {"ttl", "expires"} <= values.keys():
        raise InvalidOverrideError("expires", values["expires"], "not together with `ttl`")
    if "hold_until" in values and "hold" not in values:
        raise InvalidOverrideError("hold_until", values["hold_until"], "only together with `hold`")
    return values


def _pairs_of_query(query: str) -> Iterator[_Pair]:
    """Split *query* into its parameters, and into the pairs within their values."""
    for segment in re.split("[&;]", query.replace("+", " ")):
        first, *others = segment.split("?")
        yield from _pairs_of_piece(first, is_nested=False)
        # In redirect=https://example.com/?ttl=1h the ttl is that URL's.
        value = _decode(first.partition("=")[2]).lstrip()
        for piece in others:
            yield from _pairs_of_piece(piece, is_nested="://" in value or value.startswith("/"))


def _pairs_of_piece(piece: str, *, is_nested: bool) -> Iterator[_Pair]:
    name, equals, value = piece.partition("=")
    name, value = _decode(name), _decode(value).strip()
    if not equals and _SEPARATORS.search(name) is None and "=" not in name:
        yield _Pair(_canonical(name), "", is_nested)
    elif not equals:  # the whole piece was encoded
        for part in _SEPARATORS.split(name):
            key, _, value = part.partition("=")
            yield from _pairs_of_parameter(key, value.strip(), is_nested=is_nested or "://" in name)
    else:
        yield from _pairs_of_parameter(_SEPARATORS.split(name)[-1], value, is_nested=is_nested)


def _pairs_of_parameter(name: str, value: str, *, is_nested: bool) -> Iterator[_Pair]:
    name = _canonical(name)
    yield _Pair(name, value, is_nested)
    if name != "hold":  # whose value is free text
        yield from _nested_pairs(f"{name}={value}" if "=" in name or "," in name else value)


def _nested_pairs(text: str) -> Iterator[_Pair]:
    for name, value in _NESTED.findall(text):
        yield _Pair(_canonical(name), value, is_nested=True)


def _canonical(name: str) -> str:
    """Return *name* in lower case without blanks, invisible characters, and the brackets of an array."""
    if not name.isascii():
        name = unicodedata.normalize("NFKC", name)
    name = "".join(letter for letter in name if letter.isprintable()).strip(" \"'").lower()
    plain = _ARRAY.sub("", name).strip()
    return plain if plain in NAMES else name


def _decode(text: str) -> str:
    """Undo percent-encoding and HTML entities until nothing changes."""
    for _ in range(_MAX_ENCODINGS):
        if "%" not in text and "&" not in text:
            return text
        decoded = _unescape(unquote(text))
        if decoded == text:
            return text
        text = decoded
    raise InvalidOverrideError("URL", "", f"a part of it is encoded more than {_MAX_ENCODINGS - 1} times")


def _unescape(text: str) -> str:
    """Undo HTML entities that end in ``;``, also of entities."""
    while "&" in text and (plain := _ENTITY.sub(lambda entity: html.unescape(entity[0].lower()), text)) != text:
        text = plain
    return text


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() and letter != "`" else "\ufffd" for letter in text[:_MAX_QUOTED])
