"""The demo ends within a minute, reports whether all checks passed, and detects each violation."""

import asyncio
import os
import pty
import re
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import psutil
import pytest

from service.core.lifecycle import State
from service.demo.app import PATH, App, Received
from service.demo.inspection import inspect
from service.demo.picture import Line
from service.demo.scenes import SCENES, Scene
from service.ledger.views import Record
from service.simulator import Call, Operation, Simulator
from service.web.server import serving
from tests.conftest import http_client
from tests.support.forwards import FORWARD_SECRET, forwarded_headers
from tests.support.webhooks import SECRET, webhook

# Whoever tries the demo may have the real thing set.
REAL = {"SYNC_API_KEY": "sk-real", "MAYFLY_TTL": "forever", "MAYFLY_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x"}
MAYFLY = [sys.executable, "-c", "from service.cli import main; main()"]
DUE = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def folder():
    """An empty folder with a short path: the demo makes its data directory in it, and a socket in that."""
    with tempfile.TemporaryDirectory(prefix="mayfly-") as path:
        yield Path(path)


async def test_the_demo_succeeds_within_a_minute_and_prints_lines_without_a_terminal(folder):
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(*MAYFLY, "demo", "--picture", str(folder / "demo.svg")),
        cwd=folder,
        env=os.environ | REAL | {"TMPDIR": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = (part.decode() for part in await process.communicate())

    assert (process.returncode, errors) == (0, "")
    assert time.monotonic() - began < 60
    assert all(scene.title in output for scene in SCENES)
    assert len(re.findall("^✓", output, re.MULTILINE)) == 7
    assert f"✓ The app has the webhooks of all {len(SCENES)} generations, each with both signatures." in output
    assert re.search("its app is busy: 503 +COMPLETED +503 +scheduled", output)
    assert "due, and waits until its app has the webhook" in output
    assert re.search("its app is busy: 503 +gone +✓ +deleted", output)
    assert "✓ The app refused 1 of them at first: its DELETE came only after the app had taken it." in output
    assert "2 synthesizedAudioUrl" in output
    assert "\x1b" not in output
    assert "<svg" in (folder / "demo.svg").read_text()
    assert [path.name for path in folder.iterdir()] == ["demo.svg"], "a successful demo removes its files"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_interrupted_demo_leaves_no_files(folder, number):
    process = await asyncio.create_subprocess_exec(
        *(*MAYFLY, "demo"),
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readuntil(b"PENDING"), 20)
    servers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    await asyncio.wait_for(process.communicate(), 20)

    assert process.returncode == 130
    assert servers
    assert not [one for one in servers if one.is_running()]
    assert list(folder.iterdir()) == []


async def test_on_a_terminal_the_demo_draws_a_table_that_no_log_line_breaks(tmp_path):
    main, terminal = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *MAYFLY,
        "demo",
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal)
    output = await asyncio.to_thread(_read_all, main)

    assert await process.wait() == 0
    assert "due in" in output
    assert "scheduled" in output
    assert "cleanup." not in output
    assert '"event"' not in output


def _read_all(file: int) -> str:
    parts = []
    with os.fdopen(file, "rb", buffering=0) as reader:
        try:
            while part := reader.read(65536):
                parts.append(part)
        except OSError:  # how a terminal says that nobody is on its other side any more
            pass
    return b"".join(parts).decode(errors="replace")


def deleted(generation, **fields):
    """Return the record of a generation that was copied a second after it was due and then deleted."""
    shown = {name: value for name, value in generation.body().items() if name in _wire_names()}
    ours = {
        "account": "default",
        "state": "deleted",
        "outcome": "deleted",
        "receivedAt": DUE - timedelta(seconds=9),
        "dueAt": DUE,
        "copiedAt": DUE + timedelta(seconds=1),
        "deletedAt": DUE + timedelta(seconds=2),
        "attempts": 1,
        "nextAttemptAt": None,
        "lastError": None,
        "retention": {"rule": "MAYFLY_TTL", "ttl": "4s"},
        "hold": None,
        "archived": [],
        "labels": {},
        "receipt": None,
    }
    blank = dict.fromkeys(_wire_names())
    return msgspec.convert(blank | shown | ours | fields, Record)


def _wire_names():
    return {field.encode_name for field in msgspec.structs.fields(Record)}


def call(generation, at):
    path = f"/v2/generations/{generation.id}"
    return Call(at, "DELETE", path, "", Operation.DELETE, generation.id, has_key=True)


@pytest.fixture
def played():
    """A simulator where one generation was deleted as it should be and a forged one left alone."""
    simulator = Simulator(seed=0)
    generation, forged = simulator.add(output_file_name="take 1"), simulator.add()
    simulator.remove(generation.id)
    generation.deleted_at = DUE + timedelta(seconds=2)
    simulator.calls.append(call(generation, DUE + timedelta(seconds=2)))
    return simulator, generation, forged


def taken(status=204, *, delivery="d1", is_genuine=True, at=DUE):
    """Return a request that the app answered with *status*."""
    return Received(at, delivery, is_genuine, status)


ONCE = (taken(),)


def against(simulator, generation, record, forged, *, scene=SCENES[0], forged_status=401, requests=ONCE, forwarded=()):
    line = Line(scene, generation, record, requests)
    findings = inspect(simulator, [line], forged, forged_status, forwarded)
    return [problem.partition(": ")[2] or problem for finding in findings for problem in finding.violations]


def test_a_correct_demo_has_no_violations(played):
    simulator, generation, forged = played

    assert against(simulator, generation, deleted(generation), forged) == []


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"dueAt": DUE + timedelta(seconds=3)}, "a DELETE came before the due time"),
        ({"copiedAt": DUE + timedelta(seconds=3)}, "it was deleted before it was copied"),
        ({"copiedAt": None}, "not copied, or not deleted"),
        ({"outputFileName": None}, "outputFileName is missing or different"),
        ({"outputUrl": "https://elsewhere.invalid/"}, "outputUrl is missing or different"),
        ({"state": "failed", "outcome": None}, "failed "),
        ({"outcome": "already_gone"}, "deleted already_gone"),
    ],
)
def test_the_demo_reports_a_record_that_is_wrong(played, fields, problem):
    simulator, generation, forged = played

    assert against(simulator, generation, deleted(generation, **fields), forged) == [problem]


def test_the_demo_reports_a_kept_generation_that_was_to_be_deleted(played):
    simulator, generation, forged = played
    kept = Scene("kept", ends=State.KEPT, outcome=None)
    record = deleted(generation, state="kept", outcome=None)

    assert against(simulator, generation, record, forged, scene=kept) == ["a DELETE was sent, or it is gone"]


def test_the_demo_reports_a_forged_webhook_that_was_accepted(played):
    simulator, generation, forged = played
    simulator.calls.append(call(forged, DUE))

    assert against(simulator, generation, deleted(generation), forged, forged_status=202) == [
        "it was answered 202",
        "it was called",
    ]


@pytest.mark.parametrize(
    ("requests", "problem"),
    [
        ((), "the app answered nothing"),
        ((taken(401, is_genuine=False),), "the app answered 401"),
        ((taken(), taken()), "the app answered 204, 204"),
        ((taken(503), taken()), "the app answered 503, 204"),
    ],
)
def test_the_demo_reports_an_app_that_did_not_get_its_webhook_once(played, requests, problem):
    simulator, generation, forged = played

    assert against(simulator, generation, deleted(generation), forged, requests=requests)[0] == problem


def test_the_demo_reports_a_delete_before_the_app_has_taken_the_webhook(played):
    simulator, generation, forged = played
    late = (taken(at=DUE + timedelta(seconds=3)),)

    assert against(simulator, generation, deleted(generation), forged, requests=late) == [
        "a DELETE came before the app had taken its webhook"
    ]


def test_the_demo_reports_a_delivery_whose_id_changes(played):
    simulator, generation, forged = played
    scene = Scene("busy", refusals=1)
    for other, problems in (("d1", []), ("d2", ["Mayfly-Delivery changed between two attempts"])):
        requests = (taken(503), taken(delivery=other))

        assert against(simulator, generation, deleted(generation), forged, scene=scene, requests=requests) == problems


def test_the_demo_reports_a_forged_webhook_that_was_forwarded(played):
    simulator, generation, forged = played

    assert against(simulator, generation, deleted(generation), forged, forwarded=(taken(),)) == ["the app got it"]


@pytest.fixture
async def app():
    """The demo's app, and a client of it."""
    app = App(sync_secret=SECRET, signing_secret=FORWARD_SECRET)
    async with (
        serving(app.make_asgi(), "127.0.0.1", 0) as port,
        http_client(f"http://127.0.0.1:{port}") as client,
    ):
        yield app, client


async def test_the_demos_app_takes_what_both_have_signed_after_its_refusals(app):
    receiver, client = app
    sent = webhook()
    receiver.refusals[sent.id] = 1
    statuses = [
        (await client.post(PATH, content=sent.body, headers=forwarded_headers(sent, delivery="d1"))).status_code
        for _ in range(2)
    ]

    assert statuses == [503, 204]
    assert [(one.is_genuine, one.delivery) for one in receiver.requests_about(sent.id)] == [(True, "d1")] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"Sync-Signature": "t=1,v1=00"},
        {"Sync-Signature": ""},
        {"webhook-signature": "v1,AAAA"},
        {"webhook-timestamp": "1"},
        {"Mayfly-Delivery": "another"},
    ],
)
async def test_the_demos_app_refuses_what_only_one_has_signed(app, wrong):
    receiver, client = app
    sent = webhook()
    answer = await client.post(PATH, content=sent.body, headers=forwarded_headers(sent) | wrong)

    assert answer.status_code == 401
    assert receiver.requests_about(sent.id) == ()


def test_the_picture_in_the_readme_shows_the_scenes():
    picture = (Path(__file__).parents[2] / "deploy" / "demo.svg").read_text().replace("&#160;", " ")

    assert all(scene.title in picture for scene in SCENES)
    assert "waits until its app has the webhook" in picture
