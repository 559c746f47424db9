"""``/api/batches``: finished batches, and how far Mayfly is with finding their generations."""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Annotated

from litestar import Controller, get, post
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, FromQuery, QueryParameter

from service.core.batch import BatchState
from service.core.key import Key
from service.ledger.batch_views import BatchPage, FullBatch, list_batches, retry_and_show, show_batch
from service.ledger.database import Database
from service.web.problems import documented

MAX_BATCHES = 200
DEFAULT_BATCHES = 50


class BatchesController(Controller):
    """Finished batches: all, single ones, and another look at one."""

    path = "/batches"
    tags = ("batches",)
    security = ({"bearer": []},)

    @get("/", summary="Finished batches, newest first", responses=documented(400, 401, 403, 503))
    async def list_batches(
        self,
        database: NamedDependency[Database],
        in_state: Annotated[BatchState | None, QueryParameter(name="state")] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=MAX_BATCHES)] = DEFAULT_BATCHES,
    ) -> BatchPage:
        """Answer the newest finished batches, all or those in one state."""
        return await database.read(partial(list_batches, state=in_state, limit=limit))

    @get(
        "/{batch_id:str}",
        summary="One finished batch with its notification as it came",
        responses=documented(400, 401, 403, 404, 503),
    )
    async def show_batch(
        self, database: NamedDependency[Database], batch_id: FromPath[str], account: FromQuery[str] = "default"
    ) -> FullBatch:
        """Answer one batch, or 404."""
        return _found(await database.read(partial(show_batch, key=Key(account, batch_id))))

    @post(
        "/{batch_id:str}/retry",
        status_code=200,
        summary="Look at a finished batch again now",
        responses=documented(400, 401, 403, 404, 503),
    )
    async def retry_batch(
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        batch_id: FromPath[str],
        account: FromQuery[str] = "default",
    ) -> FullBatch:
        """Answer the batch, whatever its state was; a worker looks at it within seconds. No record is changed."""
        return _found(await database.write(partial(retry_and_show, key=Key(account, batch_id), now=now())))


def _found(batch: FullBatch | None) -> FullBatch:
    if batch is None:
        raise NotFoundException("No finished batch of this id")
    return batch
