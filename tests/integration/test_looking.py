"""The early look: what the API shows soon after the receipt fills the record, and lets the rules decide again."""

import asyncio
import contextlib
import time
from functools import partial
from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from service.config.settings import read_settings
from service.core.attempts import Verdict
from service.core.lifecycle import Move, State
from service.core.secret import Secret
from service.ledger import looking, pausing
from service.ledger.pausing import Kind, Pause
from service.sync.answers import Answer
from service.sync.rate_limit import Budget, SpareCalls
from tests.conftest import API_KEY
from tests.support.ledger import (
    ACCOUNT,
    ACTOR,
    HOUR,
    KEY,
    arrival,
    claim_one,
    confirmed,
    copy,
    moves_of,
    receive,
    row_of,
    settle,
    store,
    utc_now,
)
from tests.support.ledger import claim as claims
from workers.copy import LookLedger, Looks
from workers.ledger import WorkerLedger

RULES = """
[[rule]]
id = "scratch"
project = "scratch"
ttl = "2h"

[[rule]]
id = "film"
project = "film"
ttl = "forever"

[[rule]]
id = "court"
project = "court"
hold = "a court asked"

[[rule]]
id = "acme"
labels = { customer = "acme" }
ttl = "7d"
"""


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "mayfly.toml"
    path.write_text(RULES, encoding="utf-8")
    return read_settings({"MAYFLY_CONFIG": str(path), "SYNC_API_KEY": "sk-1"}).policy


class Api:
    """Answers GETs with what it is told, and counts them."""

    def __init__(self) -> None:
        self.answer = Answer(Verdict.RETRY, 500, error="the API answered 500")
        self.calls: list[str] = []

    async def get(self, generation_id):
        self.calls.append(generation_id)
        return self.answer

    def show(self, generation, body):
        self.answer = Answer(Verdict.DONE, 200, generation, body)


@pytest.fixture
def api():
    return Api()


@contextlib.asynccontextmanager
async def slot(_until):
    yield True


class Calls:
    """What deletions leave: *left* calls, without an end by default."""

    def __init__(self, left=1000) -> None:
        self.left = left
        self.is_spent = False

    async def take(self):
        self.left -= 1
        return self.left >= 0


@pytest.fixture
def looks_of(api, policy, metrics):
    """Make the job of a worker over a database; *enqueued* has what it enqueues."""

    def make(database, *, calls=None):
        ledger = WorkerLedger(database, limit=None, is_dry_run=False, actor=ACTOR, key=KEY, min_ttl=HOUR, now=utc_now)
        enqueued = []

        async def enqueue_cleanup(key, attempt, at):
            enqueued.append((key, attempt, at))

        looks = Looks(
            ledger=LookLedger(ledger.is_look_wanted, ledger.store_look, ledger.put_off_look, ledger.end_look),
            get=api.get,
            call_slot=slot,
            calls=cast("SpareCalls", calls or Calls()),
            enqueue_cleanup=enqueue_cleanup,
            policy=policy,
            now=utc_now,
            metrics=metrics,
            stopping=asyncio.Event(),
        )
        return looks, enqueued

    return make


def shown(item, **fields):
    """Return what the API shows of the generation of *item*: more than its webhook."""
    more = {"outputFileName": "take_07", "projectId": "none", "synthesizedAudioUrl": "https://audio"} | fields
    found = arrival(id=item.key.id, **more)
    return found.generation, found.body


async def test_the_look_fills_what_the_webhook_lacks(database, looks_of, api):
    item = arrival(due_in=24 * HOUR)
    await receive(database, item)
    api.show(*shown(item, projectId="any"))
    looks, enqueued = looks_of(database)
    await looks.run(item.key)
    row = await row_of(database, item.key)

    assert (row.project_id, row.output_file_name, row.synthesized_audio_url) == ("any", "take_07", "https://audio")
    assert (row.copy, row.look_at, row.copied_attempt) == (api.answer.body, None, None)
    assert row.copied_at is not None
    assert (row.due_at, enqueued) == (item.retention.due_at, [])
    await looks.run(item.key)
    assert api.calls == [item.key.id]


@pytest.mark.parametrize(
    ("project", "state", "move", "rule"),
    [
        ("scratch", State.SCHEDULED, Move.RESCHEDULE, "rule: scratch"),
        ("film", State.KEPT, Move.KEEP, "rule: film"),
        ("court", State.HELD, Move.HOLD, "rule: court"),
    ],
)
async def test_a_rule_about_the_project_decides_once_it_is_known(  # noqa: PLR0917 - three are fixtures
    database, looks_of, api, project, state, move, rule
):
    item = arrival(due_in=24 * HOUR)
    await receive(database, item)
    api.show(*shown(item, projectId=project))
    looks, enqueued = looks_of(database)
    await looks.run(item.key)
    row = await row_of(database, item.key)

    assert (row.state, row.rule) == (state, rule)
    assert (await moves_of(database, item.key))[-1] == move
    if state is State.SCHEDULED:
        assert row.due_at == row.wake_at == row.sent_at + 2 * HOUR
        assert enqueued == [(item.key, 1, row.due_at)]
    else:
        assert (row.wake_at, enqueued) == (None, [])


@pytest.mark.parametrize("ttl", [24 * HOUR, HOUR])
async def test_a_rule_that_was_changed_since_moves_nothing_at_the_look(database, looks_of, api, ttl):
    item = arrival(due_in=ttl)
    item = msgspec.structs.replace(item, retention=msgspec.structs.replace(item.retention, rule="rule: scratch"))
    await receive(database, item)
    api.show(*shown(item, projectId="scratch"))  # for which the rule now says two hours
    looks, enqueued = looks_of(database)
    await looks.run(item.key)
    row = await row_of(database, item.key)

    assert (row.rule, row.due_at, enqueued) == ("rule: scratch", item.retention.due_at, [])
    assert row.copied_at is not None


async def test_a_record_that_is_held_or_kept_stays_so(database, looks_of, api):
    held, kept = arrival(hold="audit"), arrival(due_in=None)
    await receive(database, held, kept)
    looks, _ = looks_of(database)
    for item in (held, kept):
        api.show(*shown(item, projectId="scratch"))
        await looks.run(item.key)

    assert [(await row_of(database, item.key)).state for item in (held, kept)] == [State.HELD, State.KEPT]
    assert (await row_of(database, held.key)).project_id == "scratch"


@pytest.mark.parametrize("url", [None, "https://app.example.com/hook", "https://m.example/webhooks/sync?label.shot=7"])
async def test_labels_of_the_signed_webhook_count_whatever_url_the_api_shows(database, looks_of, api, url):
    item = arrival(due_in=24 * 7 * HOUR)
    known = msgspec.structs.replace(item.retention, rule="rule: acme", labels={"customer": "acme"})
    await receive(database, msgspec.structs.replace(item, retention=known))
    api.show(*shown(item, webhookUrl=url, projectId="any"))
    looks, enqueued = looks_of(database)
    await looks.run(item.key)
    row = await row_of(database, item.key)

    assert (row.rule, row.due_at, enqueued) == ("rule: acme", item.retention.due_at, [])
    assert row.copied_at is not None


async def test_a_look_that_fails_is_made_again_later(database, looks_of):
    item = arrival(due_in=24 * HOUR)
    await receive(database, item)
    looks, _ = looks_of(database)
    await looks.run(item.key)
    row = await row_of(database, item.key)

    assert (row.looks, row.copied_at) == (1, None)
    assert row.look_at > utc_now()
    find = partial(looking.find_due_looks, account=ACCOUNT, limit=10)
    assert await database.read(partial(find, now=utc_now())) == []
    assert await database.read(partial(find, now=utc_now() + HOUR)) == [item.key]


async def test_a_generation_that_the_api_does_not_know_is_not_called_gone(database, looks_of, api):
    item = arrival(due_in=24 * HOUR)
    await receive(database, item)
    api.answer = Answer(Verdict.GONE, 404, body='{"errorCode":"generation_not_found"}')
    looks, _ = looks_of(database)
    with capture_logs() as logs:
        await looks.run(item.key)
    row = await row_of(database, item.key)

    assert (row.state, row.look_at, row.outcome) == (State.SCHEDULED, None, None)
    assert [line["event"] for line in logs] == ["copy.unknown"]


@pytest.mark.parametrize("kind", [Kind.UNAUTHORIZED, Kind.THROTTLED, Kind.WRONG_ORGANISATION])
async def test_no_look_is_made_while_the_api_refuses_the_key(database, looks_of, api, kind):
    item = arrival(due_in=24 * HOUR)
    await receive(database, item)
    pause = Pause(kind, utc_now(), ACTOR, "a reason", utc_now() + HOUR, ACCOUNT)
    await database.write(partial(pausing.pause, wanted=pause))
    looks, _ = looks_of(database)
    await looks.run(item.key)
    due = await database.read(partial(looking.find_due_looks, account=ACCOUNT, now=utc_now() + HOUR, limit=10))

    assert (api.calls, due) == ([], [])
    assert (await row_of(database, item.key)).look_at is not None


async def test_a_pause_of_deletions_alone_keeps_nothing_from_being_looked_at(database, looks_of, api):
    item = arrival(due_in=24 * HOUR)
    await receive(database, item)
    await database.write(partial(pausing.pause, wanted=Pause(Kind.OPERATOR, utc_now(), ACTOR, "audit", None)))
    looks, _ = looks_of(database)
    await looks.run(item.key)

    assert api.calls == [item.key.id]


async def test_while_an_attempt_has_the_record_and_afterwards_nothing_is_looked_at(database, looks_of, api):
    key = await store(database, due_in=-HOUR)
    claim = await claim_one(database)
    looks, _ = looks_of(database)
    await looks.run(key)
    await copy(database, claim)
    assert (await row_of(database, key)).look_at is None
    await settle(database, confirmed(claim))
    await looks.run(key)

    assert api.calls == []


async def test_the_copy_before_the_delete_replaces_the_early_one_unless_it_says_less(database, looks_of, api):
    rich, poor = arrival(due_in=-HOUR), arrival(due_in=-HOUR)
    await receive(database, rich, poor)
    looks, _ = looks_of(database)
    early = {}
    for item in (rich, poor):
        api.show(*shown(item))
        await looks.run(item.key)
        early[item.key] = api.answer.body
    for claim in await claims(database):
        fields: dict[str, Any] = {
            "outputFileName": "take_07",
            "projectId": "none",
            "synthesizedAudioUrl": "https://audio",
        }
        if claim.key == rich.key:
            fields["segments"] = []
        else:
            fields["outputFileName"] = None
        await copy(database, claim, **fields)
    rows = [await row_of(database, item.key) for item in (rich, poor)]

    assert '"segments": []' in rows[0].copy
    assert rows[1].copy == early[poor.key]
    assert [row.output_file_name for row in rows] == ["take_07"] * 2


async def test_looks_take_only_what_deletions_leave_of_the_budget(settings, pool):
    rate = settings(MAYFLY_API_RATE="300/minute").api_rate
    budget = Budget(rate, pool, Secret(API_KEY), clock=time.monotonic, stopping=asyncio.Event())
    spare = SpareCalls(budget, time.monotonic)
    taken = sum([await spare.take() for _ in range(20)])

    assert 0 < taken <= 4  # of ten calls in two seconds
    assert await budget.grant(1) == 1
    waiting = Budget(rate, pool, Secret("sk-another"), clock=time.monotonic, stopping=asyncio.Event())
    waiting.waiting = 1
    assert not await SpareCalls(waiting, time.monotonic).take()


async def test_at_one_attempt_in_two_seconds_a_look_takes_what_nobody_waits_for(settings, pool):
    rate = settings(MAYFLY_API_RATE="60/minute").api_rate
    budget = Budget(rate, pool, Secret(API_KEY), clock=time.monotonic, stopping=asyncio.Event())
    spare = SpareCalls(budget, time.monotonic)
    taken = [await spare.take() for _ in range(4)]
    began = time.monotonic()

    assert taken == [True, True, False, False]  # the calls of one attempt
    assert await budget.acquire(10)
    assert time.monotonic() - began < 5  # a deletion waits for one window at most
    budget.waiting = 1
    assert not await SpareCalls(budget, time.monotonic).take()


async def test_a_slow_rate_is_left_to_deletions(settings, pool):
    rate = settings(MAYFLY_API_RATE="1/hour").api_rate
    budget = Budget(rate, pool, Secret(API_KEY), clock=time.monotonic, stopping=asyncio.Event())

    assert not await SpareCalls(budget, time.monotonic).take()


async def test_without_budget_a_look_is_left_to_the_safety_net(database, looks_of, api):
    item = arrival(due_in=24 * HOUR)
    await receive(database, item)
    looks, _ = looks_of(database, calls=Calls(left=0))
    await looks.run(item.key)

    assert (api.calls, (await row_of(database, item.key)).looks) == ([], 0)


async def test_a_429_to_a_look_pauses_its_account(database, looks_of, api):
    item = arrival(due_in=24 * HOUR)
    await receive(database, item)
    api.answer = Answer(Verdict.RETRY, 429, error="the API answered 429", throttle=HOUR)
    looks, _ = looks_of(database)
    await looks.run(item.key)

    (pause,) = await database.read(pausing.find_pauses)
    assert (pause.account, pause.kind) == (ACCOUNT, Kind.THROTTLED)
    assert pause.until > utc_now() + HOUR / 2
