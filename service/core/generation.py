"""A generation as sync.so sends it: the wire type, and a lenient reader.

Webhooks and polled generations vary: null, missing and extra keys are normal; models, statuses and input types are
open sets; the failure code has two spellings. Only the id and the status are required.
Source: sync.so API v2 reference, "Generation status update" webhook and "Get generation".
"""

import json
import re
from typing import Annotated, Any, Final

import msgspec

TERMINAL: Final = frozenset({"COMPLETED", "FAILED", "REJECTED", "CANCELED", "TIMED_OUT"})
RUNNING: Final = frozenset({"PENDING", "PROCESSING"})
# The status of a record that was added by its id, until sync.so has shown its generation.
UNSEEN: Final = "UNKNOWN"

MAX_ID_LENGTH = 255
MAX_DEPTH = 64
_TOO_DEEP = "not a generation: nested too deeply"
# Strings are tokens of their own, so that brackets inside strings do not count. The quantifiers are possessive: an
# unterminated string is scanned once, not again from each of its quotes.
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_BACKSLASH = ord("\\")
# A lone surrogate, as in a text that was cut within an emoji. Some JSON readers accept it, most do not.
_LONE_SURROGATES = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
_NUMBER = re.compile(rb"[-+.0-9eE]+|null")
_LOOSE_TEXTS = frozenset(
    {
        *("model", "createdAt", "outputUrl", "outputMediaUrl", "segmentOutputUrl", "synthesizedAudioUrl"),
        *("outputFileName", "projectId", "source", "error", "errorCode", "error_code"),
        "webhookUrl",  # then it is no URL, so that the record is held
    }
)

# JSON readers differ on duplicate keys, and these keys decide what happens.
_DECISIVE_KEYS = ("id", "status", "metrics", "webhookUrl")


class MalformedError(ValueError):
    """A body that does not have the documented shape; answered 400, nothing is stored."""


class Generation(msgspec.Struct, rename="camel", frozen=True, kw_only=True):
    """A generation as the webhook or the API sends it; parts that no decision needs stay raw JSON."""

    id: str
    status: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    model: str | None = None
    created_at: str | None = None
    input: msgspec.Raw = msgspec.Raw(b"null")
    options: msgspec.Raw = msgspec.Raw(b"null")
    segments: msgspec.Raw = msgspec.Raw(b"null")
    output_url: str | None = None
    output_media_url: str | None = None
    segment_output_url: str | None = None
    synthesized_audio_url: str | None = None
    output_duration: float | None = None
    output_file_name: str | None = None
    project_id: str | None = None
    source: str | None = None
    webhook_url: str | None = None
    error: str | None = None
    error_code: str | None = None
    error_code_of_webhook: str | None = msgspec.field(name="error_code", default=None)
    metrics: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    @property
    def is_batch(self) -> bool:
        """Whether this is a batch notification; only those have metrics."""
        return self.metrics is not msgspec.UNSET and bytes(self.metrics) != b"null"

    @property
    def is_terminal(self) -> bool:
        """Whether the generation has ended."""
        return self.status in TERMINAL

    @property
    def failure_code(self) -> str | None:
        """The failure code: ``errorCode`` when polled, ``error_code`` in a webhook."""
        return self.error_code or self.error_code_of_webhook


_decoder = msgspec.json.Decoder(Generation)


def read_generation(body: bytes) -> Generation:
    """Decode the raw *body* of a webhook or of an API answer.

    Raises: MalformedError with a sentence for the sender, and nothing else, whatever the bytes are.
    """
    try:
        body.decode()  # the decoder does not check the text of the parts that stay raw
        _check_depth(body)
        generation = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MalformedError(f"not a generation: {error}") from None
    except RecursionError:
        raise MalformedError(_TOO_DEEP) from None
    check_id(generation.id)
    _check_duplicate_keys(generation, body)
    _check_no_nul(generation, body)
    return generation


def choose_body(earlier: str | None, later: str) -> str:
    """Return the body of a generation that says more: *later*, unless it lacks a field that *earlier* has."""
    if earlier is None:
        return later
    try:
        known, shown = (msgspec.json.decode(body, type=dict[str, msgspec.Raw]) for body in (earlier, later))
    except msgspec.DecodeError:
        return later
    lost = [
        name for name, value in known.items() if bytes(value) != b"null" and bytes(shown.get(name, b"null")) == b"null"
    ]
    return earlier if lost else later


def _decode(body: bytes) -> Generation:
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError:
        generation = _decoder.decode(_coerce_texts(body))
    if any(
        "\N{REPLACEMENT CHARACTER}" in text for text in (generation.id, generation.status, generation.webhook_url or "")
    ):
        raise MalformedError("not a generation: a lone surrogate in its id, status or webhookUrl")
    return generation


def _coerce_texts(body: bytes) -> bytes:
    """Convert values that should be texts and that need not be: a list as ``error`` must not lose the webhook."""
    body = _LONE_SURROGATES.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], body)
    top = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    for name in _LOOSE_TEXTS & top.keys():
        value = bytes(top[name])
        if value != b"null" and not value.startswith(b'"'):
            top[name] = msgspec.Raw(msgspec.json.encode(value.decode()))
    if "outputDuration" in top and not _NUMBER.fullmatch(bytes(top["outputDuration"])):
        top["outputDuration"] = msgspec.Raw(b"null")
    return msgspec.json.encode(top)


def _check_depth(body: bytes) -> None:
    """Refuse nesting deeper than MAX_DEPTH: the depth at which a JSON reader fails depends on its call stack."""
    if len(body) - len(body.translate(None, b"[{")) <= MAX_DEPTH:  # one pass instead of two counts
        return
    depth = 0
    for token in _BRACKETS.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            raise MalformedError(_TOO_DEEP)


def check_id(generation_id: str) -> None:
    """Refuse an id that cannot be one segment of a URL path: empty, ``.`` or ``..``, control characters.

    Raises: MalformedError.
    """
    if not generation_id or len(generation_id) > MAX_ID_LENGTH:
        raise MalformedError(f"not a generation: the id must have 1 to {MAX_ID_LENGTH} characters")
    if generation_id in (".", "..") or not generation_id.isprintable():
        raise MalformedError("not a generation: the id has characters that are not allowed")


def _check_duplicate_keys(generation: Generation, body: bytes) -> None:
    """Refuse a decisive key that occurs twice at the top level."""
    # The slow second pass is only for bodies in which it could find something: a key that occurs twice or is written
    # with escapes, which no known sender does. Searching one byte takes a fifth of the time of two.
    count = body.count
    if (
        (_BACKSLASH not in body or b"\\u" not in body)
        and count(b'"id"') < 2
        and count(b'"status"') < 2
        and (generation.metrics is msgspec.UNSET or count(b'"metrics"') < 2)
        and count(b'"webhookUrl"') < 2
    ):
        return
    try:
        top: list[tuple[str, Any]] = json.JSONDecoder(object_pairs_hook=list).decode(body.decode())
    except (ValueError, RecursionError):
        raise MalformedError("not a generation: JSON readers differ on it") from None
    keys = [key for key, _ in top]
    for key in _DECISIVE_KEYS:
        if keys.count(key) > 1:
            raise MalformedError(f"not a generation: duplicate key {key}")


def _check_no_nul(generation: Generation, body: bytes) -> None:
    """Refuse a NUL character in a field that becomes a text column: PostgreSQL cannot store it."""
    if _BACKSLASH not in body or b"\\u0000" not in body:
        return
    if any("\0" in text for text in msgspec.structs.astuple(generation) if isinstance(text, str)):
        raise MalformedError("not a generation: it has a NUL character")
