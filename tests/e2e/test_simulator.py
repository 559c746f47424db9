"""The simulator, Mayfly and sync.so's own clients together: whole processes, real sockets, a real Redis."""

import asyncio
import importlib.util
import json
import os
import sys
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.conftest import API_KEY, API_TOKEN, http_client
from tests.support.npm import install
from tests.support.readme import README, code_with
from tests.support.waiting import eventually

TYPESCRIPT = code_with(README, "typescript", "@sync.so/sdk")
PUBLIC = "https://mayfly.example.com"
OPERATOR = {"Authorization": f"Bearer {API_TOKEN}"}
# sync.so's client, and what checks the snippet's types.
PACKAGES = ("@sync.so/sdk@0.3.0", "typescript@5.9.3")


async def record_of(api, generation_id, state=None):
    """Return the record once it is there and, if one is given, in this *state*."""

    async def look():
        async with http_client(api.url) as client:
            answer = await client.get(f"/api/records/{generation_id}", headers=OPERATOR)
        record = answer.json() if answer.status_code == 200 else None
        return record if record and state in (None, record["state"]) else None

    return await eventually(look, seconds=60)


@pytest.fixture
async def services(mayfly, simulator, database_url, redis_url):
    """A web side and a worker as processes, on one database and Redis; yields the web side."""
    shared = {
        "SYNC_BASE_URL": simulator.url,
        "MAYFLY_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "MAYFLY_REDIS_URL": redis_url,
        "MAYFLY_MIN_TTL": "1s",
    }
    api, worker = mayfly("api", **shared), mayfly("worker", **shared)
    await asyncio.gather(api.start(), worker.start())
    return api


# The official Python SDK


@pytest.mark.skipif(importlib.util.find_spec("sync") is None, reason="syncsdk is not installed")
async def test_the_python_sdk_sees_a_generation_until_mayfly_deletes_it(services, simulator):
    from sync import Sync
    from sync.common import Audio, Generation, NotFoundError, Video

    simulator.switches.processing_seconds = 0.5
    simulator.plan.script("DELETE", ["hold"])  # until the client has seen the generation
    with httpx.Client(trust_env=False, timeout=10) as http:
        sdk = Sync(base_url=simulator.url, api_key=API_KEY, httpx_client=http)
        created = await asyncio.to_thread(
            sdk.generations.create,
            model="lipsync-2",
            input=[Video(url="https://example.com/video.mp4"), Audio(url="https://example.com/audio.wav")],
            webhook_url=f"{services.url}/webhooks/sync?ttl=1s",
            output_file_name="take 7",
        )
        received = await record_of(services, created.id)
        completed = await asyncio.to_thread(sdk.generations.get, created.id)
        media = await asyncio.to_thread(http.get, completed.output_url or "")
        await simulator.gates.reached(created.id)
        simulator.release(created.id)
        deleted = await record_of(services, created.id, "deleted")
        with pytest.raises(NotFoundError) as gone:
            await asyncio.to_thread(sdk.generations.get, created.id)
        listed = await asyncio.to_thread(sdk.generations.list)

    assert isinstance(completed, Generation)
    assert (created.status, completed.status, media.status_code) == ("PENDING", "COMPLETED", 200)
    assert [(sent.generation_id, sent.status) for sent in simulator.deliveries] == [(created.id, 202)]
    assert received["retention"]["rule"] != "MAYFLY_TTL"
    assert deleted["outputUrl"] == completed.output_url
    assert deleted["outputFileName"] == "take_7"
    assert (deleted["outcome"], deleted["receipt"]["status"]) == ("deleted", 200)
    assert gone.value.body.errorCode == "generation_not_found"
    assert listed == []
    assert created.id in simulator.deleted


# The official TypeScript SDK


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """A folder with sync.so's npm package, where node and the package can be had."""
    return install(tmp_path_factory.mktemp("npm"), *PACKAGES)


async def test_the_readmes_typescript_snippet_leads_to_a_deletion(mayfly, simulator, packages):
    api = await mayfly("up", SYNC_BASE_URL=simulator.url, MAYFLY_MIN_TTL="1s").start()
    simulator.switches.processing_seconds = 0.2
    simulator.plan.script("DELETE", ["hold"])  # until the client has seen the generation
    client = f"new SyncClient({{ baseUrl: {json.dumps(simulator.url)} }})"
    snippet = TYPESCRIPT.replace("new SyncClient()", client).replace(PUBLIC, api.url).replace("ttl=72h", "ttl=1s")
    create = packages / "create.mjs"
    create.write_text(f"{snippet}\nconsole.log(generation.id);\n")
    poll = packages / "poll.mjs"
    poll.write_text(
        'import { SyncClient } from "@sync.so/sdk";\n'
        f"const client = {client};\n"
        "const got = await client.generations.get(process.argv[2]).catch((error) => error);\n"
        "console.log(got.status ?? got.statusCode);\n"
    )

    generation_id = await run(["node", create.name], cwd=packages)
    await record_of(api, generation_id)
    before = await run(["node", poll.name, generation_id], cwd=packages)
    await simulator.gates.reached(generation_id)
    simulator.release(generation_id)
    record = await record_of(api, generation_id, "deleted")
    after = await run(["node", poll.name, generation_id], cwd=packages)

    assert snippet.count(api.url) == snippet.count("ttl=1s") == 1
    assert (before, after) == ("COMPLETED", "404")
    assert record["outcome"] == "deleted"


async def test_the_readmes_typescript_snippet_is_strictly_typed(packages):
    (packages / "snippet.mts").write_text(TYPESCRIPT)
    options = ("--strict", "--noEmit", "--skipLibCheck", "--module", "nodenext", "--target", "es2022")

    assert await run(["node", "node_modules/typescript/bin/tsc", *options, "snippet.mts"], cwd=packages) == ""


async def run(arguments, *, cwd=None):
    """Run a program with the key alone of what Mayfly or an SDK reads, and return its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SYNC_", "MAYFLY_"))}
    process = await asyncio.create_subprocess_exec(
        *arguments,
        cwd=cwd,
        env=clean | {"SYNC_API_KEY": API_KEY},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, (output + errors).decode()
    return output.decode().strip()


# A newcomer without an account


@asynccontextmanager
async def simulating():
    """Run `mayfly simulate` and yield the variables that it tells a newcomer to set."""
    script = os.path.join(os.path.dirname(sys.executable), "mayfly")
    process = await asyncio.create_subprocess_exec(*(script, "simulate", "--port", "0"), stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    told = {}
    try:
        async with asyncio.timeout(30):
            while "SYNC_WEBHOOK_SECRET" not in told:
                words = (await process.stdout.readline()).decode().split()
                if words[:1] == ["export"]:
                    name, _, value = words[1].partition("=")
                    told[name] = value
        yield told
    finally:
        process.terminate()
        await process.communicate()


async def test_doctor_is_all_green_for_a_newcomer_with_the_simulator(mayfly):
    async with simulating() as told:
        await mayfly("up", **told).start()
        doctor = mayfly("doctor --json", **told)
        doctor.spawn()
        code = await doctor.wait()
        report = json.loads(doctor.output())

    assert [finding for finding in report["findings"] if finding["status"] != "ok"] == []
    assert (code, report["ok"]) == (0, True)
    assert {"clock", "organisation", "worker"} <= {finding["part"] for finding in report["findings"]}
