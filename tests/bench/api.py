"""The API simulator as a process, ended by a signal: ``python -m tests.bench.api PORT``."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import uvloop

from service.simulator import serve_forever
from tests.bench.processes import PYTHON, BenchError, running, wait_for_port
from tests.bench.webhooks import API_KEY, SECRET
from tests.support.ports import free_port

_POLL_SECONDS = 0.25


class Api:
    """A running stand-in, driven through its control routes."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = url
        self._client = client

    def add(self, count: int) -> list[str]:
        """Make *count* terminal generations and return their ids."""
        ids: list[str] = self._ask("POST", "generations", [{"count": count}])
        return ids

    def set_latency(self, seconds: float) -> None:
        """Let each GET and DELETE take so long."""
        self._ask("PATCH", "switches", {"latency_seconds": seconds})

    def deletes(self) -> dict[str, datetime]:
        """Return when the first DELETE of each generation arrived, for those that had one."""
        pairs: list[tuple[str, float | None]] = self._ask("GET", "deletes")
        return {id_: datetime.fromtimestamp(at).astimezone() for id_, at in pairs if at is not None}

    def wait_for_deletes(self, ids: list[str], *, seconds: float) -> dict[str, datetime]:
        """Return the deletes of *ids* once all are there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._ask("GET", "summary")["deleted"] >= len(ids):
                return self.deletes()
            time.sleep(_POLL_SECONDS)
        raise BenchError(f"{len(self.deletes())} of {len(ids)} generations were deleted within {seconds:.0f} s")

    def wait_for_first_delete(self, *, seconds: float) -> None:
        """Return once something was deleted."""
        deadline = time.monotonic() + seconds
        while not self._ask("GET", "summary")["deleted"]:
            if time.monotonic() > deadline:
                raise BenchError(f"nothing was deleted within {seconds:.0f} s")
            time.sleep(_POLL_SECONDS)

    def _ask(self, method: str, route: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
        response = self._client.request(method, f"{self.url}/simulator/{route}", json=body)
        response.raise_for_status()
        return response.json()


@contextmanager
def api(folder: Path) -> Iterator[Api]:
    """Run a stand-in of its own on a free port."""
    port = free_port()
    command = [PYTHON, "-m", "tests.bench.api", str(port)]
    with (
        running(command, log=folder / "api.log") as process,
        httpx.Client(trust_env=False, timeout=60) as client,
    ):
        wait_for_port(port, process)
        yield Api(f"http://127.0.0.1:{port}", client)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        uvloop.run(serve_forever(port=int(sys.argv[1]), api_key=API_KEY, webhook_secret=SECRET))
