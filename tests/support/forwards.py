"""Forwarded webhooks as Mayfly sends them to an app; the signatures do not use Mayfly's code."""

import base64
import hashlib
import hmac
import time
from uuid import uuid4

from tests.support.webhooks import Webhook

FORWARD_SECRET = "whsec_" + base64.b64encode(b"forward test secret, 32 bytes ok").decode()


def standard_signature(delivery: str, at: int, body: bytes, *, secret: str = FORWARD_SECRET) -> str:
    """Return the ``webhook-signature`` of Standard Webhooks for *body* sent *at*, in seconds since 1970."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{delivery}.{at}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def forwarded_headers(
    sent: Webhook,
    *,
    delivery: str | None = None,
    attempt: int = 1,
    secret: str | None = FORWARD_SECRET,
    at: float | None = None,
) -> dict[str, str]:
    """Return the headers of one attempt, made *at*, to forward *sent*; without *secret* only sync.so has signed it."""
    delivery = delivery or str(uuid4())
    headers = sent.headers | {"User-Agent": "Mayfly/0", "Mayfly-Delivery": delivery, "Mayfly-Attempt": str(attempt)}
    if secret is not None:
        seconds = int(time.time() if at is None else at)
        headers |= {
            "webhook-id": delivery,
            "webhook-timestamp": str(seconds),
            "webhook-signature": standard_signature(delivery, seconds, sent.body, secret=secret),
        }
    return headers
