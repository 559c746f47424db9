"""Labels of records: stored from the webhook, shown, and found by the API, an export and the command line."""

import asyncio
import json

import pytest

from tests.conftest import API_TOKEN
from tests.support.commands import command
from tests.support.webhooks import webhook

OURS = "https://hooks.example.com/webhooks/sync"


@pytest.fixture
async def client(app_client):
    app_client.headers.update({"Authorization": f"Bearer {API_TOKEN}"})
    return app_client


@pytest.fixture
async def ids(client):
    """Send three webhooks, two of them with labels, and return their ids by what they are."""
    sent = {}
    for name, query in (
        ("west", "?label.customer=acme&label.shot=7"),
        ("north", "?label.customer=acme"),
        ("plain", ""),
    ):
        one = webhook(webhookUrl=OURS + query)
        assert (await client.post("/webhooks/sync", content=one.body, headers=one.headers)).status_code == 202
        sent[name] = one.id
    return sent


async def test_records_show_their_labels(client, ids):
    page = (await client.get("/api/records")).json()["items"]
    one = (await client.get(f"/api/records/{ids['west']}")).json()

    assert {item["id"]: item["labels"] for item in page} == {
        ids["west"]: {"customer": "acme", "shot": "7"},
        ids["north"]: {"customer": "acme"},
        ids["plain"]: {},
    }
    assert one["labels"] == {"customer": "acme", "shot": "7"}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["customer=acme"], {"west", "north"}),
        (["customer=acme", "shot=7"], {"west"}),
        (["Customer=acme"], {"west", "north"}),
        (["customer=ac"], set()),
        (["shot="], set()),
    ],
)
async def test_records_are_found_by_all_labels_asked_for(client, ids, labels, names):
    page = (await client.get("/api/records", params={"label": labels})).json()["items"]
    lines = (await client.get("/api/records/export", params={"label": labels, "format": "jsonl"})).text.splitlines()

    assert {item["id"] for item in page} == {json.loads(line)["id"] for line in lines} == {ids[name] for name in names}


@pytest.mark.parametrize("label", ["customer", "=acme", "cust omer=acme", "", "customer=a\0b"])
async def test_a_filter_that_is_no_label_is_400(client, label):
    answer = await client.get("/api/records", params={"label": label})

    assert answer.status_code == 400
    assert "NAME=VALUE" in answer.json()["detail"]


async def test_the_command_line_finds_records_by_their_label(ids, database_url, tmp_path):
    environment = {
        "MAYFLY_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path),
    }
    arguments = ("records", "list", "--json", "--label", "customer=acme", "--label", "shot=7")
    listed = await asyncio.to_thread(command, *arguments, **environment)
    refused = await asyncio.to_thread(command, "records", "list", "--label", "acme", **environment)

    assert [item["id"] for item in json.loads(listed.stdout)["items"]] == [ids["west"]]
    assert refused.exit_code == 2
    assert "NAME=VALUE" in refused.stderr
