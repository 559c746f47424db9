"""The operator API, with the bearer token: move a record, pause and resume all deletions, read statistics."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Literal

import msgspec
from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.openapi.spec import Operation, RequestBody
from litestar.params import FromPath, FromQuery, JSONBody, PathParameter
from sqlalchemy import Connection

from service.core.durations import MAX_TTL
from service.core.key import Key
from service.core.lifecycle import Move
from service.ledger import forgetting, key_history, moving, pausing
from service.ledger.database import Database
from service.ledger.moving import Grace
from service.ledger.pausing import Kind, Pause
from service.ledger.views import Found, FullRecord, Stats, find_record, read_stats
from service.web.problems import documented, problem
from service.web.records import answer_record

ACTOR = "operator"
_MAX_GRACE_SECONDS = int(MAX_TTL.total_seconds())


class Reason(msgspec.Struct, frozen=True):
    """Why; it is stored in the record's history, or with the pause."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


class MoveBody(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    """Why, and for release and reopen how long the record waits at least; MAYFLY_MIN_TTL unless given."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)] | None = None
    grace_seconds: Annotated[int, msgspec.Meta(ge=0, le=_MAX_GRACE_SECONDS)] | None = None


@dataclass
class _OptionalBodyOperation(Operation):
    """Documents an optional body; Litestar documents every body as required."""

    def __post_init__(self) -> None:
        if isinstance(self.request_body, RequestBody):
            self.request_body.required = False


class OperatorController(Controller):
    """Moves, pauses and statistics."""

    tags = ("operator",)
    security = ({"bearer": []},)

    @post(
        "/records/{generation_id:str}/{move:str}",
        status_code=200,
        summary="Hold, release, keep, retry, reopen or forget a record",
        responses=documented(400, 401, 403, 404, 409, 503),
        operation_class=_OptionalBodyOperation,
    )
    async def move_record(  # noqa: PLR0917 - Litestar calls it by name
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        min_ttl: NamedDependency[timedelta],
        generation_id: FromPath[str],
        move: Annotated[Literal["hold", "release", "keep", "retry", "reopen", "forget"], PathParameter()],
        data: JSONBody[MoveBody | None] = None,
        account: FromQuery[str] = "default",
    ) -> Response[FullRecord]:
        """Answer the record after the move, or 409 if its state does not allow it.

        A record that is in that state already, or forgotten, is answered as it is.
        """
        change = partial(
            _move_and_read,
            key=Key(account, generation_id),
            wanted=Move(move),
            now=now(),
            reason=data.reason if data else None,
            grace=_grace(Move(move), data.grace_seconds if data else None, min_ttl),
        )
        return await answer_record(await database.write(change))

    @post(
        "/pause",
        status_code=200,
        summary="Pause all deletions",
        responses=documented(400, 401, 403, 503),
        operation_class=_OptionalBodyOperation,
    )
    async def pause(
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        data: JSONBody[Reason | None] = None,
    ) -> Stats:
        """Pause until resume. Webhooks are still stored; deletions in progress end first."""
        wanted = Pause(Kind.OPERATOR, now(), ACTOR, data.reason if data else "no reason given", None)
        await database.write(partial(pausing.pause, wanted=wanted))
        return await database.read(partial(read_stats, now=now()))

    @post("/resume", status_code=200, summary="Resume deletions", responses=documented(400, 401, 403, 503))
    async def resume(self, database: NamedDependency[Database], now: NamedDependency[Callable[[], datetime]]) -> Stats:
        """End every pause, whatever its kind; one whose cause persists comes back by itself."""
        await database.write(key_history.resume_all)
        return await database.read(partial(read_stats, now=now()))

    @get("/stats", summary="Statistics of the ledger", responses=documented(400, 401, 403, 503))
    async def stats(self, database: NamedDependency[Database], now: NamedDependency[Callable[[], datetime]]) -> Stats:
        """Answer the number of records in each state, the age of the most overdue deletion, and the pauses."""
        return await database.read(partial(read_stats, now=now()))


def _grace(move: Move, seconds: int | None, min_ttl: timedelta) -> Grace:
    """Return what the record waits at least; without a word of the client nothing is deleted the same second."""
    if seconds is not None and move not in (Move.RELEASE, Move.REOPEN):
        raise problem(400, "Bad Request", "graceSeconds is for release and reopen alone")
    return Grace.of(min_ttl if seconds is None else timedelta(seconds=seconds), min_ttl)


def _move_and_read(
    connection: Connection, *, key: Key, wanted: Move, now: datetime, reason: str | None, grace: Grace
) -> Found | None:
    if wanted is Move.FORGET:
        forgetting.forget_record(connection, key, now=now, actor=ACTOR, reason=reason)
        return find_record(connection, key=key)
    row = moving.move_record(connection, key, wanted, now=now, actor=ACTOR, reason=reason, grace=grace)
    return None if row is None else find_record(connection, key=key)
