"""The generation as columns: what sync.so says of it, each part under the name that the records table gives it."""

from typing import Any, Final

from service.generation import Generation

# Without the status, which is never missing.
DESCRIBED: Final = (
    "model",
    "created_at",
    "input",
    "options",
    "segments",
    "output_url",
    "segment_output_url",
    "synthesized_audio_url",
    "output_duration",
    "output_file_name",
    "project_id",
    "webhook_url",
    "error",
    "error_code",
)


def described(generation: Generation) -> dict[str, Any]:
    """Return the columns that say of the generation what sync.so says of it; parts stay the JSON they came as."""
    return {
        "status": generation.status,
        "model": generation.model,
        "created_at": generation.created_at,
        "input": _json(generation.input),
        "options": _json(generation.options),
        "segments": _json(generation.segments),
        "output_url": generation.media_url,
        "segment_output_url": generation.segment_output_url,
        "synthesized_audio_url": generation.synthesized_audio_url,
        "output_duration": generation.output_duration,
        "output_file_name": generation.output_file_name,
        "project_id": generation.project_id,
        "webhook_url": generation.webhook_url,
        "error": generation.error,
        "error_code": generation.failure_code,
    }


def _json(raw: bytes | memoryview) -> str | None:
    text = bytes(raw)
    return None if text == b"null" else text.decode()
