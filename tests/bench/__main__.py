"""The benchmark suite: ``make bench``, ``make bench ONLY=intake``, ``make bench FULL=1``; about ten minutes.

It runs whole processes over loopback, in turns: Mayfly, two alternative stacks, and the physical limit. Compare figures
within one run only. On a machine with other load, use the processor times.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench import draining, report, systems
from tests.bench.footprint import footprint
from tests.bench.forwarding import isolation
from tests.bench.growth import growth
from tests.bench.intake import intake
from tests.bench.limit import fsyncs_per_second, sqlite_commits_per_second
from tests.bench.policy import decide_microseconds
from tests.bench.processes import BenchError
from tests.bench.profiling import profile
from tests.bench.report import Report, Row

ROUNDS = 3
SECONDS = 2.0
RESULTS = systems.BUILD / "results.json"


@dataclass(frozen=True, slots=True)
class Order:
    """What a measurement is given: a *folder* of its own, and whether it may take long; *raw* takes all it finds."""

    folder: Path
    is_full: bool
    raw: dict[str, object]


def measure_intake(order: Order) -> list[Row]:
    """Intake of all systems, with the limits of the disk."""
    fsyncs, commits = fsyncs_per_second(order.folder), sqlite_commits_per_second(order.folder)
    rivals = _rivals()
    durable = systems.synced(rivals[-1])  # the faster one, with the promise that Mayfly makes as well
    # At the usual rate: with a lifted budget each webhook would bring an early look in the same seconds.
    usual = replace(systems.mayfly(), extra={"MAYFLY_API_RATE": "300/minute"})
    measured = [systems.limit(), *rivals, durable, usual]
    results = intake(measured, order.folder, rounds=ROUNDS, seconds=SECONDS)
    order.raw["fsyncs_per_second"], order.raw["sqlite_commits_per_second"] = fsyncs, commits
    order.raw["intake"] = results
    return report.disk_rows(fsyncs, commits) + report.intake_rows(results)


def measure_servers(order: Order) -> list[Row]:
    """What the choice of the server is made by: the barest app under each."""
    order.raw["servers"] = results = intake(systems.servers(), order.folder, rounds=ROUNDS, seconds=SECONDS)
    return report.server_rows(results)


def measure_growth(order: Order) -> list[Row]:
    """Intake and lists over a growing ledger."""
    sizes = [0, 100_000, 1_000_000] if order.is_full else [0, 100_000]
    order.raw["growth"] = results = growth(order.folder, sizes, rounds=ROUNDS, seconds=SECONDS)
    return report.growth_rows(results)


def measure_drain(order: Order) -> list[Row]:
    """How fast workers delete what is due."""
    results = {}
    for system in [*_rivals(), systems.mayfly()]:
        latencies = [0.0, 0.05] if order.is_full or system.name == "mayfly" else [0.0]
        folder = order.folder / system.name
        results[system.name] = {
            latency: draining.drain(system, folder / str(latency), count=5000, latency_seconds=latency)
            for latency in latencies
        }
    order.raw["drain"] = results
    order.raw["bare_drain"] = limits = {
        latency: draining.bare_drain(order.folder / f"bare-{latency}", count=5000, latency_seconds=latency)
        for latency in results["mayfly"]
    }
    return report.drain_rows(results, limits)


def measure_lag(order: Order) -> list[Row]:
    """How soon after its due time a record's DELETE is sent."""
    loads = {"burst": (2000, 0.0), "spread": (500, 30.0)}
    results = {
        system.name: {
            load: draining.lag(
                system, order.folder / system.name / load, count=count, over_seconds=seconds, latency_seconds=0.02
            )
            for load, (count, seconds) in loads.items()
        }
        for system in [*(_rivals() if order.is_full else []), systems.mayfly()]
    }
    order.raw["lag"] = results
    return report.lag_rows(results)


def measure_budget(order: Order) -> list[Row]:
    """How much of a budget of calls is used while more is due, and that it is never exceeded."""
    order.raw["budget"] = figures = draining.budget(order.folder, count=1000, seconds=120.0)
    return report.budget_rows(figures)


def measure_forwarding(order: Order) -> list[Row]:
    """Whether a dead target with 5000 webhooks waiting delays another target or the intake."""
    order.raw["forwarding"] = results = isolation(order.folder, rounds=ROUNDS, seconds=60.0)
    return report.forwarding_rows(results)


def measure_footprint(order: Order) -> list[Row]:
    """What the processes take."""
    order.raw["footprint"] = figures = footprint(order.folder)
    return report.footprint_rows(figures)


def measure_policy(order: Order) -> list[Row]:
    """What 500 rules cost one webhook; an intake takes some 290 µs, and 5 % of it are the goal."""
    order.raw["policy"] = figures = decide_microseconds()
    more = max(figures.values()) - figures["no rules"]
    return [Row("decision with 500 rules", "µs of processor", figures, "12 µs more than without", is_met=more <= 12)]


def measure_profile(order: Order) -> list[Row]:
    """Where the time goes; the stacks are kept as files for https://www.speedscope.app."""
    order.raw["profile"] = profile(order.folder)
    return []


MEASUREMENTS: dict[str, Callable[[Order], list[Row]]] = {
    "intake": measure_intake,
    "servers": measure_servers,
    "growth": measure_growth,
    "drain": measure_drain,
    "lag": measure_lag,
    "budget": measure_budget,
    "forwarding": measure_forwarding,
    "footprint": measure_footprint,
    "policy": measure_policy,
    "profile": measure_profile,
}


def _rivals() -> list[systems.System]:
    node = systems.fastify_bullmq()
    return [systems.fastapi_arq()] + ([node] if node else [])


def main() -> None:
    """Measure what is asked for; a measurement that fails is told of, and the others go on."""
    everything = ",".join(MEASUREMENTS)
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--only", default=everything, help=f"with commas between: {everything}")
    parser.add_argument("--full", action="store_true", help="1 000 000 records, and all stacks everywhere")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - MEASUREMENTS.keys():
        parser.error(f"there is no {min(unknown)}; there is {everything}")
    result, failed = Report(), False
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="mayfly-bench-") as folder:
            try:
                result.rows.extend(MEASUREMENTS[name](Order(Path(folder), arguments.full, result.raw)))
            except BenchError as error:
                print(f"{name} failed: {error}", file=sys.stderr)
                failed = True
    result.write(RESULTS)
    sys.exit(failed)


if __name__ == "__main__":
    main()
