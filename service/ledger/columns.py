"""The columns that describe the generation: filled from the webhook, replaced by the copy."""

from typing import Any, Final

from service.core.generation import Generation

# Without the status, which is always there.
GENERATION_COLUMNS: Final = (
    "model",
    "created_at",
    "input",
    "options",
    "segments",
    "output_url",
    "output_media_url",
    "segment_output_url",
    "synthesized_audio_url",
    "output_duration",
    "output_file_name",
    "project_id",
    "source",
    "webhook_url",
    "error",
    "error_code",
)


def generation_values(generation: Generation) -> dict[str, Any]:
    """Return the values of the status and the GENERATION_COLUMNS: an empty text as None, JSON as the text received."""
    return {
        "status": generation.status,
        "model": generation.model or None,
        "created_at": generation.created_at or None,
        "input": _json_text(generation.input),
        "options": _json_text(generation.options),
        "segments": _json_text(generation.segments),
        "output_url": generation.output_url or None,
        "output_media_url": generation.output_media_url or None,
        "segment_output_url": generation.segment_output_url or None,
        "synthesized_audio_url": generation.synthesized_audio_url or None,
        "output_duration": generation.output_duration,
        "output_file_name": generation.output_file_name or None,
        "project_id": generation.project_id or None,
        "source": generation.source or None,
        "webhook_url": generation.webhook_url or None,
        "error": generation.error or None,
        "error_code": generation.failure_code or None,
    }


def _json_text(raw: bytes | memoryview) -> str | None:
    text = bytes(raw)
    return None if text == b"null" else text.decode()
