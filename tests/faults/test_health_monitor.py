"""The health monitor blames a web side for its own delays alone."""

import os
import time
from pathlib import Path

import httpx

from tests.faults.health_monitor import HealthMonitor
from tests.faults.processes import Process, Reach
from tests.support.app import Answer, AppProcess

_BODY = '{"parts": {"redis": {"status": "ok"}, "ledger": {"status": "ok"}}}'


async def test_a_stall_of_the_monitors_own_loop_is_no_late_answer(tmp_path: Path):
    redis = Reach()
    redis.note(is_there=True)
    async with AppProcess(tmp_path) as app, httpx.AsyncClient(trust_env=False) as client:
        app.script(Answer(body=_BODY, delay=0.25), is_for_ever=True)
        async with HealthMonitor(client, redis, None).running() as monitor:
            monitor.follow(Process(os.getpid(), tmp_path / "none.log"), app.port)
            for number in range(1, 4):
                await app.wait_for(number)
                time.sleep(1.8)  # noqa: ASYNC251 - this is the stall

            assert monitor.asked >= 2
            assert monitor.breaches == []


async def test_a_late_answer_is_found(tmp_path: Path):
    redis = Reach()
    redis.note(is_there=True)
    async with AppProcess(tmp_path) as app, httpx.AsyncClient(trust_env=False) as client:
        app.script(Answer(body=_BODY, delay=1.8), is_for_ever=True)
        async with HealthMonitor(client, redis, None).running() as monitor:
            monitor.follow(Process(os.getpid(), tmp_path / "none.log"), app.port)
            await app.wait_for(2)

            assert "answered after 1.8" in monitor.breaches[0]
