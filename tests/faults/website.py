"""One ``mayfly api`` without a worker, for tests of requests."""

import contextlib
import http.client
import signal
import sqlite3
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx

from tests.faults.processes import Process, ProcessStarter
from tests.faults.system import API_KEY, TOKEN
from tests.support.ports import free_port
from tests.support.webhooks import SECRET, webhook

Headers = Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Website:
    """A web side that runs, and ways to speak to it."""

    process: Process
    port: int
    client: httpx.Client
    ledger: Path

    def post(self, body: bytes) -> httpx.Response:
        """Post *body* with its signature."""
        return self.client.post("/webhooks/sync", content=body, headers=webhook(body).headers)

    def record(self, generation_id: str) -> httpx.Response:
        """Read a record as an operator does."""
        return self.client.get(
            f"/api/records/{quote(generation_id, safe='')}", headers={"authorization": f"Bearer {TOKEN}"}
        )

    def raw(self, method: bytes, target: bytes, body: bytes, headers: Headers) -> int | None:
        """Send a request byte by byte as given and return the answer's status; None when there is no answer."""
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        lines = [b"%s %s HTTP/1.1" % (method, target), b"host: mayfly", b"content-length: %d" % len(body)]
        lines += [b"%s: %s" % pair for pair in pairs]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.connect()
        assert connection.sock is not None
        try:
            with contextlib.suppress(OSError):
                connection.sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
            response = http.client.HTTPResponse(connection.sock)
            response.begin()
        except (OSError, http.client.HTTPException):
            return None
        else:
            response.close()
            return response.status
        finally:
            connection.close()

    def count(self, generation_id: str | None = None) -> int:
        """Count the records, or those of one generation."""
        statement = "SELECT count(*) FROM records WHERE id = coalesce(?, id)"
        with contextlib.closing(sqlite3.connect(self.ledger)) as connection:
            (count,) = connection.execute(statement, (generation_id,)).fetchone()
            return int(count)

    def write(self, statement: str, values: Sequence[str | int]) -> None:
        """Change the ledger by SQL."""
        with contextlib.closing(sqlite3.connect(self.ledger, timeout=10)) as connection, connection:
            connection.execute(statement, values)

    def metric(self, name: str) -> float:
        """Read one number from the metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


@contextlib.contextmanager
def website(starter: ProcessStarter, folder: Path, **environment: str) -> Iterator[Website]:
    """Run a web side with a ledger of its own and without a Redis until the block ends."""
    port = free_port()
    process = starter.start(
        "service.cli",
        ["api"],
        environment={
            "SYNC_WEBHOOK_SECRET": SECRET,
            "SYNC_API_KEY": API_KEY,
            "MAYFLY_API_TOKEN": TOKEN,
            "MAYFLY_REDIS_URL": "redis://127.0.0.1:9/0",
            "MAYFLY_DATA_DIR": str(folder / "data"),
            "MAYFLY_PORT": str(port),
            "MAYFLY_LOG_FORMAT": "json",
            **environment,
        },
        folder=folder,
        log=folder / "api.log",
    )
    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=no_tls, trust_env=False, timeout=10) as client:
        for _ in range(500):
            with contextlib.suppress(httpx.TransportError):
                client.get("/health/live").raise_for_status()
                break
            time.sleep(0.02)
        try:
            yield Website(process, port, client, folder / "data" / "ledger.db")
        finally:
            process.send(signal.SIGKILL)
