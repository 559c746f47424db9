"""An alternative stack, to compare with: FastAPI, arq and httpx with the same contract and no ledger.

Runs in the suite's own environment (requirements.lock): ``uvicorn tests.bench.stacks.fastapi_arq:app`` and
``arq tests.bench.stacks.fastapi_arq.WorkerSettings``, both as their documentation shows them.
"""

import hashlib
import hmac
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import httpx
from arq import create_pool
from arq.connections import RedisSettings
from fastapi import FastAPI, HTTPException, Request  # type: ignore[import-not-found, unused-ignore]

SECRET = os.environ["SYNC_WEBHOOK_SECRET"].encode()
REDIS = RedisSettings(unix_socket_path=os.environ["BENCH_REDIS_SOCKET"])
TOLERANCE_SECONDS = 300


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep one connection pool to Redis."""
    app.state.redis = await create_pool(REDIS)
    yield
    await app.state.redis.aclose()


app = FastAPI(lifespan=lifespan)


async def receive(request: Request) -> dict[str, str]:
    """Check the signature, enqueue the delayed job, answer 202."""
    body = await request.body()
    at, _, given = request.headers.get("sync-signature", "").partition(",v1=")
    at = at.removeprefix("t=")
    expected = hmac.new(SECRET, at.encode() + b"." + body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected, given):
        raise HTTPException(status_code=401)
    now = datetime.now(UTC)
    if abs(now.timestamp() - int(at)) > TOLERANCE_SECONDS:
        raise HTTPException(status_code=401)
    generation = json.loads(body)
    expires = parse_qs(urlsplit(generation["webhookUrl"]).query).get("expires")
    due_at = datetime.fromisoformat(expires[0]) if expires else now + timedelta(hours=24)
    redis = request.app.state.redis
    await redis.enqueue_job("delete_generation", generation, _job_id=generation["id"], _defer_until=due_at)
    return {"id": generation["id"], "state": "scheduled", "dueAt": due_at.isoformat()}


app.post("/webhooks/sync", status_code=202)(receive)


async def startup(ctx: dict[str, Any]) -> None:
    """Open the client that all jobs share."""
    ctx["client"] = httpx.AsyncClient(
        base_url=os.environ["SYNC_BASE_URL"], headers={"x-api-key": os.environ["SYNC_API_KEY"]}
    )


async def shutdown(ctx: dict[str, Any]) -> None:
    """Close the client."""
    await ctx["client"].aclose()


async def delete_generation(ctx: dict[str, Any], generation: dict[str, Any]) -> None:
    """Delete one generation."""
    response = await ctx["client"].delete(f"/v2/generations/{generation['id']}")
    response.raise_for_status()


class WorkerSettings:
    """How arq runs the job; what is not named here is arq's default."""

    functions: ClassVar = [delete_generation]
    redis_settings = REDIS
    on_startup = startup
    on_shutdown = shutdown
    max_jobs = int(os.environ.get("BENCH_CONCURRENCY", "10"))
