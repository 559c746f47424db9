"""What the simulator's URLs lead to, its assets and its catalogues."""

import httpx
import pytest

from tests.conftest import API_KEY, http_client


@pytest.fixture
async def client(simulator):
    async with http_client(simulator.url) as client:
        client.headers["x-api-key"] = API_KEY
        yield client


@pytest.fixture
async def stranger():
    """A client without a key, as media are fetched."""
    async with httpx.AsyncClient(trust_env=False) as client:
        yield client


async def shown(client, generation):
    return (await client.get(f"/v2/generations/{generation.id}")).json()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("outputUrl", ("video/mp4", b"ftypmp42")), ("synthesizedAudioUrl", ("audio/wav", b"WAVEfmt "))],
)
async def test_media_are_open_with_their_token_alone(simulator, client, stranger, name, expected):
    url = (await shown(client, simulator.add(text_input=True)))[name]
    media = await stranger.get(url)
    without = await stranger.get(url.partition("?")[0])
    wrong = await stranger.get(f"{url}x")

    assert (media.status_code, media.headers["content-type"]) == (200, expected[0])
    assert expected[1] in media.content
    assert len(media.content) == int(media.headers["content-length"])
    assert (without.status_code, wrong.status_code) == (403, 403)
    assert [call.has_key for call in simulator.calls[-3:]] == [False, False, False]


async def test_segments_have_an_output_of_their_own(simulator, client, stranger):
    plain, generation = simulator.add(), simulator.add()
    generation.segments = [{"startTime": 0, "endTime": 1, "audioInput": {"refId": "a"}}]
    url = (await shown(client, generation))["segmentOutputUrl"]

    assert (await shown(client, plain))["segmentOutputUrl"] is None
    assert (await stranger.get(url)).headers["content-type"] == "video/mp4"


async def test_media_can_lie_behind_a_redirect_to_the_storage(simulator, client, stranger):
    simulator.switches.media_redirects = True
    url = (await shown(client, simulator.add()))["outputUrl"]
    first = await stranger.get(url)
    followed = await stranger.get(url, follow_redirects=True)

    assert (first.status_code, first.content) == (302, b"")
    assert followed.status_code == 200
    assert b"ftyp" in followed.content


async def test_there_is_no_media_before_the_end_or_of_a_failure(simulator, client, stranger):
    for status in ("PROCESSING", "FAILED"):
        generation = simulator.add(status=status)
        url = f"{simulator.url}/v2/generations/{generation.id}/result?token={generation.token}"

        assert (await shown(client, generation))["outputUrl"] is None
        assert (await stranger.get(url)).status_code == 404


@pytest.mark.parametrize(("outlives", "status"), [(False, 404), (True, 200)])
async def test_media_of_a_deleted_generation_can_be_gone_or_stay(simulator, client, stranger, outlives, status):
    simulator.switches.media_outlives = outlives
    generation = simulator.add()
    url = (await shown(client, generation))["outputUrl"]
    download = (await client.get(f"/v2/generations/{generation.id}/download")).text
    await client.delete(f"/v2/generations/{generation.id}")

    assert (await stranger.get(url)).status_code == (await stranger.get(download)).status_code == status


async def test_the_download_is_a_url_as_text(simulator, client, stranger):
    generation, failed = simulator.add(), simulator.add(status="FAILED")
    answer = await client.get(f"/v2/generations/{generation.id}/download")

    assert answer.headers["content-type"].startswith("text/plain")
    assert (await stranger.get(answer.text)).headers["content-type"] == "video/mp4"
    assert (await client.get(f"/v2/generations/{failed.id}/download")).status_code == 400
    assert (await client.get("/v2/generations/x/download")).status_code == 404
    assert (await stranger.get(f"{simulator.url}/v2/generations/{generation.id}/download")).status_code == 401


async def test_media_can_fail_like_every_call(simulator, client, stranger):
    generation = simulator.add(faults={"MEDIA": ["503", "truncated"]})
    url = (await shown(client, generation))["outputUrl"]

    assert (await stranger.get(url)).status_code == 503
    with pytest.raises(httpx.RemoteProtocolError):
        await stranger.get(url)
    assert (await stranger.get(url)).status_code == 200


@pytest.mark.parametrize("path", ["/storage/generations/x/result.mp4", "/storage/x/y/z", "/storage/assets/x/a.mp4"])
async def test_what_is_not_in_the_storage_is_404(simulator, stranger, path):
    assert (await stranger.get(f"{simulator.url}{path}")).status_code == 404


# Assets


async def test_assets_are_paged_and_filtered(simulator, client):
    made = [simulator.add_asset(name=f"take {number}.mp4", size=number) for number in range(5)]
    simulator.add_asset(kind="AUDIO", name="vo.wav")
    pages: list[list[str]] = []
    cursor = None
    while not pages or cursor:
        params = {"limit": 2, "types": "VIDEO", "sortBy": "sizeAsc"} | ({"cursor": cursor} if cursor else {})
        page = (await client.get("/v2/assets", params=params)).json()
        cursor = page["nextCursor"]
        pages.append([asset["id"] for asset in page["items"]])

    assert pages == [[made[0].id, made[1].id], [made[2].id, made[3].id], [made[4].id]]
    assert page["totalCount"] == 5
    assert (await client.get("/v2/assets?searchQuery=VO")).json()["totalCount"] == 1


@pytest.mark.parametrize(
    ("query", "field"), [("limit=0", "limit"), ("types=VIDEO,FILM", "types"), ("sortBy=age", "sortBy")]
)
async def test_a_wrong_query_of_assets_is_400_and_named(client, query, field):
    answer = await client.get(f"/v2/assets?{query}")

    assert (answer.status_code, answer.json()["field"]) == (400, field)


async def test_an_asset_is_deleted_by_its_owner_alone(simulator, client):
    own, other = simulator.add_asset(), simulator.add_asset(is_own=False)
    answers = [await client.delete(f"/v2/assets/{id_}") for id_ in (own.id, other.id, own.id)]

    assert [answer.status_code for answer in answers] == [200, 403, 404]
    assert answers[0].json() == {"id": own.id}
    assert [answer.json().get("errorCode") for answer in answers[1:]] == ["asset_forbidden", "asset_not_found"]
    assert list(simulator.assets) == [other.id]


async def test_the_file_of_an_asset_is_open_until_it_is_deleted(client, stranger):
    asset = (await client.post("/simulator/assets", json={"kind": "IMAGE", "name": "face.png"})).json()
    url = (await client.get(f"/v2/assets/{asset['id']}/download")).text
    there = await stranger.get(url)
    await client.delete(f"/v2/assets/{asset['id']}")

    assert url == asset["url"]
    assert (there.status_code, there.headers["content-type"]) == (200, "image/png")
    assert (await stranger.get(url)).status_code == 404


async def test_an_asset_outlives_the_generation_that_used_it(simulator, client):
    created = await client.post("/v2/generate", data={"model": "lipsync-2"}, files={"video": ("a.mp4", b"x")})
    generation = simulator.generations[created.json()["id"]]
    generation.become("COMPLETED")
    await client.delete(f"/v2/generations/{generation.id}")
    (asset,) = (await client.get("/v2/assets")).json()["items"]

    assert asset["id"] == created.json()["input"][0]["assetId"]


# Catalogues


async def test_the_errors_are_open_and_the_models_are_not(simulator, client, stranger):
    errors = (await stranger.get(f"{simulator.url}/v2/errors")).json()
    models = (await client.get("/v2/models")).json()

    assert {"code", "message", "suggestion"} == errors[0].keys()
    assert "generation_not_found" in {error["code"] for error in errors}
    assert "lipsync-2" in {model["name"] for model in models}
    assert (await stranger.get(f"{simulator.url}/v2/models")).status_code == 401
