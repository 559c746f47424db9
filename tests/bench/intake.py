"""Intake: how many webhooks a second a web process answers 202, how fast, and at what cost."""

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tests.bench.processes import BenchError, cpu_seconds, python_module
from tests.bench.systems import System, place, web

CONNECTIONS = (1, 32, 256)
_MOST_A_SECOND = 20_000  # requests are prepared before the clock starts, so their number is bounded
_MEDIANS = ("rate", "p50_ms", "p99_ms", "cpu_us")

Figures = dict[str, Any]


def offer(url: str, process: psutil.Process, *, connections: int, seconds: float) -> Figures:
    """Offer webhooks from another process for so many seconds; any answer but 202 ends the measurement."""
    options = {"connections": connections, "seconds": seconds, "count": int(seconds * _MOST_A_SECOND)}
    before = cpu_seconds(process)
    result: Figures = python_module("tests.bench.load", url, *(f"--{name}={value}" for name, value in options.items()))
    if result["errors"] or not result["answers"]:
        raise BenchError(f"answers other than 202: {result['statuses']}")
    # Where the machine is shared, the cost tells more than the rate.
    result["cpu_us"] = round((cpu_seconds(process) - before) / sum(result["statuses"].values()) * 1e6, 1)
    return result


def medians(results: list[Figures]) -> Figures:
    """Return the median of each figure over *results*."""
    return {name: median(result[name] for result in results) for name in _MEDIANS}


def intake(systems: list[System], folder: Path, *, rounds: int, seconds: float) -> dict[str, dict[int, Figures]]:
    """Measure *systems* in turns, so that what else the machine does meets them alike; medians by connections."""
    results: dict[str, dict[int, list[Figures]]] = {system.name: defaultdict(list) for system in systems}
    with ExitStack() as stack:
        webs = {}
        for system in systems:
            where = stack.enter_context(place(folder / system.name))
            webs[system.name] = stack.enter_context(web(system, where))
            offer(*webs[system.name], connections=8, seconds=1.0)  # what is only slow the first time
        for _ in range(rounds):
            for connections in CONNECTIONS:
                for name, served in webs.items():
                    results[name][connections].append(offer(*served, connections=connections, seconds=seconds))
    return {
        name: {connections: medians(runs) for connections, runs in by_number.items()}
        for name, by_number in results.items()
    }
