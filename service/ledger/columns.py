"""The generation as columns: what sync.so says of it, filled from the webhook and replaced by the copy."""

from typing import Any, Final

from service.core.generation import Generation

# Without the status, which is never missing.
GENERATION_COLUMNS: Final = (
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


def generation_values(generation: Generation) -> dict[str, Any]:
    """Return the status and the DESCRIBED columns; an empty text says nothing, JSON stays the text it came as."""
    return {
        "status": generation.status,
        "model": generation.model or None,
        "created_at": generation.created_at or None,
        "input": _json_text(generation.input),
        "options": _json_text(generation.options),
        "segments": _json_text(generation.segments),
        "output_url": generation.media_url or None,
        "segment_output_url": generation.segment_output_url or None,
        "synthesized_audio_url": generation.synthesized_audio_url or None,
        "output_duration": generation.output_duration,
        "output_file_name": generation.output_file_name or None,
        "project_id": generation.project_id or None,
        "webhook_url": generation.webhook_url or None,
        "error": generation.error or None,
        "error_code": generation.failure_code or None,
    }


def _json_text(raw: bytes | memoryview) -> str | None:
    text = bytes(raw)
    return None if text == b"null" else text.decode()
