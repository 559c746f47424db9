"""Generations that an app adds by their ids: the route and its token, what becomes of the record, and both ways."""

from datetime import timedelta

import pytest

from service.core.key import Key
from tests.conftest import API_TOKEN
from tests.support.ledger import row_of

INTAKE_TOKEN = "intake-token-of-the-tests"
APP = {"Authorization": f"Bearer {INTAKE_TOKEN}"}
OPERATOR = {"Authorization": f"Bearer {API_TOKEN}"}
DAY = timedelta(days=1)


@pytest.fixture
async def app(database, open_client):
    """A client with the intake token: the test runs once on each kind of database."""
    async with open_client(database, MAYFLY_INTAKE_TOKEN=INTAKE_TOKEN) as client:
        client.headers.update(APP)
        yield client


@pytest.fixture
async def sqlite_app(sqlite_database, open_client):
    """The same over SQLite alone."""
    async with open_client(sqlite_database, MAYFLY_INTAKE_TOKEN=INTAKE_TOKEN) as client:
        client.headers.update(APP)
        yield client


def add(client, **body):
    return client.post("/api/records", json={"id": "g1"} | body)


async def test_a_generation_is_added_by_its_id_alone(app, database):
    answer = await add(app)
    row = await row_of(database, Key("default", "g1"))

    assert answer.status_code == 201
    assert answer.json()["state"] == row.state == "scheduled"
    assert row.due_at - row.received_at == DAY
