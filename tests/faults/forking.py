"""Starts Mayfly's processes by forking one that has imported everything: 50 ms each instead of a second or more.

They are processes with sessions of their own. Orders are JSON lines on standard input, answered with the process id.
The exit code of each is written to a file beside its log.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PRELOADED = (
    "asyncpg",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "sqlalchemy.dialects.sqlite",
    "httptools",
    "uvicorn",
    "uvloop",
    "service.web.app",
    "service.cli",
    "service.commands.running",
    "workers.account",
    "workers.main",
)

_OURS = (signal.SIGCHLD, signal.SIGALRM)
_LOOK_SECONDS = 0.5
_logs: dict[int, Path] = {}


def main() -> None:
    """Serve orders until standard input ends, then kill what is left."""
    for name in _PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, _reap)
    # A signal that comes just before the read of the next order does not interrupt it: a timer reaps as well.
    signal.signal(signal.SIGALRM, _reap)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        log = Path(order["log"])
        signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
        pid = os.fork()
        if pid == 0:
            _become(order, log)
        _logs[pid] = log
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        print(json.dumps({"pid": pid}), flush=True)
    for pid in list(_logs):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _become(order: dict[str, Any], log: Path) -> None:
    """Turn the child into the process that was asked for; never returns."""
    code = 70
    try:
        for number in _OURS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        importlib.import_module("time").tzset()
        function = getattr(importlib.import_module(order["module"]), "main")  # noqa: B009 - found by its name
        function(order["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reap(_number: int, _frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            log = _logs.pop(pid, None)
            if log is not None:
                code = os.waitstatus_to_exitcode(status)
                log.with_name(f"{log.name}.{pid}.exit").write_text(str(code))


if __name__ == "__main__":
    main()
