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
    ESTIMATE = "ESTIMATE"
    DOWNLOAD = "DOWNLOAD"
    MEDIA = "MEDIA"  # what outputUrl and the other URLs with a token lead to
    SECRET = "SECRET"  # noqa: S105 (the name of a route)
    ERRORS = "ERRORS"
    MODELS = "MODELS"
    ASSET_LIST = "ASSET-LIST"
    ASSET_GET = "ASSET-GET"
    ASSET_DELETE = "ASSET-DELETE"
    ASSET_DOWNLOAD = "ASSET-DOWNLOAD"
    BATCH_CREATE = "BATCH-CREATE"
    BATCH_GET = "BATCH-GET"
    BATCH_LIST = "BATCH-LIST"
    BATCH_RESULT = "BATCH-RESULT"
    COLLECTION_DELETE = "COLLECTION-DELETE"  # a DELETE that lost its id: no caller may ever send it
    UNKNOWN = "UNKNOWN"


@dataclass(slots=True)
class Call:
    """One request as received; *status* and *fault* are set by the answer.

    *generation_id* is the id in the path, also that of a batch or an asset.
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
    ("POST", b"/v2/analyze/cost"): Operation.ESTIMATE,
    ("GET", b"/v2/errors"): Operation.ERRORS,
    ("GET", b"/v2/models"): Operation.MODELS,
    ("GET", b"/v2/assets"): Operation.ASSET_LIST,
    ("POST", b"/v2/batch"): Operation.BATCH_CREATE,
    ("GET", b"/v2/batch"): Operation.BATCH_LIST,
}
# By the collection and what follows the id.
_OF_ONE = {
    ("GET", b"generations", b"download"): Operation.DOWNLOAD,
    ("GET", b"generations", b"result"): Operation.MEDIA,
    ("GET", b"generations", b"audio"): Operation.MEDIA,
    ("GET", b"generations", b"segments"): Operation.MEDIA,
    ("GET", b"assets", b""): Operation.ASSET_GET,
    ("DELETE", b"assets", b""): Operation.ASSET_DELETE,
    ("GET", b"assets", b"download"): Operation.ASSET_DOWNLOAD,
    ("GET", b"batch", b""): Operation.BATCH_GET,
    ("GET", b"batch", b"result"): Operation.BATCH_RESULT,
}
# These need no key: GET /v2/errors is open, and the others have a token in their URL.
OPEN = frozenset({Operation.ERRORS, Operation.MEDIA, Operation.BATCH_RESULT})
CHANGING = frozenset({Operation.CREATE, Operation.DELETE, Operation.ASSET_DELETE, Operation.BATCH_CREATE})
WITH_BODY = frozenset({Operation.CREATE, Operation.ESTIMATE, Operation.BATCH_CREATE})
# Many proxies resolve dot segments before routing, which turns an id of "." into the collection itself.
_NO_ID = (b"", b".", b"..")


def operation_of(method: str, raw_path: bytes) -> tuple[Operation, str]:
    """Return the operation of a request and the id in its path, decoded."""
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
    return _operation_of_one(method, raw_path) or (Operation.UNKNOWN, generation_id)


def _operation_of_one(method: str, raw_path: bytes) -> tuple[Operation, str] | None:
    """Read ``/v2/<collection>/<id>``, the same with ``/<part>``, and ``/storage/<collection>/<id>/<part>``."""
    root, _, rest = raw_path[1:].partition(b"/")
    collection, _, rest = rest.partition(b"/")
    segment, _, part = rest.partition(b"/")
    operation = _OF_ONE.get((method, collection, part)) if root == b"v2" else None
    if root == b"storage" and method == "GET" and part:
        operation = Operation.MEDIA
    if operation is None or not segment:
        return None
    return operation, unquote_to_bytes(segment).decode("utf-8", "replace")
