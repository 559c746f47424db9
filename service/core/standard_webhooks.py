"""The signature of a delivery in the form of Standard Webhooks, which libraries for many languages verify.

It is made at each attempt: sync.so's own signature has the time of the first sending, which apps refuse after five
minutes. Source: Standard Webhooks specification 1.0.0, "Signature scheme".
"""

import base64
import binascii
import hmac
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from service.core.secret import Secret

PREFIX: Final = "whsec_"
_KEY_BYTES: Final = range(24, 65)


def read_signing_key(secret: Secret) -> bytes:
    """Return the key in *secret*, ``whsec_`` and base64.

    Raises: ValueError, without the secret.
    """
    text = secret.reveal()
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    if not text.startswith(PREFIX) or len(key) not in _KEY_BYTES:
        raise ValueError("not a signing secret")
    return key


def standard_headers(delivery: str, body: bytes, *, secrets: Sequence[Secret], at: datetime) -> dict[str, str]:
    """Return the headers that sign *body* as *delivery*, sent at the aware instant *at*; none without *secrets*."""
    if not secrets:
        return {}
    timestamp = int(at.timestamp())
    signed = b"%b.%d.%b" % (delivery.encode(), timestamp, body)
    return {
        "webhook-id": delivery,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(_sign(signed, secret) for secret in secrets),
    }


def _sign(signed: bytes, secret: Secret) -> str:
    return "v1," + base64.b64encode(hmac.digest(read_signing_key(secret), signed, "sha256")).decode()
