"""``POST /v2/generate`` and ``POST /v2/analyze/cost``.

Source: sync.so API reference, "Create generation", "Create generation with files", "Estimate cost", and the guide
"Idempotent generation requests", which also covers multipart requests.
"""

import hashlib
import re

import msgspec

from service.simulator.answers import Answer, error, invalid, json_answer
from service.simulator.creation import NewGeneration, decode_json, form_values, read_creation
from service.simulator.forms import Upload, is_form, read_form
from service.simulator.generation import Generation
from service.simulator.organisation import Organisation
from service.simulator.requests import Request

GENERATION_SOURCES = frozenset(
    {
        *("studio_lite", "studio_advanced", "studio_assistant", "ios", "premiere-plugin", "resolve-plugin"),
        *("mcp", "chatgpt", "claude", "gemini", "api"),
    }
)
_KEY = re.compile(r"[A-Za-z0-9._~-]{1,128}")
_Uploads = list[tuple[dict[str, object], Upload]]  # each with its item of ``input``


class CreateRoutes:
    """The creation of single generations, and what it would cost."""

    def __init__(self, organisation: Organisation) -> None:
        self._organisation = organisation

    def create(self, request: Request) -> Answer:
        key = _idempotency_key(request)
        values, uploads = _read(request)
        new = read_creation(values)
        digest = _digest(values, uploads)
        if key is not None and (known := self._organisation.idempotency.get(key)):
            return self._replay(*known, digest)
        for item, upload in uploads:
            kind = str(item["type"]).upper()
            asset = self._organisation.add_asset(kind=kind, name=upload.name, size=len(upload.content))
            item |= {"assetId": asset.id, "url": asset.storage_url}
        generation = add_new(self._organisation, new, source=request.header(b"x-sync-source"))
        if key is not None:
            self._organisation.idempotency[key] = (digest, generation.id)
        return Answer(201, generation.encoded())

    def estimate(self, request: Request) -> Answer:
        read_creation(decode_json(request.body, "body"))
        return json_answer(200, [{"estimatedFrameCount": 250, "estimatedGenerationCost": 0.5}])

    def _replay(self, first_digest: bytes, generation_id: str, digest: bytes) -> Answer:
        if digest != first_digest:
            message = "The Idempotency-Key was used with another request"
            return error(409, message, "IDEMPOTENCY_KEY_CONFLICT", error="Conflict", field="Idempotency-Key")
        generation = self._organisation.generations.get(generation_id) or self._organisation.removed[generation_id]
        return Answer(201, generation.encoded())


def add_new(
    organisation: Organisation, new: NewGeneration, *, source: str | None, batch_id: str | None = None
) -> Generation:
    """Add a generation that was asked for through the API, and begin to process it."""
    generation = organisation.add(
        model=new.model,
        status=organisation.next_ending(),
        webhook_url=new.webhook_url,
        project_id=new.project_id,
        output_file_name=new.output_file_name,
        source=source,
        generation_source=source if source in GENERATION_SOURCES else "api",
        processing_seconds=organisation.switches.processing_seconds,
    )
    generation.input, generation.options, generation.segments = new.input, new.options, new.segments
    generation.batch_id = batch_id
    return generation


def _read(request: Request) -> tuple[dict[str, object], _Uploads]:
    """Return the body's values; the items of uploaded files get their URLs once the request is accepted."""
    if not is_form(request):
        values = decode_json(request.body, "body")
        if not isinstance(values, dict):
            raise invalid("body", "the body must be a JSON object")
        return values, []
    form = read_form(request)
    uploads: _Uploads = [
        ({"type": kind, "assetId": ""}, upload) for kind in ("video", "audio") for upload in form.files.get(kind, [])
    ]
    values = form_values(form)
    inputs = values.get("input", [])
    if isinstance(inputs, list):
        values["input"] = [*inputs, *(item for item, _ in uploads)]
    return values, uploads


def _idempotency_key(request: Request) -> str | None:
    keys = request.header_values(b"idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        message = "Idempotency-Key must be one of 1 to 128 characters of A-Za-z0-9._~-"
        raise invalid("Idempotency-Key", message, code="INVALID_IDEMPOTENCY_KEY")
    return keys[0]


def _digest(values: dict[str, object], uploads: _Uploads) -> bytes:
    """Return a digest that is the same for the same request, whatever the order of keys or the form's boundary."""
    digest = hashlib.sha256(msgspec.json.encode(values, order="sorted"))
    for _, upload in uploads:
        digest.update(hashlib.sha256(upload.content).digest())
    return digest.digest()
