"""Intake: how many webhooks a second a web process answers 202, how fast, and at what cost."""

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tests.bench.processes import BenchError, cpu_seconds, python_module
from tests.bench.systems import NOWHERE, System, place, web, worker

CONNECTIONS = (1, 32, 256)
_MOST_A_SECOND = 30_000  # requests are prepared before the clock starts, so their number is bounded
_MEDIANS = ("rate", "p50_ms", "p99_ms", "cpu_us", "cpu_of_all_us")

Figures = dict[str, Any]


def offer(url: str, process: psutil.Process, *beside: psutil.Process, connections: int, seconds: float) -> Figures:
    """Offer webhooks from another process for so many seconds; any answer but 202 ends the measurement.

    The processor time of each webhook is that of the web *process*, and that of all with those *beside* it.
    """
    options = {"connections": connections, "seconds": seconds, "count": int(seconds * _MOST_A_SECOND)}
    before = [cpu_seconds(one) for one in (process, *beside)]
    result: Figures = python_module("tests.bench.load", url, *(f"--{name}={value}" for name, value in options.items()))
    if result["errors"] or not result["answers"]:
        raise BenchError(f"answers other than 202: {result['statuses']}")
    # Where the machine is shared, the cost tells more than the rate.
    answers = sum(result["statuses"].values())
    spent = [cpu_seconds(one) - start for one, start in zip((process, *beside), before, strict=True)]
    result["cpu_us"] = round(spent[0] / answers * 1e6, 1)
    result["cpu_of_all_us"] = round(sum(spent) / answers * 1e6, 1)
    return result


def medians(results: list[Figures]) -> Figures:
    """Return the median of each figure over *results*."""
    return {name: median(result[name] for result in results) for name in _MEDIANS}


def intake(systems: list[System], folder: Path, *, rounds: int, seconds: float) -> dict[str, dict[int, Figures]]:
    """Measure *systems* in turns, so that what else the machine does meets them alike; medians by connections.

    Each is there as a whole, its worker and its Redis as well, which share the machine with the web process.
    """
    results: dict[str, dict[int, list[Figures]]] = {system.name: defaultdict(list) for system in systems}
    with ExitStack() as stack:
        wholes = {}
        for system in systems:
            where = stack.enter_context(place(folder / system.name, system.redis))
            url, process = stack.enter_context(web(system, where))
            working = [stack.enter_context(worker(system, where, NOWHERE))] if system.worker else []
            wholes[system.name] = (url, process, *working, where.redis)
            offer(*wholes[system.name], connections=8, seconds=1.0)  # what is only slow the first time
        for _ in range(rounds):
            for connections in CONNECTIONS:
                for name, whole in wholes.items():
                    results[name][connections].append(offer(*whole, connections=connections, seconds=seconds))
    return {
        name: {connections: medians(runs) for connections, runs in by_number.items()}
        for name, by_number in results.items()
    }
