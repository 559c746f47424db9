"""The results as a table and as JSON, with the goal of each figure that has one."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from tests.bench.intake import CONNECTIONS


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: figures by system; *goal* and *is_met* where Mayfly has one to reach."""

    name: str
    unit: str
    figures: dict[str, float]
    goal: str = ""
    is_met: bool | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a run measured: rows for the table, *raw* with everything."""

    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the JSON file and show the table."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"rows": [asdict(row) for row in self.rows], "raw": self.raw}, indent=1))
        console = Console(width=None if sys.stdout.isatty() else 150)
        console.print(_table(self.rows))
        for process, lines in self.raw.get("profile", {}).items():
            console.print(f"\n{process}: share of samples alone, with what it calls", markup=False)
            console.print("\n".join(lines), markup=False, highlight=False)
        console.print(f"\nwritten: {path}")


def _table(rows: Sequence[Row]) -> Table:
    systems = list(dict.fromkeys(name for row in rows for name in row.figures))
    table = Table(Column("measurement", no_wrap=True), "unit", *systems, "goal", "met")
    for row in rows:
        figures = [f"{row.figures[name]:,.6g}" if name in row.figures else "" for name in systems]
        met = "" if row.is_met is None else "yes" if row.is_met else "no"
        table.add_row(row.name, row.unit, *figures, row.goal, met)
    return table


def disk_rows(fsyncs: float, commits: float) -> list[Row]:
    """What the disk can do."""
    return [
        Row("fsync of 4 KiB", "/s", {"limit": fsyncs}),
        Row("SQLite commit of one row, synchronous=FULL", "/s", {"limit": commits}),
    ]


def intake_rows(results: dict[str, dict[int, dict[str, Any]]]) -> list[Row]:
    """Rates, latencies and costs by connections; the goals are ratios to the other stacks in the same run."""
    goals = {32: {"fastapi+arq": 2.7}, 256: {"fastify+bullmq, synced": 1.1}}
    rows = []
    for number in CONNECTIONS:

        def of(figure: str, number: int = number) -> dict[str, float]:
            return {name: by_number[number][figure] for name, by_number in results.items()}

        rates = of("rate")
        wanted = {name: factor for name, factor in goals.get(number, {}).items() if name in rates}
        goal = ", ".join(f"{factor} x {name}" for name, factor in wanted.items())
        is_met = all(rates["mayfly"] >= factor * rates[name] for name, factor in wanted.items())
        rows.append(Row(f"intake, {number} connections", "/s", rates, goal, is_met if wanted else None))
        rows.append(Row("  p50", "ms", of("p50_ms")))
        p99 = of("p99_ms")
        has_goal = number == 32
        rows.append(Row("  p99", "ms", p99, "< 15" if has_goal else "", p99["mayfly"] < 15 if has_goal else None))
        rows.append(Row("  processor time each, web", "µs", of("cpu_us")))
        of_all = of("cpu_of_all_us")
        most = of_all.get("fastify+bullmq") if number in goals else None
        goal = "" if most is None else "< fastify+bullmq"
        is_cheaper = None if most is None else of_all["mayfly"] < most
        rows.append(Row("  web, worker and Redis", "µs", of_all, goal, is_cheaper))
    return rows


def server_rows(results: dict[str, dict[int, dict[str, Any]]]) -> list[Row]:
    """The bare app's rate under each server."""
    return [
        Row(f"bare app, {name}, {number} connections", "/s", {"limit": figures["rate"]})
        for name, by_number in results.items()
        for number, figures in by_number.items()
    ]


def growth_rows(results: dict[int, dict[str, Any]]) -> list[Row]:
    """Intake, queries and lag by the number of records scheduled before."""
    empty = results[0]
    rows = []
    for size, result in results.items():
        for number, figures in result["intake"].items():
            least = 0.85 * empty["intake"][number]["rate"]
            is_flat, goal = (figures["rate"] >= least, f"≥ {least:,.0f}") if size else (None, "")
            name = f"intake, {size:,} records scheduled, {number} connections"
            rows.append(Row(name, "/s", {"mayfly": figures["rate"]}, goal, is_flat))
            rows.append(Row("  p99", "ms", {"mayfly": figures["p99_ms"]}))
            rows.append(Row("  processor time each", "µs", {"mayfly": figures["cpu_us"]}))
        # The machine's own noise is larger than a tenth of such a small time.
        allowed = 1.1 * empty["lag"]["p50_ms"] + 5
        is_flat, goal = (result["lag"]["p50_ms"] <= allowed, f"≤ {allowed:.0f}") if size else (None, "")
        rows.append(Row("  lag, 300 over 10 s: p50", "ms", {"mayfly": result["lag"]["p50_ms"]}, goal, is_flat))
        rows.append(Row("  lag, 300 over 10 s: p99", "ms", {"mayfly": result["lag"]["p99_ms"]}))
        for name, milliseconds in result["queries_ms"].items():
            allowed = 1.1 * empty["queries_ms"][name] + 0.5
            has_goal = size and name != "stats"  # which counts them all
            is_flat, goal = (milliseconds <= allowed, f"≤ {allowed:.1f}") if has_goal else (None, "")
            rows.append(Row(f"  {name}", "ms", {"mayfly": milliseconds}, goal, is_flat))
        if size:
            rows.append(Row("  ledger", "bytes/record", {"mayfly": result["ledger_bytes_per_record"]}))
    return rows


def drain_rows(results: dict[str, dict[float, dict[str, Any]]], limits: dict[float, dict[str, Any]]) -> list[Row]:
    """Drain rates by the API's latency beside those of the bare calls, what a worker took, what Redis held."""
    rows = []
    for latency in results["mayfly"]:
        rates = {name: by_latency[latency]["rate"] for name, by_latency in results.items() if latency in by_latency}
        least, goal = 0.95 * rates.get("fastapi+arq", 0.0), "0.95 x fastapi+arq"
        if latency:
            least, goal = 350, "≥ 350"
        is_met = rates["mayfly"] >= least if least else None
        rates |= {"limit": limits[latency]["rate"]}
        rows.append(Row(f"drain, API at {latency * 1000:.0f} ms", "/s", rates, goal if least else "", is_met))
        costs = {name: by_latency[latency]["cpu_us"] for name, by_latency in results.items() if latency in by_latency}
        rows.append(Row("  processor time each", "µs", costs))
    after = {name: next(iter(by.values()))["worker_after_load_mb"] for name, by in results.items()}
    rows.append(Row("worker after the load", "MB", after))
    held = {name: next(iter(by.values()))["redis_bytes_per_record"] for name, by in results.items()}
    rows.append(Row("Redis, per scheduled record", "bytes", held, "< 400", held["mayfly"] < 400))
    return rows


def lag_rows(results: dict[str, dict[str, dict[str, Any]]]) -> list[Row]:
    """Lag between due time and DELETE."""
    most = {("spread", "p50_ms"): 100, ("spread", "p99_ms"): 300}
    rows = []
    for load in ("burst", "spread"):
        by_system = {name: by_load[load] for name, by_load in results.items() if load in by_load}
        for figure in ("p50_ms", "p99_ms", "max_ms"):
            values = {name: figures[figure] for name, figures in by_system.items()}
            limit = most.get((load, figure))
            goal, is_met = (f"≤ {limit}", values["mayfly"] <= limit) if limit else ("", None)
            rows.append(Row(f"lag, {load}: {figure.removesuffix('_ms')}", "ms", values, goal, is_met))
    return rows


def budget_rows(figures: dict[str, float]) -> list[Row]:
    """The share of the budget that was used, and the most calls in any of its periods."""
    used, most = figures["used_percent"], figures["most_in_a_period"]
    allowed = figures["allowed_in_a_period"]
    return [
        Row("budget of 300/minute, 1000 due: used", "%", {"mayfly": used}, "≥ 98", used >= 98),
        Row("  most calls in any minute", "calls", {"mayfly": most}, f"≤ {allowed:g}", most <= allowed),
    ]


def forwarding_rows(results: dict[str, dict[str, float]]) -> list[Row]:
    """Receipt to arrival at one target, and the intake, by what another target is like."""
    rows = []
    for figure in results["well"]:
        values = {name: figures[figure] for name, figures in results.items()}
        has_goal = figure.endswith("p99_ms")
        is_met = all(value <= 1.1 * values["well"] for value in values.values()) if has_goal else None
        goal = "10 % more than well" if has_goal else ""
        name = figure.removesuffix("_ms").replace("_", " ")
        rows.append(Row(f"forwarding beside another target: {name}", "ms", values, goal, is_met))
    return rows


def footprint_rows(figures: dict[str, Any]) -> list[Row]:
    """Memory, idle processor time, start, Redis beyond the horizon."""
    goals = {
        "start_to_first_202_ms": 1200.0,
        "up_idle_cpu_percent": 1.0,
        "up_idle_mb": 130.0,
        "redis_keys_beyond_horizon": 0.0,
    }
    return [
        Row(
            name.replace("_", " "),
            "",
            {"mayfly": value},
            f"≤ {goals[name]:g}" if name in goals else "",
            value <= goals[name] if name in goals else None,
        )
        for name, value in figures.items()
    ]
