"""What the README tells a newcomer to type, typed as it stands there: against the stand-in for the Sync API."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.conftest import API_KEY, API_TOKEN
from tests.support.ports import free_port
from tests.support.readme import README, ROOT, code_with
from tests.support.webhooks import SECRET

SERVICE = code_with(README, "sh", "make up")
CHECKS = code_with(README, "sh", "mayfly doctor  ")
SDK = code_with(README, "python", "from sync import Sync")
PUBLIC = "https://mayfly.example.com"


@pytest.fixture
def environment(tmp_path, simulator):
    """A newcomer's shell: nothing of Mayfly is set but the stand-in's URL, and a port and folder of the test's own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SYNC_", "MAYFLY_"))}
    return clean | {
        "SYNC_BASE_URL": simulator.url,
        "MAYFLY_MIN_TTL": "1s",
        "MAYFLY_PORT": str(free_port()),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
    }


def _filled_in(block):
    """Put the two values where the README leaves them out; the commands are those of the environment under test."""
    programs = str(Path(sys.executable).parent)
    places = {"sk-…": API_KEY, "whsec_…": SECRET, "$PWD/.venv/bin": programs}
    for old, new in places.items():
        assert old in block
        block = block.replace(old, new)
    return block


async def _run(block, environment):
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", block),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    return output


@pytest.fixture
async def service(environment):
    """The block that starts the service, run as it stands; yields the exports of it for the second terminal."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", _filled_in(SERVICE)), cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        await _until_ready(process, f"http://127.0.0.1:{environment['MAYFLY_PORT']}/health/ready")
        yield _filled_in(SERVICE).partition("make up")[0]
    finally:
        os.killpg(process.pid, signal.SIGINT)
        await asyncio.wait_for(process.wait(), 30)


async def _until_ready(process, url):
    async with httpx.AsyncClient(trust_env=False) as client:
        for _ in range(600):
            assert process.returncode is None
            try:
                if (await client.get(url)).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    raise AssertionError("the quick start does not get ready")


async def test_the_quick_start_accepts_a_webhook_and_deletes_nothing(service, environment, simulator):
    said = await _run(service + CHECKS, environment)

    assert "failing" not in said
    assert "MAYFLY_DRY_RUN is on" in said
    assert "202 Accepted" in said
    assert "scheduled" in said
    generation = simulator.add(
        webhook_url=f"http://127.0.0.1:{environment['MAYFLY_PORT']}/webhooks/sync?ttl=1s", processing_seconds=0
    )
    deadline = time.monotonic() + 30
    while "dry run: it would have been deleted" not in await _run(f"{service}mayfly records list", environment):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.5)
    assert generation.deleted_at is None


@pytest.mark.skipif(importlib.util.find_spec("sync") is None, reason="syncsdk is not installed")
async def test_the_python_snippet_announces_a_generation_with_its_override(mayfly, simulator):
    api = await mayfly("up", SYNC_BASE_URL=simulator.url).start()
    snippet = SDK.replace("Sync()", f"Sync(base_url={simulator.url!r})").replace(PUBLIC, api.url)
    began = datetime.now(UTC)

    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", f"{snippet}\nprint(generation.id)"],
        env=os.environ | {"SYNC_API_KEY": API_KEY},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    record = await _record(api.url, ran.stdout.strip())
    assert timedelta(hours=71) < datetime.fromisoformat(record["dueAt"]) - began < timedelta(hours=73)


async def _record(url, generation_id):
    headers = {"authorization": f"Bearer {API_TOKEN}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client:
        for _ in range(300):
            answer = await client.get(f"/api/records/{generation_id}")
            if answer.status_code == 200:
                return msgspec.json.decode(answer.content)
            await asyncio.sleep(0.1)
    raise AssertionError("the webhook did not come")
