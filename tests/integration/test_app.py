"""The receiver of the tests itself: what came is kept as it came, and the script is followed."""

import asyncio
import json
import time

import httpx
import pytest

from tests.support.app import Answer, App, AppProcess
from tests.support.webhooks import webhook


@pytest.fixture(params=["in the process", "a process of its own"])
async def app(request, tmp_path):
    async with App() if request.param == "in the process" else AppProcess(tmp_path) as app:
        yield app


@pytest.fixture
async def client():
    async with httpx.AsyncClient(trust_env=False, timeout=1) as client:
        yield client


async def test_a_request_is_kept_as_it_came_and_in_order(app, client):
    sent = [webhook(), webhook()]
    for number, one in enumerate(sent, 1):
        headers = one.headers | {"Mayfly-Delivery": f"d{number}", "Mayfly-Attempt": str(number)}
        await client.post(f"{app.url}/hooks?a=b", content=one.body, headers=headers)

    first, second = await app.wait_for(2, path="/hooks")
    assert (first.method, first.path, first.body) == ("POST", "/hooks?a=b", sent[0].body)
    assert dict(first.headers)["Sync-Signature"] == sent[0].headers["Sync-Signature"]
    assert (second.delivery, second.attempt, second.generation) == ("d2", 2, sent[1].id)
    assert app.received(generation=sent[0].id) == [first]
    assert (first.number, first.answered, second.number) == (0, 200, 1)
    assert abs(first.at - time.time()) < 60


async def test_a_script_goes_first_until_it_is_used_up(app, client):
    app.script(Answer(503, headers=(("Retry-After", "7"),)), Answer(302, body="é"), path="/a")
    app.script(Answer(204), delivery="d1", is_for_ever=True)
    answers = [await client.post(f"{app.url}/a") for _ in range(3)]
    of_the_delivery = [await client.post(f"{app.url}/b", headers={"mayfly-delivery": "d1"}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [503, 302, 200]
    assert (answers[0].headers["Retry-After"], answers[1].text) == ("7", "é")
    assert [answer.status_code for answer in of_the_delivery] == [204, 204, 204]

    app.script(Answer(500), is_for_ever=True)
    app.forget_scripts()
    assert (await client.post(app.url)).status_code == 200


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(end="reset"), httpx.ReadError),
        (Answer(end="close"), httpx.RemoteProtocolError),
        (Answer(body="halved", end="cut"), httpx.RemoteProtocolError),
        (Answer(end="never"), httpx.ReadTimeout),
        (Answer(delay=3), httpx.ReadTimeout),
    ],
    ids=str,
)
async def test_an_answer_that_goes_wrong_is_not_counted_as_given(app, client, answer, error):
    app.script(answer)

    with pytest.raises(error):
        await client.post(app.url)
    assert [one.answered for one in await app.wait_for(1)] == [None]
    assert (await client.post(app.url)).status_code == 200


async def test_answers_are_dripped_and_as_large_as_one_likes(app, client):
    app.script(Answer(drip_head=0.005), Answer(body="ten bytes!", drip=0.02), Answer(body="{", filler=3_000_000))
    begun = time.monotonic()

    await client.post(app.url)
    assert time.monotonic() - begun > 0.15
    begun = time.monotonic()
    assert (await client.post(app.url)).text == "ten bytes!"
    assert time.monotonic() - begun > 0.2
    assert len((await client.post(app.url)).content) == 3_000_001


async def test_it_refuses_connections_and_takes_them_again_on_the_same_port(app, client):
    await client.post(app.url)
    await app.refuse()
    with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
        await client.post(app.url)
    with pytest.raises(httpx.ConnectError):
        await client.post(app.url)
    await app.accept()

    assert (await client.post(app.url)).status_code == 200


async def test_a_chunked_body_is_read_whole(app, client):
    async def pieces():
        for piece in (b'{"id": ', json.dumps("batch_abc123").encode(), b"}"):
            yield piece

    await client.post(app.url, content=pieces())

    assert [one.generation for one in await app.wait_for(1)] == ["batch_abc123"]


async def test_requests_outlive_the_process_that_was_killed(tmp_path, client):
    async with AppProcess(tmp_path) as app:
        app.script(Answer(500))
        await client.post(app.url, content=b"1")
        await app.kill9()
        with pytest.raises(httpx.HTTPError):
            await client.post(app.url, content=b"lost")
        await app.start()
        await client.post(app.url, content=b"2")

        assert [(one.body, one.answered) for one in await app.wait_for(2)] == [(b"1", 500), (b"2", 200)]


async def test_it_counts_what_is_under_way_at_once(client):
    async with App() as app:
        app.script(Answer(delay=0.2), is_for_ever=True)
        await asyncio.gather(*(client.post(app.url) for _ in range(5)))

        assert (app.most_at_once, app.connections) == (5, 5)
