"""What a person reads when something cannot start or connect: one sentence with the innermost cause."""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import sys
from typing import Any

import pytest

from service.core.secret import Secret
from service.jobs import connection
from service.runtime.causes import describe_cause
from service.sync.client import open_sync_api
from tests.support.commands import command
from tests.support.webhooks import SECRET

MAYFLY = [sys.executable, "-c", "from service.cli import main; main()"]


@pytest.fixture
async def tls_port(tmp_path):
    """A TLS server whose certificate nobody has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    options = "req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -days 2"
    files = ["-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/cert.pem"]
    await asyncio.to_thread(
        subprocess.run, ["openssl", *options.split(), *files], check=True, capture_output=True, cwd=tmp_path
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def close(_reader, writer):
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


async def test_a_redis_with_an_unknown_certificate_is_named_by_the_innermost_cause(tls_port):
    pool = connection.connect(Secret(f"rediss://127.0.0.1:{tls_port}"), retries=0)
    with pytest.raises(connection.QUEUE_ERRORS) as raised:
        await pool.ping()
    await pool.aclose(close_connection_pool=True)

    assert "certificate verify failed: self-signed certificate" in describe_cause(raised.value)


async def test_an_api_with_an_unknown_certificate_is_named_by_the_innermost_cause(tls_port, metrics):
    url = f"https://127.0.0.1:{tls_port}"
    async with open_sync_api(
        url, Secret("sk-1"), connections=1, metrics=metrics, on_throttled=lambda _seconds: None
    ) as api:
        answer = await api.get("g1")

    assert "certificate verify failed: self-signed certificate" in str(answer.error)


async def test_doctor_names_the_innermost_cause_of_tls_failures(tls_port, tmp_path):
    environment: dict[str, Any] = {
        "SYNC_API_KEY": "sk-1",
        "SYNC_WEBHOOK_SECRET": SECRET,
        "SYNC_BASE_URL": f"https://127.0.0.1:{tls_port}",
        "MAYFLY_CONFIG": write_target(tmp_path, tls_port),
        "MAYFLY_REDIS_URL": f"rediss://127.0.0.1:{tls_port}",
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
    }
    said = (await asyncio.to_thread(command, "doctor", "--json", **environment)).stdout

    assert said.count("certificate verify failed: self-signed certificate") == 3


async def test_doctor_trusts_the_authorities_that_forwarding_trusts(tls_port, tmp_path):
    environment: dict[str, Any] = {
        "SYNC_BASE_URL": "http://127.0.0.1:1",
        "MAYFLY_CONFIG": write_target(tmp_path, tls_port),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "SSL_CERT_FILE": str(tmp_path / "cert.pem"),
    }
    said = (await asyncio.to_thread(command, "doctor", "--json", **environment)).stdout

    assert f"https://127.0.0.1:{tls_port} accepts connections" in said


def write_target(folder, port):
    """Write a configuration with a target that speaks TLS, and return its path."""
    path = folder / "mayfly.toml"
    path.write_text(f'[[forward]]\nid = "crm"\nurl = "https://127.0.0.1:{port}/"\n')
    return str(path)


async def test_a_refused_connection_is_named_without_its_address():
    with pytest.raises(OSError) as raised:  # noqa: PT011 - its text differs by system
        await asyncio.open_connection("127.0.0.1", 1)

    assert describe_cause(raised.value) == "ConnectionRefusedError: Connection refused"


@pytest.mark.parametrize("name", ["up", "api"])
async def test_a_port_in_use_is_one_sentence_before_anything_starts(name, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment: dict[str, Any] = {
            "SYNC_API_KEY": "sk-1",
            "SYNC_WEBHOOK_SECRET": SECRET,
            "MAYFLY_PORT": str(port),
            "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        }
        ended = await asyncio.to_thread(
            subprocess.run, [*MAYFLY, name], env=os.environ | environment, capture_output=True, text=True, timeout=30
        )

    assert (ended.returncode, ended.stdout) == (1, "")
    expected = f"cannot listen on 127.0.0.1 port {port}: Address already in use; check MAYFLY_HOST and MAYFLY_PORT"
    assert ended.stderr == f"mayfly: {expected}\n"
    assert not (tmp_path / "data").exists()
