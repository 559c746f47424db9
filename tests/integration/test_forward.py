"""The attempts of one target: jobs, circuit, safety net, stop, and a ledger that does not answer."""

import asyncio
import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.core.circuit import FAILURES, PROBE_EVERY
from service.core.forwarding import GIVE_UP_AFTER, Reply
from service.forwarding.posting import Outgoing
from service.jobs.enqueue import ForwardJob, Job
from service.ledger.database import LedgerUnavailableError, RowLockedError, UnknownOutcomeError
from service.ledger.delivering import Due
from tests.support import attempts as ours
from tests.support.attempts import CRM, FILMS, forwarding, insert_one
from tests.support.ledger import HOUR, utc_now
from tests.support.waiting import eventually
from workers.forward import AWAY, Forwards, lease_of
from workers.net import Net
from workers.target import DeliveryLedger, RemovedTargets, reserve_threads

LATE = timedelta(seconds=2)
OK, AWAY_REPLY = Reply(200, "ok"), Reply(None, error="not reached: ConnectError: Connection refused")


class Clock:
    def __init__(self) -> None:
        self.off = timedelta(0)

    def now(self):
        return utc_now() + self.off


class Worker:
    """What works for one target, with a scripted app: *replies* in order, the last one for ever."""

    def __init__(self, database, metrics, target=CRM, post=None) -> None:
        self.database, self.metrics, self.target = database, metrics, target
        self.clock, self.stopping = Clock(), asyncio.Event()
        self.replies = [OK]
        self.sent: list[Outgoing] = []
        self.jobs: list[Job] = []
        self.is_answering = asyncio.Event()
        self.is_answering.set()
        self.ledger = DeliveryLedger(database, target, now=self.clock.now)
        self.forwards = Forwards(
            target,
            ledger=self.ledger,
            post=post or self.post,
            enqueue=self.jobs.extend,
            now=self.clock.now,
            metrics=metrics,
            stopping=self.stopping,
        )

    async def post(self, outgoing):
        self.sent.append(outgoing)
        await self.is_answering.wait()
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    async def round(self):
        """Do what a round of the net leads to, with a Redis whose jobs run at once."""
        due = await self.forwards.find_due(LATE, 200)
        for one in due:
            await self.forwards.run(one.id, one.attempt)
        return len(due)

    async def open_circuit(self):
        self.replies = [AWAY_REPLY]
        names = [await insert_one(self.database) for _ in range(FAILURES)]
        for name in names:
            await self.forwards.run(name, 1)
        return names

    def metric(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, {"target": self.target.id, **labels})


@pytest.fixture
def worker(database, metrics):
    return Worker(database, metrics)


async def test_a_job_makes_one_attempt_and_the_next_job_follows_by_the_schedule(worker, database):
    worker.replies = [Reply(503), OK]
    name = await insert_one(database, body=b"{}")
    await worker.forwards.run(name, 1)
    (job,) = worker.jobs
    assert job == ForwardJob("crm", name, 2, job.at)
    assert timedelta(seconds=4) < job.at - utc_now() < timedelta(seconds=6)
    await worker.forwards.run(name, 2)  # early
    worker.clock.off = timedelta(seconds=10)
    await worker.forwards.run(name, 2)
    await worker.forwards.run(name, 2)  # a duplicate

    assert [(one.id, one.attempt, one.body) for one in worker.sent] == [(name, 1, b"{}"), (name, 2, b"{}")]
    assert (await ours.row_of(database, name)).state == "delivered"
    assert worker.metric("mayfly_forwards_total", outcome="deferred") == 1
    assert worker.metric("mayfly_forwards_total", outcome="delivered") == 1
    assert worker.metric("mayfly_forward_seconds_count") == 1


async def test_what_comes_behind_is_enqueued_at_once_when_the_first_is_delivered(worker, database):
    first, second = await insert_one(database, "g-1"), await insert_one(database, "g-1")
    await worker.forwards.run(second, 1)
    assert worker.sent == []
    await worker.forwards.run(first, 1)

    assert [(job.delivery, job.attempt) for job in worker.jobs] == [(second, 1)]


async def test_after_ten_failures_only_a_probe_is_sent_each_half_minute(worker, database):
    await worker.open_circuit()
    assert worker.metric("mayfly_forward_circuit") == 1
    for _ in range(5):
        await worker.forwards.run(await insert_one(database), 1)
    worker.clock.off = timedelta(seconds=10)
    assert await worker.round() == 0
    assert len(worker.sent) == FAILURES
    for number in range(1, 4):
        worker.clock.off = timedelta(seconds=10) + number * PROBE_EVERY
        assert [await worker.round() for _ in range(3)] == [1, 0, 0]

        assert len(worker.sent) == FAILURES + number


async def test_a_stale_job_uses_up_no_probe(worker, database):
    names = await worker.open_circuit()
    waiting = await insert_one(database)
    worker.clock.off = PROBE_EVERY
    for name in names:
        await worker.forwards.run(name, 1)
    assert len(worker.sent) == FAILURES
    worker.replies = [OK]
    await worker.forwards.run(waiting, 1)

    assert worker.sent[-1].id == waiting
    assert worker.metric("mayfly_forward_circuit") == 0


async def test_the_first_answer_closes_the_circuit_and_all_that_waits_is_sent(worker, database):
    names = [*await worker.open_circuit(), *[await insert_one(database) for _ in range(30)]]
    worker.replies = [OK]
    worker.clock.off = 2 * PROBE_EVERY
    with capture_logs() as logs:
        assert await worker.round() == 1
        assert await worker.round() == len(names) - 1

    assert [entry["event"] for entry in logs].count("target.answers") == 1
    assert {row.state for row in await ours.rows(database)} == {"delivered"}


@pytest.mark.parametrize(
    ("status", "is_open"),
    [(500, True), (503, True), (429, True), (408, True), (404, False), (401, False), (302, False), (410, False)],
)
async def test_only_what_shows_that_the_target_is_in_trouble_opens_the_circuit(worker, database, status, is_open):
    worker.replies = [Reply(status)]
    with capture_logs() as logs:
        for name in [await insert_one(database) for _ in range(FAILURES + 2)]:
            await worker.forwards.run(name, 1)

    assert (worker.metric("mayfly_forward_circuit") == 1) == is_open
    assert len(worker.sent) == (FAILURES if is_open else FAILURES + 2)
    assert [entry["event"] for entry in logs].count("target.away") == is_open


async def test_nothing_is_given_up_before_the_target_was_tried_for_an_hour(worker, database):
    old = await insert_one(database, received_at=utc_now() - GIVE_UP_AFTER - timedelta(days=1))
    await worker.open_circuit()
    await worker.forwards.find_due(LATE, 200)
    assert (await ours.row_of(database, old)).state == "waiting"
    worker.clock.off = AWAY + timedelta(minutes=1)
    with capture_logs() as logs:
        await worker.forwards.find_due(LATE, 200)

    assert (await ours.row_of(database, old)).state == "failed"
    assert next(entry for entry in logs if entry["event"] == "forward.given_up")["deliveries"] == 1
    assert sum(row.state == "waiting" for row in await ours.rows(database)) == FAILURES


class Noted:
    """A database that notes what its writes return, or raises *error*."""

    def __init__(self, database) -> None:
        self._database = database
        self.read, self.close = database.read, database.close
        self.written: list[Any] = []
        self.error: Exception | None = None

    async def write(self, function):
        if self.error is not None:
            raise self.error
        self.written.append(await self._database.write(function))
        return self.written[-1]


async def test_many_are_given_up_in_steps_as_each_may_be_of_a_batch(database):
    old = utc_now() - GIVE_UP_AFTER
    await ours.insert(database, *(forwarding(received_at=old) for _ in range(23)))
    noted = Noted(database)
    with capture_logs() as logs:
        await DeliveryLedger(noted, CRM, now=utc_now).give_up()

    assert [row.state for row in await ours.rows(database)] == ["failed"] * 23
    assert max(len(seqs) for seqs in noted.written) <= 5
    assert [entry["deliveries"] for entry in logs] == [23]


async def test_a_target_is_tried_although_what_is_old_cannot_be_given_up(database, metrics):
    noted = Noted(database)
    worker = Worker(noted, metrics)
    name = await insert_one(database, received_at=utc_now() - GIVE_UP_AFTER)
    await worker.open_circuit()
    worker.clock.off = AWAY + timedelta(minutes=1)
    noted.error = RowLockedError("a record that waits for it")
    with pytest.raises(RowLockedError):
        await worker.forwards.find_due(LATE, 200)

    assert [one.id for one in await worker.forwards.find_due(LATE, 200)] == [name]


async def test_what_was_for_a_removed_target_is_ended_although_no_target_is_left(database, metrics):
    old = await insert_one(database, received_at=utc_now() - GIVE_UP_AFTER, targets=(FILMS,))
    recent = await insert_one(database, targets=(FILMS,))
    kept = await insert_one(database, received_at=utc_now() - GIVE_UP_AFTER)
    for targets, ended in (((CRM,), {old}), ((), {old, kept})):
        stopping = asyncio.Event()
        running = asyncio.create_task(RemovedTargets(database, targets, metrics=metrics, stopping=stopping).run())

        async def is_done(ended=ended):
            return {row.id for row in await ours.rows(database) if row.state == "failed"} == ended

        await eventually(is_done)
        stopping.set()
        await asyncio.wait_for(running, 5)

    assert (await ours.row_of(database, recent)).state == "waiting"


async def test_after_a_stop_no_attempt_begins_and_one_in_progress_ends(worker, database):
    worker.is_answering.clear()
    first, second = await insert_one(database), await insert_one(database)
    running = asyncio.create_task(worker.forwards.run(first, 1))
    await eventually(lambda: worker.sent)
    worker.stopping.set()
    running.cancel()  # as arq does
    await worker.forwards.run(second, 1)
    await worker.forwards.run_without_queue([Due("crm", second, 1)])
    worker.is_answering.set()

    assert await worker.forwards.attempts.wait(5)
    assert (await ours.row_of(database, first)).state == "delivered"
    assert [one.id for one in worker.sent] == [first]


async def test_an_outcome_that_cannot_be_stored_is_stored_again(worker, database):
    name, settle, errors = (
        await insert_one(database),
        worker.ledger.settle,
        [UnknownOutcomeError("x"), LedgerUnavailableError("y")],
    )

    async def failing(ended):
        if len(errors) == 2:
            await settle(ended)  # it was committed, and nobody said so
        if errors:
            raise errors.pop(0)
        return await settle(ended)

    worker.ledger.settle = failing
    await worker.forwards.run(name, 1)

    assert (await ours.row_of(database, name)).state == "delivered"
    assert len(worker.sent) == 1


async def test_a_claim_that_fails_begins_nothing_and_uses_up_no_probe(worker, database):
    await worker.open_circuit()
    name, claim = await insert_one(database), worker.ledger.claim
    worker.clock.off = PROBE_EVERY

    async def failing(_due):
        raise LedgerUnavailableError("away")

    worker.ledger.claim = failing
    with capture_logs() as logs:
        await worker.forwards.run(name, 1)
    assert [entry["event"] for entry in logs] == ["forward.not_started"]
    worker.ledger.claim = claim
    worker.replies = [OK]
    await worker.forwards.run(name, 1)

    assert (await ours.row_of(database, name)).state == "delivered"


async def test_without_redis_one_slow_webhook_holds_up_no_other(database, metrics):
    slow, held = await insert_one(database), asyncio.Event()

    async def post(outgoing):
        if outgoing.id == slow:
            await held.wait()
        return OK

    worker = Worker(database, metrics, replace(CRM, concurrency=3), post)

    async def no_redis(_jobs):
        raise ConnectionError

    net = Net(
        name="forwards",
        find_due=worker.forwards.find_due,
        make_job=lambda due, at: ForwardJob(due.target, due.id, due.attempt, at),
        enqueue=no_redis,
        now=worker.clock.now,
        metrics=metrics,
        stopping=worker.stopping,
        late=LATE,
        without_queue=worker.forwards.run_without_queue,
    )
    worker.clock.off = LATE
    names = [await insert_one(database) for _ in range(6)]
    running = asyncio.create_task(net.run())

    async def are_done():
        return {row.id for row in await ours.rows(database) if row.state == "delivered"} == set(names)

    await eventually(are_done, seconds=15)
    assert (await ours.row_of(database, slow)).state == "waiting"
    held.set()
    worker.stopping.set()
    await running
    assert await worker.forwards.attempts.wait(5)


async def test_lookups_that_hang_leave_a_thread_for_all_others():
    loop, held = asyncio.get_running_loop(), threading.Event()
    targets = [replace(CRM, concurrency=100), FILMS]
    reserve_threads(targets)
    hanging = [loop.run_in_executor(None, held.wait) for _ in range(108)]
    try:
        assert await asyncio.wait_for(loop.getaddrinfo("127.0.0.1", 80), 5)
    finally:
        held.set()
        await asyncio.gather(*hanging)


def test_a_lease_is_longer_than_its_attempt_and_two_commits():
    assert lease_of(replace(CRM, timeout=timedelta(minutes=1))) == timedelta(seconds=90)


async def test_a_worker_that_died_is_followed_by_the_next_attempt(worker, database):
    name = await insert_one(database)
    await worker.ledger.claim(Due("crm", name, 1))
    assert await worker.round() == 0
    worker.clock.off = lease_of(CRM) + LATE + timedelta(seconds=1)
    assert await worker.round() == 1

    assert [(one.id, one.attempt) for one in worker.sent] == [(name, 2)]
    assert (await ours.row_of(database, name)).state == "delivered"
    assert worker.clock.off < HOUR


async def test_what_is_due_for_long_is_begun_without_its_job_once_nothing_runs(worker, database):
    name = await insert_one(database, received_at=utc_now() - timedelta(seconds=20))
    fresh = await insert_one(database)  # its job may start any moment
    worker.is_answering.clear()
    await worker.forwards.take_over()
    await asyncio.sleep(0.05)
    assert [one.id for one in worker.sent] == [name]
    await worker.forwards.take_over()  # an attempt runs, so jobs do start
    worker.is_answering.set()
    await worker.forwards.attempts.wait(5)
    await worker.forwards.take_over()

    assert [one.id for one in worker.sent] == [name]
    assert (await ours.row_of(database, name)).state == "delivered"
    assert (await ours.row_of(database, fresh)).attempts == 0
