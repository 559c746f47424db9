"""The physical limit to compare with: a minimal server, and the speed of the disk."""

import hmac
import os
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from tests.bench.webhooks import SECRET

_SECONDS = 1.0
_BLOCK = b"x" * 4096
_KEY = SECRET.encode()

Message = MutableMapping[str, Any]


async def app(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """Read the body, check the HMAC, answer 202; nothing is stored. Run it under uvicorn without its lifespan."""
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    header = next(value for name, value in scope["headers"] if name == b"sync-signature")
    at, _, given = header.partition(b",v1=")
    is_theirs = hmac.compare_digest(hmac.digest(_KEY, at[2:] + b"." + body, "sha256").hex().encode(), given)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 202 if is_theirs else 401, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


def fsyncs_per_second(folder: Path) -> float:
    """Append 4 KiB and fsync, again and again: no ledger commits more often than this without sharing."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.write(file.fileno(), _BLOCK)

        def append() -> None:
            os.write(file.fileno(), _BLOCK)
            os.fsync(file.fileno())

        return _per_second(append)


def sqlite_commits_per_second(folder: Path) -> float:
    """Insert one row of 1 KB and commit, in WAL mode at synchronous=FULL: what a webhook per commit would reach."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        connection = sqlite3.connect(f"{name}/probe.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE rows (body TEXT)")
        try:
            return _per_second(lambda: connection.execute("INSERT INTO rows VALUES (?)", ("x" * 1000,)))
        finally:
            connection.close()


def _per_second(step: Callable[[], object]) -> float:
    count, started_at = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started_at) < _SECONDS:
        step()
        count += 1
    return round(count / elapsed, 1)
