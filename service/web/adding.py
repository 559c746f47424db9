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
from service.ledger.adding import add_record, make_arrival
from service.ledger.database import Database
from service.ledger.inserting import Receipt
from service.ledger.views import FullRecord, find_record
from service.web.auth import CALLER, FOR_APPS
from service.web.problems import documented, problem
from service.web.records import answer_record

log = structlog.get_logger()

Enqueue = Callable[[Sequence[Job]], None]
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


class AddingController(Controller):
    """The one route of the token that can do nothing else."""

    path = "/records"
    tags = ("records",)
    security = ({"intake": []}, {"bearer": []})

    @post(
        "/",
        status_code=201,
        summary="Add a generation by its id",
        responses={
            **documented(400, 401, 403, 503),
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
        accounts: NamedDependency[Sequence[str]],
        policy: NamedDependency[Policy],
        enqueue: NamedDependency[Enqueue],
        data: JSONBody[Addition],
    ) -> Response[Any]:  # a FullRecord
        """Schedule the deletion of a generation, also of one that is still processing: it waits until it has ended.

        A record that is there is merged as by a second webhook: the later due time wins, and a hold. An id that sync.so
        does not know makes the record failed, within some minutes.
        """
        key, at, caller = Key(choose_account(accounts, data.account), data.id), now(), str(request.state[CALLER])
        await _check_account(database, key, accounts, is_given=data.account is not None)
        try:
            asked = read_asked(ttl=data.ttl, expires=data.expires, hold=data.hold, labels=data.labels)
            retention = decide_asked_retention(policy, Facts(account=key.account), asked, by=caller, now=at)
            arrival = make_arrival(key, retention, now=at, actor=caller)
            receipt = await database.write(partial(add_record, arrival=arrival))
        except InvalidOverrideError as error:
            raise problem(400, "Bad Request", str(error)) from None
        enqueue(_jobs(key, receipt, at))
        _log_receipt(key, receipt, caller)
        found = await database.read(partial(find_record, key=key, now=at, is_dry_run=is_dry_run))
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


async def _check_account(database: Database, key: Key, accounts: Sequence[str], *, is_given: bool) -> None:
    """Refuse an account for which nothing deletes; if none was given, an id of which only another one has a record."""
    if key.account not in accounts:
        raise problem(400, "Bad Request", f"account: it accepts one of {', '.join(accounts)}")
    if is_given or len(accounts) == 1 or await database.read(partial(reading.find_row, key=key)) is not None:
        return
    if others := await database.read(partial(find_others, key=key)):
        raise problem(400, "Bad Request", f"account: {others[0]} has a record of this generation; name the account")
