"""Growth: whether a ledger full of scheduled records slows down the web side or the worker."""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter

import httpx
from sqlalchemy import BigInteger, create_engine, func, insert, literal, select, type_coerce

from service.ledger.schema import events, records
from tests.bench.api import api
from tests.bench.draining import announce, lags
from tests.bench.intake import CONNECTIONS, Figures, medians, offer
from tests.bench.processes import BenchError
from tests.bench.systems import Place, System, mayfly, place, web, worker
from tests.bench.webhooks import fresh

TOKEN = "bench-0123456789abcdef"
_QUERIES = {
    "list newest": "/records?limit=50",
    "list by state": "/records?limit=50&state=scheduled",
    "list by status": "/records?limit=50&status=COMPLETED",
    "list by rarer status": "/records?limit=50&status=FAILED",
    "list by project": "/records?limit=50&projectId=none-of-these",
    "list by time": "/records?limit=50&from={yesterday}&to={tomorrow}",
    "search for an id": "/records?q={id}",
    "search for a part": "/records?q={part}",
    "one record": "/records/{id}",
    "stats": "/stats",
}
_CALLS = 20
# Beyond the horizon of the queue, as the larger part of a long backlog is.
_DUE_IN = timedelta(days=3)


def preload(where: Place, count: int) -> float:
    """Multiply the one record of a ledger *count* times, a second apart, and return the bytes that each takes.

    The last one was received when the first record was, and the first one is due when it is.
    """
    engine = create_engine(f"sqlite:///{where.ledger}")
    with engine.begin() as connection:
        template = connection.execute(select(func.min(records.c.seq))).scalar_one()
        numbers = select(literal(0).label("number")).cte(recursive=True)
        numbers = numbers.union_all(select(numbers.c.number + 1).where(numbers.c.number < count - 1))
        starts = {"received_at": -count, "due_at": 0, "wake_at": 0}
        moved = {
            name: type_coerce(records.c[name], BigInteger) + (numbers.c.number + start) * 10**6
            for name, start in starts.items()
        }
        changed = moved | {
            "seq": literal(template + 1) + numbers.c.number,
            "id": func.lower(func.hex(func.randomblob(16))),
        }
        chosen = [changed.get(column.name, column) for column in records.c]
        statement = select(*chosen).select_from(records).join(numbers, literal(value=True))
        connection.execute(insert(records).from_select([*records.c.keys()], statement.where(records.c.seq == template)))
        moves = [records.c.seq if column.name == "record" else column for column in events.c]
        copies = select(*moves).select_from(events).join(records, records.c.seq > template)
        connection.execute(insert(events).from_select([*events.c.keys()], copies.where(events.c.record == template)))
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return where.ledger.stat().st_size / count


def growth(folder: Path, sizes: list[int], *, rounds: int, seconds: float) -> dict[int, Figures]:
    """Measure Mayfly in turns with ledgers of so many scheduled records."""
    results: dict[int, Figures] = {size: {} for size in sizes}
    system = replace(mayfly(), extra={"MAYFLY_API_TOKEN": TOKEN})
    with ExitStack() as stack:
        webs = {}
        for size in sizes:
            where = stack.enter_context(place(folder / str(size)))
            with web(system, where) as (url, _):
                announce(where, url, {one.id: datetime.now(UTC) + _DUE_IN for one in fresh(1)})
            if size:
                results[size]["ledger_bytes_per_record"] = round(preload(where, size))
            webs[size] = where, stack.enter_context(web(system, where))
            offer(*webs[size][1], connections=8, seconds=1.0)
        runs: dict[tuple[int, int], list[Figures]] = defaultdict(list)
        for _ in range(rounds):
            for connections in CONNECTIONS:
                for size, (_, served) in webs.items():
                    runs[size, connections].append(offer(*served, connections=connections, seconds=seconds))
        for size, (where, (url, _)) in webs.items():
            results[size]["intake"] = {number: medians(runs[size, number]) for number in CONNECTIONS}
            results[size]["queries_ms"] = _queries(url)
            results[size]["lag"] = _lag(system, where, url)
    return results


def _lag(system: System, where: Place, url: str) -> Figures:
    """Return the lag of a worker with a light load beside the full ledger."""
    with api(where.folder) as stand_in, worker(system, where, stand_in.url):
        stand_in.set_latency(0.02)
        return lags(where, url, stand_in, count=300, over_seconds=10.0)


def _queries(url: str) -> dict[str, float]:
    """Return the median time of each query of the operator API."""
    base = f"{url.removesuffix('/webhooks/sync')}/api"
    with httpx.Client(trust_env=False, timeout=60, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        first = client.get(f"{base}/records", params={"limit": 1})
        if first.status_code != 200:
            raise BenchError(f"the list of records answered {first.status_code}")
        known, now = first.json()["items"][0]["id"], datetime.now(UTC)
        days = {"yesterday": now - timedelta(days=1), "tomorrow": now + timedelta(days=1)}
        given = {"id": known, "part": known[3:9]} | {name: f"{day:%Y-%m-%dT%H:%M:%SZ}" for name, day in days.items()}
        return {name: _time_ms(client, base + query.format(**given)) for name, query in _QUERIES.items()}


def _time_ms(client: httpx.Client, url: str) -> float:
    times = []
    for _ in range(_CALLS):
        started_at = perf_counter()
        client.get(url).raise_for_status()
        times.append(perf_counter() - started_at)
    return round(median(times) * 1000, 2)
