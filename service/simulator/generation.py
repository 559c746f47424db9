"""One generation as the Sync API shows it.

Unset values are explicit nulls, as captured on the wire.
Source: sync.so API reference, "Generate API" and "Webhooks".
"""

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

UNFINISHED = frozenset({"PENDING", "PROCESSING"})
STATUSES = UNFINISHED | {"COMPLETED", "FAILED", "REJECTED"}
MODELS = ("sync-3", "lipsync-2", "lipsync-2-pro", "lipsync-1.9.0-beta", "react-1")
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
    """A generation; *overrides* are by wire name, and ``msgspec.UNSET`` removes a key.

    The API filters by *source*, *generation_source* and *batch_id*, but does not show them.
    """

    id: str
    status: str
    created_at: datetime
    token: str
    url: str
    input: list[dict[str, object]]
    model: str = "lipsync-2-pro"
    options: Mapping[str, object] = field(default_factory=lambda: {"sync_mode": "cut_off"})
    segments: Sequence[object] | None = None
    webhook_url: str | None = None
    output_file_name: str | None = None
    project_id: str | None = None
    webhook_copies: int = 1
    source: str | None = None  # the header x-sync-source of the client
    generation_source: str | None = "api"  # None: from before the API knew it
    batch_id: str | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    first_delete_at: datetime | None = None
    deleted_at: datetime | None = None
    _encoded: bytes | None = None
    _ended: asyncio.Event | None = None

    @property
    def is_playground(self) -> bool:
        """Whether it was made in the Studio."""
        return (self.generation_source or "").startswith("studio_")

    @property
    def created_at_text(self) -> str:
        return wire_instant(self.created_at)

    def become(self, status: str) -> None:
        self.status = status
        self._encoded = None
        if self._ended is not None and status not in UNFINISHED:
            self._ended.set()

    async def wait_until_ended(self, timeout_seconds: float) -> None:
        """Return at the final status, or after *timeout_seconds* without one."""
        if self.status not in UNFINISHED:
            return
        self._ended = self._ended or asyncio.Event()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout_seconds)

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
            "segments": self.segments,
            "webhookUrl": self.webhook_url,
            "options": self.options,
            "outputUrl": f"{result}/result?token={self.token}" if is_done else None,
            "segmentOutputUrl": f"{result}/segments?token={self.token}" if is_done and self.segments else None,
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


def wire_instant(instant: datetime) -> str:
    """Return *instant* as the API writes it, with milliseconds and Z."""
    return f"{instant.astimezone(UTC):%Y-%m-%dT%H:%M:%S}.{instant.microsecond // 1000:03d}Z"


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
