"""Invariant 7: whatever hangs, each web side reports its health correctly within a second."""

import asyncio
import time
from typing import Any

from tests.faults.databases import Postgres
from tests.faults.system import System
from tests.support.waiting import eventually

FROZEN_SECONDS = 4.0
# A second, and a little for the way there and back on a machine that others use.
LIMIT_SECONDS = 1.3


async def test_with_database_and_redis_frozen_health_answers_correctly_within_a_second(
    mortal_system: System, mortal_postgres: Postgres
):
    system = mortal_system
    worker, api = await asyncio.gather(system.worker(), system.api())
    await system.until(await system.accepted(system.generation()), "deleted")
    assert await health(system) == (200, "ok", "ok")
    mortal_postgres.freeze()
    system.redis.freeze()
    begun, seconds = time.monotonic(), []
    while time.monotonic() - begun < FROZEN_SECONDS:
        # All at once, as a load balancer, an orchestrator and a scraper ask: none may wait for another.
        asked = time.monotonic()
        said, live, up = await asyncio.gather(health(system), is_live(system), system.metric("mayfly_ledger_up"))
        seconds.append(time.monotonic() - asked)
        assert (said, live, up) == ((503, "failing", "failing"), True, 0)
        await asyncio.sleep(0.5)
    mortal_postgres.thaw()
    system.redis.thaw()
    assert max(seconds) < LIMIT_SECONDS

    async def is_well() -> bool:
        return await health(system) == (200, "ok", "ok")

    await eventually(is_well, seconds=5)
    await system.until(await system.accepted(system.generation()), "deleted")
    assert (worker.exit_code, api.exit_code) == (None, None)
    assert not (await system.judged()).all


async def health(system: System) -> tuple[int, Any, Any]:
    """Ask whether it is ready; return the status, and what is said of ledger and Redis."""
    answer = await system.client.get(f"{system.url}/health/ready")
    parts = answer.json()["parts"]
    return answer.status_code, parts["ledger"]["status"], parts["redis"]["status"]


async def is_live(system: System) -> bool:
    """Ask whether it is alive."""
    return (await system.client.get(f"{system.url}/health/live")).status_code == 200
