"""`mayfly sweep`: what it shows, what a plan may say, and what is adopted."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest

from service.core.key import Key
from service.ledger.opening import open_database
from service.ledger.schema import records
from tests.conftest import API_KEY
from tests.support.commands import command
from tests.support.ledger import ACCOUNT, HOUR, arrival, moves_of, receive, row_of
from tests.support.webhooks import SECRET

BASE = "https://mayfly.example"
OURS = f"{BASE}/webhooks/sync"
NOW = datetime.now(UTC)


@pytest.fixture
def mayfly(sqlite_url, redis_url, simulator, tmp_path):
    """Run a command on the ledger of the test and the simulator: ``await mayfly("sweep", "--json")``."""
    environment = {
        "MAYFLY_DATABASE_URL": sqlite_url.render_as_string(hide_password=False),
        "MAYFLY_REDIS_URL": redis_url,
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "MAYFLY_API_RATE": "100000/second",
        "SYNC_BASE_URL": simulator.url,
        "SYNC_WEBHOOK_SECRET": SECRET,
        "SYNC_API_KEY": API_KEY,
    }

    async def run(*arguments: object, **changes):
        return await asyncio.to_thread(command, "sweep", *map(str, arguments), **environment | changes)

    return run


@pytest.fixture
async def ledger(sqlite_url):
    """The ledger of the test."""
    async with open_database(sqlite_url) as database:
        yield database


@pytest.fixture
def old(simulator):
    """Three generations of last year, of other people, and one of today."""
    simulator.add(created_at=NOW, webhook_url="https://app.example/hook")
    return [
        simulator.add(created_at=NOW - timedelta(days=365 + day), project_id="film", output_file_name=f"take {day}")
        for day in range(3)
    ]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


async def planned(mayfly, tmp_path):
    """Write the plan of the old generations, and return its path and lines."""
    path = tmp_path / "plan.jsonl"
    result = await mayfly("--older-than", "30d", "--all", "--plan", path)
    assert result.exit_code == 0, result.output
    return path, lines_of(path)


async def test_what_is_ours_is_adopted_and_counted_by_status_and_project(mayfly, simulator, ledger):
    missed = [simulator.add(webhook_url=OURS, status=status) for status in ("COMPLETED", "FAILED")]
    simulator.add()
    result = await mayfly(MAYFLY_PUBLIC_URL=BASE)

    assert result.exit_code == 0
    for line in ("3 generations at sync.so.", "1 have no webhookUrl of this account", "2 without a record"):
        assert line in result.output
    assert "Adopted: 2 scheduled. The first is deleted in" in result.output
    for one in missed:
        assert (await row_of(ledger, Key(ACCOUNT, one.id))).state == "scheduled"


async def test_a_dry_run_adopts_nothing(mayfly, simulator):
    simulator.add(webhook_url=OURS)
    result = await mayfly("--dry-run", "--json", MAYFLY_PUBLIC_URL=BASE)

    (report,) = json.loads(result.stdout)
    assert (report["isDryRun"], report["new"], report["statuses"], report["adopted"]) == (
        True,
        1,
        {"COMPLETED": 1},
        {},
    )
    assert datetime.fromisoformat(report["firstDueAt"]) > NOW + 23 * HOUR
    (again,) = json.loads((await mayfly("--dry-run", "--json", MAYFLY_PUBLIC_URL=BASE)).stdout)
    assert again["new"] == 1


async def test_without_a_word_on_what_is_ours_nothing_is_listed(mayfly, simulator):
    result = await mayfly()

    assert (result.exit_code, simulator.calls) == (2, [])
    assert "set MAYFLY_PUBLIC_URL" in result.stderr


async def test_an_unknown_account_is_named(mayfly):
    result = await mayfly("--account", "acme", MAYFLY_PUBLIC_URL=BASE)

    assert result.exit_code == 2
    assert "there is default" in result.stderr


async def test_the_backlog_of_others_is_shown_with_its_age(mayfly, old):
    result = await mayfly("--older-than", "30d", "--all", "--dry-run")

    assert result.exit_code == 0
    assert f"3 without a record, the oldest of {old[2].created_at:%Y-%m-%d %H:%M}" in result.output
    assert "1 are younger" in result.output
    assert "film" in result.output
    assert "Nothing was adopted." in result.output


async def test_all_is_not_adopted_without_a_yes(mayfly, ledger, old, simulator):
    refused = await mayfly("--older-than", "30d", "--all")
    assert (refused.exit_code, simulator.calls) == (1, [])
    assert "add --yes, or --dry-run" in refused.stderr
    agreed = await mayfly("--older-than", "30d", "--all", "--yes")

    assert agreed.exit_code == 0
    assert (await row_of(ledger, Key(ACCOUNT, old[0].id))).state == "scheduled"


async def test_a_plan_has_a_line_for_each_and_adopts_nothing(mayfly, ledger, old, tmp_path):
    await receive(ledger, arrival(id=old[1].id, due_in=HOUR))
    path, lines = await planned(mayfly, tmp_path)

    by_id = {line["id"]: line for line in lines}
    assert by_id.keys() == {one.id for one in old}
    first = by_id[old[0].id]
    assert (first["state"], first["rule"], first["projectId"], first["outputFileName"]) == (
        "new",
        "MAYFLY_TTL",
        "film",
        "take_0",
    )
    assert by_id[old[1].id]["state"] == "scheduled"
    assert path.stat().st_mode & 0o777 == 0o600
    again = await mayfly("--all", "--plan", path)
    assert (again.exit_code, lines_of(path)) == (2, lines)


async def test_a_plan_adopts_exactly_its_lines_and_holds_what_it_says(mayfly, ledger, simulator, old, tmp_path):
    path, lines = await planned(mayfly, tmp_path)
    simulator.add(created_at=NOW - timedelta(days=400))  # not there when it was planned
    by_id = {line["id"]: line for line in lines}
    gone, protected = by_id[old[0].id], by_id[old[2].id]
    simulator.remove(gone["id"])
    write_lines(path, [gone, protected | {"hold": "legal"}])
    before = datetime.now(UTC)
    result = await mayfly("--apply", path, "--yes")

    assert result.exit_code == 0
    assert f"1 of the plan are no longer there, or have not ended: {gone['id']}" in result.output
    row = await row_of(ledger, Key(ACCOUNT, protected["id"]))
    assert (row.state, row.hold_reason, row.wake_at, row.rule) == ("held", "legal", None, "MAYFLY_TTL")
    assert row.hold_by.startswith("sweep by ")
    assert row.due_at >= before + 24 * HOUR
    assert [move.value for move in await moves_of(ledger, Key(ACCOUNT, protected["id"]))] == ["receive", "hold"]
    counted = json.loads((await mayfly("--all", "--dry-run", "--json")).stdout)[0]
    assert (counted["new"], counted["known"]) == (3, {"held": 1})


async def test_a_line_schedules_with_a_whole_ttl_from_its_application_on(mayfly, ledger, tmp_path, old):
    path, _ = await planned(mayfly, tmp_path)
    before = datetime.now(UTC)
    result = await mayfly("--apply", path, "--yes", "--json", MAYFLY_TTL="7d")

    (report,) = json.loads(result.stdout)
    assert report["adopted"] == {"scheduled": 3}
    for one in old:
        row = await row_of(ledger, Key(ACCOUNT, one.id))
        assert row.due_at >= before + timedelta(days=7)


async def test_what_is_known_stays_as_it_is_but_a_hold_of_the_plan_counts(mayfly, ledger, tmp_path, old):
    await receive(ledger, *(arrival(id=one.id, due_in=HOUR) for one in old))
    before = [await row_of(ledger, Key(ACCOUNT, one.id)) for one in old]
    path, lines = await planned(mayfly, tmp_path)
    write_lines(path, [line | ({"hold": "legal"} if line["id"] == old[0].id else {}) for line in lines])
    result = await mayfly("--apply", path, "--yes")

    assert result.exit_code == 0
    assert "3 known already: scheduled" in result.output
    assert "of what was known already: 1." in result.output
    after = [await row_of(ledger, Key(ACCOUNT, one.id)) for one in old]
    assert (after[0].state, after[0].hold_reason) == ("held", "legal")
    assert after[1:] == before[1:]


async def test_a_hold_of_the_plan_that_comes_too_late_is_not_passed_over(mayfly, ledger, tmp_path, old):
    await receive(ledger, arrival(id=old[0].id, due_in=HOUR))
    change = records.update().values(state="deleted", wake_at=None)
    await ledger.write(lambda connection: connection.execute(change))
    path, lines = await planned(mayfly, tmp_path)
    write_lines(path, [line | {"hold": "legal"} for line in lines])
    result = await mayfly("--apply", path, "--yes")

    assert result.exit_code == 1
    assert f"not put on hold: {old[0].id}: cannot hold: the record is deleted" in result.stderr
    assert "Adopted: 2 held." in result.output


async def test_a_plan_is_not_applied_unasked_and_a_dry_run_of_it_adopts_nothing(mayfly, tmp_path, old):
    path, _ = await planned(mayfly, tmp_path)
    refused = await mayfly("--apply", path)
    rehearsed = await mayfly("--apply", path, "--dry-run")

    assert (refused.exit_code, rehearsed.exit_code) == (1, 0)
    assert "3 without a record" in rehearsed.output
    counted = json.loads((await mayfly("--all", "--dry-run", "--json")).stdout)[0]
    assert (counted["new"], len(old)) == (4, 3)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("{}", "line 2 cannot be read"),
        ("nonsense", "line 2 cannot be read"),
        ('{"id": "x", "account": "acme"}', "line 2 is about another account than default"),
        ('{"id": "first", "account": "default"}', "line 2 has the same id as line 1"),
        ('{"id": "x", "account": "default", "hodl": "legal"}', "unknown field `hodl`"),
        ('{"id": "x", "account": "default", "hold": true}', "line 2 cannot be read"),
        ('{"id": "x", "account": "default", "hold": ""}', "line 2 cannot be read"),
        ('{"id": "", "account": "default"}', "line 2 cannot be read"),
        ("\ufffe", "line 2 cannot be read"),
    ],
)
async def test_a_plan_with_a_wrong_line_is_refused_as_a_whole(mayfly, simulator, tmp_path, bad, problem):
    path = tmp_path / "plan.jsonl"
    path.write_text(f'{{"id": "first", "account": "default"}}\n{bad}\n\n', encoding="utf-8")
    result = await mayfly("--apply", path, "--yes")

    assert (result.exit_code, simulator.calls) == (1, [])
    assert problem in result.stderr
    assert "nothing was adopted" in result.stderr


async def test_a_list_that_cannot_be_completed_writes_no_plan_and_exits_with_1(mayfly, simulator, tmp_path, old):
    simulator.plan.script("LIST", ["401"])
    result = await mayfly("--all", "--plan", tmp_path / "plan.jsonl")

    assert (result.exit_code, (tmp_path / "plan.jsonl").exists(), len(old)) == (1, False, 3)
    assert "the API answered 401; nothing of this account was adopted" in result.stderr


async def test_items_that_cannot_be_read_are_shown(mayfly, simulator):
    simulator.add(webhook_url=OURS, status="")
    result = await mayfly(MAYFLY_PUBLIC_URL=BASE)

    assert result.exit_code == 0
    assert "1 items of the list cannot be read" in result.stderr
    assert "not a generation" in result.stderr


async def test_options_that_contradict_each_other_are_refused(mayfly, tmp_path):
    path = write_lines(tmp_path / "plan.jsonl", [])

    assert (await mayfly("--apply", path, "--all")).exit_code == 2
    assert (await mayfly("--older-than", "soon")).exit_code == 2


async def test_the_adopt_of_an_account_is_enough_to_be_swept(mayfly, simulator, tmp_path, ledger):
    config = tmp_path / "mayfly.toml"
    config.write_text('[[account]]\nid = "default"\nadopt = "without-webhook"\n', encoding="utf-8")
    polled = simulator.add()
    simulator.add(webhook_url="https://app.example/hook")
    result = await mayfly("--json", MAYFLY_CONFIG=str(config), MAYFLY_TTL="2m")

    (report,) = json.loads(result.stdout)
    assert report["adopted"] == {"scheduled": 1}
    row = await row_of(ledger, Key(ACCOUNT, polled.id))
    assert row.due_at - row.sent_at == timedelta(minutes=15)
