"""What every command prints of foreign text: nothing of it controls the terminal."""

import asyncio
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import click
import pytest
import structlog

from service.cli import main
from service.core.lifecycle import State
from service.ledger import pausing
from service.ledger.opening import open_database
from service.ledger.pausing import Kind, Pause
from service.ledger.schema import records
from service.runtime.logging import configure_logging
from tests.support.app import Answer, App
from tests.support.commands import command
from tests.support.deliveries import alter, forward
from tests.support.ledger import HOUR, arrival, receive
from tests.support.webhooks import SECRET

# An escape sequence, its form in one C1 character, a text that runs backwards, markup of rich.
FOREIGN = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066\u2069\u200f[bold]x[/bold]\nmayfly: all is well"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
# How each command is run; those that serve print logs alone.
COMMANDS: dict[str, list[tuple[str, ...]]] = {
    "records list": [("--state", "failed"), ("--state", "held"), ("--state", "kept"), ("--json",), ("--find", FOREIGN)],
    "records show": [("failed",), ("failed", "--json"), ("held",), ("kept",), ("scheduled",), (FOREIGN,)],
    "explain": [("scheduled",), ("failed",), ("held",), ("kept",), (FOREIGN,), ("held", "--json")],
    "records add": [
        (FOREIGN,),
        ("failed", "--hold", FOREIGN),
        ("new", "--hold", FOREIGN, "--json"),
        ("new", "--ttl", FOREIGN),
        ("new", "--label", f"name={FOREIGN}"),
        ("new", "--account", FOREIGN),
    ],
    "records hold": [("--find", FOREIGN), ("failed", "--reason", FOREIGN), ("held",), (FOREIGN, "kept")],
    "records release": [("held",), ("kept", "--yes", "--reason", FOREIGN), (FOREIGN,)],
    "records keep": [("failed", "--reason", FOREIGN), (FOREIGN,)],
    "records retry": [("failed", "--reason", FOREIGN), (FOREIGN,)],
    "records reopen": [("failed",), (FOREIGN,)],
    "records forget": [("failed",), ("failed", "--yes", "--reason", FOREIGN), ("held", "--yes"), ("--yes", FOREIGN)],
    "records export": [(), ("--format", "csv"), ("--find", FOREIGN)],
    "policy check": [(), (FOREIGN,)],
    "policy schema": [()],
    "policy diff": [(), (FOREIGN,), ("--json",)],
    "policy apply": [(), ("--existing", "--yes"), ("--existing", FOREIGN)],
    "batches list": [(), ("--json",)],
    "batches show": [(FOREIGN,)],
    "batches retry": [(FOREIGN,)],
    "forwards list": [(), ("--state", "failed"), ("--json",), ("--target", FOREIGN), ("--cursor", FOREIGN)],
    "forwards show": [("a-delivery",), ("a-delivery", "--json"), (FOREIGN,)],
    "forwards replay": [("a-delivery",), (FOREIGN,), ("--target", FOREIGN), ("--state", "failed", "--dry-run")],
    "sweep": [("--dry-run",), ("--apply", FOREIGN), ("--account", FOREIGN)],
    "stats": [(), ("--json",)],
    "pause": [("--reason", FOREIGN)],
    "resume": [()],
    "doctor": [(), ("--json",)],
    "send": [
        ("--status", "FAILED", "--url", "http://127.0.0.1:1/\u202e?ttl=1m"),
        ("--forward", "--id", FOREIGN, "--url", f"http://127.0.0.1:1/webhooks/sync?label.of={FOREIGN}"),
        ("--forward", "--json"),
    ],
    "migrate": [()],
}
SERVING = {"up", "api", "worker", "demo", "simulate"}


def execute(connection, *, statement):
    """Execute *statement*."""
    return connection.execute(statement).rowcount


@pytest.fixture
async def environment(sqlite_url, tmp_path):
    """The environment of a ledger with foreign text in every column that has some, and in a pause."""
    async with open_database(sqlite_url) as database:
        fields: dict[str, Any] = {
            "outputFileName": FOREIGN,
            "model": FOREIGN,
            "error": FOREIGN,
            "options": {"x": FOREIGN},
        }
        for state in ("scheduled", "held", "failed", "kept"):
            await receive(database, arrival(id=state, due_in=HOUR, webhookUrl=f"https://a/{FOREIGN}", **fields))
            change = {
                "state": State(state),
                "last_error": FOREIGN,
                "hold_by": FOREIGN,
                "hold_reason": FOREIGN,
                "rule": FOREIGN,
            }
            update = records.update().where(records.c.id == state).values(change)
            await database.write(partial(execute, statement=update))
        made = await forward(database, status=FOREIGN, id=FOREIGN, error=FOREIGN)
        answers = {"last_error": FOREIGN, "last_answer": FOREIGN, "content_type": FOREIGN, "state": "failed"}
        await alter(database, made, id="a-delivery", target=FOREIGN, wake_at=None, **answers)
        pause = Pause(Kind.DAILY_LIMIT, datetime.now(UTC), FOREIGN, FOREIGN, None)
        await database.write(partial(pausing.pause, wanted=pause))
    config = tmp_path / "mayfly.toml"
    async with App() as app:
        app.default = Answer(503, body=FOREIGN)
        table = '[[forward]]\nid = "{}"\nurl = "{}"\n{}\n'
        config.write_text(table.format("a", app.url, "") + table.format("b", app.url, 'labels = { of = "no" }'))
        yield _make_environment(sqlite_url, tmp_path) | {"MAYFLY_CONFIG": str(config)}


def _make_environment(sqlite_url, tmp_path):
    return {
        "MAYFLY_DATABASE_URL": sqlite_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "SYNC_WEBHOOK_SECRET": SECRET,
        "SYNC_API_KEY": "sk-sim",
        "SYNC_BASE_URL": "http://127.0.0.1:1",
    }


@pytest.mark.parametrize("name", COMMANDS)
async def test_no_command_prints_foreign_text_that_controls_the_terminal(environment, name):
    for arguments in COMMANDS[name]:
        result = await asyncio.to_thread(command, *name.split(), *arguments, **environment)

        assert CONTROL.findall(result.stdout + result.stderr) == [], arguments
        assert "\nmayfly: all is well" not in result.stdout + result.stderr, arguments


async def test_foreign_text_is_shown_escaped_and_not_dropped(environment):
    shown = await asyncio.to_thread(command, "records", "show", "failed", **environment)
    paused = await asyncio.to_thread(command, "stats", **environment)

    tried = await asyncio.to_thread(command, "send", "--forward", **environment)

    assert r"| \x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066\u2069\u200f[bold]x[/bold]" in tried.stdout
    for output in (shown.stdout, paused.stdout):
        joined = re.sub(r"\s*\n\s*", "", output)
        assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066\u2069\u200f[bold]x[/bold]\nmayfly" in joined


def test_every_command_is_run_with_foreign_text_or_serves():
    assert {*COMMANDS, *SERVING} == set(_leaves(main, ""))


def test_logs_for_a_terminal_show_foreign_text_escaped(capsys):
    before = logging.getLogger().handlers[:]
    try:
        configure_logging("console")
        structlog.get_logger().warning("record.odd", generation=FOREIGN, exc_info=ValueError(FOREIGN))
        logging.getLogger("a library").warning("about %s", FOREIGN)
    finally:
        structlog.reset_defaults()
        logging.getLogger().handlers[:] = before
    text = capsys.readouterr().err

    assert text.count(r"x1b]0;owned") == 3
    assert not CONTROL.findall(re.sub("\x1b\\[[0-9]*m", "", text)), "all but the colours of the logs"


def _leaves(group: click.Group, path: str) -> Iterator[str]:
    for name in group.list_commands(click.Context(group)):
        inner: click.Command | None = group.get_command(click.Context(group), name)
        if isinstance(inner, click.Group):
            yield from _leaves(inner, f"{path}{name} ")
        else:
            yield f"{path}{name}"
