"""A batch as sync.so sends it, and the lines of its results file. Both are read leniently; nothing here does I/O.

Source: sync.so docs, "Batch processing", and the payload reference "Batch status update". What a line of the results
has beside its ``request_id`` is not documented: a generation or an error is found wherever it is likely to be.
"""

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

import msgspec

from service.core.durations import parse_instant
from service.core.generation import Generation, MalformedError, read_generation

FINISHED: Final = frozenset({"COMPLETED", "FAILED"})
# A batch has 500 or 1000 generations; another number is no number of those.
MAX_LINES: Final = 20_000

# Where the generation of a line may be, and how deep: {"response": {"body": {…}}}.
_PLACES: Final = ("generation", "result", "response", "output", "data", "body")
_DEPTH: Final = 3
# Where an ``id`` is that of the generation, though nothing else says so: that of a response could be the response's.
_NAMED: Final = ("generation", "result")
_ID_KEYS: Final = ("generation_id", "generationId")
# A status beside one of these is that of a generation; any other could be that of the line.
_DESCRIBING: Final = ("model", "input", "createdAt", "outputUrl")
_NOTHING: Final = (b"null", b"false", b'""', b"{}", b"[]")


class BatchState(StrEnum):
    """How far Mayfly is with a finished batch."""

    WAITING = "waiting"  # for its first look
    UNRESOLVED = "unresolved"  # some of its generations are not known yet; it is tried again
    RESOLVED = "resolved"  # each of its generations has a record, or is known to need none
    FAILED = "failed"  # given up; it needs an operator


class Batch(msgspec.Struct, frozen=True):
    """A batch's notification. *total* is how many generations it says that it has."""

    id: str
    status: str
    created_at: datetime | None
    webhook_url: str | None
    output_url: str | None
    total: int | None


def is_finished_batch(generation: Generation) -> bool:
    """Whether *generation* is the notification of a batch that has ended."""
    return generation.is_batch and generation.status in FINISHED


def read_batch(notification: Generation, body: bytes) -> Batch:
    """Return the batch of a *notification* that read_generation() has read from *body*. It raises nothing."""
    top = _object(body) or {}
    created_at = notification.created_at or _text(top, "created_at")
    metrics = None if notification.metrics is msgspec.UNSET else _object(bytes(notification.metrics))
    return Batch(
        notification.id,
        notification.status,
        _instant(created_at),
        notification.webhook_url,
        notification.output_url,
        _total(metrics or {}),
    )


def read_output_url(body: str) -> str | None:
    """Return the ``outputUrl`` in the API's answer about a batch."""
    return _text(_object(body.encode()) or {}, "outputUrl")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the results: a *generation*, or an error without one, or neither, if it cannot be read.

    *is_ended*: the line describes a generation that has ended. Otherwise it may have no more than its id, and only the
    API tells what has become of it.
    """

    generation: Generation | None = None
    is_ended: bool = False
    is_error: bool = False


def read_line(line: bytes) -> Line:
    """Read one line of the results. It raises nothing, whatever the bytes are."""
    top = _object(line)
    if top is None:
        return Line()
    objects = list(_objects("", line, top, _DEPTH))
    for _, raw, fields in objects:
        if (found := _read_described(raw, fields)) is not None:
            return Line(found, is_ended=found.is_terminal)
    for place, _, fields in objects:
        for name in (*_ID_KEYS, "id") if place in _NAMED else _ID_KEYS:
            if (named := _read_named(_text(fields, name))) is not None:
                return Line(named)
    return Line(is_error=any(_has_error(fields) for _, _, fields in objects))


_Fields = Mapping[str, msgspec.Raw]


def _objects(place: str, raw: bytes, fields: _Fields, depth: int) -> Iterator[tuple[str, bytes, _Fields]]:
    """Yield the object of a line and those within it where a generation may be, the outermost first."""
    if "metrics" in fields:
        return  # a batch
    yield place, raw, fields
    if depth == 0:
        return
    for name in _PLACES:
        inner = bytes(fields[name]) if name in fields else b""
        if (found := _object(inner)) is not None:
            yield from _objects(name, inner, found, depth - 1)


def _read_described(raw: bytes, fields: Mapping[str, msgspec.Raw]) -> Generation | None:
    if not any(name in fields for name in _DESCRIBING):
        return None
    try:
        found = read_generation(raw)
    except MalformedError:
        return None
    return None if found.is_batch else found


def _read_named(generation_id: str | None) -> Generation | None:
    """Return a generation of which the id alone is known, if that can be one."""
    if generation_id is None:
        return None
    try:
        return read_generation(msgspec.json.encode({"id": generation_id, "status": "UNKNOWN"}))
    except MalformedError:
        return None


def _has_error(fields: Mapping[str, msgspec.Raw]) -> bool:
    return any(bytes(fields[name]) not in _NOTHING for name in ("error", "errors") if name in fields)


def _object(raw: bytes) -> dict[str, msgspec.Raw] | None:
    if not raw.lstrip().startswith(b"{"):
        return None
    try:
        raw.decode()
        return msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _text(fields: Mapping[str, msgspec.Raw], name: str) -> str | None:
    try:
        return msgspec.json.decode(fields[name], type=str) or None
    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _instant(text: str | None) -> datetime | None:
    try:
        return parse_instant(text or "")
    except (ValueError, OverflowError):
        return None


def _total(metrics: Mapping[str, msgspec.Raw]) -> int | None:
    try:
        total = msgspec.json.decode(metrics["total_generations"], type=int)
    except (KeyError, msgspec.MsgspecError):
        return None
    return total if 0 <= total <= MAX_LINES else None


def is_public(address: str) -> bool:
    """Whether an IP *address* belongs to the internet, and not to a machine's own or a company's network."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inner = None
    if isinstance(found, ipaddress.IPv6Address):
        if any(found in one for one in _TRANSLATED):
            return False
        # An IPv4 address in another form leads where that one leads.
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
    return found.is_global and not found.is_multicast if inner is None else inner.is_global and not inner.is_multicast


_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
# IPv4 in IPv6, obsolete or as a network translates it for itself: it leads to any IPv4 address.
_TRANSLATED: Final = (ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


@dataclass(frozen=True, slots=True)
class Tally:
    """What one look at a batch found.

    *expected*: how many generations it says that it has, None if it does not. *found*: different ids. *errors*: lines
    with an error and no generation. *unread*: lines that cannot be read and that the list did not make up for.
    *pending*: generations that have not ended, or of which the API told nothing. *has_results*: the results file was
    read to its end.
    """

    expected: int | None
    found: int
    errors: int
    unread: int
    pending: int
    has_results: bool

    @property
    def missing(self) -> int:
        """How many generations nothing was found of."""
        if self.expected is None:
            return 0 if self.has_results else 1
        return max(0, self.expected - self.found - self.errors)

    @property
    def unresolved(self) -> int:
        """How many generations are not known to have a record, or to need none."""
        return max(self.missing, self.unread) + self.pending
