"""The footprint of an idle Mayfly: memory, processor time, Redis, and the time to start."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import redis

from tests.bench.draining import announce
from tests.bench.intake import offer
from tests.bench.load import exchange
from tests.bench.processes import cpu_seconds, running, wait_for_port
from tests.bench.systems import BIN, NOWHERE, Place, mayfly, place, web, worker
from tests.bench.webhooks import fresh, request_of
from tests.support.ports import free_port

_IDLE_SECONDS = 20.0
_SETTLE_SECONDS = 3.0


def footprint(folder: Path) -> dict[str, Any]:
    """Measure one web and one worker process, idle, then the web process after a load."""
    system = mayfly()
    with place(folder) as where:
        figures: dict[str, Any] = {"start_to_first_202_ms": first_202_ms(where)}
        with web(system, where) as (url, serving), worker(system, where, NOWHERE) as working:
            time.sleep(_SETTLE_SECONDS)
            figures["web_idle_mb"], figures["worker_idle_mb"] = _megabytes(serving), _megabytes(working)
            figures["web_idle_cpu_percent"], figures["worker_idle_cpu_percent"] = _idle([serving, working])
            offer(url, serving, connections=256, seconds=5.0)
            figures["web_after_load_mb"] = _megabytes(serving)
    figures |= _up(folder / "up")
    with place(folder / "far") as where, web(system, where) as (url, _):
        far = datetime.now(UTC) + timedelta(days=30)
        announce(where, url, {one.id: far for one in fresh(1000)})
        with redis.Redis(unix_socket_path=str(where.redis_socket)) as client:
            figures["redis_keys_beyond_horizon"] = client.dbsize()
    return figures


def _up(folder: Path) -> dict[str, float]:
    """Measure ``mayfly up`` with its embedded server, idle."""
    folder.mkdir()
    environment = Place(folder, folder / "none.sock", psutil.Process()).environment(NOWHERE)
    environment = {name: value for name, value in environment.items() if name != "MAYFLY_REDIS_URL"}
    port = free_port()
    command = ["env", f"MAYFLY_PORT={port}", str(BIN / "mayfly"), "up"]
    with running(command, log=folder / "up.log", environment=environment) as process:
        wait_for_port(port, process)
        time.sleep(_SETTLE_SECONDS)
        processes = [process, *process.children(recursive=True)]
        memory = sum(_megabytes(one) for one in processes)
        return {"up_idle_mb": round(memory, 1), "up_idle_cpu_percent": round(sum(_idle(processes)), 2)}


def first_202_ms(where: Place) -> float:
    """Return the time from the start of the process, on an empty data directory, to the first webhook answered 202."""
    port = free_port()
    request = request_of(next(fresh(1)), "/webhooks/sync", f"127.0.0.1:{port}")
    environment = where.environment(NOWHERE)
    started_at = time.perf_counter()
    with running(mayfly().web(port), log=where.folder / "web.log", environment=environment):
        while time.perf_counter() - started_at < 30:
            if exchange(port, request) == "202":
                return round((time.perf_counter() - started_at) * 1000, 1)
            time.sleep(0.01)
    raise TimeoutError("no webhook was answered within 30 s")


def _idle(processes: list[psutil.Process]) -> list[float]:
    """Return the share of a core that each of *processes* takes with nothing to do, in percent."""
    before = [cpu_seconds(process) for process in processes]
    time.sleep(_IDLE_SECONDS)
    after = [cpu_seconds(process) for process in processes]
    return [round((end - start) / _IDLE_SECONDS * 100, 2) for start, end in zip(before, after, strict=True)]


def _megabytes(process: psutil.Process) -> float:
    return round(float(process.memory_info().rss) / 1e6, 1)
