"""Webhooks that are forwarded: real processes, apps on real sockets, and parts killed, emptied and stopped."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from service.simulator import Generation, Operation
from tests.faults import judging_forwards
from tests.faults.databases import Postgres
from tests.faults.forwarding import count, expire_leases, forward, hurry, target
from tests.faults.processes import Process
from tests.faults.proxy import Proxy
from tests.faults.system import SIGNING, TOKEN, System, on_both
from tests.support.app import Answer, App, Received
from tests.support.ports import free_port
from tests.support.waiting import eventually
from tests.support.webhooks import Webhook, batch, webhook


async def begun(system: System, app: App, *lines: str) -> tuple[Generation, Process]:
    """Forward to *app*, start both sides and send one webhook; return its generation and the worker."""
    forward(system, target("crm", app.port, *lines))
    worker, _ = await asyncio.gather(system.worker(), system.api())
    return await system.accepted(system.generation()), worker


async def send(system: System, sent: Webhook, *, port: int | None = None) -> None:
    """Send any webhook; it must be answered 202."""
    url = f"http://127.0.0.1:{port or system.port}/webhooks/sync"
    answer = await system.client.post(url, content=sent.body, headers=sent.headers)
    assert answer.status_code == 202


async def are(system: System, number: int, state: str = "delivered", *, seconds: float = 15) -> None:
    """Wait until *number* deliveries are in *state*, and no other is left."""

    async def have_arrived() -> bool:
        return await count(system, state) == number

    await eventually(have_arrived, seconds=seconds)
    assert await system.ledger.number("SELECT count(*) FROM deliveries") == number


async def check(system: System) -> None:
    """Let everything be deleted, and judge it; no log has the URL or the secret of a target."""
    await system.drain()
    assert not (await system.judged()).all


def verify(received: Received) -> None:
    """Verify as both an app of sync.so's documentation and one of Standard Webhooks do."""
    judging_forwards.verify(received, signing=SIGNING)
    sent_at = (received.header("sync-signature") or "").removeprefix("t=").partition(",")[0]
    assert abs(datetime.now(UTC).timestamp() - float(sent_at)) < 300


def check_repeats(requests: Sequence[Received], *, times: int) -> None:
    """Check that the same delivery was sent so many *times*, numbered, with the same body."""
    assert len(requests) == times
    assert len({(one.delivery, one.body, one.header("sync-signature")) for one in requests}) == 1
    assert [one.attempt for one in requests] == list(range(1, times + 1))


# All as it should be


@on_both
async def test_every_webhook_reaches_its_targets_once_and_is_verified_by_both(system: System):
    async with App() as app, App() as second:
        forward(
            system,
            target("crm", app.port),
            target("ended", second.port, 'statuses = ["COMPLETED", "FAILED"]'),
            target("running", second.port, 'statuses = "PROCESSING"', 'labels = { customer = "acme*" }'),
        )
        port = free_port()
        await asyncio.gather(system.worker(), system.worker(), system.api(), system.api(MAYFLY_PORT=str(port)))
        url = "https://hooks.example.com/webhooks/sync?label.customer=acme-eu"
        others = [
            webhook(status="PROCESSING", webhookUrl=url),
            webhook(status="PROCESSING"),
            webhook(body=json.dumps(batch()).encode()),
            webhook(body=json.dumps(batch() | {"status": "PROCESSING", "id": "batch_2"}, indent=3).encode()),
            webhook(title="Žižek 🎬"),
        ]
        generations = [system.generation() for _ in range(10)]
        await asyncio.gather(*(system.announce(one, port=p) for one in generations for p in (system.port, port)))
        await asyncio.gather(*(send(system, one, port=port) for one in others))
        bodies = [one.body for one in others] + [system.simulator.webhook(one.id)[0] for one in generations]
        await are(system, 15 + 12 + 1, seconds=20)

        assert Counter(one.body for one in app.requests) == Counter(bodies)
        ended = Counter(one.body for one in second.received(path="/ended"))
        assert ended == Counter([others[2].body, others[4].body, *bodies[5:]])
        assert [one.body for one in second.received(path="/running")] == [others[0].body]
        for received in (*app.requests, *second.requests):
            verify(received)
            assert received.attempt == 1
        assert len({one.delivery for one in (*app.requests, *second.requests)}) == 28


@on_both
async def test_a_resend_by_sync_so_is_forwarded_once(system: System):
    async with App() as app:
        generation, _ = await begun(system, app)
        await app.wait_for(1)
        for _ in range(3):
            await system.accepted(generation)
        await system.until(generation, "deleted")

        assert len(app.requests) == 1
        await check(system)


@on_both
async def test_the_webhooks_of_a_generation_arrive_in_order_while_its_app_fails(system: System):
    async with App() as app:
        app.script(Answer(503), Answer(end="reset"), Answer(500))
        forward(system, target("crm", app.port))
        await asyncio.gather(system.worker(), system.worker(), system.api())
        steps = [webhook(id="g-1", status=status) for status in ("PENDING", "PROCESSING", "PROCESSING", "COMPLETED")]
        for one in steps:
            await send(system, one)

        async def are_there() -> bool:
            await hurry(system)
            await asyncio.sleep(0.2)
            return await count(system, "delivered") == 4

        await eventually(are_there, seconds=30)
        arrived = [one.body for one in app.requests if one.answered == 200]
        assert arrived == [one.body for one in steps]
        assert [one.body for one in app.requests[:4]] == [steps[0].body] * 4


# Killed


@on_both
async def test_a_web_side_killed_between_commit_and_enqueue_loses_no_delivery(system: System):
    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", system.redis.port)

    async with App() as app:
        forward(system, target("crm", app.port))
        async with Proxy(connect).serve() as proxy:
            api = await system.api(MAYFLY_REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0")
            proxy.trouble("stall", b"EVALSHA")
            await system.accepted(system.generation())
            await asyncio.wait_for(proxy.reached.wait(), 5)
            await api.kill()
        assert await system.redis.command("KEYS", "arq:job:forward*") == []
        await asyncio.gather(system.api(), system.worker())
        await are(system, 1)

        check_repeats(app.requests, times=1)
        await check(system)


@on_both
async def test_a_worker_killed_after_its_claim_is_followed_by_another_attempt(system: System):
    async with App() as app:

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection("127.0.0.1", app.port)

        async with Proxy(connect).serve() as proxy:
            proxy.trouble("stall", b"POST")
            forward(system, target("crm", proxy.port))
            worker, _ = await asyncio.gather(system.worker(), system.api())
            await system.accepted(system.generation())
            await asyncio.wait_for(proxy.reached.wait(), 10)
            await worker.kill()
            proxy.trouble("cut", b"no request has this")
            await expire_leases(system)
            await system.worker()
            await are(system, 1)

            assert [one.attempt for one in app.requests] == [2]
        verify(app.requests[0])
        await check(system)


@on_both
async def test_a_worker_killed_in_the_middle_of_an_attempt_repeats_the_same_delivery(system: System):
    async with App() as app:
        app.script(Answer(end="never"))
        _, worker = await begun(system, app)
        await app.wait_for(1)
        await worker.kill()
        await expire_leases(system)
        await system.worker()
        await are(system, 1)

        check_repeats(app.requests, times=2)
        verify(app.requests[1])
        await check(system)


@on_both
async def test_a_worker_killed_between_answer_and_commit_repeats_the_same_delivery(system: System):
    async with App() as app:
        app.script(Answer(delay=0.5))
        _, worker = await begun(system, app)
        await app.wait_for(1)
        async with system.ledger.lock("deliveries"):
            await eventually(lambda: app.requests[0].answered)
            await asyncio.sleep(0.3)  # the answer is read, and the outcome waits at the lock
            await worker.kill()
        assert await count(system, "waiting") == 1
        await expire_leases(system)
        await system.worker()
        await are(system, 1)

        check_repeats(app.requests, times=2)
        await check(system)


@on_both
async def test_sigterm_in_the_middle_of_an_attempt_lets_it_end(system: System):
    async with App() as app:
        app.default = Answer(delay=1.5)
        _, worker = await begun(system, app)
        await app.wait_for(1)
        worker.send(signal.SIGTERM)
        await asyncio.sleep(0.5)
        assert worker.exit_code is None

        assert await worker.ended(15) == 0
        assert await count(system, "delivered") == 1
        check_repeats(app.requests, times=1)


async def test_a_worker_frozen_beyond_its_lease_undoes_no_success(either_system: System):
    system = either_system
    async with App() as app:
        app.script(Answer(410, delay=1))
        generation, sleeper = await begun(system, app)
        await app.wait_for(1)
        sleeper.send(signal.SIGSTOP)
        await expire_leases(system)
        await system.worker()
        await are(system, 1)
        sleeper.send(signal.SIGCONT)
        await sleeper.logged("forward.failed")
        await asyncio.sleep(0.5)

        assert await count(system, "delivered") == 1
        check_repeats(app.requests, times=2)
        await system.until(generation, "deleted")


# Redis and the database away


@on_both
async def test_what_redis_lost_is_delivered(system: System):
    async with App() as app:
        forward(system, target("crm", app.port))
        await system.api()
        generations = [await system.accepted(system.generation()) for _ in range(20)]

        async def are_enqueued() -> bool:
            return len(await system.redis.command("KEYS", "arq:job:forward*")) == len(generations)

        await eventually(are_enqueued)
        await system.redis.command("FLUSHALL")
        await system.worker()
        await are(system, len(generations))

        assert Counter(one.attempt for one in app.requests) == {1: len(generations)}
        await check(system)


async def test_without_redis_deliveries_go_on(system: System):
    async with App() as app:
        app.script(Answer(503))
        forward(system, target("crm", app.port, "concurrency = 3"))
        await asyncio.gather(system.worker(), system.api())
        system.redis.kill()
        generations = [await system.accepted(system.generation()) for _ in range(7)]

        async def are_there() -> bool:
            await hurry(system)
            await asyncio.sleep(0.3)
            return await count(system, "delivered") == len(generations)

        await eventually(are_there, seconds=40)
        assert len(app.requests) == len(generations) + 1
        await system.redis.start()
        await check(system)


async def test_a_postgresql_killed_in_the_middle_of_an_attempt_repeats_nothing(
    mortal_system: System, mortal_postgres: Postgres
):
    system = mortal_system
    async with App() as app:
        app.script(Answer(delay=1.5))
        await begun(system, app)
        await app.wait_for(1)
        mortal_postgres.kill()
        await eventually(lambda: app.requests[0].answered)
        await asyncio.sleep(1)
        await mortal_postgres.start()
        await are(system, 1)

        check_repeats(app.requests, times=1)
        await check(system)


# Targets in trouble


@pytest.mark.parametrize("trouble", ["dead", "slow"])
async def test_a_target_in_trouble_delays_no_other(either_system: System, trouble: str):
    system = either_system
    async with App() as app, App() as slow:
        slow.default = Answer(end="never")
        forward(system, target("crm", slow.port if trouble == "slow" else free_port()), target("films", app.port))
        await asyncio.gather(system.worker(), system.api())
        sent: dict[bytes, float] = {}
        for _ in range(40):
            generation = await system.accepted(system.generation())
            sent[system.simulator.webhook(generation.id)[0]] = datetime.now(UTC).timestamp()
        await app.wait_for(40)

        late = sorted(one.at - sent[one.body] for one in app.requests)
        assert late[-1] < 8  # an attempt at the one in trouble takes 15 s
        assert late[20] < 4
        assert await system.ledger.number("SELECT count(*) FROM deliveries WHERE target = 'crm' AND attempts < 3") == 40
        await check(system)


@on_both
async def test_a_circuit_opens_and_one_answer_closes_it(system: System):
    app = App()
    forward(system, target("crm", app.port))
    worker, _ = await asyncio.gather(system.worker(without="a steady clock"), system.api())
    generations = [await system.accepted(system.generation()) for _ in range(25)]
    away = await worker.logged("target.away")
    assert away["target"] == "crm"
    assert "Connection refused" in away["error"]
    await asyncio.sleep(1)
    assert len(worker.events("forward.deferred")) <= 18  # ten, and those that were under way
    async with app:
        worker.send(signal.SIGUSR1)  # an hour later
        await worker.logged("target.answers")
        worker.send(signal.SIGUSR2)
        await are(system, len(generations), seconds=20)

    assert len({one.delivery for one in app.requests}) == len(app.requests) == len(generations)


@on_both
async def test_410_ends_a_delivery_and_no_other(system: System):
    async with App() as app:
        app.script(Answer(410))
        _, worker = await begun(system, app)
        failed = await worker.logged("forward.failed")
        assert failed["error"] == "answered 410: it does not want this webhook"
        assert failed["delivery"] == app.requests[0].delivery
        await system.accepted(system.generation())
        await app.wait_for(2)
        await hurry(system)
        await eventually(lambda: app.requests[1].answered)
        await asyncio.sleep(0.5)

        assert len(app.requests) == 2
        assert (await count(system, "failed"), await count(system, "delivered")) == (1, 1)
        await check(system)


@on_both
async def test_retry_after_is_obeyed(system: System):
    async with App() as app:
        app.script(Answer(503, headers=(("Retry-After", "3600"),)))
        await begun(system, app)

        async def is_deferred() -> int:
            return await system.ledger.number(
                "SELECT count(*) FROM deliveries WHERE attempts = 1 AND leased_until IS NULL"
            )

        await eventually(is_deferred)
        await system.ledger.execute(_earlier(system, timedelta(minutes=59)))
        await asyncio.sleep(3.5)
        assert len(app.requests) == 1
        await system.ledger.execute(_earlier(system, timedelta(minutes=2)))
        await are(system, 1)

        check_repeats(app.requests, times=2)


def _earlier(system: System, duration: timedelta) -> str:
    seconds = int(duration.total_seconds())
    by = f"INTERVAL '{seconds} seconds'" if system.ledger.url.startswith("postgresql") else str(seconds * 10**6)
    return f"UPDATE deliveries SET wake_at = wake_at - {by}"  # noqa: S608 - of our own words


# A target that is required


@on_both
async def test_nothing_is_deleted_before_a_required_target_has_taken_it(system: System):
    async with App() as app:
        app.script(Answer(503), Answer(204))
        generation, _ = await begun(system, app, "required = true")
        await app.wait_for(1)
        await asyncio.sleep(3)  # the ttl of two seconds is over
        assert (await system.row(generation)).state == "scheduled"
        assert not system.simulator.removed
        await hurry(system)
        await system.until(generation, "deleted", is_hurried=False)

        (answered,) = [one for one in app.requests if one.answered == 204]
        (delete,) = system.calls(generation, Operation.DELETE)
        assert delete.at.timestamp() >= answered.at
        assert not (await system.judged()).all


@on_both
async def test_a_required_delivery_that_fails_and_is_replayed_retries_its_record(system: System):
    async with App() as app:
        app.script(Answer(410), Answer(200))
        generation, _ = await begun(system, app, "required = true")
        await system.until(generation, "failed", is_hurried=False)
        assert not system.simulator.removed
        (delivery,) = {one.delivery for one in app.requests}
        answer = await system.client.post(
            f"{system.url}/api/forwards/{delivery}/replay", headers={"authorization": f"Bearer {TOKEN}"}
        )
        assert answer.status_code == 200
        await system.until(generation, "deleted", is_hurried=False)

        assert [one.answered for one in app.requests] == [410, 200]
