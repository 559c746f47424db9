"""``POST /api/records/hold`` and ``release``: holds and releases of all records that match a filter."""

from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Final

import msgspec
from litestar import Controller, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from service.core.holding import Hold
from service.core.lifecycle import Move, State
from service.ledger import bulk
from service.ledger.bulk import Moved, Wanted
from service.ledger.database import Database
from service.ledger.moving import Grace
from service.ledger.reading import Filter
from service.web.auth import OPERATOR
from service.web.operator import MAX_GRACE_SECONDS, read_until
from service.web.problems import documented, problem

# A proxy in front waits for a minute.
SECONDS: Final = 30.0


class Chosen(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    """Which records: those that match all of these, and at least one must be given."""

    state: State | None = None
    status: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    project_id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    q: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None

    labels: Annotated[dict[str, str], msgspec.Meta(max_length=20)] = {}
    account: Annotated[str, msgspec.Meta(min_length=1, max_length=63)] | None = None

    def as_filter(self) -> Filter:
        """Return the filter.

        Raises: ProblemDetailsException without any.
        """
        if self == Chosen():
            raise problem(400, "Bad Request", "filter needs one of account, state, status, projectId, labels and q")
        return Filter(self.state, self.status, self.project_id, text=self.q, labels=self.labels, account=self.account)


class HoldAll(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    """Hold what matches; *dry_run* only counts."""

    filter: Chosen
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    until: Annotated[str, msgspec.Meta(min_length=1, max_length=64, examples=["2026-12-31", "30d"])] | None = None
    dry_run: bool = False


class ReleaseAll(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    """Release what matches and is held; *expected* is the number that a dry run has shown, and needed without one."""

    filter: Chosen
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    grace_seconds: Annotated[int, msgspec.Meta(ge=0, le=MAX_GRACE_SECONDS)] | None = None
    expected: Annotated[int, msgspec.Meta(ge=0)] | None = None
    dry_run: bool = False


class Outcome(msgspec.Struct, rename="camel", frozen=True):
    """How many records in each state matched before, and what was done; *result* is None after a dry run."""

    matched: dict[State, int]
    result: Moved | None


class BulkController(Controller):
    """Moves of all records that match a filter."""

    path = "/records"
    tags = ("operator",)
    security = ({"bearer": []},)

    @post("/hold", status_code=200, summary="Hold all that match", responses=documented(400, 401, 403, 503))
    async def hold(
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        data: JSONBody[HoldAll],
    ) -> Outcome:
        """Hold all records that match now; it needs no count, because a hold can be released.

        Those that match later are not held: a rule does that. After 30 s it answers isComplete false; ask again.
        """
        by = Hold(OPERATOR, data.reason, read_until(data.until, now()))
        wanted = Wanted(Move.HOLD, data.filter.as_filter(), by)
        return await _move(database, wanted, now, is_dry_run=data.dry_run, expected=None)

    @post("/release", status_code=200, summary="Release all that match", responses=documented(400, 401, 403, 409, 503))
    async def release(
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        min_ttl_of: NamedDependency[Callable[[str], timedelta]],
        data: JSONBody[ReleaseAll],
    ) -> Outcome:
        """Release the held records that match, if their number is the expected one, else 409 and nothing is released.

        Each waits for its account's min_ttl or graceSeconds, as after a single release.
        """
        if data.expected is None and not data.dry_run:
            raise problem(400, "Bad Request", "expected: the number of held records that dryRun shows")
        seconds = data.grace_seconds

        def grace_of(account: str) -> Grace:
            return Grace.of(min_ttl_of(account) if seconds is None else timedelta(seconds=seconds), min_ttl_of(account))

        wanted = Wanted(Move.RELEASE, data.filter.as_filter(), Hold(OPERATOR, data.reason, None), grace_of)
        return await _move(database, wanted, now, is_dry_run=data.dry_run, expected=data.expected)


async def _move(
    database: Database, wanted: Wanted, now: Callable[[], datetime], *, is_dry_run: bool, expected: int | None
) -> Outcome:
    matched = await database.read(partial(bulk.count_matching, chosen=wanted.chosen))
    if is_dry_run:
        return Outcome(matched, None)
    return Outcome(matched, await bulk.move_matching(database, wanted, now=now, expected=expected, seconds=SECONDS))
