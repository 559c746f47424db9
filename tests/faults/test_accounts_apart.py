"""Two accounts in one service, whose organisations share one base URL: what happens to one is nothing to the other."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.simulator import Generation, Operation, Simulator
from tests.faults.databases import migrated_sqlite
from tests.faults.processes import ProcessStarter
from tests.faults.system import API_KEY, TOKEN, System, running
from tests.support.organisations import Organisations
from tests.support.waiting import eventually

ACME_KEY = "sk-acme-0123456789abcdef"
ACME_SECRET = "whsec_of_acme_0123456789abcdef"
OPERATOR = {"authorization": f"Bearer {TOKEN}"}
CONFIG = """
[[account]]
id = "acme"
api_key_env = "ACME_KEY"
webhook_secret_env = "ACME_SECRET"
"""


@dataclass
class Pair:
    """A system with the accounts ``default`` and ``acme``, and the organisation of each."""

    system: System
    acme: Simulator

    @property
    def default(self) -> Simulator:
        """The organisation of the account ``default``."""
        return self.system.simulator

    def write_config(self, text: str) -> None:
        """Replace the rules file, for processes that start from now on."""
        Path(self.system.environment["MAYFLY_CONFIG"]).write_text(text, encoding="utf-8")

    async def announce(self, account: str, generation: Generation) -> int:
        """Send the webhook of a *generation* of *account*, and return the status of the answer."""
        simulator = self.acme if account == "acme" else self.default
        body, headers = simulator.webhook(generation.id)
        url = f"{self.system.url}/webhooks/sync/{account}"
        return (await self.system.client.post(url, content=body, headers=headers)).status_code

    async def store(self, account: str, number: int) -> list[Generation]:
        """Add so many generations to the organisation of *account*, and send their webhooks."""
        simulator = self.acme if account == "acme" else self.default
        generations = [simulator.add() for _ in range(number)]
        assert {await self.announce(account, one) for one in generations} == {202}
        return generations

    async def count(self, account: str, state: str) -> int:
        """Return how many records of *account* are in *state*."""
        where = f"account = '{account}' AND state = '{state}'"
        return await self.system.ledger.number(f"SELECT count(*) FROM records WHERE {where}")  # noqa: S608

    async def until(self, account: str, state: str, number: int, *, seconds: float = 20) -> None:
        """Wait until so many records of *account* are in *state*."""

        async def are_there() -> bool:
            return await self.count(account, state) == number

        await eventually(are_there, seconds=seconds)

    async def pauses(self) -> set[tuple[str, str]]:
        """Return the account and the kind of each pause."""
        answer = await self.system.client.get(f"{self.system.url}/api/stats", headers=OPERATOR)
        return {(one["account"], one["kind"]) for one in answer.raise_for_status().json()["pauses"]}


@contextlib.asynccontextmanager
async def two_accounts(starter: ProcessStarter, folder: Path, **environment: str) -> AsyncIterator[Pair]:
    """Run two organisations behind one URL, for the processes that the test starts."""
    acme = Simulator(api_key=ACME_KEY, webhook_secret=ACME_SECRET, seed=1)
    config = folder / "mayfly.toml"
    config.write_text(CONFIG, encoding="utf-8")
    ledger = await migrated_sqlite(folder)
    async with (
        acme.serve(),
        running(starter, folder, ledger) as system,
        Organisations({API_KEY: system.simulator.url, ACME_KEY: acme.url}).serve() as organisations,
    ):
        system.environment = {
            "SYNC_BASE_URL": organisations.url,
            "MAYFLY_CONFIG": str(config),
            "ACME_KEY": ACME_KEY,
            "ACME_SECRET": ACME_SECRET,
            **environment,
        }
        yield Pair(system, acme)
    ledger.close()


@pytest.fixture
async def pair(starter: ProcessStarter, tmp_path: Path) -> AsyncIterator[Pair]:
    """Two accounts."""
    async with two_accounts(starter, tmp_path) as pair:
        yield pair


def deleted(simulator: Simulator) -> list[str]:
    """Return the ids of all DELETEs that came, in their order."""
    return [call.generation_id for call in simulator.calls if call.operation is Operation.DELETE]


async def test_each_deletion_goes_to_the_organisation_of_its_account(pair: Pair):
    await asyncio.gather(pair.system.api(), pair.system.worker())
    mine, theirs = await pair.store("default", 5), await pair.store("acme", 5)
    await pair.until("default", "deleted", 5)
    await pair.until("acme", "deleted", 5)

    assert sorted(deleted(pair.default)) == sorted(one.id for one in mine)
    assert sorted(deleted(pair.acme)) == sorted(one.id for one in theirs)


async def test_an_id_that_two_accounts_have_is_deleted_once_in_each(pair: Pair):
    worker, _ = await asyncio.gather(pair.system.worker(), pair.system.api())
    shared = "11111111-2222-4333-8444-555555555555"
    for account, simulator in (("default", pair.default), ("acme", pair.acme)):
        assert await pair.announce(account, simulator.add(generation_id=shared)) == 202
    await pair.until("default", "deleted", 1)
    await pair.until("acme", "deleted", 1)

    assert (deleted(pair.default), deleted(pair.acme)) == ([shared], [shared])
    assert worker.exit_code is None


async def test_a_held_record_of_one_account_is_kept_while_its_twin_is_deleted(pair: Pair):
    await asyncio.gather(pair.system.api(MAYFLY_TTL="2s"), pair.system.worker())
    shared = "11111111-2222-4333-8444-555555555556"
    for account, simulator in (("default", pair.default), ("acme", pair.acme)):
        assert await pair.announce(account, simulator.add(generation_id=shared)) == 202
    url = f"{pair.system.url}/api/records/{shared}/hold?account=acme"
    held = await pair.system.client.post(url, headers=OPERATOR, json={"reason": "a court asked"})
    await pair.until("default", "deleted", 1)
    await asyncio.sleep(1)

    assert (held.status_code, held.json()["account"]) == (200, "acme")
    assert (deleted(pair.default), deleted(pair.acme)) == ([shared], [])
    assert shared in pair.acme.generations


async def test_a_revoked_key_of_one_account_pauses_that_one_alone(pair: Pair):
    worker, _ = await asyncio.gather(pair.system.worker(), pair.system.api())
    pair.acme.switches.unauthorized = True
    await pair.store("acme", 5)
    paused = await worker.logged("deletions.paused")
    await pair.store("default", 5)
    await pair.until("default", "deleted", 5)
    _, health = await pair.system.health()

    assert await pair.pauses() == {("acme", "unauthorized")}
    assert (paused["account"], "ACME_KEY" in paused["what_now"]) == ("acme", True)
    assert "ACME_KEY" in health["parts"]["deletions"]["detail"]
    assert (await pair.count("acme", "scheduled"), deleted(pair.acme)) == (5, [])
    pair.acme.switches.unauthorized = False
    await pair.system.ledger.execute("UPDATE pauses SET until = :now")  # a minute later
    await pair.until("acme", "deleted", 5)
    assert await pair.pauses() == set()


async def test_a_429_of_one_account_slows_that_one_alone(pair: Pair):
    await asyncio.gather(pair.system.worker(), pair.system.api())
    pair.acme.plan.stand(Operation.GET, "429:retry_after=600")
    await pair.store("acme", 5)

    async def is_throttled() -> bool:
        return await pair.pauses() == {("acme", "throttled")}

    await eventually(is_throttled, seconds=15)
    await pair.store("default", 10)
    await pair.until("default", "deleted", 10, seconds=10)

    assert await pair.count("acme", "scheduled") == 5


async def test_an_outage_of_one_organisation_delays_the_other_by_nothing(pair: Pair):
    await asyncio.gather(pair.system.worker(), pair.system.api())
    pair.acme.switches.outage = True
    await pair.store("acme", 20)
    await asyncio.sleep(1.5)
    await pair.store("default", 20)
    await pair.until("default", "deleted", 20, seconds=10)

    assert await pair.count("acme", "scheduled") + await pair.count("acme", "deleting") == 20


async def test_the_secret_of_one_account_opens_no_other(pair: Pair):
    await pair.system.api()
    body, headers = pair.acme.webhook(pair.acme.add().id)
    statuses = [
        (await pair.system.client.post(f"{pair.system.url}{path}", content=body, headers=headers)).status_code
        for path in ("/webhooks/sync", "/webhooks/sync/default", "/webhooks/sync/nobody", "/webhooks/sync/acme")
    ]

    assert statuses == [401, 401, 404, 202]


async def test_after_flushall_the_records_of_both_accounts_are_deleted(pair: Pair):
    await asyncio.gather(pair.system.worker(), pair.system.api(MAYFLY_TTL="3s"))
    await pair.store("default", 10)
    await pair.store("acme", 10)
    await asyncio.sleep(0.5)
    await pair.system.redis.command("FLUSHALL")
    await pair.until("default", "deleted", 10)
    await pair.until("acme", "deleted", 10)

    assert (len(deleted(pair.default)), len(deleted(pair.acme))) == (10, 10)


async def test_records_of_a_removed_account_stay_and_are_named_until_it_is_back(pair: Pair):
    api = await pair.system.api()
    theirs = await pair.store("acme", 3)
    await api.stop()
    pair.write_config("")
    api, worker = await asyncio.gather(pair.system.api(), pair.system.worker())
    await pair.store("default", 3)
    await pair.until("default", "deleted", 3)
    await pair.system.ledger.execute("UPDATE records SET wake_at = wake_at - 3600000000 WHERE account = 'acme'")
    _, health = await pair.system.health()
    stats = (await pair.system.client.get(f"{pair.system.url}/api/stats", headers=OPERATOR)).json()
    refused = await pair.announce("acme", pair.acme.add())

    assert (deleted(pair.acme), await pair.count("acme", "scheduled"), refused) == ([], 3, 404)
    assert health["parts"]["deletions"]["detail"].startswith("account acme is not configured")
    assert [(one["account"], one["configured"], one["due"]) for one in stats["accounts"]] == [
        ("default", True, 0),
        ("acme", False, 3),
    ]
    await asyncio.gather(api.stop(), worker.stop())
    pair.write_config(CONFIG)
    await pair.system.worker()
    await pair.until("acme", "deleted", 3)
    assert sorted(deleted(pair.acme)) == sorted(one.id for one in theirs)
