"""``POST /api/records``: an app, or an operator, adds a generation by its id; no webhook comes to Mayfly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final

import msgspec
import structlog
from litestar import Controller, Request, Response, post
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import Example, OpenAPIMediaType, Operation, RequestBody
from litestar.params import JSONBody

from service.core.asking import read_asked
from service.core.generation import MAX_ID_LENGTH
from service.core.key import Key, choose_account
from service.core.labels import MAX_LABELS
from service.core.lifecycle import State
from service.core.matchers import Facts
from service.core.overrides import InvalidOverrideError
from service.core.retention import Policy, decide_asked_retention
from service.jobs.enqueue import CleanupJob, CopyJob, Job
from service.ledger import reading
from service.ledger.account_reading import find_others
from service.ledger.adding import add_records, make_arrival
from service.ledger.database import Database
from service.ledger.group_commit import GroupCommit
from service.ledger.inserting import Arrival, Receipt
from service.ledger.views import FullRecord, find_record
from service.web.auth import CALLER, FOR_APPS
from service.web.problems import documented, problem
from service.web.records import answer_record
from service.web.webhooks import MAX_BODY_BYTES

log = structlog.get_logger()

_Word = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
_EXAMPLES: Final = {
    "by policy": {"id": "1a5a4cbd-4d29-4bd9-a2c8-5b5d0fd5a3d0"},
    "ttl and labels": {"id": "1a5a4cbd-4d29-4bd9-a2c8-5b5d0fd5a3d0", "ttl": "72h", "labels": {"customer": "acme"}},
    "expires": {"id": "1a5a4cbd-4d29-4bd9-a2c8-5b5d0fd5a3d0", "expires": "2026-12-31T00:00:00Z"},
    "hold": {"id": "1a5a4cbd-4d29-4bd9-a2c8-5b5d0fd5a3d0", "hold": "legal"},
}


class Addition(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True):
    """A generation of *account* by its id, and at most one of *ttl*, *expires* and *hold*; else the policy decides.

    They have the forms of the overrides in a webhookUrl: ttl 90s, 15m, 24h, 7d, 2w or forever; expires an instant with
    its offset or a date; hold a reason.
    """

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_LENGTH)]
    account: Annotated[str, msgspec.Meta(min_length=1, max_length=63)] | None = None
    ttl: Annotated[_Word, msgspec.Meta(examples=["72h", "forever"])] | None = None
    expires: Annotated[_Word, msgspec.Meta(examples=["2026-12-31T00:00:00Z", "2026-12-31"])] | None = None
    hold: Annotated[_Word, msgspec.Meta(examples=["legal"])] | None = None
    labels: Annotated[dict[str, str], msgspec.Meta(max_length=MAX_LABELS, examples=[{"customer": "acme"}])] = {}


@dataclass
class _AddOperation(Operation):
    """Documents examples of the body."""

    def __post_init__(self) -> None:
        if isinstance(self.request_body, RequestBody):
            for content in self.request_body.content.values():
                if isinstance(content, OpenAPIMediaType):
                    content.examples = {name: Example(value=value) for name, value in _EXAMPLES.items()}


class Adding:
    """Stores what is added; calls that come together share a transaction, as webhooks do."""

    def __init__(
        self,
        *,
        database: Database,
        enqueue: Callable[[Sequence[Job]], None],
        accounts: Sequence[str],
        policy: Policy,
        now: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._enqueue = enqueue
        self._accounts = accounts
        self._policy = policy
        self._now = now
        self._group: GroupCommit[Arrival, Receipt] = GroupCommit(self._commit)

    async def add(self, wanted: Addition, caller: str) -> tuple[Key, Receipt]:
        """Store what is *wanted*, then enqueue its jobs in the background.

        Raises: ProblemDetailsException for what cannot be read; MalformedError; LedgerUnavailableError.
        """
        now, key = self._now(), Key(choose_account(self._accounts, wanted.account), wanted.id)
        await self._check_account(key, is_given=wanted.account is not None)
        try:
            asked = read_asked(ttl=wanted.ttl, expires=wanted.expires, hold=wanted.hold, labels=wanted.labels)
            retention = decide_asked_retention(self._policy, Facts(account=key.account), asked, by=caller, now=now)
            receipt = await self._group.submit(make_arrival(key, retention, now=now, actor=caller))
        except InvalidOverrideError as error:
            raise problem(400, "Bad Request", str(error)) from None
        self._enqueue(_jobs(key, receipt, now))
        _log_receipt(key, receipt, caller)
        return key, receipt

    async def _commit(self, arrivals: Sequence[Arrival]) -> Sequence[Receipt]:
        return await self._database.write(partial(add_records, arrivals=arrivals))

    async def _check_account(self, key: Key, *, is_given: bool) -> None:
        """Refuse an account for which nothing deletes; if none was given, an id of which another one has the record."""
        if key.account not in self._accounts:
            raise problem(400, "Bad Request", f"account: it accepts one of {', '.join(self._accounts)}")
        is_sure = is_given or len(self._accounts) == 1
        if is_sure or await self._database.read(partial(reading.find_row, key=key)) is not None:
            return
        if others := await self._database.read(partial(find_others, key=key)):
            raise problem(400, "Bad Request", f"account: {others[0]} has a record of this generation; name the account")


class AddingController(Controller):
    """The one route of the token that can do nothing else."""

    path = "/records"
    tags = ("records",)
    security = ({"intake": []}, {"bearer": []})

    @post(
        "/",
        status_code=201,
        request_max_body_size=MAX_BODY_BYTES,
        summary="Add a generation by its id",
        responses={
            **documented(400, 401, 403, 413, 503),
            200: ResponseSpec(FullRecord, description="the record that was there", generate_examples=False),
            201: ResponseSpec(FullRecord, description="the new record", generate_examples=False),
        },
        operation_class=_AddOperation,
        opt={FOR_APPS: True},
    )
    async def add_record(  # noqa: PLR0917 - Litestar calls it by name
        self,
        request: Request[Any, Any, Any],
        database: NamedDependency[Database],
        now: NamedDependency[Callable[[], datetime]],
        is_dry_run: NamedDependency[bool],
        adding: NamedDependency[Adding],
        data: JSONBody[Addition],
    ) -> Response[Any]:  # a FullRecord
        """Schedule the deletion of a generation, also of one that is still processing: it waits until it has ended.

        A record that is there is merged as by a second webhook: the later due time wins, and a hold. An id that sync.so
        does not know makes the record failed, within some minutes.
        """
        key, receipt = await adding.add(data, str(request.state[CALLER]))
        found = await database.read(partial(find_record, key=key, now=now(), is_dry_run=is_dry_run))
        answer: Response[Any] = await answer_record(database, key, found)
        answer.status_code = 201 if receipt.is_new else 200
        return answer


def _jobs(key: Key, receipt: Receipt, now: datetime) -> list[Job]:
    """Return the early look at a new record, and the attempt at one that is scheduled, and new or changed."""
    jobs: list[Job] = [CopyJob(key, now)] if receipt.is_new else []
    if receipt.is_moved and receipt.state is State.SCHEDULED and receipt.due_at is not None:
        jobs.append(CleanupJob(key, receipt.attempts + 1, receipt.due_at))
    return jobs


def _log_receipt(key: Key, receipt: Receipt, caller: str) -> None:
    if receipt.is_new:
        due_at = None if receipt.due_at is None else receipt.due_at.isoformat()
        log.info("record.added", generation=key.id, by=caller, due_at=due_at, state=str(receipt.state))
