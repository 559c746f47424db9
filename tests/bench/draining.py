"""The worker: how fast it deletes what is due, and how soon after the due time."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep
from typing import Any

import redis

from tests.bench.api import Api, api
from tests.bench.processes import BenchError, cpu_seconds, python_module
from tests.bench.systems import Place, System, mayfly, place, web, worker, write_json

_LEAD = timedelta(seconds=6)  # for the webhooks to be taken before the first is due
_ENQUEUED_SECONDS = 0.5  # what is enqueued after the answers is in Redis by then


def announce(where: Place, url: str, due: dict[str, datetime]) -> None:
    """Send the webhook of each generation, with its due time as an override."""
    wanted = [
        (id_, f"https://hooks.example.com/webhooks/sync?expires={at:%Y-%m-%dT%H:%M:%S.%f}Z") for id_, at in due.items()
    ]
    path = write_json(where.folder / "wanted.json", wanted)
    result = python_module("tests.bench.load", url, "--wanted", str(path), "--seconds", "60", "--connections", "8")
    if result["statuses"] != {"202": len(due)}:
        raise BenchError(f"answers other than {len(due)} times 202: {result['statuses']}")


def redis_bytes(where: Place) -> int:
    """Return what Redis holds in memory once all that was answered is enqueued."""
    sleep(_ENQUEUED_SECONDS)
    with redis.Redis(unix_socket_path=str(where.redis_socket)) as client:
        used: int = client.info("memory")["used_memory"]
        return used


def drain(system: System, folder: Path, *, count: int, latency_seconds: float) -> dict[str, Any]:
    """Let *count* generations be due before the worker starts, and see how fast they go."""
    with place(folder) as where, api(folder) as stand_in:
        ids = stand_in.add(count)
        with web(system, where, stand_in.url) as (url, _):
            empty = redis_bytes(where)
            announce(where, url, dict.fromkeys(ids, datetime.now(UTC) + timedelta(seconds=1)))
            used = redis_bytes(where)
        stand_in.set_latency(latency_seconds)
        with worker(system, where, stand_in.url) as process:
            deletes = stand_in.wait_for_deletes(ids, seconds=120)
            used_seconds, memory = cpu_seconds(process), process.memory_info().rss
    first, last = min(deletes.values()), max(deletes.values())
    return {
        "rate": round((count - 1) / (last - first).total_seconds(), 1),
        "cpu_us": round(used_seconds / count * 1e6),
        "worker_after_load_mb": round(memory / 1e6, 1),
        "redis_bytes_per_record": round((used - empty) / count),
    }


def budget(folder: Path, *, count: int, seconds: float) -> dict[str, float]:
    """Let *count* generations be due under a budget of 300 calls a minute, two for each, and watch so many seconds."""
    system = replace(mayfly(), extra={"MAYFLY_API_RATE": "300/minute"})
    with place(folder) as where, api(folder) as stand_in:
        ids = stand_in.add(count)
        with web(system, where, stand_in.url) as (url, _):
            announce(where, url, dict.fromkeys(ids, datetime.now(UTC) + timedelta(seconds=1)))
        with worker(system, where, stand_in.url):
            stand_in.wait_for_first_delete(seconds=30)
            sleep(seconds + 2)
            times = sorted(stand_in.deletes().values())
    minute, allowed = timedelta(minutes=1), 300
    in_time = sum(at < times[0] + timedelta(seconds=seconds) for at in times)
    return {
        "used_percent": round(100 * 2 * in_time / (allowed * seconds / 60), 1),
        "most_in_a_period": 2 * max(sum(start <= at < start + minute for at in times) for start in times),
        # A DELETE comes a moment after its attempt was granted: one more can fall into the minute.
        "allowed_in_a_period": allowed + 2,
    }


def bare_drain(folder: Path, *, count: int, latency_seconds: float) -> dict[str, Any]:
    """Make the same calls with nothing around them."""
    folder.mkdir(parents=True)
    with api(folder) as stand_in:
        ids = stand_in.add(count)
        stand_in.set_latency(latency_seconds)
        path = write_json(folder / "ids.json", ids)
        result: dict[str, Any] = python_module("tests.bench.bare_client", stand_in.url, str(path))
    return result


def lag(system: System, folder: Path, *, count: int, over_seconds: float, latency_seconds: float) -> dict[str, Any]:
    """Let *count* generations come due over so many seconds, 0 for all at once, with the worker waiting."""
    with place(folder) as where, api(folder) as stand_in:
        stand_in.set_latency(latency_seconds)
        with web(system, where, stand_in.url) as (url, _), worker(system, where, stand_in.url):
            return lags(where, url, stand_in, count=count, over_seconds=over_seconds)


def lags(where: Place, url: str, stand_in: Api, *, count: int, over_seconds: float) -> dict[str, Any]:
    """Announce *count* generations due over so many seconds to a running system, and see when each is deleted."""
    ids = stand_in.add(count)
    start = datetime.now(UTC) + _LEAD
    due = {id_: start + timedelta(seconds=over_seconds * at / count) for at, id_ in enumerate(ids)}
    announce(where, url, due)
    deletes = stand_in.wait_for_deletes(ids, seconds=over_seconds + 120)
    late = sorted((deletes[id_] - due[id_]).total_seconds() for id_ in ids)
    return {
        "p50_ms": round(late[len(late) // 2] * 1000, 1),
        "p99_ms": round(late[int(len(late) * 0.99)] * 1000, 1),
        "max_ms": round(late[-1] * 1000, 1),
        "early": sum(one < 0 for one in late),
    }
