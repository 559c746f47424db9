"""The operator API: the token, pages and filters of records, moves, pauses."""

import json
from datetime import datetime, timedelta, timezone
from urllib.parse import quote

import msgspec
import pytest

from service.core.attempts import Outcome
from service.core.generation import read_generation
from service.core.key import Key
from service.ledger import reading
from service.ledger.outcomes import CopyResult
from service.ledger.receiving import Arrival
from tests.conftest import API_TOKEN
from tests.support.ledger import (
    HOUR,
    arrival,
    claim,
    claim_one,
    confirmed,
    copy,
    deferred,
    given_up,
    gone_already,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)

BEARER = {"Authorization": f"Bearer {API_TOKEN}"}
PROJECT = "612bb64a-e7f4-40c1-977b-3e9797845637"


@pytest.fixture
async def client(app_client):
    """A client with the operator's token: the test runs once on each kind of database."""
    app_client.headers.update(BEARER)
    return app_client


@pytest.fixture
async def sqlite_client(sqlite_database, open_client):
    """The same over SQLite alone."""
    async with open_client(sqlite_database) as client:
        client.headers.update(BEARER)
        yield client


async def ids_of(client, **params):
    answer = await client.get("/api/records", params=params)
    assert answer.status_code == 200
    return [item["id"] for item in answer.json()["items"]]


# Who may ask


async def test_a_request_without_the_token_is_refused(sqlite_database, open_client):
    headers = [None, "", "Bearer", "Bearer wrong", f"Basic {API_TOKEN}", API_TOKEN, "Bearer \xff"]
    async with open_client(sqlite_database) as client:
        answers = [
            await client.get(path, headers={} if header is None else {"Authorization": header.encode("latin-1")})
            for path in ("/api/records", "/api/records/g1", "/api/stats")
            for header in headers
        ]

    assert {answer.status_code for answer in answers} == {401}
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    assert {answer.headers["content-type"] for answer in answers} == {"application/problem+json"}


async def test_without_a_configured_token_the_operator_api_is_closed(sqlite_database, open_client):
    async with open_client(sqlite_database, MAYFLY_API_TOKEN="") as client:
        answers = [await client.get("/api/records", headers=headers) for headers in ({}, BEARER)]

    assert [answer.status_code for answer in answers] == [403, 403]
    assert "MAYFLY_API_TOKEN" in answers[0].json()["detail"]


async def test_the_scheme_of_the_token_is_read_in_any_case(sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        answers = [
            await client.get("/api/records", headers={"Authorization": f"{scheme} {API_TOKEN}"})
            for scheme in ("Bearer", "bearer", "BEARER")
        ]

    assert [answer.json() for answer in answers] == [{"items": [], "nextCursor": None}] * 3


async def test_a_body_that_is_not_in_utf_8_is_400_at_every_route(sqlite_client):
    json_type = {"Content-Type": "application/json"}
    for path in ("/api/records/g1/hold", "/api/records/hold", "/api/pause"):
        answer = await sqlite_client.post(path, content=b'{"reason": "\xff"}', headers=json_type)

        assert (answer.status_code, answer.json()["detail"]) == (400, "the body is not in UTF-8"), path


# Query parameters


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/api/records?stat=deleted", "unknown query parameter 'stat': did you mean state?"),
        ("/api/records?project_id=p", "unknown query parameter 'project_id': did you mean projectId?"),
        ("/api/records?STATE=held", "unknown query parameter 'STATE': did you mean state?"),
        ("/api/records/g1?acount=other", "unknown query parameter 'acount': did you mean account?"),
        ("/api/stats?x=1", "unknown query parameter 'x': there are none here"),
    ],
)
async def test_an_unknown_query_parameter_is_400_and_names_the_nearest_one(sqlite_client, path, detail):
    answer = await sqlite_client.get(path)

    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {"status": 400, "title": "Bad Request", "detail": detail}


async def test_an_unknown_query_parameter_that_is_like_no_other_is_400(sqlite_client):
    answer = await sqlite_client.get("/api/records?zzz=1&limit=5")
    moved = await sqlite_client.post("/api/records/g1/release?grace=60")

    assert (answer.status_code, moved.status_code) == (400, 400)
    assert "'zzz': there are account, cursor, deletedFrom," in answer.json()["detail"]


async def test_without_the_token_no_parameter_is_named(sqlite_database, open_client):
    async with open_client(sqlite_database) as client:
        assert (await client.get("/api/records?stat=deleted")).status_code == 401


# Pages


async def test_pages_are_newest_first_and_each_record_is_on_one_of_them(client, database):
    keys = [await store(database, due_in=HOUR) for _ in range(7)]
    pages: list[list[str]] = []
    cursor = None
    while True:
        params = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = (await client.get("/api/records", params=params)).json()
        pages.append([item["id"] for item in page["items"]])
        if (cursor := page["nextCursor"]) is None:
            break

    newest_first = [key.id for key in reversed(keys)]
    assert pages == [newest_first[:3], newest_first[3:6], newest_first[6:]]


async def test_a_record_that_arrives_between_two_pages_shifts_no_other(client, database):
    keys = [await store(database, due_in=HOUR) for _ in range(4)]
    first = (await client.get("/api/records", params={"limit": 2})).json()
    await store(database, due_in=HOUR)

    assert await ids_of(client, limit=2, cursor=first["nextCursor"]) == [keys[1].id, keys[0].id]


async def test_the_last_page_has_no_cursor_even_when_it_is_full(sqlite_client, sqlite_database):
    await store(sqlite_database)
    await store(sqlite_database)

    assert (await sqlite_client.get("/api/records", params={"limit": 2})).json()["nextCursor"] is None


async def statuses_of(client, paths):
    return {path: (await client.get(f"/api/records{path}")).status_code for path in paths}


async def test_an_invalid_query_is_400(sqlite_client):
    queries = [
        *("?limit=0", "?limit=501", "?limit=-1", "?limit=x", "?limit=1e9", "?state=gone", "?state=", "?from=yesterday"),
        *("?from=2026-01-01T00:00:00", "?to=2026-13-01T00:00:00Z", "?cursor=", "?cursor=x", "?cursor=%00"),
        *("?cursor=%FF", "?cursor=AAAAAAAAAAAAAAAA", "?cursor=_________-8", "?q=" + "x" * 201),
    ]

    assert await statuses_of(sqlite_client, queries) == dict.fromkeys(queries, 400)


async def test_the_error_of_a_query_uses_the_clients_parameter_names(sqlite_client):
    answers = [await sqlite_client.get(f"/api/records?{query}") for query in ("limit=0", "state=gone", "dueFrom=x")]

    for answer, name in zip(answers, ("limit", "state", "dueFrom"), strict=True):
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json().keys() == {"status", "title", "detail"}
        assert (answer.json()["status"], answer.json()["title"]) == (400, "Bad Request")
        assert answer.json()["detail"].startswith(f"{name}: ")


async def test_a_missing_record_is_404_as_a_problem(sqlite_client):
    answer = await sqlite_client.get("/api/records/nowhere")

    assert answer.json() == {"status": 404, "title": "Not Found", "detail": "No record of this generation"}


@pytest.mark.parametrize("generation_id", ["a%2Fb", "%", "a b", "Ä", "?", "x;y"])
async def test_an_id_is_one_percent_encoded_segment_of_the_path(sqlite_client, sqlite_database, generation_id):
    await store(sqlite_database, id=generation_id, due_in=HOUR)
    path = f"/api/records/{quote(generation_id, safe='')}"
    shown = await sqlite_client.get(path)
    held = await sqlite_client.post(f"{path}/hold", json={"reason": "wait"})

    assert (shown.status_code, shown.json()["id"]) == (200, generation_id)
    assert (held.status_code, held.json()["state"]) == (200, "held")


@pytest.mark.parametrize("generation_id", ["a/b", "/a", "a/../b", "x/hold"])
async def test_an_id_with_a_slash_is_listed_but_has_no_path_of_its_own(sqlite_client, sqlite_database, generation_id):
    await store(sqlite_database, id=generation_id, due_in=HOUR)
    path = f"/api/records/{quote(generation_id, safe='')}"
    statuses = [(await sqlite_client.get(path)).status_code, (await sqlite_client.post(f"{path}/hold")).status_code]
    page = (await sqlite_client.get("/api/records")).json()

    assert set(statuses) <= {404, 405}
    assert [(item["id"], item["state"]) for item in page["items"]] == [(generation_id, "scheduled")]


async def test_no_query_causes_an_internal_error(client):
    queries = [
        *("?q=%00", "?q=%25", "?q=%5C", "?q='", "?q=%ED%A0%80", "?status=%00", "?projectId=%00", "?status=%FF", "?x=1"),
        *("?from=9999-12-31T23:59:59-14:00", "?to=0001-01-01T00:00:00%2B14:00", "?cursor=f_________8"),
    ]

    assert set((await statuses_of(client, queries)).values()) <= {200, 400}


async def test_no_id_causes_an_internal_error(client):
    ids = ["/%00", "/%FF", "/..", "/a%2Fb", "/%F0%9F%AA%B0", "/" + "x" * 3000]

    assert set((await statuses_of(client, ids)).values()) <= {400, 404, 405}


# Filters


async def test_records_are_found_by_state_and_status(client, database):
    waiting = await store(database, due_in=HOUR, status="FAILED")
    held = await store(database, hold="wait")
    kept = await store(database, due_in=None)
    deleted = await store(database)
    await settle(database, confirmed(await claim_one(database)))

    assert await ids_of(client, state="scheduled") == [waiting.id]
    assert await ids_of(client, state="held") == [held.id]
    assert await ids_of(client, state="kept") == [kept.id]
    assert await ids_of(client, state="deleted") == [deleted.id]
    for status in ("FAILED", "failed", "Failed"):
        assert await ids_of(client, status=status) == [waiting.id]
    assert await ids_of(client, status="completed") == [deleted.id, kept.id, held.id]
    assert await ids_of(client, state="held", status="FAILED") == []


async def test_records_are_found_by_their_project(client, database):
    copied = await store(database)
    await copy(database, await claim_one(database), projectId=PROJECT)
    announced = await store(database, due_in=HOUR, projectId=PROJECT)
    await store(database, due_in=HOUR)

    assert await ids_of(client, projectId=PROJECT) == [announced.id, copied.id]
    assert await ids_of(client, projectId="other") == []


async def test_records_are_found_by_the_time_of_their_receipt(client, database):
    first = utc_now() - timedelta(seconds=40)
    times = [first, first + timedelta(seconds=15), first + timedelta(seconds=30)]
    keys = [await store(database, received_at=at) for at in times]
    elsewhere = timezone(timedelta(hours=1))

    assert await ids_of(client, **{"from": times[1].isoformat()}) == [keys[2].id, keys[1].id]
    assert await ids_of(client, to=times[1].isoformat()) == [keys[0].id]
    between = {"from": times[1].astimezone(elsewhere).isoformat(), "to": times[2].isoformat()}
    assert await ids_of(client, **between) == [keys[1].id]
    assert await ids_of(client, **{"from": (utc_now() + HOUR).isoformat()}) == []
    assert await ids_of(client, to=(utc_now() - 48 * HOUR).isoformat()) == []


async def test_a_search_reads_a_limited_number_of_records_per_page_and_continues(client, database, monkeypatch):
    monkeypatch.setattr(reading, "SEARCHED", 10)
    wanted = [await store(database, id=f"needle-{number}") for number in range(3)]
    await receive(database, *(arrival() for _ in range(25)))
    pages: list[list[str]] = []
    cursor = None
    while not pages or cursor:
        answer = await client.get("/api/records", params={"q": "needle"} | ({"cursor": cursor} if cursor else {}))
        cursor = answer.json()["nextCursor"]
        pages.append([item["id"] for item in answer.json()["items"]])

    assert pages == [[], [], [key.id for key in reversed(wanted)]]


async def test_a_search_matches_parts_of_id_and_file_name_without_wildcards(client, database):
    named = await store(database, id="abc-100%-x")
    await copy(database, await claim_one(database), outputFileName="Take_07")
    other = await store(database, id="def-100-x")

    assert await ids_of(client, q="100%") == [named.id]
    assert await ids_of(client, q="ABC") == [named.id]
    assert await ids_of(client, q="take_0") == [named.id]
    assert await ids_of(client, q="take-0") == []
    assert await ids_of(client, q="100") == [other.id, named.id]


@pytest.mark.parametrize("field", ["id", "outputFileName", "model", "error", "error_code"])
async def test_a_search_finds_the_webhooks_values_before_the_copy(client, database, field):
    key = await store(database, due_in=HOUR, **{field: "half a Needle ✂"})
    await store(database, due_in=HOUR)

    assert await ids_of(client, q="needle") == [key.id]


async def test_pages_have_the_order_of_receipt_whatever_the_order_of_inserts(client, database):
    at = utc_now()
    late, early = [await store(database, received_at=at - minutes * HOUR / 60) for minutes in (1, 2)]
    first = (await client.get("/api/records", params={"limit": 1})).json()

    assert [item["id"] for item in first["items"]] == [late.id]
    assert await ids_of(client, limit=1, cursor=first["nextCursor"]) == [early.id]


async def test_records_received_at_the_same_instant_are_each_on_one_page(client, database):
    at = utc_now()
    await receive(database, *(arrival(received_at=at, due_in=HOUR) for _ in range(7)))
    found: list[str] = []
    cursor = None
    while not found or cursor:
        page = (await client.get("/api/records", params={"limit": 2} | ({"cursor": cursor} if cursor else {}))).json()
        found += [item["id"] for item in page["items"]]
        cursor = page["nextCursor"]

    assert len(found) == len(set(found)) == 7


# One record


async def test_one_record_shows_the_bodies_as_received_and_a_page_does_not(client, database):
    item = arrival(id="g1", novelty={"a": [1.0]}, error="half \\ud83d")
    await receive(database, item)
    waiting = (await client.get("/api/records/g1")).json()
    await copy(database, await claim_one(database), polled=True)
    copied = (await client.get("/api/records/g1")).json()
    (listed,) = (await client.get("/api/records")).json()["items"]

    assert (waiting["notification"], waiting["copy"]) == (json.loads(item.body), None)
    assert copied["notification"] == waiting["notification"]
    assert copied["copy"]["polled"] is True
    assert not {"notification", "copy", "events"} & listed.keys()


async def test_a_page_and_a_single_record_show_the_same_fields(client, database):
    item = arrival(
        id="g1", due_in=HOUR, segments=[{"startTime": 0}], outputFileName="take", synthesizedAudioUrl="https://a"
    )
    await receive(database, item)
    (listed,) = (await client.get("/api/records")).json()["items"]
    alone = (await client.get("/api/records/g1")).json()

    assert listed == {name: value for name, value in alone.items() if name in listed}
    assert (listed["segments"], listed["outputFileName"]) == ([{"startTime": 0}], "take")


async def test_a_scheduled_record_shows_the_webhooks_values(client, database):
    item = arrival(id="g1", due_in=HOUR, status="FAILED", error="no face", error_code="generation_no_face")
    await receive(database, item)
    record = (await client.get("/api/records/g1")).json()
    sent = json.loads(item.body)

    for name in ("id", "status", "model", "createdAt", "input", "options", "webhookUrl", "error", "outputUrl"):
        assert record[name] == sent[name]
    assert record["errorCode"] == "generation_no_face"
    assert record["outputDuration"] == 9.98
    assert (record["account"], record["state"], record["attempts"]) == ("default", "scheduled", 0)
    assert datetime.fromisoformat(record["dueAt"]) == item.retention.due_at
    assert record["nextAttemptAt"] == record["dueAt"]
    assert record["retention"] == {"rule": "MAYFLY_TTL", "ttl": "1h"}
    assert record["copiedAt"] is record["deletedAt"] is record["outcome"] is record["receipt"] is record["hold"] is None
    assert record["segments"] is record["projectId"] is record["synthesizedAudioUrl"] is None
    assert [(event["move"], event["actor"]) for event in record["events"]] == [("receive", "webhook")]


async def test_a_deleted_record_shows_its_copy_its_receipt_and_its_history(client, database):
    key = await store(database)
    item = await claim_one(database)
    await copy(database, item, outputFileName="take_07", projectId=PROJECT, segments=[{"startTime": 0}])
    await settle(database, confirmed(item))
    record = (await client.get(f"/api/records/{key.id}")).json()

    assert (record["state"], record["outcome"], record["receipt"]) == ("deleted", "deleted", {"status": 200})
    assert (record["outputFileName"], record["projectId"], record["segments"]) == (
        "take_07",
        PROJECT,
        [{"startTime": 0}],
    )
    assert record["copiedAt"] <= record["deletedAt"]
    assert record["deletedAt"].endswith("Z")
    assert record["nextAttemptAt"] is None
    assert [event["move"] for event in record["events"]] == ["receive", "claim", "confirm"]
    assert record["events"][-1]["detail"] == {"attempt": 1, "verdict": "done", "outcome": "deleted"}


async def test_where_the_api_showed_nothing_the_webhooks_value_is_shown(sqlite_client, sqlite_database):
    item = arrival(id="g1", model="sync-3", error="odd", outputUrl="https://a", options={"x": 1})
    await receive(sqlite_database, item)
    nothing = dict.fromkeys(["model", "error", "outputUrl", "outputDuration", "options", "input"])
    await copy(sqlite_database, await claim_one(sqlite_database), **nothing)
    record = (await sqlite_client.get("/api/records/g1")).json()

    assert (record["model"], record["error"], record["outputUrl"]) == ("sync-3", "odd", "https://a")
    assert (record["outputDuration"], record["options"]) == (9.98, {"x": 1})
    assert record["input"] == json.loads(item.body)["input"]


async def test_a_part_with_a_number_beyond_float_is_shown_as_text(sqlite_client, sqlite_database):
    item = arrival(id="g1", options={"x": 17})
    body = item.body.replace("17", "1e999")
    await receive(sqlite_database, msgspec.structs.replace(item, body=body, generation=read_generation(body.encode())))
    record = (await sqlite_client.get("/api/records/g1")).json()

    assert (record["options"], record["notification"]) == ('{"x": 1e999}', body)
    assert (await sqlite_client.get("/api/records")).status_code == 200


async def test_a_deferred_record_shows_the_next_attempt_and_the_error(sqlite_client, sqlite_database):
    key = await store(sqlite_database)
    retry_at = utc_now() + HOUR
    await settle(sqlite_database, deferred(await claim_one(sqlite_database), retry_at=retry_at))
    record = (await sqlite_client.get(f"/api/records/{key.id}")).json()

    assert (record["attempts"], record["lastError"]) == (1, "the API answered 500")
    assert datetime.fromisoformat(record["nextAttemptAt"]) == retry_at
    assert record["dueAt"] != record["nextAttemptAt"]


async def test_a_held_record_shows_who_holds_it_and_why(sqlite_client, sqlite_database):
    key = await store(sqlite_database, hold="legal case")
    record = (await sqlite_client.get(f"/api/records/{key.id}")).json()

    assert record["hold"] == {"by": "webhook", "reason": "legal case", "until": None}
    assert record["nextAttemptAt"] is None


async def test_a_missing_record_is_404(sqlite_client):
    answer = await sqlite_client.get("/api/records/nowhere")

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


async def test_a_record_of_another_account_is_shown_on_request(sqlite_client, sqlite_database):
    one = arrival(id="g1")
    await receive(
        sqlite_database, Arrival(Key("other", "g1"), one.generation, one.body, one.retention, utc_now(), utc_now())
    )

    assert (await sqlite_client.get("/api/records/g1")).status_code == 404
    assert (await sqlite_client.get("/api/records/g1?account=other")).json()["account"] == "other"


# An operator's moves


def seconds_until(text):
    return (datetime.fromisoformat(text) - utc_now()).total_seconds()


async def move(client, key, name, body=None):
    return await client.post(f"/api/records/{key.id}/{name}", json=body)


async def test_hold_and_release_move_a_record(client, database):
    key = await store(database, due_in=HOUR)
    held = await move(client, key, "hold", {"reason": "legal case"})
    released = await move(client, key, "release")

    assert (held.status_code, released.status_code) == (200, 200)
    assert held.json()["state"] == "held"
    assert held.json()["hold"] == {"by": "operator", "reason": "legal case", "until": None}
    assert (released.json()["state"], released.json()["hold"]) == ("scheduled", None)
    assert released.json()["nextAttemptAt"] == held.json()["dueAt"]
    assert [event["move"] for event in released.json()["events"]] == ["receive", "hold", "release"]


async def test_a_released_record_whose_time_has_come_waits_for_the_minimum_ttl(client, database):
    key = await store(database, hold="wait")
    answer = await move(client, key, "release")

    assert 55 < seconds_until(answer.json()["dueAt"]) <= 60
    assert answer.json()["dueAt"] == answer.json()["nextAttemptAt"]
    assert answer.json()["retention"] == {"rule": "MAYFLY_TTL", "ttl": "-1h"}
    assert await claim(database) == []


@pytest.mark.parametrize(("seconds", "least", "most"), [(7200, 7190, 7200), (30, 25, 30)])
async def test_a_release_gives_the_grace_that_it_asks_for(client, database, seconds, least, most):
    key = await store(database, hold="wait")
    answer = await move(client, key, "release", {"graceSeconds": seconds})

    assert least < seconds_until(answer.json()["dueAt"]) <= most
    assert answer.json()["events"][-1]["detail"] == {"dueAt": answer.json()["dueAt"]}


async def test_a_grace_of_zero_lets_an_overdue_record_be_deleted_at_once(client, database):
    key = await store(database, hold="wait")
    await move(client, key, "release", {"graceSeconds": 0})

    assert (await claim_one(database)).key == key


async def test_a_grace_makes_no_record_due_earlier(client, database):
    key = await store(database, hold="wait", due_in=HOUR)
    answer = await move(client, key, "release", {"graceSeconds": 1})

    assert 3500 < seconds_until(answer.json()["dueAt"]) <= 3600


@pytest.mark.parametrize("name", ["hold", "keep", "retry"])
async def test_a_grace_for_another_move_is_refused(sqlite_client, sqlite_database, name):
    key = await store(sqlite_database, due_in=HOUR)
    answer = await move(sqlite_client, key, name, {"graceSeconds": 60})

    assert (answer.status_code, answer.json()["detail"]) == (400, "graceSeconds is for release and reopen alone")


@pytest.mark.parametrize("body", [{}, {"graceSeconds": 5}])
async def test_a_kept_record_is_released_with_a_fresh_minimum_ttl(client, database, body):
    key = await store(database, due_in=-HOUR)
    await move(client, key, "keep")
    answer = await move(client, key, "release", body)

    assert (answer.json()["state"], answer.json()["retention"]) == (
        "scheduled",
        {"rule": "released by operator", "ttl": "1m"},
    )
    assert 55 < seconds_until(answer.json()["dueAt"]) <= 60
    assert answer.json()["dueAt"] == answer.json()["nextAttemptAt"]
    assert await claim(database) == []


async def stored_in(database, state):
    """Store a record in *state*, overdue unless it is kept."""
    if state == "kept":
        return await store(database, due_in=None)
    key = await store(database, hold="wait" if state == "held" else None)
    if state == "failed":
        await settle(database, given_up(await claim_one(database)))
    elif state == "deleted":
        await settle(database, gone_already(await claim_one(database)))
    return key


MOVES = [
    ("scheduled", "hold", "held"),
    ("scheduled", "keep", "kept"),
    ("held", "keep", "kept"),
    ("held", "release", "scheduled"),
    ("failed", "keep", "kept"),
    ("failed", "hold", "held"),
    ("failed", "retry", "scheduled"),
    ("kept", "release", "scheduled"),
    ("deleted", "reopen", "scheduled"),
]
DONE = [
    ("scheduled", "release"),
    ("scheduled", "retry"),
    ("scheduled", "reopen"),
    ("held", "hold"),
    ("kept", "keep"),
]
NAMES = ("hold", "release", "keep", "retry", "reopen")
LEGAL = {*DONE, *((before, name) for before, name, _ in MOVES)}
REFUSED = [(s, n) for s in ("scheduled", "held", "kept", "failed", "deleted") for n in NAMES if (s, n) not in LEGAL]


@pytest.mark.parametrize(("before", "name", "then"), MOVES)
async def test_each_move_of_an_operator_leads_where_the_table_says(client, database, before, name, then):
    key = await stored_in(database, before)
    answer = await move(client, key, name, {"reason": "so"})

    assert (answer.status_code, answer.json()["state"]) == (200, then)
    assert answer.json()["events"][-1]["move"] == name
    assert answer.json()["events"][-1]["detail"]["reason"] == "so"
    assert (answer.json()["hold"] is not None) == (then == "held")


@pytest.mark.parametrize(("state", "name"), DONE)
async def test_a_move_to_the_state_it_is_in_succeeds_and_changes_nothing(client, database, state, name):
    key = await stored_in(database, state)
    before = (await client.get(f"/api/records/{key.id}")).json()
    answer = await move(client, key, name, {"reason": "again"})

    assert (answer.status_code, answer.json()) == (200, before)


@pytest.mark.parametrize(("state", "name"), REFUSED)
async def test_a_move_that_is_not_in_the_table_is_409_and_changes_nothing(client, database, state, name):
    key = await stored_in(database, state)
    before = (await client.get(f"/api/records/{key.id}")).json()
    answer = await move(client, key, name)

    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert (await client.get(f"/api/records/{key.id}")).json() == before


async def test_a_hold_that_came_by_a_keep_is_over(client, database):
    key = await store(database, hold="legal")
    await move(client, key, "keep")
    await move(client, key, "release")

    row = await row_of(database, key)
    assert (row.state, row.hold_by, row.hold_reason) == ("scheduled", None, None)


async def test_a_reopened_record_is_called_deleted_no_longer(client, database):
    key = await stored_in(database, "deleted")
    deleted = (await client.get(f"/api/records/{key.id}")).json()
    answer = (await move(client, key, "reopen", {"reason": "wrong key"})).json()

    assert (deleted["outcome"], deleted["receipt"]["status"]) == ("already_gone", 404)
    assert (answer["state"], answer["outcome"], answer["deletedAt"], answer["receipt"]) == ("scheduled", *[None] * 3)
    assert 55 < seconds_until(answer["dueAt"]) <= 60
    assert answer["events"][-1]["detail"] == {
        "reason": "wrong key",
        "dueAt": answer["dueAt"],
        "outcome": "already_gone",
        "deletedAt": deleted["deletedAt"],
        "receipt": {"status": 404},
    }
    assert answer["nextAttemptAt"] == answer["dueAt"]
    assert await claim(database) == []


@pytest.mark.parametrize("outcome", [Outcome.DELETED, Outcome.ALREADY_GONE])
async def test_a_record_with_a_copy_cannot_be_reopened(client, database, outcome):
    key = await store(database)
    item = await claim_one(database)
    await copy(database, item)
    await settle(database, gone_already(item) if outcome is Outcome.ALREADY_GONE else confirmed(item))
    answer = await move(client, key, "reopen")

    assert answer.status_code == 409
    assert "the API had shown its generation" in answer.json()["detail"]
    assert (await row_of(database, key)).outcome == outcome


async def test_an_unknown_field_in_the_body_of_a_move_is_400(sqlite_client, sqlite_database):
    key = await store(sqlite_database, hold="wait")
    answers = [await move(sqlite_client, key, "release", body) for body in ({"grace": 60}, {"graceSeconds": -1})]

    assert [answer.status_code for answer in answers] == [400, 400]
    assert (await row_of(sqlite_database, key)).state == "held"


async def test_a_released_record_without_a_due_time_is_never_deleted(client, database):
    key = await store(database, due_in=None, hold="wait")
    answer = await move(client, key, "release")

    assert answer.status_code == 200
    assert await claim(database, now=utc_now() + timedelta(days=9999)) == []
    assert (await row_of(database, key)).due_at is None


async def test_a_kept_record_is_never_deleted(client, database):
    key = await store(database)
    answer = await move(client, key, "keep", {"reason": "the film"})

    assert (answer.json()["state"], answer.json()["dueAt"]) == ("kept", None)
    assert await claim(database) == []


@pytest.mark.parametrize(("name", "state"), [("hold", "held"), ("keep", "kept")])
async def test_a_hold_stops_a_worker_until_its_copy_and_not_after(client, database, name, state):
    key, other = await store(database), await store(database)
    items = {item.key: item for item in await claim(database)}
    await copy(database, items[other])
    stopped, refused = [await move(client, one, name, {"reason": "wait"}) for one in (key, other)]

    assert (stopped.status_code, stopped.json()["state"]) == (200, state)
    assert await copy(database, items[key]) is CopyResult.LOST
    assert refused.status_code == 409
    assert "its DELETE may be in progress" in refused.json()["detail"]


async def test_an_unknown_move_or_an_invalid_body_is_refused(sqlite_client, sqlite_database):
    key = await store(sqlite_database, due_in=HOUR)
    reasons: list[object] = [{"reason": ""}, {"reason": "x" * 501}, {"reason": 5}, [], "x"]
    unknown = [(await move(sqlite_client, key, name)).status_code for name in ("vanish", "claim", "confirm")]
    unread = [(await move(sqlite_client, key, "hold", reason)).status_code for reason in reasons]

    assert set(unknown) <= {400, 404}
    assert unread == [400] * len(reasons)
    assert (await row_of(sqlite_database, key)).state == "scheduled"


@pytest.mark.parametrize("name", ["release", "keep", "retry", "reopen"])
async def test_a_move_of_a_missing_record_is_404(sqlite_client, name):
    assert (await move(sqlite_client, Key("default", "nowhere"), name)).status_code == 404


async def test_a_generation_without_a_record_can_be_held_and_released(client, database):
    key = Key("default", "g-unseen")
    held = await move(client, key, "hold", {"reason": "audit", "until": "30d"})
    explained = await client.get("/api/records/g-unseen/explain")
    await receive(database, arrival(id=key.id))
    record = (await client.get("/api/records/g-unseen")).json()

    assert (held.status_code, held.json()["state"], held.json()["hold"]["reason"]) == (202, None, "audit")
    assert "on hold before its first webhook, by operator until" in held.json()["explain"]
    assert held.json() == explained.json()
    assert (record["state"], record["hold"]) == ("held", held.json()["hold"])


async def test_the_hold_of_a_generation_without_a_record_can_be_released(client, database):
    key = Key("default", "g-unseen")
    await move(client, key, "hold")
    released, again = [await move(client, key, "release") for _ in range(2)]
    await receive(database, arrival(id=key.id))

    assert (released.status_code, released.json()["hold"], again.status_code) == (200, None, 404)
    assert (await row_of(database, key)).state == "scheduled"


@pytest.mark.parametrize("until", ["tomorrow", "30", "0s", "2020-01-01", "", 5])
async def test_an_invalid_end_of_a_hold_is_400_and_holds_nothing(sqlite_client, sqlite_database, until):
    key = await store(sqlite_database, due_in=HOUR)
    answer = await move(sqlite_client, key, "hold", {"until": until})

    assert answer.status_code == 400
    assert "until" in answer.json()["detail"]
    assert (await row_of(sqlite_database, key)).state == "scheduled"


async def test_an_end_is_for_a_hold_alone(sqlite_client, sqlite_database):
    answer = await move(sqlite_client, await store(sqlite_database, due_in=HOUR), "keep", {"until": "1d"})

    assert (answer.status_code, answer.json()["detail"]) == (400, "until is for hold alone")


@pytest.mark.parametrize("generation_id", ["x" * 256, "%C2%85", "..%20x%07"])
async def test_what_can_be_no_id_of_a_generation_is_not_held(sqlite_client, generation_id):
    assert (await sqlite_client.post(f"/api/records/{generation_id}/hold")).status_code == 400


async def test_a_record_is_explained_with_what_blocks_it(client, database):
    key = await store(database, due_in=HOUR)
    await client.post("/api/pause", json={"reason": "audit"})
    record = (await client.get(f"/api/records/{key.id}")).json()
    explained = (await client.get(f"/api/records/{key.id}/explain")).json()
    unknown = await client.get("/api/records/nobody/explain")

    assert record["explain"] == explained["explain"]
    assert record["blockedBy"] == explained["blockedBy"]
    assert [one["kind"] for one in record["blockedBy"]] == ["operator", "no_worker"]
    assert "MAYFLY_TTL decided this" in record["explain"]
    assert (unknown.status_code, unknown.json()["state"]) == (200, None)
    assert "There is no record of generation nobody" in unknown.json()["explain"]


async def test_pause_and_resume_apply_to_all_deletions(client, database):
    await store(database)
    paused = await client.post("/api/pause", json={"reason": "moving house"})
    assert await claim(database) == []
    resumed = await client.post("/api/resume")

    assert paused.json()["pauses"][0]["reason"] == "moving house"
    assert resumed.json()["pauses"] == []
    assert len(await claim(database)) == 1


async def test_stats_show_the_numbers_of_the_ledger(client, database):
    await store(database, due_in=-HOUR)
    await store(database, due_in=HOUR)
    await store(database, due_in=None)
    stats = (await client.get("/api/stats")).json()

    assert stats["records"] == {"scheduled": 2, "deleting": 0, "deleted": 0, "failed": 0, "held": 0, "kept": 1}
    assert 3590 < stats["oldestOverdueSeconds"] < 3700
    assert stats["due"] == 1


@pytest.mark.parametrize("body", [b'{"reason":' + b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000])
async def test_json_nested_without_end_is_400(sqlite_database, open_client, body):
    async with open_client(sqlite_database) as client:
        headers = {"authorization": f"Bearer {API_TOKEN}", "content-type": "application/json"}
        routes = ("/api/pause", "/api/records/g1/hold")
        answers = [await client.post(route, content=body, headers=headers) for route in routes]

    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].json()["detail"] == "the body is nested too deeply"
