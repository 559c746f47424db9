"""What the answers of the Sync API mean: one table, by status.

Source: sync.so API v2 reference, "Errors", and the pages of "Get generation" and "Delete generation".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

import msgspec

from service.core.attempts import Verdict, throttle_duration
from service.core.generation import RUNNING, Generation, MalformedError, read_generation
from service.core.retry_after import parse_retry_after

# A generation has a few kilobytes, more with segments and scripts.
MAX_BYTES: Final = 2 * 1024 * 1024
# A page of the list has a hundred of them.
MAX_PAGE_BYTES: Final = 32 * 1024 * 1024

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a status means for the record (*verdict*), for the daily limit, for the key and for all other calls."""

    verdict: Verdict
    is_undeleted: bool = False  # a DELETE with this answer certainly deleted nothing
    is_key_good: bool = False  # the API gives this answer only to a valid key
    is_key_doubtful: bool = False  # either the key is refused or this record: a call about no generation tells
    is_throttled: bool = False  # all calls stop for the time that the API asks for


MEANINGS: Mapping[int, Meaning] = MappingProxyType(
    {
        200: Meaning(Verdict.DONE, is_key_good=True),
        400: Meaning(Verdict.REFUSED, is_undeleted=True),
        401: Meaning(Verdict.UNAUTHORIZED, is_undeleted=True, is_key_doubtful=True),
        402: Meaning(Verdict.UNAUTHORIZED, is_undeleted=True),
        403: Meaning(Verdict.UNAUTHORIZED, is_undeleted=True, is_key_doubtful=True),
        404: Meaning(Verdict.RETRY),  # _GONE if proves_gone()
        405: Meaning(Verdict.REFUSED, is_undeleted=True),
        408: Meaning(Verdict.RETRY),
        409: Meaning(Verdict.RUNNING, is_undeleted=True, is_key_good=True),
        410: Meaning(Verdict.RETRY),  # as 404
        422: Meaning(Verdict.REFUSED, is_undeleted=True),
        425: Meaning(Verdict.RETRY),
        429: Meaning(Verdict.RETRY, is_undeleted=True, is_throttled=True),
    }
)
_GONE: Final = Meaning(Verdict.GONE, is_key_good=True)
_OTHER_4XX: Final = Meaning(Verdict.REFUSED)
# 5xx; 3xx, which are never followed; other 2xx, which confirm nothing.
_ALL_OTHERS: Final = Meaning(Verdict.RETRY)


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one call.

    *generation* and *body* are set when the API showed the generation asked for; a page of the list is a *body* alone.
    *error* is a sentence for the operator, without URLs and bodies. *status* is None without an answer. *throttle* is
    for how long to make no calls.
    """

    verdict: Verdict
    status: int | None = None
    generation: Generation | None = None
    body: str | None = None
    error: str | None = None
    retry_after: timedelta | None = None
    is_undeleted: bool = False
    is_key_good: bool = False
    is_key_doubtful: bool = False
    throttle: timedelta | None = None
    location: str | None = None  # where the API redirects to, which is not followed with the key


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as received; *body* is None if it is longer than MAX_BYTES, or MAX_PAGE_BYTES for a list."""

    status: int
    body: bytes | None
    retry_after: str | None
    location: str | None = None


def read_get(reply: Reply, generation_id: str) -> Answer:
    """Interpret the answer to the GET of a generation: DONE with the generation if it is terminal."""
    if reply.status != HTTPStatus.OK:
        return _read_error(reply)
    answer = _read_generation(reply, generation_id)
    if answer.generation is None or answer.generation.is_terminal:
        return answer
    if answer.generation.status in RUNNING:
        return replace(answer, verdict=Verdict.RUNNING, error="it is still being processed")
    # A generation with an unknown status may still be in use.
    error = "the API shows a status that this release does not know"
    return replace(answer, verdict=Verdict.RETRY, error=error, is_key_good=False)


def read_delete(reply: Reply, generation_id: str) -> Answer:
    """Interpret the answer to the DELETE of a generation: DONE if the API confirms it."""
    if reply.status == HTTPStatus.NO_CONTENT:
        return Answer(Verdict.DONE, reply.status, is_key_good=True)
    return _read_generation(reply, generation_id) if reply.status == HTTPStatus.OK else _read_error(reply)


def read_list(reply: Reply) -> Answer:
    """Interpret the answer to the list of generations, as a proof of the key: DONE, UNAUTHORIZED, or RETRY for neither.

    A page of a proxy is no word on the key.
    """
    body = (reply.body or b"").strip()
    if reply.status == HTTPStatus.OK and body.startswith(b"["):
        return Answer(Verdict.DONE, reply.status, is_key_good=True)
    answer = _read_error(reply)
    is_theirs = reply.body == b"" or _parse_details(reply.body) is not None
    return answer if answer.verdict is Verdict.UNAUTHORIZED and is_theirs else replace(answer, verdict=Verdict.RETRY)


def read_page(reply: Reply) -> Answer:
    """Interpret the answer to a page of the list of generations: DONE with the whole array as *body*."""
    if reply.status != HTTPStatus.OK:
        return _read_error(reply)
    if reply.body is None:
        return Answer(Verdict.RETRY, reply.status, error="the API's answer is longer than any page of generations")
    try:
        msgspec.json.decode(reply.body, type=list[msgspec.Raw])
        body = reply.body.decode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Answer(Verdict.RETRY, reply.status, error="the API answered 200 without a list of generations")
    return Answer(Verdict.DONE, reply.status, body=body, is_key_good=True)


def read_batch_answer(reply: Reply) -> Answer:
    """Interpret the answer to the GET of a batch: DONE with its *body*, or with the *location* of its results."""
    if reply.status in REDIRECTS and reply.location:
        return Answer(Verdict.DONE, reply.status, is_key_good=True, location=reply.location)
    if reply.status != HTTPStatus.OK:
        return _read_error(reply)
    if _parse_details(reply.body) is None:
        return Answer(Verdict.RETRY, reply.status, error="the API answered 200 without a batch")
    return Answer(Verdict.DONE, reply.status, body=(reply.body or b"").decode(), is_key_good=True)


def explain_refusal(refusal: Answer, proof: Answer | None) -> Answer:
    """Tell by *proof*, the answer of read_list(), what a 401 or 403 about one generation means; None is no answer.

    A key that is accepted elsewhere makes it this record's own refusal. Without a word on the key it is neither.
    """
    if proof is not None and proof.verdict is Verdict.UNAUTHORIZED:
        return refusal
    if proof is not None and proof.verdict is Verdict.DONE:
        error = f"{refusal.error} for this generation, and accepts the key"
        return replace(refusal, verdict=Verdict.REFUSED, error=error, is_key_good=True)
    error = f"{refusal.error}, and whether the key is accepted is not known"
    throttle = None if proof is None else proof.throttle
    return replace(refusal, verdict=Verdict.RETRY, error=error, throttle=throttle)


def _read_generation(reply: Reply, generation_id: str) -> Answer:
    """Read the generation in a 200 and check its id."""
    if reply.body is None:
        return Answer(Verdict.RETRY, reply.status, error="the API's answer is longer than any generation")
    try:
        generation = read_generation(reply.body)
    except MalformedError:
        return Answer(Verdict.RETRY, reply.status, error="the API answered 200 without a generation")
    if generation.id != generation_id:
        # Never observed. After a few tries it needs an operator.
        return Answer(Verdict.REFUSED, reply.status, error="the API answered with another generation")
    meaning = MEANINGS[HTTPStatus.OK]
    return Answer(meaning.verdict, reply.status, generation, reply.body.decode(), is_key_good=meaning.is_key_good)


def _read_error(reply: Reply) -> Answer:
    """Interpret any status that is not a success."""
    details = _parse_details(reply.body)
    meaning = _meaning(reply, details)
    code = _error_code(details)
    error = f"the API answered {reply.status}" + (f" {code}" if isinstance(code, str) and code.isidentifier() else "")
    now = datetime.now(UTC)
    retry_after = parse_retry_after(reply.retry_after or "", now=now)
    if retry_after is None:
        retry_after = parse_retry_after(str((details or {}).get("retryAfterSeconds", "")), now=now)
    return Answer(
        meaning.verdict,
        reply.status,
        body=reply.body.decode(errors="replace") if meaning.verdict is Verdict.GONE and reply.body else None,
        error=error,
        retry_after=retry_after,
        is_undeleted=meaning.is_undeleted,
        is_key_good=meaning.is_key_good,
        is_key_doubtful=meaning.is_key_doubtful,
        throttle=throttle_duration(retry_after) if meaning.is_throttled else None,
    )


def _meaning(reply: Reply, details: dict[str, Any] | None) -> Meaning:
    if proves_gone(reply.status, details):
        return _GONE
    return MEANINGS.get(reply.status, _OTHER_4XX if 400 <= reply.status < 500 else _ALL_OTHERS)


def proves_gone(status: int, details: dict[str, Any] | None) -> bool:
    """Whether an error answer proves that the generation does not exist: only the API's own code does.

    Gateways answer 404 and 410 while routes reload, with any body or none; and another code is about something else.
    """
    return status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE) and _error_code(details) == "generation_not_found"


def _error_code(details: dict[str, Any] | None) -> object:
    """Return the error code of an error body; the API has spelled the name in two ways."""
    found = details or {}
    return found.get("error_code") if found.get("errorCode") is None else found["errorCode"]


def _parse_details(body: bytes | None) -> dict[str, Any] | None:
    """Parse an error body: a JSON object, else None; proxies in front of the API answer in HTML."""
    try:
        details = msgspec.json.decode(body or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return details if isinstance(details, dict) else None
