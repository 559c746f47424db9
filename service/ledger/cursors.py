"""Cursors of pages in the order of receipt: where the next page goes on."""

import base64
import binascii
import struct
from datetime import datetime
from typing import Final

from service.core.errors import ExplainedError
from service.ledger.instant import instant, microseconds

# When it was received, and its number.
Place = tuple[datetime, int]
# Microseconds since 1970 and the number.
_CURSOR: Final = ">qq"


class CursorError(ExplainedError):
    """A cursor that is not the next_cursor of a page."""


def make_cursor(place: Place) -> str:
    """Return the cursor of the page after *place*."""
    raw = struct.pack(_CURSOR, microseconds(place[0]), place[1])
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def read_cursor(cursor: str) -> Place:
    """Return the place of *cursor*.

    Raises: CursorError.
    """
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        since, seq = struct.unpack(_CURSOR, raw)
        return instant(since), seq
    except (binascii.Error, struct.error, ValueError, OverflowError):
        raise CursorError("invalid cursor: use the nextCursor of a page") from None
