"""The operator API, with the bearer token: move a record, pause and resume all deletions, read statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import Operation, RequestBody
from litestar.params import FromPath, FromQuery, JSONBody, PathParameter, QueryParameter

from service.core.durations import MAX_TTL
from service.core.holding import Hold, parse_until
from service.core.key import Key, choose_account, describe_unsaid
from service.core.lifecycle import Move
from service.ledger import forgetting, key_history, moving, pausing, reading
from service.ledger.account_reading import UnknownAccountError, find_others, require_account
from service.ledger.database import Database
from service.ledger.explanations import Explanation, explain_key
from service.ledger.moving import Grace
from service.ledger.pausing import Kind, Pause
from service.ledger.views import FullRecord, Stats, find_record, read_stats
from service.web.auth import OPERATOR
from service.web.problems import documented, problem
from service.web.records import answer_record, refuse_missing

MAX_GRACE_SECONDS = int(MAX_TTL.total_seconds())


class Reason(msgspec.Struct, frozen=True):
    """Why; it is stored in the record's history, or with the pause."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


class MoveBody(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    """Why, for a hold until when, and for release and reopen how long the record waits at least.

    *until* is a date, its end in UTC, an instant or a duration such as 30d; a hold without it ends by a release.
    *grace_seconds* is MAYFLY_MIN_TTL, or the account's min_ttl, unless given.
    """

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)] | None = None
    until: Annotated[str, msgspec.Meta(min_length=1, max_length=64, examples=["2026-12-31", "30d"])] | None = None
    grace_seconds: Annotated[int, msgspec.Meta(ge=0, le=MAX_GRACE_SECONDS)] | None = None


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
        responses={
            **documented(400, 401, 403, 404, 409, 503),
            200: ResponseSpec(FullRecord, description="the record after it", generate_examples=False),
            202: ResponseSpec(Explanation, description="held before its first webhook", generate_examples=False),
        },
        operation_class=_OptionalBodyOperation,
    )
    async def move_record(  # noqa: PLR0917 - Litestar calls it by name
        self,
        request: Request[Any, Any, Any],
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        min_ttl_of: NamedDependency[Callable[[str], timedelta]],
        is_dry_run: NamedDependency[bool],
        accounts: NamedDependency[Sequence[str]],
        generation_id: FromPath[str],
        move: Annotated[Literal["hold", "release", "keep", "retry", "reopen", "forget"], PathParameter()],
        data: JSONBody[MoveBody | None] = None,
        account: FromQuery[str | None] = None,
    ) -> Response[Any]:  # one of the two above
        """Answer the record after the move, or 409 if its state does not allow it.

        A record that is in that state already, or forgotten, is answered as it is. A hold of a generation without a
        record is stored and answered 202: its record will be held from the beginning, unless a release comes first.
        """
        wanted, at, body = Move(move), now(), data or MoveBody()
        if b"%2f" in request.scope.get("raw_path", b"").lower():  # it would be the hold of another id
            raise NotFoundException("An id with a slash has no path: use mayfly records")
        key = Key(choose_account(accounts, account), generation_id)
        grace = _grace(wanted, body.grace_seconds, min_ttl_of(key.account))
        await _check_account(database, key, accounts, wanted, is_given=account is not None)
        by = _by(wanted, body, at)
        find = partial(find_record, key=key, now=at, is_dry_run=is_dry_run)
        if wanted is Move.FORGET:
            await database.write(partial(forgetting.forget_record, key=key, now=at, actor=OPERATOR, reason=by.reason))
        moved = (
            None
            if wanted is Move.FORGET
            else await moving.move_generation(database, key, wanted, by, now=at, grace=grace)
        )
        if not isinstance(moved, Hold):
            answer: Response[Any] = await answer_record(database, key, await database.read(find))
            return answer
        explained = await database.read(partial(explain_key, key=key, now=at, is_dry_run=is_dry_run))
        return Response(explained, status_code=202 if wanted is Move.HOLD else 200)

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
        accounts: NamedDependency[Sequence[str]],
        data: JSONBody[Reason | None] = None,
        account: Annotated[str | None, QueryParameter(description="pause this one alone")] = None,
    ) -> Stats:
        """Pause until resume. Webhooks are still stored; deletions in progress end first."""
        reason = data.reason if data else "no reason given"
        await _require_known(database, account, accounts)
        wanted = Pause(Kind.OPERATOR, now(), OPERATOR, reason, None, account or pausing.ALL_ACCOUNTS)
        await database.write(partial(pausing.pause, wanted=wanted))
        return await database.read(partial(read_stats, accounts=accounts, now=now()))

    @post("/resume", status_code=200, summary="Resume deletions", responses=documented(400, 401, 403, 503))
    async def resume(
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        accounts: NamedDependency[Sequence[str]],
        account: Annotated[str | None, QueryParameter(description="end the pauses of this one alone")] = None,
    ) -> Stats:
        """End every pause, whatever its kind; one whose cause persists comes back by itself."""
        await _require_known(database, account, accounts)
        await database.write(partial(key_history.resume_all, account=account))
        return await database.read(partial(read_stats, accounts=accounts, now=now()))

    @get("/stats", summary="Statistics of the ledger", responses=documented(400, 401, 403, 503))
    async def stats(
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        accounts: NamedDependency[Sequence[str]],
    ) -> Stats:
        """Answer the number of records in each state, the age of the most overdue deletion, and the pauses."""
        return await database.read(partial(read_stats, accounts=accounts, now=now()))


async def _require_known(database: Database, account: str | None, accounts: Sequence[str]) -> None:
    if account is None:
        return
    try:
        await database.read(partial(require_account, name=account, configured=accounts))
    except UnknownAccountError as error:
        raise problem(400, "Bad Request", str(error)) from None


async def _check_account(
    database: Database, key: Key, accounts: Sequence[str], wanted: Move, *, is_given: bool
) -> None:
    """Refuse an account that is unknown; if none was given, an id that only another has, or that has no record to hold.

    Held before its first webhook here, the record of the other account would be deleted nevertheless.
    """
    if is_given:
        await _require_known(database, key.account, accounts)
        return
    is_there = await database.read(partial(reading.find_row, key=key)) is not None
    others = await database.read(partial(find_others, key=key))
    if others and not is_there:
        raise await refuse_missing(database, key)
    if wanted is Move.HOLD and not is_there and len(accounts) > 1:
        raise problem(400, "Bad Request", f"{describe_unsaid(key.id, accounts)}: add account=NAME")


def _grace(move: Move, seconds: int | None, min_ttl: timedelta) -> Grace:
    """Return what the record waits at least; without a word of the client nothing is deleted the same second."""
    if seconds is not None and move not in (Move.RELEASE, Move.REOPEN):
        raise problem(400, "Bad Request", "graceSeconds is for release and reopen alone")
    return Grace.of(min_ttl if seconds is None else timedelta(seconds=seconds), min_ttl)


def read_until(text: str | None, now: datetime) -> datetime | None:
    """Return the end of a hold; None is until a release.

    Raises: ProblemDetailsException.
    """
    try:
        return None if text is None else parse_until(text, now=now)
    except ValueError as error:
        raise problem(400, "Bad Request", f"until: it accepts {error}") from None


def _by(move: Move, body: MoveBody, now: datetime) -> Hold:
    """Return who moves a record, why, and until when it is held."""
    if body.until is not None and move is not Move.HOLD:
        raise problem(400, "Bad Request", "until is for hold alone")
    return Hold(OPERATOR, body.reason, read_until(body.until, now))
