"""Growth: whether a ledger full of scheduled records makes anything slower."""

from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import httpx
from sqlalchemy import BigInteger, create_engine, func, insert, literal, select, type_coerce

from service.ledger.schema import events, records
from tests.bench.draining import announce
from tests.bench.intake import medians, offer
from tests.bench.processes import BenchError
from tests.bench.systems import Place, mayfly, place, web
from tests.bench.webhooks import fresh

TOKEN = "bench-0123456789abcdef"
_QUERIES = {
    "list newest": "?limit=50",
    "list by state": "?limit=50&state=scheduled",
    "list by status": "?limit=50&status=COMPLETED",
    "search": "?q={id}",
    "one record": "/{id}",
}
_CALLS = 20
# Beyond the horizon of the queue, as the larger part of a long backlog is.
_DUE_IN = timedelta(days=3)


def preload(where: Place, count: int) -> float:
    """Multiply the one record of a ledger *count* times, due a second apart, and return the bytes that each takes."""
    engine = create_engine(f"sqlite:///{where.ledger}")
    with engine.begin() as connection:
        template = connection.execute(select(func.min(records.c.seq))).scalar_one()
        numbers = select(literal(0).label("number")).cte(recursive=True)
        numbers = numbers.union_all(select(numbers.c.number + 1).where(numbers.c.number < count - 1))
        later = {name: type_coerce(records.c[name], BigInteger) + numbers.c.number * 10**6 for name in _INSTANTS}
        changed = later | {
            "seq": literal(template - count) + numbers.c.number,
            "id": func.lower(func.hex(func.randomblob(16))),
        }
        chosen = [changed.get(column.name, column) for column in records.c]
        statement = select(*chosen).select_from(records).join(numbers, literal(value=True))
        connection.execute(insert(records).from_select([*records.c.keys()], statement.where(records.c.seq == template)))
        moves = [records.c.seq if column.name == "record" else column for column in events.c]
        copies = select(*moves).select_from(events).join(records, records.c.seq < template)
        connection.execute(insert(events).from_select([*events.c.keys()], copies.where(events.c.record == template)))
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return where.ledger.stat().st_size / count


_INSTANTS = ("due_at", "wake_at")


def growth(folder: Path, sizes: list[int], *, rounds: int, seconds: float) -> dict[int, dict[str, Any]]:
    """Measure Mayfly in turns with ledgers of so many scheduled records."""
    results: dict[int, dict[str, Any]] = {size: {"runs": []} for size in sizes}
    system = replace(mayfly(), extra={"MAYFLY_API_TOKEN": TOKEN})
    with ExitStack() as stack:
        webs = {}
        for size in sizes:
            where = stack.enter_context(place(folder / str(size)))
            with web(system, where) as (url, _):
                announce(where, url, {one.id: datetime.now(UTC) + _DUE_IN for one in fresh(1)})
            if size:
                results[size]["ledger_bytes_per_record"] = round(preload(where, size))
            webs[size] = stack.enter_context(web(system, where))
            offer(*webs[size], connections=8, seconds=1.0)
        for _ in range(rounds):
            for size, served in webs.items():
                results[size]["runs"].append(offer(*served, connections=32, seconds=seconds))
        for size, (url, _) in webs.items():
            results[size] |= medians(results[size].pop("runs")) | {"queries_ms": _queries(url)}
    return results


def _queries(url: str) -> dict[str, float]:
    """Return the median time of each query of the operator API."""
    base = f"{url.removesuffix('/webhooks/sync')}/api/records"
    with httpx.Client(trust_env=False, timeout=60, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        first = client.get(base, params={"limit": 1})
        if first.status_code != 200:
            raise BenchError(f"the list of records answered {first.status_code}")
        known = first.json()["items"][0]["id"]
        return {name: _time_ms(client, f"{base}{query.format(id=known)}") for name, query in _QUERIES.items()}


def _time_ms(client: httpx.Client, url: str) -> float:
    times = []
    for _ in range(_CALLS):
        started_at = perf_counter()
        client.get(url).raise_for_status()
        times.append(perf_counter() - started_at)
    return round(median(times) * 1000, 2)
