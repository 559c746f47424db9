"""All records that match a filter, as lines of JSON or CSV, page by page: memory does not grow with the ledger."""

import asyncio
import csv
import io
from collections.abc import AsyncIterator
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Final

import msgspec

from service.ledger import reading
from service.ledger.database import Database
from service.ledger.reading import MAX_PAGE, Filter, Page
from service.ledger.views import Record, present_page


class Format(StrEnum):
    """How records are written: as JSON, one a line, or as CSV with a line of names."""

    JSONL = "jsonl"
    CSV = "csv"


MEDIA_TYPES: Final = {Format.JSONL: "application/x-ndjson", Format.CSV: "text/csv; charset=utf-8"}
_NAMES: Final = {field.name: field.encode_name for field in msgspec.structs.fields(Record)}
# A spreadsheet takes a text that begins with one of these for a formula, and runs it.
_FORMULA: Final = ("=", "+", "-", "@", "\t")


async def export_lines(database: Database, wanted: Filter, form: Format) -> AsyncIterator[bytes]:
    """Yield the lines of each page of the records that match *wanted*, newest first; without any an empty text.

    Records that arrive meanwhile are left out.

    Raises: LedgerUnavailableError.
    """
    yield _write_csv([list(_NAMES.values())]) if form is Format.CSV else b""
    cursor: str | None = None
    while True:
        page = await database.read(partial(reading.read_page, wanted=wanted, limit=MAX_PAGE, cursor=cursor))
        # In a thread: megabytes would stop the event loop.
        yield await asyncio.to_thread(_encode_page, page, form)
        cursor = page.next_cursor
        if cursor is None:
            return


def _encode_page(page: Page, form: Format) -> bytes:
    items = present_page(page).items
    if form is Format.JSONL:
        return msgspec.json.Encoder().encode_lines(items)
    return _write_csv([[_cell(getattr(item, name)) for name in _NAMES] for item in items])


def _cell(value: object) -> str:
    """Return *value* for a cell of a spreadsheet: text on one line, lists and objects as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        line = value.replace("\n", "\\n").replace("\r", "\\r")
        return f"'{line}" if line.startswith(_FORMULA) else line
    text = msgspec.json.encode(value).decode()
    return text.strip('"') if isinstance(value, datetime) else text


def _write_csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
