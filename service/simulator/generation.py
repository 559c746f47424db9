"""One generation as the Sync API shows it.

Unset values are explicit nulls, as captured on the wire.
Source: sync.so API reference, "Generate API" and "Webhooks".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

UNFINISHED = frozenset({"PENDING", "PROCESSING"})
STATUSES = UNFINISHED | {"COMPLETED", "FAILED", "REJECTED"}
ERRORS = {
    "FAILED": ("The provided video URL is inaccessible", "generation_input_video_inaccessible"),
    "REJECTED": ("The request was rejected", "generation_input_validation_failed"),
}
# The webhook has fewer keys than the polled generation, and another name for the error code.
_WEBHOOK_KEYS = (
    *("id", "createdAt", "status", "model", "input", "webhookUrl", "options"),
    *("outputUrl", "segmentOutputUrl", "outputDuration", "error"),
)


@dataclass(slots=True)
class Generation:
    """A generation; *overrides* are by wire name, and ``msgspec.UNSET`` removes a key."""

    id: str
    status: str
    created_at: datetime
    token: str
    url: str
    input: list[dict[str, object]]
    model: str = "lipsync-2-pro"
    options: Mapping[str, object] = field(default_factory=lambda: {"sync_mode": "cut_off"})
    webhook_url: str | None = None
    output_file_name: str | None = None
    project_id: str | None = None
    webhook_copies: int = 1
    overrides: Mapping[str, object] = field(default_factory=dict)
    first_delete_at: datetime | None = None
    deleted_at: datetime | None = None
    _encoded: bytes | None = None

    @property
    def created_at_text(self) -> str:
        return f"{self.created_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S}.{self.created_at.microsecond // 1000:03d}Z"

    def become(self, status: str) -> None:
        self.status = status
        self._encoded = None

    def body(self) -> dict[str, object]:
        """Return the wire body of GET, list items and DELETE."""
        is_done = self.status == "COMPLETED"
        result = f"{self.url}/v2/generations/{self.id}"
        error, code = ERRORS.get(self.status, (None, None))
        body: dict[str, object] = {
            "id": self.id,
            "createdAt": self.created_at_text,
            "status": self.status,
            "model": self.model,
            "input": self.input,
            "segments": None,
            "webhookUrl": self.webhook_url,
            "options": self.options,
            "outputUrl": f"{result}/result?token={self.token}" if is_done else None,
            "segmentOutputUrl": None,
            "outputDuration": 9.98 if is_done else None,
            "outputFileName": self.output_file_name,
            "projectId": self.project_id,
            "error": error,
            "errorCode": code,
        }
        if any(part.get("type") == "text" for part in self.input):
            body["synthesizedAudioUrl"] = f"{result}/audio?token={self.token}" if is_done else None
        return {key: value for key, value in (body | dict(self.overrides)).items() if value is not msgspec.UNSET}

    def encoded(self) -> bytes:
        if self._encoded is None:
            self._encoded = msgspec.json.encode(self.body())
        return self._encoded

    def notification(self) -> bytes:
        """Return the body of the webhook for the present status."""
        body = self.body()
        shown = {key: body[key] for key in _WEBHOOK_KEYS if key in body}
        return msgspec.json.encode(shown | {"error_code": body.get("errorCode")})


def sample_input(*, text: bool) -> list[dict[str, object]]:
    """Return a video input with a recorded voice, or with a *text* to speak."""
    video: dict[str, object] = {"url": "https://cdn.example.com/in/take-07.mp4", "type": "video"}
    if not text:
        return [video, {"url": "https://cdn.example.com/in/vo-07.wav", "type": "audio"}]
    provider = {"name": "elevenlabs", "voiceId": "EXAVITQu4vr4", "script": "Grüße aus Köln"}
    return [video, {"type": "text", "provider": provider}]


def sanitised(name: str | None) -> str | None:
    """Return an output file name as the API stores it: letters, digits, ``-`` and ``_``; at most 255."""
    return None if name is None else re.sub(r"[^A-Za-z0-9_-]", "", name.replace(" ", "_"))[:255]
