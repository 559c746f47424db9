"""Mayfly as a process of its own, for tests that kill it."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0


class Mayfly:
    """One ``mayfly`` command, started with nothing of our own environment but *env*; its log goes to a file."""

    def __init__(self, command: str, folder: Path, env: dict[str, str]) -> None:
        self.command = command
        self.url = ""
        self._log = folder / f"{command.replace(' ', '-')}-{time.monotonic_ns()}.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SYNC_", "MAYFLY_"))}
        self._env = clean | {"MAYFLY_HOST": "127.0.0.1", "MAYFLY_PORT": "0", "MAYFLY_LOG_FORMAT": "json"} | env
        self._cwd = folder
        self.prefix: list[str] = []  # a command that starts it, such as one that sets limits
        self._process: subprocess.Popen[bytes] | None = None
        self._children: set[psutil.Process] = set()
        self._begun = 0  # the size of the log when the present run began

    @property
    def pid(self) -> int:
        """The id of the present process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> "Mayfly":
        """Start it and return once it works: the web side answers, or the worker says so."""
        self.spawn()
        if self.command in ("up", "api"):
            line = await self.wait_for_log("web.started")
            self.url = f"http://127.0.0.1:{line['port']}"
            self._env["MAYFLY_PORT"] = str(line["port"])  # the same after a restart
            await self._wait_until_live()
        if self.command in ("up", "worker"):
            await self.wait_for_log("worker.started")
        self._note_children()
        return self

    def spawn(self) -> None:
        """Start it and wait for nothing."""
        self._begun = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.prefix, *_program(), *self.command.split()],
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def restart(self) -> "Mayfly":
        """Start it again after it ended."""
        assert self._process is None or self._process.poll() is not None
        return await self.start()

    async def kill9(self) -> None:
        """Kill it with SIGKILL; its embedded Redis keeps running."""
        assert self._process is not None
        self._note_children()
        self._process.kill()
        await asyncio.to_thread(self._process.wait, _STOP_SECONDS)

    async def terminate(self) -> int:
        """Ask it to end and return its exit code."""
        assert self._process is not None
        self._note_children()
        self._process.terminate()
        return await self.wait()

    async def wait(self) -> int:
        """Wait for its end and return its exit code."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, _STOP_SECONDS)

    def output(self) -> str:
        """Return all that the present run said."""
        with self._log.open("rb") as log:
            log.seek(self._begun)
            return log.read().decode()

    def logs(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the events that the present run logged, those named *event* alone if one is given."""
        # The last line may be under way.
        lines = [line for line in self.output().splitlines(keepends=True) if line.startswith("{") and line[-1] == "\n"]
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [line for line in events if event is None or line.get("event") == event]

    async def wait_for_log(self, event: str, *, seconds: float = _START_SECONDS) -> dict[str, Any]:
        """Return the first *event* of the present run once it is there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            has_ended = self._process is None or self._process.poll() is not None
            if found := self.logs(event):
                return found[0]
            if has_ended:
                raise AssertionError(f"mayfly {self.command} ended without {event}:\n{self.output()[-4000:]}")
            await asyncio.sleep(0.02)
        raise AssertionError(f"mayfly {self.command} did not log {event}:\n{self.output()[-4000:]}")

    def stop(self) -> None:
        """End it and what it started, whatever state they are in."""
        if self._process is not None and self._process.poll() is None:
            self._note_children()
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for child in self._children:
            if child.is_running():
                child.kill()
        psutil.wait_procs(list(self._children), timeout=5)

    def _note_children(self) -> None:
        try:
            self._children.update(psutil.Process(self.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    async def _wait_until_live(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            answer = await client.get(f"{self.url}/health/live")
            answer.raise_for_status()


def _program() -> list[str]:
    script = Path(sys.executable).with_name("mayfly")
    return [str(script)] if script.exists() else [sys.executable, "-c", "from service.cli import main; main()"]
