"""The systems under test, each started as its users start it: web, worker, Redis, API simulator."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from service.jobs.embedded_redis import find_server
from tests.bench.processes import (
    PYTHON,
    ROOT,
    BenchError,
    running,
    wait_for_file,
    wait_for_port,
)
from tests.bench.webhooks import API_KEY, SECRET
from tests.support.ports import free_port

BUILD = ROOT / "build" / "bench"
CONCURRENCY = 50
# An API that is not there, for what makes no calls.
NOWHERE = "http://127.0.0.1:9"
_STACKS = Path(__file__).parent / "stacks"
BIN = Path(PYTHON).parent
_UVICORN_OPTIONS = ["--http", "httptools", "--loop", "uvloop", "--no-access-log", "--log-level", "warning"]
# Node and npm would otherwise ask for the newest of themselves.
_QUIET_NPM = ["--no-audit", "--no-fund", "--no-package-lock", "--loglevel", "error"]


@dataclass(frozen=True, slots=True)
class Place:
    """A temporary folder with a Redis in it, for one system at a time."""

    folder: Path
    redis_socket: Path
    redis: psutil.Process

    @property
    def ledger(self) -> Path:
        """Where Mayfly keeps its SQLite ledger."""
        return self.folder / "data" / "ledger.db"

    def environment(self, base_url: str) -> dict[str, str]:
        """Return what all systems are told; the API's rate budget is lifted."""
        return {
            "SYNC_WEBHOOK_SECRET": SECRET,
            "SYNC_API_KEY": API_KEY,
            "SYNC_BASE_URL": base_url,
            "BENCH_REDIS_SOCKET": str(self.redis_socket),
            "BENCH_CONCURRENCY": str(CONCURRENCY),
            "MAYFLY_REDIS_URL": f"unix://{self.redis_socket}",
            "MAYFLY_DATA_DIR": str(self.folder / "data"),
            "MAYFLY_API_RATE": "1000000/second",
            "MAYFLY_CONCURRENCY": str(CONCURRENCY),
            "MAYFLY_MIN_TTL": "1s",
            "MAYFLY_LOG_FORMAT": "json",
        }


@dataclass(frozen=True, slots=True)
class System:
    """How to start one system: *web* takes the port; an empty *worker* has none; *redis* are options of its Redis."""

    name: str
    web: Callable[[int], list[str]]
    worker: list[str] = field(default_factory=list)
    extra: Mapping[str, str] = field(default_factory=dict)
    redis: Mapping[str, str] = field(default_factory=dict)


def limit() -> System:
    """The barest ASGI app, see limit.py."""
    return System("limit", lambda port: [PYTHON, "-m", "uvicorn", "tests.bench.limit:app", *_on(port)])


def servers() -> list[System]:
    """The same app under the servers, loops and parsers that there are to choose from, one process each."""

    def uvicorn(port: int) -> list[str]:
        options = ["--http", "h11", "--loop", "asyncio", "--no-access-log", "--log-level", "warning"]
        return [PYTHON, "-m", "uvicorn", "tests.bench.limit:app", "--host", "127.0.0.1", "--port", str(port), *options]

    granian = str(_python_environment() / "granian")

    def granian_on(port: int) -> list[str]:
        options = ["--interface", "asginl", "--loop", "uvloop", "--workers", "1", "--no-ws", "--log-level", "warning"]
        return [granian, *options, "--host", "127.0.0.1", "--port", str(port), "tests.bench.limit:app"]

    return [
        replace(limit(), name="uvicorn, uvloop, httptools"),
        System("uvicorn, asyncio, h11", uvicorn),
        System("granian, uvloop", granian_on, extra={"PYTHONPATH": str(ROOT)}),
    ]


def mayfly() -> System:
    """Mayfly as in production: `mayfly api` and `mayfly worker` with a ledger and a Redis of their own."""
    command = str(BIN / "mayfly")
    # uvicorn's port is a setting of Mayfly's.
    worker = ["env", "MAYFLY_PORT=0", command, "worker"]
    return System("mayfly", lambda port: ["env", f"MAYFLY_PORT={port}", command, "api"], worker)


def fastapi_arq() -> System:
    """FastAPI, uvicorn and arq, from the suite's own environment."""
    folder = _python_environment()
    module = "tests.bench.stacks.fastapi_arq"
    return System(
        "fastapi+arq",
        lambda port: [str(folder / "uvicorn"), f"{module}:app", *_on(port)],
        [str(folder / "arq"), f"{module}.WorkerSettings"],
        {"PYTHONPATH": str(ROOT)},
    )


def fastify_bullmq() -> System | None:
    """Fastify and BullMQ; None, with a message, where Node is not at hand."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        print("fastify+bullmq is left out: it needs node and npm", file=sys.stderr)
        return None
    folder = BUILD / "fastify_bullmq"
    shutil.copytree(_STACKS / "fastify_bullmq", folder, dirs_exist_ok=True)
    wanted = (folder / "package.json").read_bytes()
    stamp = folder / "installed.json"
    if not stamp.exists() or stamp.read_bytes() != wanted:
        _run(["npm", "install", *_QUIET_NPM], folder)
        stamp.write_bytes(wanted)
    script = ["node", str(folder / "index.js")]
    return System(
        "fastify+bullmq",
        lambda port: ["env", f"PORT={port}", *script, "web"],
        [*script, "worker"],
        {"NODE_ENV": "production"},
    )


def synced(system: System) -> System:
    """Have its Redis sync each write before it answers, so that what *system* has accepted survives a power cut."""
    return replace(system, name=f"{system.name}, synced", redis={"appendfsync": "always"})


def py_spy() -> str:
    """Return the profiler's path."""
    return str(_python_environment() / "py-spy")


@contextmanager
def place(folder: Path, given: Mapping[str, str] | None = None) -> Iterator[Place]:
    """Run a Redis in *folder*, set up as the embedded one is but for what is *given*.

    AOF on, synced each second, never evicting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    socket = folder / "redis.sock"
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "dir": str(folder),
        "save": "",
        "appendonly": "yes",
        "maxmemory-policy": "noeviction",
        **(given or {}),
    }
    command = [find_server(), *(part for name, value in options.items() for part in (f"--{name}", value))]
    with running(command, log=folder / "redis.log") as process:
        wait_for_file(socket, process)
        yield Place(folder, socket, process)


@contextmanager
def web(system: System, where: Place, base_url: str = NOWHERE) -> Iterator[tuple[str, psutil.Process]]:
    """Run the web process of *system* and yield the URL for webhooks and the process."""
    port = free_port()
    environment = where.environment(base_url) | dict(system.extra)
    with running(system.web(port), log=where.folder / "web.log", environment=environment) as process:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}/webhooks/sync", process


@contextmanager
def worker(system: System, where: Place, base_url: str) -> Iterator[psutil.Process]:
    """Run the worker process of *system*."""
    environment = where.environment(base_url) | dict(system.extra)
    with running(system.worker, log=where.folder / "worker.log", environment=environment) as process:
        yield process


def _on(port: int) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(port), *_UVICORN_OPTIONS]


def _python_environment() -> Path:
    """Make the environment of the other stacks from its hashed lock, once, and return the folder of its programs."""
    lock = Path(__file__).parent / "requirements.lock"
    folder, stamp = BUILD / "venv", BUILD / "venv" / "installed.lock"
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
        uv = str(BIN / "uv")
        _run([uv, "venv", "--quiet", "--clear", "--python", PYTHON, str(folder)], ROOT)
        python = str(folder / "bin" / "python")
        _run([uv, "pip", "sync", "--quiet", "--require-hashes", "--python", python, str(lock)], ROOT)
        stamp.write_bytes(lock.read_bytes())
    return folder / "bin"


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"UV_SYSTEM_CERTS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")


def write_json(path: Path, value: object) -> Path:
    """Write *value* for another process to read."""
    path.write_text(json.dumps(value))
    return path
