"""`mayfly forwards`: output and exit codes."""

import asyncio
import json

import pytest

from service.commands import forward_replays
from service.core.forwarding import DeliveryState
from service.ledger.opening import open_database
from tests.support.commands import command
from tests.support.deliveries import APP, CONFIG, CRM, alter, attempt, claim_delivery, delivery_of, failed, forward
from tests.support.ledger import HOUR, utc_now
from tests.support.webhooks import SECRET

NO_TARGET = "target old is not in MAYFLY_CONFIG, so nothing was replayed: add its [[forward]] again first"


@pytest.fixture
async def ledger(database_url):
    """The ledger of the test."""
    async with open_database(database_url) as database:
        yield database


@pytest.fixture
def mayfly(database_url, tmp_path):
    """Run a command of forwards on the ledger of the test: ``await mayfly("list", "--json")``."""
    path = tmp_path / "mayfly.toml"
    path.write_text(CONFIG, encoding="utf-8")
    environment = {
        "MAYFLY_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "MAYFLY_DATA_DIR": str(tmp_path / "data"),
        "MAYFLY_CONFIG": str(path),
        "SYNC_WEBHOOK_SECRET": SECRET,
        "SYNC_API_KEY": "sk-sim",
    }

    async def run(*arguments: str, **options):
        return await asyncio.to_thread(command, "forwards", *arguments, **environment | options)

    return run


async def state_of(ledger, delivery_id):
    return (await delivery_of(ledger, delivery_id)).state


async def test_deliveries_are_listed_newest_first_with_what_comes_next(mayfly, ledger):
    gone = await failed(ledger)
    done, first, behind = [await forward(ledger, id=name, outputDuration=n) for n, name in enumerate(("a", "b", "b"))]
    await attempt(ledger, done)
    await attempt(ledger, first, 503)
    leased = await forward(ledger, CRM, status="FAILED")
    await claim_delivery(ledger, leased)
    lines = [line.split(maxsplit=6) for line in (await mayfly("list")).stdout.splitlines()[1:]]

    assert [line[0] for line in lines] == [leased, behind, first, done, gone]
    assert lines[0][1:] == [
        "crm",
        (await delivery_of(ledger, leased)).generation,
        "FAILED",
        "waiting",
        "1",
        lines[0][6],
    ]
    assert [line[6].strip() for line in lines] == [
        "an attempt is made now",
        f"waits for {first}, an earlier one of this generation",
        "attempt 2 in 5 s: answered 503" if "5 s" in lines[2][6] else "attempt 2 in 4 s: answered 503",
        "nothing; delivered now",
        "needs an operator: answered 410: it does not want this webhook",
    ]


async def test_a_list_for_scripts_is_the_page_of_the_api_and_its_cursor_leads_on(mayfly, ledger):
    made = [await forward(ledger) for _ in range(3)]
    first = json.loads((await mayfly("list", "--json", "--limit", "2")).stdout)
    second = json.loads((await mayfly("list", "--json", "--cursor", first["nextCursor"])).stdout)
    refused = await mayfly("list", "--cursor", "x")

    assert [one["id"] for one in first["items"] + second["items"]] == made[::-1]
    assert second["nextCursor"] is None
    assert "body" not in first["items"][0]
    assert (refused.exit_code, "invalid cursor" in refused.stderr) == (1, True)


FILTERS = [
    ("--target", "crm"),
    ("--state", "FAILED"),
    ("--generation", "g-1"),
    ("--account", "studio"),
    ("--status", "failed"),
    ("--since", "-1h"),
]


@pytest.mark.parametrize("options", FILTERS)
async def test_a_list_of_deliveries_is_narrowed(mayfly, ledger, options):
    await forward(ledger, received_at=utc_now() - 2 * HOUR)
    only = await failed(ledger, CRM, id="g-1", account="studio", status="FAILED")
    page = json.loads((await mayfly("list", "--json", *options)).stdout)

    assert [one["id"] for one in page["items"]] == [only]
    assert (await mayfly("list", "--until", "-3h")).stdout == "No deliveries.\n"


async def test_a_delivery_is_shown_with_what_its_target_gets(mayfly, ledger):
    made = await failed(ledger)
    shown, whole = await mayfly("show", made), json.loads((await mayfly("show", made, "--json")).stdout)
    missing = await mayfly("show", "none")
    row = await delivery_of(ledger, made)

    assert whole["body"].encode() == row.body
    assert row.body.decode() in shown.stdout
    assert row.signature in shown.stdout
    assert "not-to-be-shown" not in shown.stdout + str(whole)
    assert (missing.exit_code, missing.stderr) == (1, "mayfly: there is no delivery none\n")


async def test_deliveries_are_replayed_by_id_each_with_a_line(mayfly, ledger):
    gone, waits, leased, removed = (
        await failed(ledger),
        await forward(ledger),
        await forward(ledger),
        await failed(ledger),
    )
    await attempt(ledger, waits, 503)
    await claim_delivery(ledger, leased)
    await alter(ledger, removed, target="old")
    result = await mayfly("replay", gone, "-", stdin=f"{waits}\n\n{leased}\n{removed}\nnone\n".encode())

    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{gone} begins anew: attempt 2 to app is next.",
        f"{waits} is brought forward: attempt 2 to app is next.",
        "A worker that runs sends them within seconds.",
    ]
    assert result.stderr.splitlines() == [
        f"mayfly: {leased}: an attempt at this delivery is being made now: nothing was changed, see how it ends",
        f"mayfly: {removed}: {NO_TARGET}",
        "mayfly: there is no delivery none",
    ]
    again = await mayfly("replay", gone)
    assert (again.exit_code, again.stdout.splitlines()[0]) == (0, f"{gone} is due already: attempt 2 to app is next.")


async def test_a_filter_replays_what_failed_after_a_preview(mayfly, ledger):
    made = [await failed(ledger) for _ in range(2)]
    other = await failed(ledger, CRM, status="FAILED")
    await attempt(ledger, await forward(ledger))
    counted = await mayfly("replay", "--target", "app", "--dry-run")
    unsure = await mayfly("replay", "--target", "app")
    wrong = await mayfly("replay", "--target", "app", "--expect", "3")
    states = {await state_of(ledger, one) for one in made}
    sure = await mayfly("replay", "--target", "app", "--yes")

    assert (counted.exit_code, counted.stdout) == (0, "These match: 2 failed.\n")
    assert (unsure.exit_code, unsure.stderr) == (
        1,
        "mayfly: nothing was replayed; add --yes to send 2 deliveries again\n",
    )
    assert (wrong.exit_code, "2 deliveries match, not 3" in wrong.stderr) == (1, True)
    assert states == {DeliveryState.FAILED}
    assert (sure.exit_code, sure.stdout.splitlines()[1]) == (
        0,
        "2 are sent again. A worker that runs sends them within seconds.",
    )
    assert {await state_of(ledger, one) for one in made} == {DeliveryState.WAITING}
    assert await state_of(ledger, other) == DeliveryState.FAILED
    assert (await mayfly("replay", "--target", "app", "--yes")).stdout == "No delivery that is failed matches.\n"


async def test_the_number_that_was_seen_answers_the_question(mayfly, ledger):
    made = await forward(ledger)
    await attempt(ledger, made)
    result = await mayfly("replay", "--state", "delivered", "--expect", "1")

    assert (result.exit_code, await state_of(ledger, made)) == (0, DeliveryState.WAITING)


@pytest.mark.parametrize(("answer", "then"), [(b"y\n", DeliveryState.WAITING), (b"n\n", DeliveryState.FAILED)])
async def test_a_terminal_is_asked_before_a_replay_by_filter(mayfly, ledger, monkeypatch, answer, then):
    made = await failed(ledger)
    monkeypatch.setattr(forward_replays, "is_terminal", lambda: True)
    result = await mayfly("replay", "--state", "failed", stdin=answer)

    assert "Send 1 delivery again?" in result.stdout
    assert await state_of(ledger, made) == then


async def test_a_replay_says_which_targets_are_not_configured(mayfly, ledger):
    await failed(ledger, APP)
    await alter(ledger, await failed(ledger), target="old")
    counted = await mayfly("replay", "--state", "failed", "--dry-run")
    refused = await mayfly("replay", "--target", "old")

    assert counted.stdout == (
        "These match: 1 failed. Those of targets that are not in MAYFLY_CONFIG stay as they are: 1 to old.\n"
    )
    assert (refused.exit_code, "target old is not in MAYFLY_CONFIG" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give ids, or a filter such as --target"),
        (("an-id", "--target", "app"), "give ids or a filter, not both"),
        (("an-id", "--dry-run"), "--dry-run and --expect are for a filter, not for ids"),
        (("--since", "tomorrow"), "it accepts"),
    ],
)
async def test_what_cannot_be_replayed_as_asked_exits_with_2(mayfly, arguments, told):
    result = await mayfly("replay", *arguments)

    assert (result.exit_code, told in result.stderr) == (2, True)
