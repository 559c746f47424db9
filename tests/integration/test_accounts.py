"""Several accounts in one service: keys and secrets, routes, queues, budgets and pauses of each apart."""

from functools import partial

import pytest
from structlog.testing import capture_logs

from service.config.settings import SettingsError, read_settings, require_api_key, require_key_or_secret
from service.core.key import Key
from service.core.secret import Secret
from service.jobs.enqueue import queue_of
from service.ledger import claiming, daily_limit, key_history, outlook, pausing, reading
from service.ledger.key_history import KeyOfAccount
from service.ledger.pausing import Kind, Pause
from service.ledger.receiving import Arrival
from service.sync.organisation import check_organisations, fetch_secrets
from tests.support.ledger import ACTOR, HOUR, LEASE, arrival, count, receive, row_of, utc_now
from tests.support.webhooks import SECRET, webhook

OTHER = "acme"
OTHER_SECRET = "whsec_of_acme_0123456789abcdef"
CONFIG = """
[[account]]
id = "acme"
api_key_env = "ACME_KEY"
webhook_secret_env = "ACME_SECRET"
min_ttl = "2h"
rate = "60/minute"
"""


def settings(tmp_path, config=CONFIG, **environment):
    path = tmp_path / "mayfly.toml"
    path.write_text(config, encoding="utf-8")
    return read_settings({"MAYFLY_CONFIG": str(path), "MAYFLY_DATA_DIR": str(tmp_path), **environment})


def of_account(item: Arrival, account: str) -> Arrival:
    return Arrival(
        Key(account, item.key.id), item.generation, item.body, item.retention, item.received_at, item.sent_at
    )


def test_without_a_table_there_is_one_account(tmp_path):
    (only,) = settings(tmp_path, "", SYNC_API_KEY="sk-1", SYNC_WEBHOOK_SECRET=SECRET).accounts

    assert (only.id, only.keys.api_key, only.keys.webhook_secrets) == ("default", Secret("sk-1"), (Secret(SECRET),))


def test_accounts_of_the_file_are_beside_the_default_one(tmp_path):
    found = settings(tmp_path, SYNC_API_KEY="sk-1", ACME_KEY="sk-2", ACME_SECRET=SECRET).accounts

    assert [one.id for one in found] == ["default", "acme"]
    assert (found[1].keys.api_key, found[1].keys.webhook_secrets) == (Secret("sk-2"), (Secret(SECRET),))

    assert (found[1].rate.calls, found[0].rate.calls) == (60, 300)


def test_without_a_key_of_its_own_there_is_no_default_account(tmp_path):
    assert [one.id for one in settings(tmp_path, ACME_KEY="sk-2").accounts] == ["acme"]


def test_a_key_in_a_file_is_read(tmp_path):
    (tmp_path / "key").write_text("sk-of-a-file\n", encoding="utf-8")
    (found,) = settings(tmp_path, ACME_KEY_FILE=str(tmp_path / "key")).accounts

    assert found.keys.api_key == Secret("sk-of-a-file")


def test_what_an_account_lacks_is_named_by_its_variable(tmp_path):
    found = settings(tmp_path, SYNC_API_KEY="sk-1")

    with pytest.raises(SettingsError, match=r"^ACME_KEY is not set: put an API key"):
        require_api_key(found)
    with pytest.raises(SettingsError, match=r"^ACME_SECRET is not set: .* or set ACME_KEY"):
        require_key_or_secret(found)


def test_without_a_variable_of_its_own_no_other_accounts_variable_is_named(tmp_path):
    found = settings(tmp_path, '[[account]]\nid = "bolt"\n', SYNC_API_KEY="sk-1")

    with pytest.raises(SettingsError, match=r"^a variable named by api_key_env of account bolt is not set: put an API"):
        require_api_key(found)


def test_an_invalid_key_of_an_account_is_named_and_not_shown(tmp_path):
    with pytest.raises(SettingsError, match=r"account acme: ACME_SECRET is invalid") as raised:
        settings(tmp_path, ACME_SECRET="verysecret")

    assert "verysecret" not in str(raised.value)


async def test_the_secret_is_fetched_with_the_key(tmp_path, simulator):
    bare = settings(tmp_path, "", SYNC_API_KEY=simulator.api_key, SYNC_BASE_URL=simulator.url)
    with capture_logs() as logs:
        found = await fetch_secrets(bare)

    assert found.accounts[0].keys.webhook_secrets == (Secret(simulator.webhook_secret),)
    assert [line["event"] for line in logs] == ["organisation.secret_fetched"]
    assert simulator.webhook_secret not in str(logs)


async def test_a_secret_that_cannot_be_fetched_is_named(tmp_path, simulator):
    bare = settings(tmp_path, "", SYNC_API_KEY="sk-another-key", SYNC_BASE_URL=simulator.url)

    with pytest.raises(SettingsError, match=r"could not be fetched .*refuses the key"):
        await fetch_secrets(bare)


async def test_each_key_is_compared_with_the_secret_of_its_account(tmp_path, simulator):
    environment = {"SYNC_API_KEY": simulator.api_key, "SYNC_WEBHOOK_SECRET": simulator.webhook_secret}
    wrong = settings(
        tmp_path, SYNC_BASE_URL=simulator.url, ACME_KEY=simulator.api_key, ACME_SECRET=SECRET + "9", **environment
    )

    with pytest.raises(SettingsError, match=r"check ACME_SECRET and ACME_KEY$"):
        await check_organisations(wrong)


def test_each_account_has_its_own_queue():
    assert queue_of("default") != queue_of("acme") != queue_of("other")


@pytest.fixture
async def two_accounts(sqlite_database, open_client, tmp_path):
    """A client of an application with the accounts ``default`` and ``acme``."""
    path = tmp_path / "mayfly.toml"
    path.write_text(CONFIG, encoding="utf-8")
    environment = {"MAYFLY_CONFIG": str(path), "ACME_KEY": "sk-2", "ACME_SECRET": OTHER_SECRET}
    async with open_client(sqlite_database, **environment) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "secret", "status"),
    [
        ("/webhooks/sync", SECRET, 202),
        ("/webhooks/sync/acme", OTHER_SECRET, 202),
        ("/webhooks/sync/default", SECRET, 202),
        ("/webhooks/sync/acme", SECRET, 401),
        ("/webhooks/sync", OTHER_SECRET, 401),
        ("/webhooks/sync/nobody", SECRET, 404),
    ],
)
async def test_each_account_has_its_own_route_and_secret(two_accounts, sqlite_database, path, secret, status):
    sent = webhook(secret=secret)
    answer = await two_accounts.post(path, content=sent.body, headers=sent.headers)

    assert answer.status_code == status
    assert await count(sqlite_database) == (status == 202)


async def test_the_bounds_of_an_account_are_its_own(two_accounts, sqlite_database):
    sent = webhook(secret=OTHER_SECRET, webhookUrl="https://mayfly.example.com/webhooks/sync/acme?ttl=5m")
    await two_accounts.post("/webhooks/sync/acme", content=sent.body, headers=sent.headers)
    row = await row_of(sqlite_database, Key("acme", sent.id))

    assert row.due_at - row.received_at >= 2 * HOUR


async def test_a_worker_claims_only_records_of_its_account(database):
    mine, theirs = arrival(due_in=-HOUR), of_account(arrival(due_in=-HOUR), OTHER)
    await receive(database, mine, theirs)
    write = partial(claiming.claim_due, account=OTHER, now=utc_now(), lease=LEASE, limit=10, actor=ACTOR)

    assert [claim.key for claim in await database.write(write)] == [theirs.key]


async def test_a_pause_of_one_account_is_not_obeyed_by_another(database):
    await receive(database, arrival(due_in=-HOUR), of_account(arrival(due_in=-HOUR), OTHER))
    pause = Pause(Kind.UNAUTHORIZED, utc_now(), ACTOR, "the API refuses the key", utc_now() + HOUR, OTHER)
    await database.write(partial(pausing.pause, wanted=pause))

    allowed = [
        await database.read(partial(pausing.peek_allowance, account=name, now=utc_now())) for name in ("default", OTHER)
    ]
    assert allowed == [pausing.UNLIMITED, 0]
    seen = await database.read(
        partial(outlook.read_outlook, account=OTHER, now=utc_now(), late=LEASE, since=None, until=utc_now(), limit=5)
    )
    assert (seen.allowed, seen.late) == (0, ())


async def test_a_pause_by_an_operator_is_obeyed_by_all(database):
    await database.write(partial(pausing.pause, wanted=Pause(Kind.OPERATOR, utc_now(), ACTOR, "audit", None)))

    for name in ("default", OTHER):
        assert await database.read(partial(pausing.peek_allowance, account=name, now=utc_now())) == 0


async def test_the_daily_limit_counts_each_account_for_itself(database):
    reserve = partial(daily_limit.reserve_deletes, limit=1, now=utc_now(), actor=ACTOR)
    first = [await database.write(partial(reserve, wanted=2, account=name)) for name in ("default", OTHER)]

    assert first == [1, 1]
    assert {one.account for one in await database.read(pausing.find_pauses)} == {"default", OTHER}


async def test_a_key_without_generations_pauses_its_own_account(database):
    note = partial(key_history.note_answers, is_shown=False, now=utc_now(), actor=ACTOR)
    await database.write(partial(note, key=KeyOfAccount(OTHER, "k"), unknown=key_history.MAX_UNKNOWN))

    assert [one.account for one in await database.read(pausing.find_pauses)] == [OTHER]
    await database.write(partial(key_history.resume_all, account="default"))
    assert len(await database.read(pausing.find_pauses)) == 1
    await database.write(partial(key_history.resume_all, account=OTHER))
    assert await database.read(pausing.find_pauses) == []


async def test_the_backlog_is_that_of_all_accounts(database):
    await receive(database, arrival(due_in=HOUR), of_account(arrival(due_in=-HOUR), OTHER))
    backlog = await database.read(partial(reading.read_backlog, now=utc_now()))

    assert await database.read(reading.find_accounts) == [OTHER, "default"]
    assert (backlog.due, backlog.oldest_overdue >= HOUR) == (1, True)
