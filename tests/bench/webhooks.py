"""Signed webhooks as sync.so sends them, prepared as whole HTTP requests before any clock starts."""

import hmac
import json
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from uuid import uuid4

# It protects nothing; each process of the benchmarks gets it.
SECRET = "whsec_bench_0123456789abcdef0123456789abcdef"
API_KEY = "sk-simulator"
_SIGNED = "key=K2JCJMDEHXQW5F&expires=1761390000&signature=6c1f7a9b0d44e2c86c1f7a9b0d44e2c86c1f7a9b0d44e2c86c1f7a9b0d44"


class Wanted(NamedTuple):
    """One generation to announce; a *webhook_url* may have an override (``?expires=…``)."""

    id: str
    webhook_url: str = "https://hooks.example.com/sync/t_8Qm2"


def fresh(count: int) -> Iterator[Wanted]:
    """Yield *count* generations with new ids."""
    return (Wanted(str(uuid4())) for _ in range(count))


def body_of(wanted: Wanted) -> bytes:
    """Return the webhook's body: a COMPLETED generation of about 900 bytes with the fields that are documented."""
    return json.dumps(
        {
            "id": wanted.id,
            "createdAt": "2026-10-24T09:58:12.402Z",
            "status": "COMPLETED",
            "model": "lipsync-2-pro",
            "input": [
                {"url": f"https://cdn.example.com/in/take-07.mp4?{_SIGNED}", "type": "video"},
                {"url": f"https://cdn.example.com/in/vo-07.wav?{_SIGNED}", "type": "audio"},
            ],
            "webhookUrl": wanted.webhook_url,
            "options": {"sync_mode": "cut_off", "temperature": 0.5, "occlusion_detection_enabled": False},
            "outputUrl": f"https://api.sync.so/v2/generations/{wanted.id}/result?token={wanted.id}",
            "segmentOutputUrl": None,
            "outputDuration": 9.98,
            "error": None,
            "error_code": None,
        },
        separators=(",", ":"),
    ).encode()


def request_of(wanted: Wanted, path: str, host: str) -> bytes:
    """Return the whole HTTP/1.1 request, signed as sent now."""
    body = body_of(wanted)
    at = int(time.time())
    digest = hmac.digest(SECRET.encode(), b"%d." % at + body, "sha256").hex()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"sync-signature: t={at},v1={digest}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def requests_of(wanted: Iterable[Wanted], path: str, host: str) -> list[bytes]:
    """Return one request for each generation."""
    return [request_of(one, path, host) for one in wanted]
