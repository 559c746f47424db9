"""`mayfly policy diff` and `apply`: what they show, when they ask, and what they change."""

import asyncio
import json
import re
from datetime import datetime, timedelta

import pytest
from sqlalchemy import URL, func, select, update

from service.commands import record_moves
from service.core.lifecycle import Move, State
from service.ledger import migrating
from service.ledger.opening import open_database
from service.ledger.schema import events, records
from tests.support.commands import command
from tests.support.ledger import HOUR, arrival, moves_of, receive, row_of, store, utc_now
from tests.support.waiting import eventually

DAY = 24 * HOUR
RULES = """
[[rule]]
id = "failures"
status = "FAILED"
ttl = "2h"

[[rule]]
id = "film"
model = "film*"
forever = true

[[rule]]
id = "court"
model = "court*"
hold = "case 7"
"""


@pytest.fixture
def policy(database_url, tmp_path):
    """Run ``mayfly policy`` on the ledger of the test; the file has the rules above unless *rules* are given."""
    file = tmp_path / "mayfly.toml"
    environment = {
        "MAYFLY_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
    }

    async def run(*arguments: str, rules=RULES, stdin: bytes = b"", has_file=True, **changes):
        file.write_text(rules, encoding="utf-8")
        words = [arguments[0], str(file), *arguments[1:]] if has_file else arguments
        return await asyncio.to_thread(command, "policy", *words, stdin=stdin, **environment | changes)

    return run


@pytest.fixture
async def keys(database):
    """Records that the rules change, each in another way, and one that they do not."""
    found = {
        "plain": await store(database, due_in=DAY),
        "failed": await store(database, due_in=DAY, status="FAILED"),
        "film": await store(database, due_in=DAY, model="film-1"),
        "court": await store(database, due_in=DAY, model="court-1"),
        "kept": await store(database, due_in=None),
        "override": await store(database, due_in=DAY, status="FAILED"),
    }
    named = update(records).where(records.c.id == found["override"].id).values(rule="override: ttl")
    await database.write(lambda connection: connection.execute(named).rowcount)
    return found


async def rows_of(database, keys):
    return {name: await row_of(database, key) for name, key in keys.items()}


async def test_a_diff_counts_what_would_change_and_changes_nothing(policy, database, keys):
    before = await rows_of(database, keys)
    result = await policy("diff")

    assert result.exit_code == 0
    assert "MAYFLY_TTL=1d (it is not set here: this is the default), MAYFLY_MIN_TTL=1m" in result.stdout
    assert "Of 5 records that the policy decided, 4 would change." in result.stdout
    for line in (
        "1  are deleted earlier",
        "1  are kept forever",
        "1  were kept forever and are deleted",
        "1  are held",
    ):
        assert f"       {line}\n" in result.stdout
    assert re.search(r"2  within a day", result.stdout)
    assert "The earliest deletion that follows is in 119 min, at 20" in result.stdout
    assert re.search(r"MAYFLY_TTL  rule: failures +1\n", result.stdout)
    assert keys["failed"].id in result.stdout
    assert keys["plain"].id not in result.stdout
    assert keys["override"].id not in result.stdout
    assert await rows_of(database, keys) == before


async def test_a_diff_for_scripts_has_all_counts(policy, keys):
    found = json.loads((await policy("diff", "--json", "--limit", "1", MAYFLY_TTL="1d")).stdout)

    assert (found["ttl"], found["isTtlSet"], found["minTtl"]) == ("1d", True, "1m")
    assert (found["examined"], found["changed"]) == (5, 4)
    effects = {"earlier": 1, "later": 0, "same_time": 0, "forever": 1, "released": 1, "held": 1}
    assert found["effects"] == effects
    assert found["due"] == {"at_once": 0, "within_an_hour": 0, "within_a_day": 2, "later": 0}
    assert found["left"] == {"unchanged": 1, "operator": 0, "unknown": 0, "moved": 0}
    assert {(one["oldRule"], one["newRule"]): one["records"] for one in found["rules"]} == {
        ("MAYFLY_TTL", "rule: failures"): 1,
        ("MAYFLY_TTL", "rule: film"): 1,
        ("MAYFLY_TTL", "rule: court"): 1,
        ("MAYFLY_TTL", "MAYFLY_TTL"): 1,
    }
    (first,) = found["records"]
    assert (first["id"], first["effect"]) == (keys["failed"].id, "earlier")
    assert first["newDueAt"] == found["earliest"]
    assert datetime.fromisoformat(first["oldDueAt"]) - datetime.fromisoformat(first["newDueAt"]) == 22 * HOUR


@pytest.mark.parametrize(
    ("age", "due"),
    [
        (5 * HOUR, "at_once"),
        (2 * HOUR - timedelta(minutes=30), "within_an_hour"),
        (HOUR / 2, "within_a_day"),
    ],
)
async def test_a_diff_says_when_records_become_due(policy, database, age, due):
    key = await store(database, due_in=DAY, status="FAILED")
    older = {"sent_at": utc_now() - age, "ttl_seconds": int((DAY + age).total_seconds())}
    await database.write(
        lambda connection: connection.execute(update(records).where(records.c.id == key.id).values(older)).rowcount
    )
    found = json.loads((await policy("diff", "--json")).stdout)

    assert {name for name, number in found["due"].items() if number} == {due}


async def test_a_diff_says_what_it_leaves_and_why(policy, database):
    await store(database, due_in=DAY)
    rules = '[[rule]]\nid = "film"\nproject = "film"\nttl = "9d"\n'
    result = await policy("diff", rules=rules, MAYFLY_TTL="2h")

    assert "Of 1 record that the policy decided, 0 would change." in result.stdout
    assert "a rule may protect them whose facts the API has not shown yet" in result.stdout


async def test_apply_changes_what_the_diff_shows(policy, database, keys):
    result = await policy("apply", "--existing", "--yes")
    rows = await rows_of(database, keys)

    assert result.exit_code == 0
    assert "4 would change." in result.stdout
    assert "Restart it first, or new webhooks\nstill get the old rules." in result.stdout
    assert result.stdout.endswith("4 of 4 records were changed.\n")
    assert {name: (row.state, row.rule) for name, row in rows.items()} == {
        "plain": (State.SCHEDULED, "MAYFLY_TTL"),
        "failed": (State.SCHEDULED, "rule: failures"),
        "film": (State.KEPT, "rule: film"),
        "court": (State.HELD, "rule: court"),
        "kept": (State.SCHEDULED, "MAYFLY_TTL"),
        "override": (State.SCHEDULED, "override: ttl"),
    }
    assert rows["failed"].due_at == rows["failed"].wake_at == rows["failed"].sent_at + 2 * HOUR
    assert await moves_of(database, keys["failed"]) == [Move.RECEIVE, Move.RESCHEDULE]
    again = await policy("apply", "--existing", "--yes")
    assert again.stdout.endswith("Nothing was changed.\n")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        ((), 2, "records that exist never move by themselves; add --existing"),
        (("--yes",), 2, "add --existing"),
        (("--existing",), 1, "nothing was changed: look at the preview, then add --yes"),
        (("--existing", "--dry-run", "--yes"), 0, "Nothing was changed."),
    ],
)
async def test_apply_changes_nothing_without_a_word(  # noqa: PLR0917 - three are fixtures
    policy, database, keys, arguments, exit_code, said
):
    before = await rows_of(database, keys)
    result = await policy("apply", *arguments)

    assert result.exit_code == exit_code
    assert said in result.stdout + result.stderr
    assert await rows_of(database, keys) == before


@pytest.mark.parametrize(("answer", "exit_code"), [("y", 0), ("n", 1)])
async def test_apply_asks_on_a_terminal(policy, database, keys, monkeypatch, answer, exit_code):  # noqa: PLR0917
    monkeypatch.setattr(record_moves, "is_terminal", lambda: True)
    result = await policy("apply", "--existing", stdin=f"{answer}\n".encode())

    assert result.exit_code == exit_code
    assert "Change 4 records? [y/N]" in result.stdout
    assert ((await row_of(database, keys["failed"])).rule == "MAYFLY_TTL") == bool(exit_code)


@pytest.mark.parametrize("arguments", [("diff",), ("apply", "--existing", "--yes")])
async def test_a_policy_without_a_file_or_with_a_fault_changes_nothing(policy, database, keys, arguments):
    before = await rows_of(database, keys)
    without = await policy(*arguments, has_file=False, MAYFLY_TTL="2h")
    faulty = await policy(*arguments, rules=RULES.replace("2h", "2"))

    assert (without.exit_code, faulty.exit_code) == (2, 2)
    assert "there is no file" in without.stderr
    assert await rows_of(database, keys) == before


async def test_a_killed_apply_leaves_what_is_done_and_the_next_one_does_the_rest(mayfly, tmp_path):
    url, data = URL.create("sqlite", database=str(tmp_path / "data" / "ledger.db")), tmp_path / "data"
    data.mkdir(mode=0o700)
    (tmp_path / "mayfly.toml").write_text("", encoding="utf-8")
    async with open_database(url) as database:
        await database.write(migrating.migrate)
        await receive(database, *(arrival(due_in=DAY, id=f"g-{number}") for number in range(3000)))

        async def count_changed():
            changed = select(func.count()).where(records.c.ttl_seconds == 7200)
            return await database.read(lambda connection: connection.scalar(changed))

        process = mayfly("policy apply mayfly.toml --existing --yes", MAYFLY_TTL="2h")
        process.spawn()
        await eventually(count_changed, seconds=60)
        await process.kill9()
        done = await count_changed()
        process.spawn()
        assert await process.wait() == 0

        assert 0 < done < 3000
        assert await count_changed() == 3000
        moves = select(func.count()).where(events.c.move == Move.RESCHEDULE)
        assert await database.read(lambda connection: connection.scalar(moves)) == 3000
