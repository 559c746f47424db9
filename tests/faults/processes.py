"""Processes of the fault tests: started, frozen, thawed and killed by their own ids."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis.asyncio as redis

import service
from service.jobs.embedded_redis import find_server
from tests.support.ports import free_port

ROOT = Path(service.__file__).parents[1]
START_SECONDS = 30.0


class ProcessError(Exception):
    """A process that did not do what the test needs of it, with the end of its log."""


class Reach:
    """Whether a server can be reached, as the test has made it, and since when."""

    def __init__(self) -> None:
        self.is_there = False
        self._since = time.monotonic()

    def note(self, *, is_there: bool) -> None:
        """Note that from now on it cannot be reached, or perhaps can."""
        self.is_there, self._since = is_there, time.monotonic()

    def is_away_since(self, instant: float) -> bool:
        """Whether it could not be reached at any time since *instant*, on the monotonic clock."""
        return not self.is_there and self._since <= instant


@dataclass(slots=True)
class Process:
    """One running process and where it logs."""

    pid: int
    log: Path
    signalled_at: float = 0.0  # on the monotonic clock
    last_signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        with contextlib.suppress(OSError, ValueError):
            return int(self.log.with_name(f"{self.log.name}.{self.pid}.exit").read_text())
        return None

    @property
    def is_left_alone(self) -> bool:
        """Whether it runs, and was not told to end or to stand still."""
        return self.last_signal in (None, signal.SIGCONT) and self.exit_code is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        self.signalled_at, self.last_signal = time.monotonic(), number
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill it at once and wait until it is gone."""
        self.send(signal.SIGKILL)
        await self.ended(20)

    async def stop(self, seconds: float = 20) -> int:
        """Ask it to end and return its exit code."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        return await self.ended(seconds)

    async def ended(self, seconds: float) -> int:
        """Wait for its end and return the exit code."""
        end = time.monotonic() + seconds
        while (code := self.exit_code) is None:
            if time.monotonic() > end:
                raise ProcessError(f"{self.pid} did not end within {seconds} s:\n{self.tail()}")
            await asyncio.sleep(0.01)
        return code

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log events of that name, oldest first."""
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == name:
                    found.append(event)
        return found

    async def logged(self, name: str, *, times: int = 1, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Wait until it has logged the event *times* over, and return the last."""
        end = time.monotonic() + seconds
        while len(found := self.events(name)) < times:
            if self.exit_code is not None or time.monotonic() > end:
                raise ProcessError(f"{self.pid} has not logged {name}:\n{self.tail()}")
            await asyncio.sleep(0.02)
        return found[-1]

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text()[-3000:]

    @property
    def seconds_without_a_core(self) -> float:
        """For how long its event loop could have run while other processes had all cores."""
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        return 0.0

    @property
    def resident_megabytes(self) -> float:
        """How much memory it holds."""
        return float(psutil.Process(self.pid).memory_info().rss / 2**20)

    @property
    def peak_megabytes(self) -> float:
        """How much memory it held at its most; a moment's worth is seen as well."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024


class ProcessStarter:
    """Starts processes; see starter.py."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forking"],
            cwd=ROOT,
            env=_clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def start(
        self, module: str, arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
    ) -> Process:
        """Start main(arguments) of *module* in *folder* with *environment*."""
        log.touch(mode=0o600)
        order = {
            "module": module,
            "arguments": list(arguments),
            "environment": {**_clean_environment(), **environment},
            "folder": str(folder),
            "log": str(log),
        }
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        return Process(self._answer()["pid"], log)

    def close(self) -> None:
        """End the starter and all its processes that still run."""
        self._parent.communicate(timeout=10)

    def _answer(self) -> dict[str, Any]:
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        if not line:
            raise ProcessError("the starter has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _clean_environment() -> dict[str, str]:
    """Return the environment without what was set for a Mayfly of the caller's own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SYNC_", "MAYFLY_"))}
    return environment | {"PYTHONPATH": str(ROOT)}


class RedisServer:
    """A Redis of one's own on a loopback port, to be killed, frozen, filled and emptied."""

    def __init__(self, folder: Path, *, options: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(folder),
            "save": "",
            "appendonly": "yes",
            "logfile": str(folder / "redis.log"),
            **(options or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.reach = Reach()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """Return a client of the test's own."""
        client: redis.Redis = redis.Redis.from_url(self.url, socket_timeout=5)
        return client

    async def start(self) -> None:
        """Start it, with what its append-only file holds, and wait until it answers."""
        self.reach.note(is_there=True)
        arguments = [part for name, value in self._options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen([find_server(), *arguments], stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(redis.RedisError, OSError):
                    async with self.client() as client:
                        await client.ping()
                        return
                await asyncio.sleep(0.02)

    def kill(self) -> None:
        """Kill it at once."""
        self.reach.note(is_there=False)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Stop it in its tracks: connections stay open and nothing answers."""
        assert self._process is not None
        self.reach.note(is_there=False)
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self.reach.note(is_there=True)
        self._process.send_signal(signal.SIGCONT)

    async def command(self, *words: str | bytes | int) -> Any:  # noqa: ANN401 - whatever Redis says
        """Run one command."""
        async with self.client() as client:
            return await client.execute_command(*words)
