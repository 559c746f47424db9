"""The commands that read the ledger and move records: output and exit codes."""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta

import click
import pytest
from click.testing import CliRunner

from service import __version__
from service.cli import main
from service.commands import record_moves
from service.core.generation import read_generation
from service.core.key import Key
from service.core.lifecycle import State
from service.core.retention import Policy, decide_retention
from service.ledger import heartbeats, pausing, receiving
from service.ledger.opening import open_database
from service.ledger.pausing import Kind, Pause
from service.ledger.receiving import Arrival
from service.ledger.schema import records
from tests.support.commands import command
from tests.support.webhooks import SECRET, webhook

NOW = datetime.now(UTC)
HIDDEN = "hunter2"


@pytest.fixture
def mayfly(database_url, tmp_path):
    """Run a command on the ledger of the test: ``await mayfly("stats", "--json")``."""
    environment = {
        "MAYFLY_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "SYNC_WEBHOOK_SECRET": SECRET,
        "SYNC_API_KEY": "sk-sim",
    }

    async def run(*arguments: str, **changes):
        return await asyncio.to_thread(command, *arguments, **environment | changes)

    return run


def arrive(connection, *, state=State.SCHEDULED, **fields):
    """Write the record of a generation, in *state*."""
    body = webhook(**fields).body
    generation = read_generation(body)
    retention = decide_retention(
        Policy(timedelta(hours=1), timedelta(minutes=1)), webhook_url=generation.webhook_url, sent_at=NOW, now=NOW
    )
    receiving.receive(
        connection, [Arrival(Key("default", generation.id), generation, body.decode(), retention, NOW, NOW)]
    )
    if state is not State.SCHEDULED:
        change = {
            "state": state,
            "wake_at": None,
            "last_error": "the API answered 400" if state is State.FAILED else None,
        }
        connection.execute(records.update().where(records.c.id == generation.id).values(change))
    return generation.id


def make_due(connection, generation_id):
    """Let the record have been due five minutes ago."""
    past = datetime.now(UTC) - timedelta(minutes=5)
    return connection.execute(records.update().where(records.c.id == generation_id).values(due_at=past)).rowcount


@pytest.fixture
async def ledger(database_url):
    """Write into the ledger of the test: ``await ledger(arrive, status="FAILED")``."""
    async with open_database(database_url) as database:

        async def write(function, *arguments: object, **options):
            return await database.write(lambda connection: function(connection, *arguments, **options))

        yield write


async def test_records_are_listed_newest_first(mayfly, ledger):
    ids = [await ledger(arrive) for _ in range(3)]

    result = await mayfly("records", "list")

    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ids[::-1]


async def test_a_list_for_scripts_is_the_page_of_the_api_and_its_cursor_leads_on(mayfly, ledger):
    ids = [await ledger(arrive) for _ in range(3)]

    first = json.loads((await mayfly("records", "list", "--json", "--limit", "2")).stdout)
    cursor = first["nextCursor"]
    second = json.loads((await mayfly("records", "list", "--json", "--cursor", cursor)).stdout)

    assert [item["id"] for item in first["items"] + second["items"]] == ids[::-1]
    assert second["nextCursor"] is None
    assert first["items"][0]["outputUrl"].startswith("https://api.sync.so/")


@pytest.mark.parametrize(
    "options",
    [("--state", "failed"), ("--status", "FAILED"), ("--project", "p-1"), ("--find", "TAKE_7")],
)
async def test_a_list_is_narrowed(mayfly, ledger, options):
    await ledger(arrive)
    wanted = await ledger(arrive, state=State.FAILED, id="take_7", status="FAILED", projectId="p-1")

    result = await mayfly("records", "list", *options)

    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [wanted]
    assert "needs an operator: the API answered 400" in result.stdout


async def test_an_empty_ledger_says_so(mayfly):
    result = await mayfly("records", "list")

    assert (result.exit_code, result.stdout) == (0, "No records.\n")


async def test_one_record_is_shown_with_its_history(mayfly, ledger):
    wanted = await ledger(arrive, outputFileName="take [7]")

    text = await mayfly("records", "show", wanted)
    record = json.loads((await mayfly("records", "show", wanted, "--json")).stdout)

    assert text.exit_code == 0
    assert "take [7]" in text.stdout, "what came from outside is text, not markup"
    assert "rule=MAYFLY_TTL" in text.stdout
    assert record["id"] == wanted
    assert [event["move"] for event in record["events"]] == ["receive"]


@pytest.mark.parametrize("name", ["show", "release", "keep", "retry", "reopen"])
async def test_a_missing_record_is_reported_in_one_line(mayfly, name):
    result = await mayfly("records", name, "nobody")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("mayfly: there is no record of generation nobody")
    assert result.stderr.count("\n") == 1


async def test_an_invalid_cursor_is_reported_in_one_line(mayfly):
    result = await mayfly("records", "list", "--cursor", "zzz")

    assert (result.exit_code, result.stderr) == (1, "mayfly: invalid cursor: use the nextCursor of a page\n")


async def test_hold_release_and_keep_move_a_record(mayfly, ledger):
    wanted = await ledger(arrive)

    held = await mayfly("records", "hold", wanted, "--reason", "legal")
    released = await mayfly("records", "release", wanted)
    kept = await mayfly("records", "keep", wanted)
    record = json.loads((await mayfly("records", "show", wanted, "--json")).stdout)

    told = [result.stdout for result in (held, released, kept)]
    assert (told[0], told[2]) == (f"{wanted} is held.\n", f"{wanted} is kept.\n")
    assert told[1].startswith(f"{wanted} is scheduled. It is due in ")
    assert [event["move"] for event in record["events"]] == ["receive", "hold", "release", "keep"]
    assert record["events"][1]["detail"] == {"reason": "legal"}
    assert record["events"][1]["actor"].endswith("(command line)")
    assert record["dueAt"] is None


async def test_a_held_record_without_a_due_time_is_kept_after_its_release(mayfly, ledger):
    wanted = await ledger(arrive, webhookUrl="https://hooks.example.com/webhooks/sync?ttl=forever&hold=legal")

    before = json.loads((await mayfly("records", "show", wanted, "--json")).stdout)
    released = await mayfly("records", "release", wanted)
    record = json.loads((await mayfly("records", "show", wanted, "--json")).stdout)

    assert (before["state"], released.stdout) == (
        "held",
        f"{wanted} is kept. It has no due time; release it again to have it deleted.\n",
    )
    assert [event["move"] for event in record["events"]] == ["receive", "hold", "release", "keep"]
    assert record["nextAttemptAt"] is None


async def test_retry_schedules_a_failed_record(mayfly, ledger):
    wanted = await ledger(arrive, state=State.FAILED)

    result = await mayfly("records", "retry", wanted)

    assert result.stdout == f"{wanted} is scheduled.\n"


async def test_an_illegal_move_is_reported_in_one_line(mayfly, ledger):
    wanted = await ledger(arrive, state=State.DELETED)

    result = await mayfly("records", "hold", wanted)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"mayfly: {wanted}: cannot hold: the record is deleted\n"


async def test_each_of_several_records_is_reported_on_a_line(mayfly, ledger):
    ids = [await ledger(arrive) for _ in range(3)]
    deleted = await ledger(arrive, state=State.DELETED)

    result = await mayfly("records", "keep", ids[0], deleted, "nobody", "-", stdin=f"{ids[1]}\n\n {ids[2]} \n".encode())
    again = await mayfly("records", "keep", *ids)

    assert result.exit_code == 1
    assert result.stdout.splitlines() == [f"{one} is kept." for one in ids]
    assert result.stderr.splitlines() == [
        f"mayfly: {deleted}: cannot keep: the record is deleted",
        "mayfly: there is no record of generation nobody",
    ]
    assert again.exit_code == 0
    assert again.stdout.splitlines() == [f"{one} is kept already." for one in ids]


async def test_a_move_needs_an_id(mayfly):
    result = await mayfly("records", "hold")

    assert result.exit_code == 2


async def test_an_overdue_record_is_not_released_without_a_word(mayfly, ledger):
    overdue, waiting = [await ledger(arrive, state=State.HELD) for _ in range(2)]
    await ledger(make_due, overdue)

    refused = await mayfly("records", "release", overdue, waiting)
    state = json.loads((await mayfly("records", "show", overdue, "--json")).stdout)["state"]
    confirmed = await mayfly("records", "release", "--yes", overdue)

    assert (refused.exit_code, state) == (1, "held")
    assert refused.stderr == (
        f"mayfly: {overdue} stays held: it was due 5 min ago and would be deleted now; "
        "add --yes, or --grace 1h to let it wait\n"
    )
    assert refused.stdout.startswith(f"{waiting} is scheduled. It is due in ")
    assert (confirmed.exit_code, confirmed.stdout) == (0, f"{overdue} is scheduled. It is due now.\n")


async def test_a_grace_lets_an_overdue_record_wait(mayfly, ledger):
    overdue = await ledger(arrive, state=State.HELD)
    await ledger(make_due, overdue)

    result = await mayfly("records", "release", overdue, "--grace", "3h")
    invalid = await mayfly("records", "release", overdue, "--grace", "3")

    assert result.exit_code == 0
    assert result.stdout.startswith(f"{overdue} is scheduled. It is due in 2 h, at ")
    assert invalid.exit_code == 2
    assert "it accepts a number with a unit" in invalid.stderr


@pytest.mark.parametrize(("answer", "then"), [("y", (0, "scheduled")), ("n", (1, "held"))])
async def test_a_terminal_is_asked_before_a_release_that_deletes_at_once(mayfly, ledger, monkeypatch, answer, then):
    overdue = await ledger(arrive, state=State.HELD)
    await ledger(make_due, overdue)
    monkeypatch.setattr(record_moves, "is_terminal", lambda: True)

    result = await mayfly("records", "release", overdue, stdin=f"{answer}\n".encode())
    record = json.loads((await mayfly("records", "show", overdue, "--json")).stdout)

    assert f"{overdue}: it was due 5 min ago and will be deleted now. Release it? [y/N]" in result.stdout
    assert (result.exit_code, record["state"]) == then


async def test_a_kept_record_is_released_after_the_minimum_ttl(mayfly, ledger):
    kept = await ledger(arrive)
    await mayfly("records", "keep", kept)

    result = await mayfly("records", "release", kept, MAYFLY_MIN_TTL="3h")

    assert result.stdout.startswith(f"{kept} is scheduled. It is due in 2 h, at ")


async def test_reopen_schedules_a_record_that_was_deleted_unseen(mayfly, ledger):
    unseen, deleted = [await ledger(arrive, state=State.DELETED) for _ in range(2)]
    gone = records.update().where(records.c.id == unseen).values(outcome="already_gone", deleted_at=NOW)
    await ledger(lambda connection: connection.execute(gone).rowcount)

    result = await mayfly("records", "reopen", unseen, deleted, "--grace", "3h")
    record = json.loads((await mayfly("records", "show", unseen, "--json")).stdout)

    assert result.exit_code == 1
    assert result.stdout.startswith(f"{unseen} is scheduled. It is due in 2 h, at ")
    assert result.stderr.startswith(f"mayfly: {deleted}: cannot reopen: the record is deleted, and")
    assert (record["outcome"], record["deletedAt"], record["receipt"]) == (None, None, None)


@pytest.mark.parametrize("status", ["completed", "COMPLETED", "Completed"])
async def test_the_case_of_a_status_does_not_matter(mayfly, ledger, status):
    wanted = await ledger(arrive)

    result = await mayfly("records", "list", "--status", status)

    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [wanted]


async def test_a_record_shows_what_blocks_its_deletion(mayfly, ledger):
    waiting, held = await ledger(arrive), await ledger(arrive, state=State.HELD)
    await ledger(lambda connection: heartbeats.record_beat(connection, heartbeats.WORKER, now=datetime.now(UTC)))
    before = await mayfly("records", "show", waiting)
    await mayfly("pause", "--reason", "audit")

    text = await mayfly("records", "show", waiting, MAYFLY_DRY_RUN="true")
    record = json.loads((await mayfly("records", "show", waiting, "--json")).stdout)
    other = await mayfly("records", "show", held, MAYFLY_DRY_RUN="true")

    assert "Not deleted now" not in before.stdout
    assert "Not deleted now: deletions are paused since" in text.stdout
    assert ": audit. mayfly resume ends it." in text.stdout
    assert "Not deleted now: MAYFLY_DRY_RUN is set here." in text.stdout
    assert [(one["kind"], one["reason"]) for one in record["blockedBy"]] == [("operator", "audit")]
    assert "Not deleted now" not in other.stdout


async def test_a_hold_has_an_end_and_says_so(mayfly, ledger):
    wanted = await ledger(arrive)

    held = await mayfly("records", "hold", wanted, "--until", "2099-12-30")
    again = await mayfly("records", "hold", wanted, "--until", "1d")
    listed = await mayfly("records", "list")
    invalid = await mayfly("records", "hold", wanted, "--until", "tomorrow")

    assert held.stdout == f"{wanted} is held until 2099-12-31 00:00:00 UTC.\n"
    assert again.stdout == f"{wanted} is held already until 2099-12-31 00:00:00 UTC.\n"
    assert "held until 2099-12-31 00:00:00 UTC" in listed.stdout
    assert (invalid.exit_code, "it accepts a date, 2026-12-31" in invalid.stderr) == (2, True)


async def test_a_generation_without_a_record_is_held_and_explained(mayfly):
    before = await mayfly("explain", "g-unseen")
    held = await mayfly("records", "hold", "g-unseen", "--reason", "audit")
    explained = await mayfly("explain", "g-unseen")
    shown = await mayfly("records", "show", "g-unseen")
    released = await mayfly("records", "release", "g-unseen")

    assert (before.exit_code, before.stdout.startswith("There is no record of generation g-unseen, so")) == (0, True)
    assert held.stdout == "g-unseen has no record yet. It is held from its first webhook on.\n"
    assert "on hold before its first webhook, by " in explained.stdout
    assert (shown.exit_code, "g-unseen; it is held before its first webhook, by " in shown.stderr) == (1, True)
    assert released.stdout == "g-unseen has no record. Its hold is removed.\n"


async def test_explain_is_what_show_ends_with(mayfly, ledger):
    wanted = await ledger(arrive)

    shown = await mayfly("records", "show", wanted)
    explained = await mayfly("explain", wanted)
    found = json.loads((await mayfly("explain", wanted, "--json")).stdout)

    assert shown.stdout.endswith(f"\n\n{explained.stdout}")
    assert (found["explain"], found["state"]) == (explained.stdout.rstrip("\n"), "scheduled")
    assert [one["kind"] for one in found["blockedBy"]] == ["no_worker"]


async def test_a_project_is_held_and_released_after_a_count(mayfly, ledger):
    ids = [await ledger(arrive, projectId="film") for _ in range(3)]
    await ledger(arrive, projectId="film", state=State.DELETED)
    await ledger(arrive, projectId="other")

    counted = await mayfly("records", "hold", "--project", "film", "--dry-run")
    refused = await mayfly("records", "hold", "--project", "film")
    held = await mayfly("records", "hold", "--project", "film", "--yes", "--reason", "audit")
    unsure = await mayfly("records", "release", "--project", "film", "--yes")
    other = await mayfly("records", "release", "--project", "film", "--expect", "2")
    released = await mayfly("records", "release", "--project", "film", "--expect", "3")

    preview = "These match: 3 scheduled, 1 deleted. Those deleted stay as they are.\n"
    assert (counted.exit_code, counted.stdout) == (0, preview)
    assert (refused.exit_code, refused.stderr) == (1, "mayfly: nothing was moved; add --yes to hold 3 records\n")
    assert held.stdout.splitlines()[1] == "3 are held; 1 came too late: deleted, or their DELETE may be in progress."
    assert (unsure.exit_code, "add --expect 3" in unsure.stderr) == (1, True)
    assert (other.exit_code, "3 records match, not 2: nothing was moved" in other.stderr) == (1, True)
    assert released.stdout.splitlines()[1] == "3 are released."
    assert json.loads((await mayfly("records", "show", ids[0], "--json")).stdout)["state"] == "scheduled"


async def test_a_hold_by_label_holds_those_with_this_label(mayfly, ledger):
    url = "https://hooks.example.com/webhooks/sync?label.customer="
    await ledger(arrive, webhookUrl=f"{url}acme")
    await ledger(arrive, webhookUrl=f"{url}other")

    held = await mayfly("records", "hold", "--label", "customer=acme", "--yes")

    assert held.stdout.splitlines() == ["These match: 1 scheduled.", "1 is held."]


@pytest.mark.parametrize(
    "arguments", [("g1", "--project", "film"), (), ("g1", "--dry-run"), ("--state", "vanished"), ("--yes",)]
)
async def test_a_hold_of_ids_and_a_filter_is_refused(mayfly, arguments):
    result = await mayfly("records", "hold", *arguments)

    assert (result.exit_code, result.stdout) == (2, "")


async def test_a_missing_ledger_is_named_by_its_absolute_path(mayfly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    relative = await mayfly("stats", MAYFLY_DATABASE_URL="", MAYFLY_DATA_DIR="./somewhere")
    absolute = await mayfly("stats", MAYFLY_DATABASE_URL="", MAYFLY_DATA_DIR=str(tmp_path / "else"))

    where = f"mayfly: there is no ledger at {tmp_path}/somewhere/ledger.db yet"
    why = "MAYFLY_DATA_DIR, somewhere, is relative to the current directory"
    assert relative.stderr == f"{where}: {why}; mayfly up or mayfly migrate makes it\n"
    assert f"there is no ledger at {tmp_path}/else/ledger.db yet; mayfly up" in absolute.stderr


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("record", "list"), "No such command 'record': did you mean records?"),
        (("stat",), "No such command 'stat': did you mean stats?"),
        (("up", "--port", "9000"), "No such option '--port': set MAYFLY_PORT in the environment."),
        (("--host", "::", "api"), "No such option '--host': set MAYFLY_HOST in the environment."),
        (("worker", "--api-key", "k"), "No such option '--api-key': set SYNC_API_KEY in the environment."),
    ],
)
async def test_a_mistyped_command_or_a_setting_as_an_option_gets_advice(mayfly, arguments, advice):
    result = await mayfly(*arguments)

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {advice}"


async def test_stats_show_the_number_per_state_and_the_most_overdue_deletion(mayfly, ledger):
    await ledger(arrive)
    await ledger(arrive, state=State.FAILED)
    late = await ledger(arrive)
    five_minutes_ago = datetime.now(UTC) - timedelta(minutes=5)
    overdue = records.update().where(records.c.id == late).values(wake_at=five_minutes_ago)
    await ledger(lambda connection: connection.execute(overdue).rowcount)

    text = (await mayfly("stats")).stdout
    numbers = json.loads((await mayfly("stats", "--json")).stdout)

    assert {state: number for state, number in numbers["records"].items() if number} == {"scheduled": 2, "failed": 1}
    assert numbers["due"] == 1
    assert 300 <= numbers["oldestOverdueSeconds"] < 400
    assert numbers["pauses"] == []
    assert "Due now: 1, the longest for 3" in text
    assert "No worker has been seen.\nDeletions are not paused, but need a worker that runs." in text
    assert numbers["workerSeenAt"] is None


async def test_stats_say_when_a_worker_was_last_seen(mayfly, ledger):
    await ledger(heartbeats.record_beat, heartbeats.WORKER, now=datetime.now(UTC))
    running = (await mayfly("stats")).stdout
    seen_at = datetime.now(UTC) - timedelta(hours=1)
    await ledger(heartbeats.record_beat, heartbeats.WORKER, now=seen_at)
    gone = (await mayfly("stats")).stdout
    numbers = json.loads((await mayfly("stats", "--json")).stdout)

    assert "A worker was last seen" in running
    assert "Deletions are running." in running
    assert "A worker was last seen 360" in gone
    assert "Deletions are running." not in gone
    assert datetime.fromisoformat(numbers["workerSeenAt"]) == seen_at


async def test_a_second_pause_keeps_the_first_reason(mayfly):
    first = await mayfly("pause", "--reason", "audit")
    second = await mayfly("pause", "--reason", "another")
    paused = json.loads((await mayfly("stats", "--json")).stdout)["pauses"]
    text = (await mayfly("stats")).stdout
    ended = await mayfly("resume")
    again = await mayfly("resume")

    assert first.stdout == "Deletions are paused.\n"
    assert "already" in second.stdout
    assert [(one["kind"], one["reason"]) for one in paused] == [("operator", "audit")]
    assert "Deletions are paused:\n  operator since" in text
    assert ended.stdout == "Deletions are resumed. Ended: operator.\n"
    assert again.stdout == "There was no pause to end.\n"


async def test_resume_ends_the_pause_of_a_refused_key_too(mayfly, ledger):
    await ledger(pausing.pause, Pause(Kind.UNAUTHORIZED, NOW, "worker", "the API refuses the key", NOW))

    result = await mayfly("resume")

    assert result.stdout == "Deletions are resumed. Ended: unauthorized.\n"


async def test_reading_commands_create_no_ledger(mayfly, tmp_path):
    result = await mayfly("stats", MAYFLY_DATABASE_URL="")

    assert result.exit_code == 1
    assert "mayfly up or mayfly migrate" in result.stderr
    assert not (tmp_path / "data").exists()


async def test_migrate_leaves_current_tables_unchanged(mayfly):
    result = await mayfly("migrate")

    assert result.exit_code == 0
    assert result.stdout.endswith(" already.\n")


@pytest.mark.parametrize("arguments", [("stats",), ("records", "list"), ("pause",), ("doctor",), ("migrate",), ("up",)])
async def test_invalid_settings_are_reported_in_a_line_each_without_their_values(mayfly, arguments):
    result = await mayfly(*arguments, MAYFLY_TTL=HIDDEN, MAYFLY_PORT=HIDDEN, SYNC_WEBHOOK_SECRET=HIDDEN)

    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert [line.split()[1] for line in lines] == ["SYNC_WEBHOOK_SECRET", "MAYFLY_TTL", "MAYFLY_PORT"]
    assert HIDDEN not in result.stderr


async def test_an_unreachable_database_is_reported_without_its_password(mayfly):
    url = f"postgresql://mayfly:{HIDDEN}@127.0.0.1:1/mayfly"

    result = await mayfly("stats", MAYFLY_DATABASE_URL=url)

    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "MAYFLY_DATABASE_URL" in result.stderr
    assert HIDDEN not in result.stderr


def test_every_command_explains_itself_and_its_options():
    for path in _paths(main, ()):
        result = CliRunner().invoke(main, [*path, "--help"])

        assert result.exit_code == 0, path
        assert len(result.output.splitlines()) > 4, path


def test_every_option_has_its_help():
    for path in _paths(main, ()):
        for parameter in _command(path).params:
            assert not isinstance(parameter, click.Option) or parameter.help, (path, parameter.name)


def test_the_version_option_prints_the_version():
    assert CliRunner().invoke(main, ["--version"]).output == f"mayfly, version {__version__}\n"


def _command(path):
    found: click.Command | None = main
    for name in path:
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), name)
    assert found is not None
    return found


def _paths(group, path):
    for name in group.list_commands(click.Context(group)):
        inner = group.get_command(click.Context(group), name)
        yield (*path, name)
        if isinstance(inner, click.Group):
            yield from _paths(inner, (*path, name))


RULES = """
[[rule]]
id = "failures"
status = "FAILED"
ttl = "1h"

[[rule]]
id = "old"
expires = 2020-01-01
"""


@pytest.fixture
def policy(tmp_path):
    """Run ``mayfly policy`` on a file with the given rules."""
    file = tmp_path / "mayfly.toml"

    def run(*arguments: str, text=RULES, **environment):
        file.write_text(text)
        return command("policy", *arguments, **environment), file

    return run


def test_policy_check_shows_the_rules_in_plain_words(policy, tmp_path):
    result, file = policy("check", str(tmp_path / "mayfly.toml"), MAYFLY_TTL="3d")

    assert result.exit_code == 0
    assert f"{file} is valid: 2 rules." in result.stdout
    assert re.search(r"1  failures +status is FAILED +deleted after 1h", result.stdout)
    assert re.search(r"MAYFLY_TTL +every other generation +deleted after 3d", result.stdout)
    assert f'warning: {file}:7: rule "old": expires has passed' in result.stderr


def test_policy_check_reads_the_file_of_the_environment(policy, tmp_path):
    result, file = policy("check", "--json", MAYFLY_CONFIG=str(tmp_path / "mayfly.toml"))
    found = json.loads(result.stdout)

    assert found["file"] == str(file)
    assert [rule["id"] for rule in found["rules"]] == ["failures", "old", "MAYFLY_TTL"]
    assert len(found["warnings"]) == 1


def test_policy_check_names_each_problem_and_exits_with_2(policy, tmp_path):
    result, file = policy(
        "check", str(tmp_path / "mayfly.toml"), text=RULES.replace("1h", "1").replace("status", "staus")
    )

    assert result.exit_code == 2
    assert [line.partition("mayfly: ")[2].partition(" rule")[0] for line in result.stderr.splitlines()] == [
        f"{file}:4:",
        f"{file}:5:",
    ]


@pytest.mark.parametrize("arguments", [(), ("none.toml",)])
def test_policy_check_without_a_file_exits_with_2(policy, arguments):
    result, _ = policy("check", *arguments)

    assert result.exit_code == 2
    assert "there is no file to check" in result.stderr or "cannot be read: No such file" in result.stderr


def test_policy_schema_prints_the_schema_of_the_file(policy):
    result, _ = policy("schema")

    assert "RuleTable" in json.loads(result.stdout)["$defs"]
