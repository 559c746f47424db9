"""The signature of a webhook: verify the one received, make the one that the simulator sends.

Source: sync.so docs, "Webhooks", "Verify webhook signatures", and "Get webhook secret".
"""

import hmac
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal

# Far above what is ever sent (one t, one v1 of 64 digits), far below what takes time to parse.
MAX_HEADER_LENGTH = 4096
MAX_SIGNATURES = 16
# A rotation has two secrets at a time.
_CACHED_MACS = 16

# The header as sync.so sends it, for a fast path; any other form takes the slow one.
_USUAL = re.compile(r"t=([0-9]{1,12}),v1=([0-9a-f]{64})", re.ASCII)
# ASCII digits only: int() would also take "١٢", " 12 ", "1_000" and "+5".
_TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)

Reason = Literal["missing", "malformed", "stale", "mismatch"]


class SignatureError(Exception):
    """The signature of a webhook is missing or wrong; answered 401, never stored."""

    def __init__(self, reason: Reason, details: str = "") -> None:
        super().__init__(f"webhook signature rejected: {reason}" + (f", {details}" if details else ""))
        self.reason: Reason = reason  # a closed set, so it can label a metric
        self.details = details  # numbers, no secret


def verify(header: str, body: bytes, *, secrets: Sequence[bytes], now: datetime, tolerance: timedelta) -> datetime:
    """Return the send time if *header*, ``t=<unix seconds>,v1=<hex>``, signs the raw *body* with one of *secrets*.

    A secret is the full ``whsec_…`` string as UTF-8: nothing is stripped or decoded. *now* is aware UTC and may
    differ from ``t`` by *tolerance* either way. The header may have several ``v1`` entries; unknown entries are
    ignored. A digest is lower-case hex.

    Raises: SignatureError, and nothing else, whatever the header is.
    """
    timestamp, digests = _parse_header(header)
    signed = b"%b.%b" % (timestamp.encode(), body)
    # Every pair is compared, so that the time taken does not reveal which secret or entry matched.
    matches = 0
    for secret in secrets:
        mac = _start_mac(secret).copy()
        mac.update(signed)
        expected = mac.hexdigest()
        for digest in digests:
            matches |= hmac.compare_digest(expected, digest)
    if not matches:
        raise SignatureError("mismatch")
    _check_time(timestamp, now, tolerance)
    return datetime.fromtimestamp(int(timestamp), UTC)


@lru_cache(_CACHED_MACS)  # making one takes as long as hashing a webhook with it
def _start_mac(secret: bytes) -> hmac.HMAC:
    return hmac.new(secret, digestmod="sha256")


def check_form(header: str, *, now: datetime, tolerance: timedelta) -> None:
    """Return if *header* has the right form and a time near *now*. It verifies no signature.

    Raises: SignatureError.
    """
    timestamp, _ = _parse_header(header)
    _check_time(timestamp, now, tolerance)


def sign(body: bytes, *, secret: bytes, at: datetime) -> str:
    """Return the header that signs *body* as sent at the aware instant *at*."""
    timestamp = int(at.timestamp())
    digest = hmac.digest(secret, b"%d." % timestamp + body, "sha256").hex()
    return f"t={timestamp},v1={digest}"


def _check_time(timestamp: str, now: datetime, tolerance: timedelta) -> None:
    ahead = int(timestamp) - now.timestamp()
    if abs(ahead) > tolerance.total_seconds():
        side = "ahead of" if ahead > 0 else "behind"
        raise SignatureError(
            "stale", f"{abs(ahead):.0f} s {side} Mayfly's clock ({tolerance.total_seconds():.0f} s allowed)"
        )


def _parse_header(header: str) -> tuple[str, list[str]]:
    """Split *header* into its one timestamp and its v1 digests."""
    if usual := _USUAL.fullmatch(header):
        return usual[1], [usual[2]]
    if not header:
        raise SignatureError("missing")
    if len(header) > MAX_HEADER_LENGTH:
        raise SignatureError("malformed")
    entries = [entry.strip().partition("=") for entry in header.split(",")]
    timestamps = [value for name, _, value in entries if name == "t"]
    digests = [value for name, _, value in entries if name == "v1"]
    if len(timestamps) != 1 or not _TIMESTAMP.fullmatch(timestamps[0]):
        raise SignatureError("malformed")
    if not digests or len(digests) > MAX_SIGNATURES:
        raise SignatureError("malformed")
    # An entry that is not a digest cannot match; others may, as during a rotation.
    return timestamps[0], [digest for digest in digests if _DIGEST.fullmatch(digest)]
