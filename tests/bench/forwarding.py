"""Forwarding: whether a target in trouble, with thousands of webhooks waiting, slows another target or the intake.

Four systems at the same time, so that all have the same share of a busy machine: beside the target that is measured
they have no other, one that is well and has taken as many, one that refuses connections, or one that accepts them and
never answers. The figures are meant as ratios within a run.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psutil
from sqlalchemy import create_engine, insert

from service.ledger.delivery_schema import deliveries
from tests.bench.api import api
from tests.bench.processes import BenchError, cpu_seconds
from tests.bench.systems import Place, mayfly, place, web, worker
from tests.bench.webhooks import Wanted, body_of, request_of
from tests.support.app import Answer, App, AppProcess
from tests.support.ports import free_port

WAITING = 5000
OTHERS = ("absent", "well", "refuses", "never answers")
# Twice what one organisation makes at its most.
_A_SECOND = 4
_CONNECTIONS = 8
# Until attempts are under way. The circuit of what never answers opens after half a minute: both states are measured.
_SETTLE_SECONDS = 3.0
_TABLE = """
[[forward]]
id = "{id}"
url = "{url}/hooks"
"""


@dataclass(frozen=True, slots=True)
class Sent:
    """One webhook: its id, when it was sent, and after which time it was answered, in seconds."""

    id: str
    at: float
    answered_after: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A running system, its measured target, and what is sent to it."""

    well: App
    url: str
    processes: tuple[psutil.Process, ...]
    wanted: list[Wanted]


def isolation(folder: Path, *, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return the figures by the other target's trouble, each the median of *rounds* of so many *seconds*."""
    found = [asyncio.run(_measure(folder / str(number), seconds)) for number in range(rounds)]
    return {
        trouble: {name: round(median(one[trouble][name] for one in found), 1) for name in figures}
        for trouble, figures in found[0].items()
    }


async def _measure(folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    async with contextlib.AsyncExitStack() as stack:
        systems = {trouble: await _start(stack, folder, trouble, int(seconds * _A_SECOND)) for trouble in OTHERS}
        await asyncio.sleep(_SETTLE_SECONDS)
        before = {trouble: _spent(*one.processes) for trouble, one in systems.items()}
        sending = [_send(one.url, one.wanted, number / len(systems)) for number, one in enumerate(systems.values())]
        sent = dict(zip(systems, await asyncio.gather(*sending), strict=True))
        for one in systems.values():
            await one.well.wait_for(len(one.wanted), seconds=60)
        spent = {trouble: _spent(*one.processes) - before[trouble] for trouble, one in systems.items()}
    figures = {}
    for trouble, one in systems.items():
        arrived = {request.generation: request.at for request in one.well.requests}
        figures[trouble] = {
            **_percentiles("arrival", [arrived[webhook.id] - webhook.at for webhook in sent[trouble]]),
            **_percentiles("intake", [webhook.answered_after for webhook in sent[trouble]]),
            "cpu_ms": round(spent[trouble] / len(one.wanted) * 1000, 1),
        }
    return figures


async def _start(stack: contextlib.AsyncExitStack, folder: Path, trouble: str, count: int) -> Measured:
    folder = folder / trouble.replace(" ", "-")
    where = stack.enter_context(place(folder))
    stand_in = stack.enter_context(api(folder))
    well = await stack.enter_async_context(AppProcess(folder))
    other = await stack.enter_async_context(_other(folder, trouble))
    config = where.folder / "forward.toml"
    tables = [("measured", well.url), *([] if other is None else [("other", other)])]
    config.write_text("".join(_TABLE.format(id=name, url=target) for name, target in tables))
    system = replace(mayfly(), extra={"MAYFLY_CONFIG": str(config), "MAYFLY_API_RATE": "300/minute"})
    url, web_process = stack.enter_context(web(system, where, stand_in.url))
    if trouble != "absent":
        _preload(where, is_waiting=trouble != "well")
    worker_process = stack.enter_context(worker(system, where, stand_in.url))
    wanted = [Wanted(one) for one in stand_in.add(count)]
    return Measured(well, url, (web_process, worker_process), wanted)


@contextlib.asynccontextmanager
async def _other(folder: Path, trouble: str) -> AsyncIterator[str | None]:
    """Run the other target, and yield its URL; None for none."""
    if trouble == "absent":
        yield None
    elif trouble == "refuses":
        yield f"http://127.0.0.1:{free_port()}"
    elif trouble == "well":
        (folder / "other").mkdir()
        async with AppProcess(folder / "other") as app:
            yield app.url
    else:
        async with App() as app:
            app.default = Answer(end="never")
            yield app.url


def _preload(where: Place, *, is_waiting: bool) -> None:
    """Store WAITING webhooks of the other target, each of a generation of its own: all of them due, or delivered."""
    now = datetime.now(UTC)
    rows = [_row(Wanted(str(uuid4())), now - timedelta(seconds=WAITING - number)) for number in range(WAITING)]
    if not is_waiting:
        rows = [row | {"state": "delivered", "wake_at": None, "finished_at": row["since"]} for row in rows]
    engine = create_engine(f"sqlite:///{where.ledger}")
    with engine.begin() as connection:
        connection.execute(insert(deliveries), rows)
    engine.dispose()


def _row(wanted: Wanted, at: datetime) -> dict[str, Any]:
    body = body_of(wanted)
    return {
        "id": str(uuid4()),
        "target": "other",
        "account": "default",
        "generation": wanted.id,
        "status": "COMPLETED",
        "is_required": False,
        "state": "waiting",
        "attempts": 1,
        "tries": 1,
        "received_at": at,
        "since": at,
        "wake_at": at,
        "content_type": "application/json",
        "signature": "t=1,v1=00",
        "digest": sha256(body).digest(),
        "body": body,
    }


async def _send(url: str, wanted: list[Wanted], offset: float) -> list[Sent]:
    """Send the webhooks of *wanted* at a steady rate, whatever the answers take; *offset* is in parts of a step."""
    address = urlsplit(url)
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(_CONNECTIONS):
        free.put_nowait(await asyncio.open_connection(address.hostname, address.port))
    sent: list[Sent] = []

    async def send(one: Wanted) -> None:
        request = request_of(one, address.path, address.netloc)
        at, clock = time.time(), time.perf_counter()
        reader, writer = await free.get()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 202 " not in head:
            raise BenchError(f"an answer other than 202: {head[:80]!r}")
        await reader.readexactly(_length_of(head))
        sent.append(Sent(one.id, at, time.perf_counter() - clock))
        free.put_nowait((reader, writer))

    started_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, one in enumerate(wanted):
            await asyncio.sleep(max(0.0, started_at + (number + offset) / _A_SECOND - time.perf_counter()))
            group.create_task(send(one))
    while not free.empty():
        free.get_nowait()[1].close()
    return sent


def _length_of(head: bytes) -> int:
    lines = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if b": " in line)
    return int(lines[b"content-length"])


def _spent(*processes: psutil.Process) -> float:
    return sum(cpu_seconds(one) for one in processes)


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"{name}_p{share}_ms": round(ordered[len(ordered) * share // 100] * 1000, 1) for share in (50, 90, 99)}
