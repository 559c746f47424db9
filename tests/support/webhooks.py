"""Webhooks as sync.so sends them; the signature does not use Mayfly's code."""

import hashlib
import hmac
import json
import time
from dataclasses import dataclass, field
from uuid import uuid4

SECRET = "whsec_test_0123456789abcdef0123456789abcdef"


def signature(body: bytes, *, secret: str = SECRET, at: float | None = None) -> str:
    """Sign *body* as sent at *at*, in seconds since 1970; now unless given."""
    timestamp = int(time.time() if at is None else at)
    digest = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


@dataclass(frozen=True)
class Webhook:
    """A body with its signature header."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The generation's id."""
        return str(json.loads(self.body)["id"])


def notification(**fields: object) -> dict[str, object]:
    """Return a documented notification of a completed generation; *fields* by wire name replace what it says."""
    generation_id = str(uuid4())
    return {
        "id": generation_id,
        "createdAt": "2026-10-24T09:58:12.402Z",
        "status": "COMPLETED",
        "model": "lipsync-2-pro",
        "input": [{"url": "https://cdn.example.com/in/take-07.mp4", "type": "video"}],
        "webhookUrl": "https://hooks.example.com/webhooks/sync",
        "options": {"sync_mode": "cut_off", "temperature": 0.5},
        "outputUrl": f"https://api.sync.so/v2/generations/{generation_id}/result?token=9b6d0c11",
        "segmentOutputUrl": None,
        "outputDuration": 9.98,
        "error": None,
        "error_code": None,
    } | fields


def webhook(body: bytes | None = None, *, secret: str = SECRET, at: float | None = None, **fields: object) -> Webhook:
    """Return a signed webhook: of the raw *body*, or of a notification with *fields*."""
    raw = json.dumps(notification(**fields), ensure_ascii=False).encode() if body is None else body
    headers = {"Content-Type": "application/json", "Sync-Signature": signature(raw, secret=secret, at=at)}
    return Webhook(raw, headers)


def batch() -> dict[str, object]:
    """Return a batch's notification, which alone has metrics."""
    return {
        "id": "batch_abc123",
        "created_at": "2026-10-24T06:00:00.000Z",
        "status": "COMPLETED",
        "metrics": {"total_generations": 40, "success_count": 38, "failed_count": 2, "pending_count": 0},
        "outputUrl": "https://api.sync.so/v2/batch/batch_abc123/result?token=f0c1a2b3",
        "webhookUrl": "https://hooks.example.com/webhooks/sync",
    }
