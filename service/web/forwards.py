"""``/api/forwards``: deliveries of webhooks to targets, and their replays."""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, Final

import msgspec
import structlog
from litestar import Controller, get, post
from litestar.di import NamedDependency, Provide
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, JSONBody, QueryParameter

from service.core.forwarding import DeliveryState
from service.core.replaying import Replay, require_replayed, require_target
from service.jobs.enqueue import ForwardJob, Job
from service.ledger.database import Database
from service.ledger.delivery_reading import DeliveryFilter
from service.ledger.delivery_views import DeliveriesPage, Delivery, FullDelivery, list_deliveries, show_delivery
from service.ledger.reading import MAX_PAGE, Span
from service.ledger.replaying import (
    ReplayCounts,
    Replayed,
    WantedReplay,
    count_deliveries,
    replay_matching,
    replay_one,
)
from service.web.bulk import SECONDS
from service.web.parameters import read_delivery_filter
from service.web.problems import documented, problem
from service.web.records import DEFAULT_PAGE

log = structlog.get_logger()

_FILTERED: Final = {"wanted": Provide(read_delivery_filter, sync_to_thread=False)}
Enqueue = Callable[[Sequence[Job]], None]
Instant = Annotated[datetime, msgspec.Meta(tz=True, examples=["2026-12-31T00:00:00Z"])]


class ChosenDeliveries(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    """Which deliveries: those that match all of these, and at least one must be given.

    Without a *state* it is about those that have failed. From and to are about the receipt of the webhook.
    """

    target: Annotated[str, msgspec.Meta(min_length=1, max_length=64, examples=["app"])] | None = None
    state: DeliveryState | None = None
    generation: Annotated[str, msgspec.Meta(min_length=1, max_length=255)] | None = None
    account: Annotated[str, msgspec.Meta(min_length=1, max_length=63)] | None = None
    status: Annotated[str, msgspec.Meta(min_length=1, max_length=64, examples=["COMPLETED"])] | None = None
    since: Instant | None = msgspec.field(default=None, name="from")
    until: Instant | None = msgspec.field(default=None, name="to")

    def as_filter(self) -> DeliveryFilter:
        """Return the filter.

        Raises: ProblemDetailsException without any.
        """
        if self == ChosenDeliveries():
            known = "target, state, generation, account, status, from and to"
            raise problem(400, "Bad Request", f"filter needs one of {known}")
        received = Span(self.since, self.until)
        return DeliveryFilter(self.target, self.state, self.generation, self.account, self.status, received)


class ReplayAll(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    """Replay what matches; *expected* is the number that a dry run has shown, and needed without one."""

    filter: ChosenDeliveries
    expected: Annotated[int, msgspec.Meta(ge=0, examples=[12])] | None = None
    dry_run: bool = False


class ReplayOutcome(msgspec.Struct, rename="camel", frozen=True):
    """How many deliveries in each state matched before, and what was done; *result* is None after a dry run.

    *without_target* counts those that match as well, but stay as they are, for each target that is not configured.
    """

    matched: dict[DeliveryState, int]
    without_target: dict[str, int]
    result: ReplayCounts | None


class ForwardsController(Controller):
    """Deliveries of webhooks to targets: pages, single ones, and replays."""

    path = "/forwards"
    tags = ("forwards",)
    security = ({"bearer": []},)

    @get(
        "/",
        summary="A page of deliveries to targets, newest first",
        dependencies=_FILTERED,
        responses=documented(400, 401, 403, 503),
    )
    async def list_deliveries(
        self,
        database: NamedDependency[Database],
        wanted: NamedDependency[DeliveryFilter],
        limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE,
        cursor: Annotated[str | None, QueryParameter(description="nextCursor of the previous page")] = None,
    ) -> DeliveriesPage:
        """Answer a page of the deliveries that match all filters, without what they send.

        A filter by account or status without a generation searches 10 000 deliveries: its page may be short or empty.
        """
        return await database.read(partial(list_deliveries, wanted=wanted, limit=limit, cursor=cursor))

    @get(
        "/{delivery_id:str}",
        summary="One delivery with what its target gets, and the target's last answer",
        responses=documented(400, 401, 403, 404, 503),
    )
    async def show_delivery(self, database: NamedDependency[Database], delivery_id: FromPath[str]) -> FullDelivery:
        """Answer one delivery, by its Mayfly-Delivery, or 404. Its body has URLs with tokens."""
        return _found(await database.read(partial(show_delivery, delivery_id=delivery_id)))

    @post(
        "/{delivery_id:str}/replay",
        status_code=200,
        summary="Send a delivery again now",
        responses=documented(400, 401, 403, 404, 409, 503),
    )
    async def replay_delivery(
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        targets: NamedDependency[frozenset[str]],
        enqueue: NamedDependency[Enqueue],
        delivery_id: FromPath[str],
    ) -> Delivery:
        """Answer the delivery, which is sent at once: one that has ended begins anew, one that waits is advanced.

        409 while an attempt at it is made, and if its target is not configured any more.
        """
        at = now()
        replay = partial(replay_one, delivery_id=delivery_id, configured=targets, now=at)
        replayed = await database.write(replay)
        if replayed is not None:
            require_replayed(replayed.result, replayed.target)
            _enqueue([replayed], enqueue, at)
        found = _found(await database.read(partial(show_delivery, delivery_id=delivery_id)))
        return Delivery(**{name: getattr(found, name) for name in Delivery.__struct_fields__})

    @post(
        "/replay",
        status_code=200,
        summary="Send all deliveries again that match",
        responses=documented(400, 401, 403, 409, 503),
    )
    async def replay_all(
        self,
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        targets: NamedDependency[frozenset[str]],
        enqueue: NamedDependency[Enqueue],
        data: JSONBody[ReplayAll],
    ) -> ReplayOutcome:
        """Replay all deliveries that match, if their number is the expected one, else 409 and nothing is replayed.

        After 30 s it answers isComplete false; count and ask again.
        """
        chosen = data.filter.as_filter()
        if data.expected is None and not data.dry_run:
            raise problem(400, "Bad Request", "expected: the number of deliveries that dryRun shows")
        require_target(chosen.target, targets)
        wanted = WantedReplay.of(chosen, targets)
        matching = await database.read(partial(count_deliveries, wanted=wanted))
        result = None
        if not data.dry_run:

            def note(step: Sequence[Replayed]) -> None:
                _enqueue(step, enqueue, now())

            result = await replay_matching(
                database, wanted, now=now, expected=data.expected, note=note, seconds=SECONDS
            )
        return ReplayOutcome(matching.counts, matching.without_target, result)


def _enqueue(replayed: Sequence[Replayed], enqueue: Enqueue, now: datetime) -> None:
    """Enqueue the jobs of what was *replayed*, after its commit, and log it."""
    sent = [one for one in replayed if one.result in (Replay.REPLAYED, Replay.ADVANCED)]
    enqueue([ForwardJob(one.target, one.id, one.attempt, now) for one in sent])
    if len(sent) == 1:
        log.info("forward.replayed", delivery=sent[0].id, target=sent[0].target, attempt=sent[0].attempt)
    elif sent:
        log.info("forward.replayed", number=len(sent), targets=sorted({one.target for one in sent}))


def _found(delivery: FullDelivery | None) -> FullDelivery:
    if delivery is None:
        raise NotFoundException("No delivery of this id")
    return delivery
