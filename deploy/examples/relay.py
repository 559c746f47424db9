"""Takes the webhooks of sync.so at the app's own webhookUrl, and relays each to Mayfly as it came.

pip install httpx && python relay.py
"""

import hmac
import json
import os
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx

SYNC_SECRET = os.environ["SYNC_WEBHOOK_SECRET"].encode()  # the whole value, whsec_ included
MAYFLY = os.environ["MAYFLY_PUBLIC_URL"] + "/webhooks/sync"
RELAY_SECONDS = 270  # Mayfly takes a webhook for five minutes after sync.so sent it


def verify(signature: str, body: bytes) -> int:
    """Return when sync.so sent the body, in seconds since 1970.

    Raises: ValueError if sync.so did not sign it, or sent it over five minutes ago.
    """
    found = re.match(r"t=(\d+),v1=([0-9a-f]{64})", signature, re.ASCII)
    if not found:
        raise ValueError("Sync-Signature is missing or malformed")
    sent_at, digest = found.groups()
    if not hmac.compare_digest(digest, hmac.new(SYNC_SECRET, f"{sent_at}.".encode() + body, "sha256").hexdigest()):
        raise ValueError("sync.so did not sign this body")
    if abs(time.time() - int(sent_at)) > 300:
        raise ValueError("sync.so sent it too long ago")
    return int(sent_at)


def relay(body: bytes, headers: dict[str, str], sent_at: int) -> None:
    """Send the bytes and headers of sync.so until Mayfly has them; a body parsed and written anew would be refused."""
    pause = 1.0
    while True:
        try:
            status = httpx.post(MAYFLY, content=body, headers=headers, timeout=10).status_code
        except httpx.TransportError:
            status = 503
        if status == 202:
            return
        is_refused = status < 500 and status not in (408, 429)
        if is_refused or time.time() + pause > sent_at + RELAY_SECONDS:
            break
        time.sleep(pause)
        pause = min(2 * pause, 30)
    with open("not-relayed.txt", "a") as file:  # later: mayfly records add - < not-relayed.txt
        file.write(f"{json.loads(body)['id']}\n")


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length) if 0 <= length <= 2**20 else b""
            sent_at = verify(self.headers.get("Sync-Signature", ""), body)
        except ValueError:
            self.send_error(401)
            return
        # Here your app does what it always did with the webhook.
        kept = {name: self.headers[name] for name in ("Content-Type", "Sync-Signature") if name in self.headers}
        Thread(target=relay, args=(body, kept, sent_at)).start()
        self.send_response(204)
        self.end_headers()


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8000"))), Handler).serve_forever()
