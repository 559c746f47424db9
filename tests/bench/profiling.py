"""Where the time goes: py-spy on the web process under load and on the worker while it drains."""

import json
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from tests.bench.api import api
from tests.bench.draining import announce
from tests.bench.intake import offer
from tests.bench.processes import BenchError, cpu_seconds
from tests.bench.systems import BUILD, mayfly, place, py_spy, web, worker

_SECONDS = 6
_ROWS = 8000
_TOP = 20


def profile(folder: Path) -> dict[str, list[str]]:
    """Profile both processes; the stacks are kept beside the results, the top functions are returned."""
    return {"web": _profile_web(folder / "web"), "worker": _profile_worker(folder / "worker")}


def _profile_web(folder: Path) -> list[str]:
    with place(folder) as where, web(mayfly(), where) as (url, process), ThreadPoolExecutor(1) as threads:
        offer(url, process, connections=8, seconds=1.0)
        load = threads.submit(offer, url, process, connections=32, seconds=_SECONDS + 2.0)
        _wait_until_busy(process)  # the requests are prepared first
        top = _record(process, "web")
        load.result()
        return top


def _profile_worker(folder: Path) -> list[str]:
    system = mayfly()
    with place(folder) as where, api(folder) as stand_in:
        ids = stand_in.add(_ROWS)
        with web(system, where, stand_in.url) as (url, _):
            announce(where, url, dict.fromkeys(ids, datetime.now(UTC) + timedelta(seconds=1)))
        with worker(system, where, stand_in.url) as process:
            stand_in.wait_for_first_delete(seconds=30)
            return _record(process, "worker")


def _wait_until_busy(process: psutil.Process) -> None:
    """Return once *process* takes more than half of a core."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        before = cpu_seconds(process)
        time.sleep(0.2)
        if cpu_seconds(process) - before > 0.1:
            return
    raise BenchError("the load never came")


def _record(process: psutil.Process, name: str) -> list[str]:
    """Sample *process* and return its top functions, by the samples in which each held the interpreter's lock."""
    path = BUILD / f"{name}.speedscope.json"
    options = ["--pid", str(process.pid), "--duration", str(_SECONDS), "--rate", "250", "--gil", "--nonblocking"]
    done = subprocess.run(
        [py_spy(), "record", *options, "--format", "speedscope", "--output", str(path)],
        capture_output=True,
        text=True,
        timeout=_SECONDS + 60,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"py-spy failed:\n{done.stderr[-1000:]}")
    return _top(json.loads(path.read_text()))


def _top(recorded: dict[str, Any]) -> list[str]:
    """Return lines with each function's share of the samples, alone and with what it called."""
    frames = [f"{frame['name']} ({_short(frame['file'])})" for frame in recorded["shared"]["frames"]]
    alone: Counter[str] = Counter()
    with_called: Counter[str] = Counter()
    for thread in recorded["profiles"]:
        for stack, weight in zip(thread["samples"], thread["weights"], strict=True):
            if not stack:
                continue
            alone[frames[stack[-1]]] += weight
            with_called.update(dict.fromkeys({frames[index] for index in stack}, weight))
    total = alone.total() or 1.0
    ranked = sorted(with_called, key=lambda name: (alone[name], with_called[name]), reverse=True)[:_TOP]
    ranked += [name for name, _ in with_called.most_common(3 * _TOP) if name not in ranked]
    return [f"{alone[name] / total:6.1%} {with_called[name] / total:6.1%}  {name}" for name in ranked]


def _short(file: str | None) -> str:
    return "/".join((file or "?").split("/")[-2:])
