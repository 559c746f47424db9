"""The physical limit of a drain, a process of its own: ``python -m tests.bench.bare_client URL IDS.json``.

The two calls that each deletion needs, by bare httpx at the same concurrency: nothing is claimed, copied, kept or told.
Prints one JSON object.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import httpx
import uvloop

from tests.bench.systems import CONCURRENCY
from tests.bench.webhooks import API_KEY


async def drain(url: str, ids: list[str]) -> float:
    """Make the calls for *ids* and return how many of them were done in a second."""
    waiting = iter(ids)
    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
    headers = {"x-api-key": API_KEY}
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=30, trust_env=False) as client:

        async def delete_some() -> None:
            for id_ in waiting:
                (await client.get(f"/v2/generate/{id_}")).raise_for_status()
                (await client.delete(f"/v2/generations/{id_}")).raise_for_status()

        started_at = time.perf_counter()
        await asyncio.gather(*(delete_some() for _ in range(CONCURRENCY)))
        return len(ids) / (time.perf_counter() - started_at)


if __name__ == "__main__":
    print(json.dumps({"rate": round(uvloop.run(drain(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))), 1)}))
