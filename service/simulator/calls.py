"""The operation of a request, by its path as received, and the log of calls."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from urllib.parse import unquote_to_bytes


class Operation(StrEnum):
    """The operation of a request; faults are scripted per operation."""

    GET = "GET"
    DELETE = "DELETE"
    LIST = "LIST"
    COUNT = "COUNT"
    CREATE = "CREATE"
    SECRET = "SECRET"  # noqa: S105 (the name of a route)
    COLLECTION_DELETE = "COLLECTION-DELETE"  # a DELETE that lost its id: no caller may ever send it
    UNKNOWN = "UNKNOWN"


@dataclass(slots=True)
class Call:
    """One request as received; *status* and *fault* are set by the answer.

    *status* is None while the call waits at a gate, and if the connection is closed without an answer.
    """

    at: datetime
    method: str
    raw_path: str
    query: str
    operation: Operation
    generation_id: str
    has_key: bool
    status: int | None = None
    fault: str | None = None


_FIXED = {
    ("GET", b"/v2/generations"): Operation.LIST,
    ("GET", b"/v2/generations/"): Operation.LIST,
    ("GET", b"/v2/generations/count"): Operation.COUNT,
    ("GET", b"/v2/organizations/webhook/secret"): Operation.SECRET,
    ("POST", b"/v2/generate"): Operation.CREATE,
}
# Many proxies resolve dot segments before routing, which turns an id of "." into the collection itself.
_NO_ID = (b"", b".", b"..")


def operation_of(method: str, raw_path: bytes) -> tuple[Operation, str]:
    """Return the operation and the generation id, decoded, of a request."""
    if fixed := _FIXED.get((method, raw_path)):
        return fixed, ""
    prefix, _, segment = raw_path.rpartition(b"/")
    if b"%" in segment:
        segment = unquote_to_bytes(segment)
    generation_id = segment.decode("utf-8", "replace")
    if method == "DELETE" and (
        raw_path in (b"/v2/generations", b"/v2/generate")
        or (prefix in (b"/v2/generations", b"/v2/generate") and segment in _NO_ID)
    ):
        return Operation.COLLECTION_DELETE, ""
    if segment and method == "GET" and prefix in (b"/v2/generate", b"/v2/generations"):
        return Operation.GET, generation_id
    if segment and method == "DELETE" and prefix == b"/v2/generations":
        return Operation.DELETE, generation_id
    return Operation.UNKNOWN, generation_id
