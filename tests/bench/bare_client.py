"""The physical limit of a drain, a process of its own: ``python -m tests.bench.bare_client URL IDS.json``.

The two calls that each deletion needs, by bare httpx at the same concurrency: no claim, no copy, no record, no log.
Prints one JSON object.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import uvloop

from tests.bench.systems import CONCURRENCY
from tests.bench.webhooks import API_KEY


async def drain(url: str, ids: list[str]) -> float:
    """Make the calls for *ids* and return how many of them were done in a second.

    Each of those at work has a client of its own: one pool of 50 connections looks at all of them at every call, and
    made 90 deletions a second where these make 450.
    """
    waiting = iter(ids)
    options: dict[str, Any] = {"headers": {"x-api-key": API_KEY}, "timeout": 30, "trust_env": False}
    clients = [httpx.AsyncClient(base_url=url, **options) for _ in range(CONCURRENCY)]

    async def delete_some(client: httpx.AsyncClient) -> None:
        async with client:
            for id_ in waiting:
                (await client.get(f"/v2/generate/{id_}")).raise_for_status()
                (await client.delete(f"/v2/generations/{id_}")).raise_for_status()

    started_at = time.perf_counter()
    await asyncio.gather(*map(delete_some, clients))
    return len(ids) / (time.perf_counter() - started_at)


if __name__ == "__main__":
    print(json.dumps({"rate": round(uvloop.run(drain(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))), 1)}))
