"""Takes the webhooks that Mayfly forwards: verifies each one, stores it once, answers.

pip install standardwebhooks && python receive.py
"""

import hashlib
import hmac
import os
import re
import sqlite3
import time
from contextlib import closing
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

SYNC_SECRETS = os.environ["SYNC_WEBHOOK_SECRET"].split(",")  # the whole value, whsec_ included
# The secret that secret_env of the [[forward]] names. Without one, late deliveries are refused.
FORWARD = Webhook(os.environ["FORWARD_SECRET"]) if "FORWARD_SECRET" in os.environ else None
TOLERANCE_SECONDS = 300
MAX_BYTES = 2**20
INBOX = "inbox.db"


def verify(headers: Message, body: bytes) -> None:
    """Return if sync.so signed the body and it was sent just now: by sync.so, or by Mayfly in this attempt.

    Raises: ValueError, WebhookVerificationError.
    """
    found = re.match(r"t=(\d+),v1=([0-9a-f]{64})", headers.get("Sync-Signature", ""), re.ASCII)
    if not found:
        raise ValueError("Sync-Signature is missing or malformed")
    sent_at, digest = found.groups()
    expected = [hmac.new(key.encode(), f"{sent_at}.".encode() + body, "sha256").hexdigest() for key in SYNC_SECRETS]
    if not any(hmac.compare_digest(digest, one) for one in expected):
        raise ValueError("sync.so did not sign this body")
    if FORWARD and "webhook-signature" in headers:
        FORWARD.verify(body, dict(headers))  # checks webhook-timestamp, too: that of the attempt
    elif abs(time.time() - int(sent_at)) > TOLERANCE_SECONDS:
        raise ValueError("sync.so sent it too long ago")


def store(delivery: str, body: bytes) -> bool:
    """Return whether it is new. A worker of yours reads the inbox, at its own pace."""
    with closing(sqlite3.connect(INBOX)) as db, db:
        db.execute("CREATE TABLE IF NOT EXISTS inbox (delivery TEXT PRIMARY KEY, body BLOB)")
        return db.execute("INSERT OR IGNORE INTO inbox VALUES (?, ?)", (delivery, body)).rowcount == 1


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length) if 0 <= length <= MAX_BYTES else b""
            verify(self.headers, body)
        except (ValueError, WebhookVerificationError):
            self.send_error(401)
            return
        # Without Mayfly-Delivery it comes from sync.so itself.
        store(self.headers.get("Mayfly-Delivery") or hashlib.sha256(body).hexdigest(), body)
        self.send_response(204)  # only now: it is stored
        self.end_headers()


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8000"))), Handler).serve_forever()
