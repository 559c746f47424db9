"""``/api/records``: pages of records, and single ones."""

from datetime import datetime
from typing import Annotated

from litestar import Controller, get
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, FromQuery, QueryParameter

from service.core.key import Key
from service.core.lifecycle import State
from service.ledger import reading
from service.ledger.database import Database
from service.ledger.reading import MAX_PAGE, Filter
from service.ledger.views import FullRecord, RecordPage, find_record, present_record
from service.web.problems import documented, problem

DEFAULT_PAGE = 50


class RecordsController(Controller):
    """Pages of records, and single ones."""

    path = "/records"
    tags = ("records",)
    security = ({"bearer": []},)

    @get("/", summary="A page of records, newest first", responses=documented(400, 401, 403, 503))
    async def list_records(  # noqa: PLR0917 - Litestar calls it by name
        self,
        database: NamedDependency[Database],
        in_state: Annotated[State | None, QueryParameter(name="state")] = None,
        status: FromQuery[str | None] = None,
        project_id: Annotated[str | None, QueryParameter(name="projectId")] = None,
        since: Annotated[datetime | None, QueryParameter(name="from", description="received at or after")] = None,
        until: Annotated[datetime | None, QueryParameter(name="to", description="received before")] = None,
        q: Annotated[
            str | None,
            QueryParameter(
                max_length=200,
                description="part of an id, file name, model or error; a page searches 10 000 records and may be short",
            ),
        ] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE,
        cursor: Annotated[str | None, QueryParameter(description="nextCursor of the previous page")] = None,
    ) -> RecordPage:
        """Answer a page of the records that match all filters."""
        wanted = Filter(in_state, status, project_id, _require_zone(since, "from"), _require_zone(until, "to"), q)
        page = await database.read(lambda connection: reading.read_page(connection, wanted, limit=limit, cursor=cursor))
        return RecordPage([present_record(row) for row in page.rows], page.next_cursor)

    @get(
        "/{generation_id:str}",
        summary="One record with its history and the bodies as received",
        responses=documented(400, 401, 403, 404, 503),
    )
    async def show_record(
        self, database: NamedDependency[Database], generation_id: FromPath[str], account: FromQuery[str] = "default"
    ) -> FullRecord:
        """Answer one record, or 404."""
        record = await database.read(lambda connection: find_record(connection, key=Key(account, generation_id)))
        if record is None:
            raise NotFoundException("No record of this generation")
        return record


def _require_zone(instant: datetime | None, name: str) -> datetime | None:
    if instant is not None and instant.tzinfo is None:
        raise problem(400, "Bad request", f"{name} needs a time zone, such as 2026-12-31T00:00:00Z")
    return instant
