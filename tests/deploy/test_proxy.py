"""The sample configuration of nginx, with TLS, in front of a real web side: it limits what the web server cannot.

Only the addresses and the files of the certificate are put in. nginx is Debian's: ``apt-get install nginx-light``.
"""

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import API_TOKEN
from tests.support.ports import free_port
from tests.support.process import Mayfly
from tests.support.webhooks import Webhook, webhook

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(300)]

HOST = "hooks.example.com"
# nginx.conf as Debian has it, as far as it matters, in a folder of the test's own and in the foreground.
MAIN = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  include {folder}/mayfly.conf;
}}
"""


@dataclass(frozen=True, slots=True)
class Front:
    """nginx at *port*, whose certificate *context* trusts."""

    port: int
    context: ssl.SSLContext
    client: httpx.Client

    def connect(self) -> ssl.SSLSocket:
        """Open a TLS connection."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self.context.wrap_socket(plain, server_hostname=HOST)

    def post(self, sent: Webhook) -> httpx.Response:
        """Send a webhook."""
        return self.client.post("/webhooks/sync", content=sent.body, headers=sent.headers)


@contextmanager
def nginx(folder: Path, sample: str, upstream: str) -> Iterator[int]:
    """Run nginx with *sample*, its addresses replaced, and yield the port."""
    port = free_port()
    places = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",
        "server 127.0.0.1:8080;": f"server {upstream};",
        "/etc/ssl/mayfly": str(folder),
    }
    for old, new in places.items():
        assert old in sample
        sample = sample.replace(old, new)
    (folder / "mayfly.conf").write_text(sample)
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder))
    command = ["nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen(command) as process:
        try:
            yield port
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for HOST that nobody else has signed, in a folder that nginx's own user may read."""
    if missing := [name for name in ("nginx", "openssl") if shutil.which(name) is None]:
        pytest.skip(f"{missing[0]} is not on this machine")
    folder = tmp_path_factory.mktemp("nginx")
    options = f"-newkey rsa:2048 -nodes -days 2 -subj /CN={HOST} -addext subjectAltName=DNS:{HOST}"
    files = "-keyout privkey.pem -out fullchain.pem"
    subprocess.run(
        ["openssl", "req", "-x509", *options.split(), *files.split()], cwd=folder, check=True, capture_output=True
    )
    for place in (folder, *folder.parents[:2]):
        place.chmod(0o755)
    return folder


@pytest.fixture
async def site(certificate: Path, root: Path, mayfly: Callable[..., Mayfly]):
    """A web side, and nginx in front of it."""
    api = await mayfly("up", SYNC_BASE_URL="http://127.0.0.1:9").start()
    sample = (root / "deploy" / "proxy" / "nginx.conf").read_text(encoding="utf-8")
    context = ssl.create_default_context(cafile=certificate / "fullchain.pem")
    with nginx(certificate, sample, api.url.removeprefix("http://")) as port:
        transport = httpx.HTTPTransport(verify=context, retries=20)
        url = f"https://{HOST}:{port}"
        with httpx.Client(transport=_To127(transport), base_url=url, trust_env=False, timeout=30) as client:
            await asyncio.to_thread(client.get, "/")
            yield Front(port, context, client), api


class _To127(httpx.BaseTransport):
    """Sends what is for HOST to this machine, under the name that the certificate has."""

    def __init__(self, transport: httpx.HTTPTransport) -> None:
        self._transport = transport

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send *request*."""
        request.extensions["sni_hostname"] = HOST
        request.url = request.url.copy_with(host="127.0.0.1")
        return self._transport.handle_request(request)

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()


def head(length: int) -> bytes:
    """Return the head of a webhook whose body of *length* bytes is still to come."""
    signature = webhook(b"x" * length).headers["Sync-Signature"]
    lines = (
        "POST /webhooks/sync HTTP/1.1",
        f"Host: {HOST}",
        f"Content-Length: {length}",
        f"Sync-Signature: {signature}",
    )
    return "\r\n".join([*lines, "", ""]).encode()


async def test_a_signed_webhook_goes_through_with_its_bytes_as_they_are(site):
    front, api = site
    sent = webhook(webhookUrl="https://hooks.example.com/x?hold=proxy", error="é🪰")
    large = webhook(error="x" * 900_000, webhookUrl="https://hooks.example.com/x?hold=proxy")
    answers = [await asyncio.to_thread(front.post, one) for one in (sent, large)]
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
        token = {"Authorization": f"Bearer {API_TOKEN}"}
        states = [(await client.get(f"/api/records/{one.id}", headers=token)).json()["state"] for one in (sent, large)]

    assert [answer.status_code for answer in answers] == [202, 202]
    assert states == ["held", "held"]


async def test_nothing_but_the_webhook_route_is_let_in(site):
    front, _ = site
    paths = ["/", "/metrics", "/schema", "/api/records", "/health/ready", "/webhooks"]

    assert {path: front.client.get(path).status_code for path in paths} == dict.fromkeys(paths, 404)
    assert front.client.get("/webhooks/sync").status_code == 405


async def test_a_body_over_the_limit_is_413_and_an_unsigned_one_401(site):
    front, _ = site
    sent = webhook()

    assert front.post(webhook(b"x" * (2**20 + 1))).status_code == 413
    assert front.post(Webhook(sent.body, {"Content-Type": "application/json"})).status_code == 401
    assert front.post(Webhook(sent.body + b" ", sent.headers)).status_code == 401


def seconds_until_closed(connection: ssl.SSLSocket, *, drip: bytes) -> tuple[float, bytes]:
    """Send a *drip* now and then; return how long the other side took to end it, and what it said."""
    begun, answer = time.monotonic(), b""
    connection.settimeout(0.5)
    while time.monotonic() - begun < 25:
        try:
            if drip:
                connection.send(drip)
            data = connection.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            break
        if not data:
            break
        answer += data
    return time.monotonic() - begun, answer


async def test_a_slow_head_is_ended_after_ten_seconds_and_a_large_one_at_once(site):
    front, api = site
    with front.connect() as slow, front.connect() as large:
        slow.sendall(b"POST /webhooks/sync HTTP/1.1\r\nHost: x\r\nX-Drip: ")
        large.sendall(b"GET /webhooks/sync HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 10_000)
        large.settimeout(5)
        answer = large.recv(64)
        took, _ = await asyncio.to_thread(seconds_until_closed, slow, drip=b"x")

    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert 8 < took < 14
    assert api.logs("webhook.not_stored") == []


async def test_a_body_that_does_not_come_never_reaches_mayfly(site):
    front, api = site
    with front.connect() as stuck:
        stuck.sendall(head(1000) + b"x" * 10)
        took, answer = await asyncio.to_thread(seconds_until_closed, stuck, drip=b"")

    assert 8 < took < 14
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert api.logs("webhook.not_stored") == []


async def test_requests_sent_ahead_without_end_take_no_memory_of_mayfly(site):
    """Without a proxy one connection took 1.3 GB in 6 s: uvicorn reads on while requests wait."""
    front, api = site
    sent = webhook()
    assert front.post(sent).status_code == 202
    before = psutil.Process(api.pid).memory_info().rss
    data = b"GET /webhooks/sync HTTP/1.1\r\nHost: " + HOST.encode() + b"\r\n\r\n"
    with front.connect() as ahead:
        await asyncio.to_thread(send_without_reading, ahead, data * 200, seconds=4)
        meanwhile = await asyncio.to_thread(front.post, webhook())
        grown = psutil.Process(api.pid).memory_info().rss - before

    assert meanwhile.status_code == 202
    assert grown < 10 * 2**20


def send_without_reading(connection: ssl.SSLSocket, data: bytes, *, seconds: float) -> None:
    """Send *data* again and again, until *seconds* are over or the other side takes no more."""
    connection.settimeout(1)
    end = time.monotonic() + seconds
    with suppress(OSError):
        while time.monotonic() < end:
            connection.sendall(data)


async def test_one_address_has_its_share_of_connections_and_no_more(site):
    front, _ = site
    with ExitStack() as stack:
        stuck = [stack.enter_context(front.connect()) for _ in range(70)]
        for connection in stuck:
            connection.sendall(head(1000) + b"x")
        await asyncio.sleep(1)
        refused = front.post(webhook()).status_code
    await asyncio.sleep(1)

    assert refused == 503
    assert front.post(webhook()).status_code == 202


def test_the_sample_for_caddy_is_one_that_caddy_can_read(tool, root: Path) -> None:
    result = tool("caddy", "adapt", "--config", root / "deploy" / "proxy" / "Caddyfile", "--adapter", "caddyfile")

    assert result.returncode == 0, result.stderr
    assert "127.0.0.1:8080" in result.stdout
