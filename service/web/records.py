"""``/api/records``: pages of records, and single ones."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final

import msgspec
from litestar import Controller, MediaType, Response, get
from litestar.di import NamedDependency, Provide
from litestar.exceptions import NotFoundException
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, OpenAPIType, Operation, Schema
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import Stream

from service.core.key import Key, choose_account, describe_missing
from service.ledger import reading
from service.ledger.account_reading import find_others
from service.ledger.database import Database
from service.ledger.explanations import Explanation, explain_key
from service.ledger.exporting import MEDIA_TYPES, Format, export_lines
from service.ledger.reading import MAX_PAGE, Filter
from service.ledger.views import Found, FullRecord, RecordPage, find_record, present_full, present_page
from service.web.parameters import read_filter
from service.web.problems import documented

DEFAULT_PAGE = 50
_FILTERED: Final = {"wanted": Provide(read_filter, sync_to_thread=False)}


async def encode_answer(build: Callable[[], object]) -> Any:  # noqa: ANN401 - a Response's content is what it documents
    """Return what *build* returns as JSON. A thread does both: megabytes would stop the event loop."""
    return await asyncio.to_thread(lambda: msgspec.json.encode(build()))


async def answer_record(database: Database, key: Key, found: Found | None) -> Response[FullRecord]:
    """Answer one record, or 404, which names the account that has one of this id."""
    if found is None:
        raise await refuse_missing(database, key)
    return Response(await encode_answer(lambda: present_full(found)), media_type=MediaType.JSON)


async def refuse_missing(database: Database, key: Key) -> NotFoundException:
    """Return the 404 for a record that is not there; it names the account that has one of this id."""
    others = await database.read(partial(find_others, key=key))
    if not others:
        return NotFoundException("No record of this generation")
    return NotFoundException(f"{describe_missing(key, others)}: add account={others[0]}")


@dataclass
class _ExportOperation(Operation):
    """Documents both media types; Litestar documents that of the route."""

    def __post_init__(self) -> None:
        answer = (self.responses or {}).get("200")
        if isinstance(answer, OpenAPIResponse):
            answer.content = {
                kind.split(";")[0]: OpenAPIMediaType(schema=Schema(type=OpenAPIType.STRING))
                for kind in MEDIA_TYPES.values()
            }


class RecordsController(Controller):
    """Pages of records, all that match, and single ones."""

    path = "/records"
    tags = ("records",)
    security = ({"bearer": []},)

    @get(
        "/",
        summary="A page of records, newest first",
        dependencies=_FILTERED,
        responses=documented(400, 401, 403, 503),
    )
    async def list_records(
        self,
        database: NamedDependency[Database],
        wanted: NamedDependency[Filter],
        limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE,
        cursor: Annotated[str | None, QueryParameter(description="nextCursor of the previous page")] = None,
    ) -> Response[RecordPage]:
        """Answer a page of the records that match all filters. It ends early before it has more than 4 MiB."""
        page = await database.read(partial(reading.read_page, wanted=wanted, limit=limit, cursor=cursor))
        answer = await encode_answer(partial(present_page, page))
        return Response(answer, media_type=MediaType.JSON)

    @get(
        "/export",
        summary="All records that match, newest first, as JSON Lines or CSV",
        dependencies=_FILTERED,
        media_type="application/x-ndjson",
        responses=documented(400, 401, 403, 503),
        operation_class=_ExportOperation,
    )
    async def export_records(
        self,
        database: NamedDependency[Database],
        wanted: NamedDependency[Filter],
        form: Annotated[Format, QueryParameter(name="format")] = Format.JSONL,
    ) -> Stream:
        """Stream the records that match all filters, one a line. A connection that breaks off before its end failed."""
        lines = export_lines(database, wanted, form)
        first = await anext(lines)  # an error before the first byte has its status
        # As headers: Litestar prefers the media type of the route to that of a Stream.
        kind, name = MEDIA_TYPES[form], f'attachment; filename="records.{form}"'
        headers = {"Content-Type": kind, "Content-Disposition": name}
        return Stream(_joined(first, lines), headers=headers)

    @get(
        "/{generation_id:str}",
        summary="One record with its history and the bodies as they came",
        responses=documented(400, 401, 403, 404, 503),
    )
    async def show_record(  # noqa: PLR0917 - Litestar calls it by name
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        is_dry_run: NamedDependency[bool],
        generation_id: FromPath[str],
        accounts: NamedDependency[Sequence[str]],
        account: FromQuery[str | None] = None,
    ) -> Response[FullRecord]:
        """Answer one record, or 404."""
        key = Key(choose_account(accounts, account), generation_id)
        found = await database.read(partial(find_record, key=key, now=now(), is_dry_run=is_dry_run))
        return await answer_record(database, key, found)

    @get(
        "/{generation_id:str}/explain",
        summary="Why a generation is or is not deleted, also one without a record",
        responses=documented(400, 401, 403, 503),
    )
    async def explain(  # noqa: PLR0917 - Litestar calls it by name
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        is_dry_run: NamedDependency[bool],
        generation_id: FromPath[str],
        accounts: NamedDependency[Sequence[str]],
        account: FromQuery[str | None] = None,
    ) -> Explanation:
        """Answer what becomes of the generation, what blocks its deletion now, and what can be done, in plain words."""
        key = Key(choose_account(accounts, account), generation_id)
        return await database.read(partial(explain_key, key=key, now=now(), is_dry_run=is_dry_run))


async def _joined(first: bytes, others: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for one in others:
        yield one
