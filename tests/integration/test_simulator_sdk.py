"""Every method of the official Python SDK against the simulator; what it answers passes the SDK's own models."""

import importlib.util
import json

import httpx
import pydantic
import pytest

from tests.conftest import API_KEY
from tests.support.waiting import eventually

if importlib.util.find_spec("sync") is None:
    pytest.skip("syncsdk is not installed", allow_module_level=True)

from sync import AsyncSync
from sync.common import (
    Asset,
    Audio,
    BadRequestError,
    BatchResponse,
    EstimatedGenerationCost,
    Generation,
    GenerationOptions,
    GenerationSegment,
    ModelInfo,
    NotFoundError,
    PaginatedAssetsResponse,
    SegmentAudioInput,
    Tts,
    UnauthorizedError,
    Video,
)
from sync.common.types.eleven_labs import ElevenLabs
from sync.core.serialization import convert_and_respect_annotation_metadata
from sync.webhooks import GenerationNotification

VIDEO, AUDIO = Video(url="https://cdn.example.com/a.mp4"), Audio(url="https://cdn.example.com/a.wav", ref_id="a")


@pytest.fixture
async def client():
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        yield client


@pytest.fixture
def sdk(simulator, client):
    simulator.switches.processing_seconds = 0.1
    return AsyncSync(base_url=simulator.url, api_key=API_KEY, httpx_client=client)


async def strict(model, client, url):
    """Read what *url* answers by the SDK's model, which its client reads without checking."""
    return checked(model, (await client.get(url, headers={"x-api-key": API_KEY})).content)


def checked(model, body):
    renamed = convert_and_respect_annotation_metadata(object_=json.loads(body), annotation=model, direction="read")
    return pydantic.TypeAdapter(model).validate_json(json.dumps(renamed), strict=True)


async def test_a_generation_is_created_polled_and_listed(sdk, simulator, client):
    segment = GenerationSegment(start_time=0, end_time=2, audio_input=SegmentAudioInput(ref_id="a"))
    created = await sdk.generations.create(
        model="lipsync-2",
        input=[VIDEO, AUDIO],
        options=GenerationOptions(sync_mode="cut_off"),
        segments=[segment],
        output_file_name="take 7",
    )
    await simulator.generations[created.id].wait_until_ended(5)
    polled = await sdk.generations.get(created.id)
    media = await client.get(polled.output_url or "")

    assert (created.status, polled.status) == ("PENDING", "COMPLETED")
    assert created.segments == polled.segments == [segment]
    assert polled.input == [VIDEO, AUDIO]
    assert media.headers["content-type"] == "video/mp4"
    strict_one = await strict(Generation, client, f"{simulator.url}/v2/generate/{created.id}")
    assert strict_one.options == GenerationOptions(sync_mode="cut_off")


async def test_lists_by_ids_and_statuses_find_each_of_them(sdk, simulator, client):
    first, second = simulator.add(text_input=True), simulator.add(status="FAILED")
    simulator.add(status="REJECTED")
    by_ids = await sdk.generations.list(ids=[first.id, second.id])
    by_status = await sdk.generations.list(status=["COMPLETED", "FAILED"])
    one_page = await sdk.generations.list(request_options={"additional_query_parameters": {"limit": 1}})

    assert {item.id for item in by_ids} == {item.id for item in by_status} == {first.id, second.id}
    assert len(one_page) == 1
    assert len(await strict(list[Generation], client, f"{simulator.url}/v2/generations")) == 3


async def test_speech_and_uploads_are_accepted(sdk, simulator, client):
    speech = Tts(provider=ElevenLabs(voice_id="v", script="Grüße"))
    spoken = await sdk.generations.create(model="lipsync-2-pro", input=[VIDEO, speech])
    uploaded = await sdk.generations.create_with_files(
        model="lipsync-2", video=("a.mp4", b"x", "video/mp4"), audio=("a.wav", b"y", "audio/wav")
    )
    assets = await sdk.assets.list(types=["VIDEO"], limit=10)
    asset = await sdk.assets.get(assets.items[0].id)

    assert spoken.input[1] == speech
    assert [part.type for part in uploaded.input] == ["video", "audio"]
    assert (asset.id, asset.type, assets.total_count) == (uploaded.input[0].asset_id, "VIDEO", 1)
    assert (await strict(PaginatedAssetsResponse, client, f"{simulator.url}/v2/assets")).total_count == 2
    assert (await strict(Asset, client, f"{simulator.url}/v2/assets/{asset.id}")).size == 1


async def test_models_and_estimates_are_there(sdk, simulator, client):
    (cost,) = await sdk.generations.estimate_cost(model="lipsync-2", input=[VIDEO, AUDIO])

    assert isinstance(cost, EstimatedGenerationCost)
    assert {"lipsync-2", "sync-3"} <= {model.name for model in await sdk.models.list()}
    assert await strict(list[ModelInfo], client, f"{simulator.url}/v2/models")


async def test_a_batch_is_validated_created_polled_and_listed(sdk, simulator, client):
    payload = {"model": "lipsync-2", "input": [{"type": "video", "url": VIDEO.url}]}
    lines = [{"request_id": f"r{n}", "endpoint": "/v2/generate", "payload": payload} for n in range(20)]
    content = b"\n".join(json.dumps(line).encode() for line in lines)
    validated = await sdk.batch.create(input=content, dry_run=True)
    created = await sdk.batch.create(input=("batch.jsonl", content))

    async def look():
        batch = await sdk.batch.get(created.id)
        return batch if batch.status == "COMPLETED" else None

    batch = await eventually(look)
    results = await client.get(batch.output_url, follow_redirects=True)

    assert validated.status == "VALIDATED"
    assert batch.metrics.success_count == 20
    assert [item.id for item in await sdk.batch.list(status="COMPLETED", created_before=created.created_at)] == []
    assert [item.id for item in await sdk.batch.list(status="COMPLETED")] == [created.id]
    assert len(results.text.splitlines()) == 20
    assert (await strict(BatchResponse, client, f"{simulator.url}/v2/batch/{created.id}")).webhook_url is None


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "REJECTED"])
def test_the_webhook_passes_the_sdks_model(simulator, status):
    body, _ = simulator.webhook(simulator.add(status=status, text_input=True).id)
    notification = checked(GenerationNotification, body)

    assert notification.status == status
    assert (notification.error_code is None) == (status == "COMPLETED")


async def test_errors_are_those_of_the_sdk(sdk, simulator, client):
    generation = simulator.add()
    with pytest.raises(BadRequestError) as refused:
        await sdk.generations.create(model="lipsync-2", input=[VIDEO, AUDIO], webhook_url="not a url")
    simulator.remove(generation.id)
    with pytest.raises(NotFoundError) as missing:
        await sdk.generations.get(generation.id)
    stranger = AsyncSync(base_url=simulator.url, api_key="sk-other", httpx_client=client)
    with pytest.raises(UnauthorizedError):
        await stranger.generations.list()

    assert refused.value.body.field == "webhookUrl"
    assert missing.value.body.errorCode == "generation_not_found"
