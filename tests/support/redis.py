"""A real Redis for the tests: the server of the embedded one, on a unix socket."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from service.jobs.embedded_redis import find_server

_START_SECONDS = 10.0
_STOP_SECONDS = 10.0


@contextmanager
def redis_server(folder: Path, **options: str) -> Iterator[str]:
    """Run a Redis in *folder*, with redis.conf *options*, until the block ends; yield its URL."""
    socket = folder / "redis.sock"
    wanted = {"port": "0", "unixsocket": str(socket), "dir": str(folder), "save": "", "logfile": "redis.log"} | options
    arguments = [part for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", value)]
    with subprocess.Popen([find_server(), *arguments], stdout=subprocess.DEVNULL) as server:
        url = f"unix://{socket}"
        try:
            _wait_until_ready(url, server)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_ready(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    with redis.Redis.from_url(url) as client:
        while time.monotonic() < deadline and server.poll() is None:
            try:
                client.ping()
            except (redis.RedisError, OSError):
                time.sleep(0.01)
            else:
                return
    raise RuntimeError("the tests' Redis did not start")
