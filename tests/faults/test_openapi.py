"""Rows 29 to 48 at every route: answers match the service's OpenAPI document, for requests generated from it.

The ledger holds a record in each state, and most of the webhooks are signed: all kinds of answers occur.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy import URL

from service.core.lifecycle import State
from service.ledger.database import Database
from service.ledger.opening import open_database
from tests.faults.processes import ProcessStarter
from tests.faults.system import TOKEN
from tests.faults.website import Website, website
from tests.support import deliveries, ledger
from tests.support.webhooks import notification, signature

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
IDS = ("deleted", "deleted twice?", "failed", "being deleted", "once failed", "due", "später: é🪰", "kept", "held")
PAGES = ("/api/records", "/api/forwards")
DELIVERIES = ("waits", "attempted", "delivered", "gone", "removed")
# In turn, as chance takes one of them most of the time; None is for whatever id was made up.
ASKED_FOR = (*IDS, "unknown", None)
# What has to be seen of each route, or its answers were not looked at: its statuses at the least.
SEEN = {
    "GET /health/live": {200},
    "GET /health/ready": {200},
    "GET /metrics": {200},
    "GET /api/records": {200, 400},
    "POST /api/records": {200, 201, 400},
    "GET /api/records/export": {200, 400},
    "GET /api/records/{generation_id}": {200, 404},
    "GET /api/records/{generation_id}/explain": {200},
    "POST /api/records/{generation_id}/{move}": {200, 404, 409},
    "POST /api/records/hold": {200, 400},
    "POST /api/records/release": {400},
    "GET /api/batches": {200},
    "GET /api/batches/{batch_id}": {404},
    "POST /api/batches/{batch_id}/retry": {404},
    "GET /api/forwards": {200, 400},
    "GET /api/forwards/{delivery_id}": {200, 404},
    "POST /api/forwards/{delivery_id}/replay": {200, 404, 409},
    "POST /api/forwards/replay": {200, 400},
    "POST /api/pause": {200},
    "POST /api/resume": {200},
    "GET /api/stats": {200},
    "POST /webhooks/sync": {202, 400, 401},
    "POST /webhooks/sync/{account}": {404},
}


@pytest.fixture(scope="module")
def site(starter: ProcessStarter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Website]:
    """A web side whose ledger holds records in every state."""
    folder = tmp_path_factory.mktemp("openapi")
    config = folder / "mayfly.toml"
    config.write_text(deliveries.CONFIG, encoding="utf-8")
    with website(starter, folder, MAYFLY_CONFIG=str(config)) as site:
        asyncio.run(fill(site.ledger))
        yield site


async def fill(path: Path) -> None:
    """Write records of all states, some of them with ids that need care."""
    async with open_database(URL.create("sqlite", database=str(path))) as database:
        for name in ("deleted", "deleted twice?", "failed", "being deleted", "once failed"):
            await ledger.store(database, id=name)
        claims = {item.key.id: item for item in await ledger.claim(database)}
        for name in ("deleted", "deleted twice?", "being deleted"):
            await ledger.copy(database, claims[name])
        await ledger.settle(database, *(ledger.confirmed(claims[name]) for name in ("deleted", "deleted twice?")))
        await ledger.settle(database, ledger.given_up(claims["failed"]), ledger.deferred(claims["once failed"]))
        await ledger.store(database, id="due", due_in=-ledger.HOUR)
        await ledger.store(database, id="später: é🪰", due_in=ledger.HOUR, status="FAILED", error="no such file")
        await ledger.store(database, id="kept", due_in=None)
        await ledger.store(database, id="held", hold="a film")
        await fill_deliveries(database)


async def fill_deliveries(database: Database) -> None:
    """Write deliveries in every state, to a target that is configured and to one that is not."""
    for name in DELIVERIES:
        made = await deliveries.forward(database, status="FAILED" if name == "removed" else "COMPLETED")
        if name == "delivered":
            await deliveries.attempt(database, made)
        elif name in {"gone", "removed"}:
            await deliveries.attempt(database, made, 410, answer="später: 🪰")
        elif name == "attempted":
            await deliveries.claim_delivery(database, made, lease=24 * ledger.HOUR)
        await deliveries.alter(database, made, id=name, target="old" if name == "removed" else "app")


class RequestAuth(requests.auth.AuthBase):
    """Signs a webhook over the bytes as they are sent; every other request gets the operator's token."""

    def __init__(self, *, is_signed: bool) -> None:
        self._is_signed = is_signed

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the signature, unless the request must not have one."""
        body: Any = request.body or b""
        if "/webhooks/" not in str(request.url):
            request.headers["Authorization"] = f"Bearer {TOKEN}"
        elif self._is_signed:
            request.headers["Sync-Signature"] = signature(body.encode() if isinstance(body, str) else body)
        return request


def test_a_record_in_each_state_matches_the_openapi_document(site: Website):
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{site.port}/schema/openapi.json")
    operation = schema["/api/records/{generation_id}"]["GET"]
    shown = {}
    for name in IDS:
        case = operation.Case(path_parameters={"generation_id": quote(name, safe="")})
        answer = case.call_and_validate(auth=RequestAuth(is_signed=True), checks=CHECKS)
        assert answer.status_code == 200
        shown[answer.json()["id"]] = answer.json()["state"]

    assert shown.keys() == set(IDS)
    assert set(shown.values()) == set(State)


CHOICES = st.fixed_dictionaries(
    {
        "is_signed": st.sampled_from([True, True, True, False]),
        "is_documented": st.sampled_from([True, True, False]),
        # Made up filters all together find nothing: most pages are asked for with one of them, or none.
        "filters": st.sampled_from([(), (), ("state",), ("status",), ("q",), ("from", "to"), None]),
        "limit": st.sampled_from([1, 3, 500]),
        "has_cursor": st.booleans(),
        "asked": st.sampled_from([{}, {"ttl": "3d"}, {"expires": "2199-01-01"}, {"hold": "legal"}, {"ttl": "3"}]),
    }
)


def shape(case: Any, choice: Mapping[str, Any], name: str | None, cursors: list[str]) -> None:  # noqa: ANN401 - a type with five parameters
    """Give *case* what chance would never find: the id *name* of a record, a cursor of ours, the body of a webhook."""
    if name is not None and "generation_id" in case.path_parameters:
        case.path_parameters["generation_id"] = quote(name, safe="")
        case.query.pop("account", None)
    if name is not None and "delivery_id" in case.path_parameters:
        case.path_parameters["delivery_id"] = quote(name, safe="")
    if case.meta.generation.mode is GenerationMode.NEGATIVE:
        return  # it is wrong on purpose
    if case.path in PAGES and case.method == "GET" and choice["filters"] is not None:
        case.query = {name: case.query[name] for name in choice["filters"] if name in case.query}
        case.query["limit"] = choice["limit"]
        if choice["has_cursor"] and cursors:
            case.query["cursor"] = cursors[-1]
    if case.path == "/api/forwards/replay" and choice["is_documented"]:
        case.body = {"filter": {"state": "delivered"}, "dryRun": True}
    if case.path == "/api/records" and case.method == "POST" and choice["is_documented"]:
        known = {"id": name or uuid4().hex, "account": "default"}
        case.body = {key: case.body[key] for key in ("labels",) if key in case.body} | known | choice["asked"]
    if case.path == "/webhooks/sync" and choice["is_documented"]:
        known = {"id": name} if name else {}
        case.body = {**notification(), **case.body, **known, "status": notification()["status"]}


def test_every_route_matches_the_openapi_document_for_any_request(site: Website):
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{site.port}/schema/openapi.json")
    with requests.Session() as session:
        session.trust_env = False
        operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
        seen = {operation.label: statuses_of(operation, session) for operation in operations}

    assert {label: SEEN[label] - set(statuses) for label, statuses in seen.items()} == {label: set() for label in SEEN}
    assert site.process.exit_code is None
    assert site.process.events("request.crashed") == []


def statuses_of(operation: Any, session: requests.Session) -> Counter[int]:  # noqa: ANN401 - of a library's own types
    """Ask *operation* in many ways, hold each answer against its promise, and count the answers' statuses."""
    statuses: Counter[int] = Counter()
    cursors: list[str] = []
    lists = [f"GET {path}" for path in PAGES]
    names = cycle((*DELIVERIES, "unknown", None) if "{delivery_id}" in operation.path else ASKED_FOR)

    cases, fuzz = operation.as_strategy(), FUZZ
    if operation.query or operation.body:
        cases |= operation.as_strategy(GenerationMode.NEGATIVE)
    elif not operation.path_parameters:
        fuzz = settings(FUZZ, max_examples=5)  # there is nothing to vary

    @fuzz
    @given(case=cases, choice=CHOICES)
    def keeps_its_promise(case: Any, choice: Mapping[str, Any]) -> None:  # noqa: ANN401
        shape(case, choice, next(names), cursors)
        assume(len(quote(str(case.query))) < 4000)  # beyond 4 KiB the server itself answers 414, in plain text
        session.auth = RequestAuth(is_signed=choice["is_signed"])
        answer = case.call_and_validate(session=session, checks=CHECKS)
        statuses[answer.status_code] += 1
        if answer.status_code == 200 and operation.label in lists and answer.json()["nextCursor"]:
            cursors.append(answer.json()["nextCursor"])

    keeps_its_promise()
    assert cursors or operation.label not in lists
    return statuses
