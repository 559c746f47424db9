"""Processes of the suite: started in the foreground, awaited until they serve, ended by their own id."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
_START_SECONDS = 30.0
_STOP_SECONDS = 15.0


class BenchError(Exception):
    """A measurement that cannot be made, with the reason."""


@contextmanager
def running(
    command: list[str], *, log: Path, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[psutil.Process]:
    """Run *command* until the block ends; what it says goes to *log*, whose end is shown if it dies."""
    # Nothing of the caller's own set-up may change what is measured, nor be reached by it.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SYNC_", "MAYFLY_"))}
    with log.open("ab") as output:
        process = psutil.Popen(command, cwd=cwd, env=clean | dict(environment or {}), stdout=output, stderr=output)
    try:
        yield process
        if process.poll() is not None:
            raise BenchError(f"{Path(command[0]).name} ended early:\n{log.read_text()[-2000:]}")
    finally:
        _end(process)


def _end(process: psutil.Popen) -> None:
    children = process.children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time that *process* and its children have used so far."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def wait_for_port(port: int, process: psutil.Process) -> None:
    """Return once something accepts connections on *port*."""
    for _ in _while_alive(process):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return


def wait_for_file(path: Path, process: psutil.Process) -> None:
    """Return once *path* is there, a unix socket mostly."""
    for _ in _while_alive(process):
        if path.exists():
            return


def wait_for(url: str, process: psutil.Process, *, status: int = 200) -> None:
    """Return once *url* answers *status*."""
    with httpx.Client(trust_env=False, timeout=5) as client:
        for _ in _while_alive(process):
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).status_code == status:
                    return


def _while_alive(process: psutil.Process) -> Iterator[None]:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise BenchError(f"{process.pid} ended before it was ready")
        yield
        time.sleep(0.02)
    raise BenchError(f"{process.pid} was not ready within {_START_SECONDS:.0f} s")


def python_module(module: str, *arguments: str) -> Any:  # noqa: ANN401 - JSON
    """Run one of the suite's own modules to its end and return the JSON it prints."""
    done = subprocess.run(
        [PYTHON, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise BenchError(f"{module} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)
