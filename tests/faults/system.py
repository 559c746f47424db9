"""A whole system under test: simulator, Redis, ledger and processes; sending, draining and the verdict."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx

from service.core.key import DEFAULT_ACCOUNT, Key
from service.core.secret import Secret
from service.jobs import connection, enqueue
from service.jobs.enqueue import CleanupJob
from service.simulator import Call, Generation, Operation, Simulator
from tests.faults.databases import Ledger, Row, migrated_sqlite
from tests.faults.health_monitor import HealthMonitor
from tests.faults.judging import FINAL, Sent, Verdict, WatchedCalls, judge
from tests.faults.judging_forwards import FINAL_STATUSES, Inbox, Told, judge_forwards
from tests.faults.processes import Process, ProcessStarter, RedisServer
from tests.support.ports import free_port
from tests.support.waiting import eventually
from tests.support.webhooks import SECRET, signature

T = TypeVar("T")

API_KEY = "sk-faults-0123456789abcdef"
TOKEN = "operator-token-of-the-fault-tests"
# Of the targets that webhooks are forwarded to: what they verify with, and what is in their URLs.
SIGNING = "whsec_" + "A" * 43 + "="
URL_SECRET = "in-the-url-of-a-target"
SECRETS = (SECRET, API_KEY, TOKEN, SIGNING, URL_SECRET)
# The health_monitor must not wait for a connection that a hundred webhooks have in use.
_NO_TIME = timedelta(0)
_MANY = httpx.Limits(max_connections=None, max_keepalive_connections=20)


@dataclass
class System:
    """What a fault test works with; made by *running*."""

    starter: ProcessStarter
    folder: Path
    simulator: Simulator
    redis: RedisServer
    ledger: Ledger
    client: httpx.AsyncClient
    health_monitor: HealthMonitor
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    sent: list[Sent] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)  # all webhooks, also those that schedule nothing
    inboxes: list[Inbox] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    # Whether hurry() enqueues jobs as well. For tests of what an attempt leads to alone: where it is judged whether
    # there is one at all, a job of the test's own would do the repair that it is to see.
    is_enqueueing: bool = False

    @property
    def url(self) -> str:
        """Where the first api process listens."""
        return f"http://127.0.0.1:{self.port}"

    # Processes

    def spawn(
        self, command: str, *, module: str = "service.cli", arguments: Sequence[str] = (), **environment: str
    ) -> Process:
        """Start a ``mayfly`` command, or another *module* that stands for it, and wait for nothing."""
        log = self.folder / f"{command}-{len(self.processes)}.log"
        process = self.starter.start(
            module,
            [command, *arguments],
            environment={
                "SYNC_API_KEY": API_KEY,
                "SYNC_WEBHOOK_SECRET": SECRET,
                "SYNC_BASE_URL": self.simulator.url,
                "MAYFLY_API_TOKEN": TOKEN,
                "MAYFLY_DATABASE_URL": self.ledger.url,
                "MAYFLY_REDIS_URL": self.redis.url,
                "MAYFLY_DATA_DIR": str(self.folder / "data"),
                "MAYFLY_PORT": "0" if command == "worker" else str(self.port),
                "MAYFLY_LOG_FORMAT": "json",
                "MAYFLY_MIN_TTL": "1s",
                "MAYFLY_TTL": "1s",
                "MAYFLY_API_RATE": "100000/second",
                **self.environment,
                **environment,
            },
            folder=self.folder,
            log=log,
        )
        self.processes.append(process)
        return process

    async def api(self, **environment: str) -> Process:
        """Start ``mayfly api``, wait until it serves, and have an eye on its health from then on."""
        process = self.spawn("api", **environment)
        await process.logged("web.started")
        self.health_monitor.follow(process, int(environment.get("MAYFLY_PORT", self.port)))
        return process

    async def worker(self, *, without: str | None = None, **environment: str) -> Process:
        """Start ``mayfly worker``, or one *without* a part (see partial_workers.py), and wait until it works."""
        if without is None:
            process = self.spawn("worker", **environment)
        else:
            process = self.spawn("worker", module="tests.faults.partial_workers", arguments=[without], **environment)
        await process.logged("worker.started")
        return process

    # What goes in

    def generation(self, *, get: Sequence[str] = (), delete: Sequence[str] = (), **options: Any) -> Generation:  # noqa: ANN401
        """Add a generation that meets these faults."""
        faults = {"GET": get, "DELETE": delete}
        return self.simulator.add(faults={name: script for name, script in faults.items() if script}, **options)

    async def announce(
        self,
        generation: Generation,
        *,
        seconds: float = 15,
        port: int | None = None,
        at: datetime | None = None,
        body: bytes | None = None,
    ) -> Sent:
        """Send a webhook of *generation*, signed *at*, to the web side at *port*; note how it was answered.

        Its *body* is that of its present status unless given.
        """
        begun = datetime.now(UTC)
        own, headers = self.simulator.webhook(generation.id, at=at)
        if body is not None:
            headers |= {"Sync-Signature": signature(body, at=(at or begun).timestamp())}
        body = own if body is None else body
        url = f"http://127.0.0.1:{port or self.port}/webhooks/sync"
        try:
            answer = await self.client.post(url, content=body, headers=headers, timeout=seconds)
        except httpx.HTTPError:
            sent = Sent(generation.id, None, datetime.now(UTC))
        else:
            due_at = answer.json().get("dueAt") if answer.status_code == 202 else None
            due_at = datetime.fromisoformat(due_at) if due_at else None
            sent = Sent(generation.id, answer.status_code, datetime.now(UTC), due_at)
        status, instants = json.loads(body)["status"], (begun.timestamp(), sent.answered_at.timestamp())
        self.told.append(
            Told(generation.id, status, body, headers["Sync-Signature"], *instants, is_accepted=sent.is_accepted)
        )
        if status in FINAL_STATUSES:
            self.sent.append(sent)
        return sent

    async def accepted(self, generation: Generation) -> Generation:
        """Send the webhook of *generation*, which must be answered 202."""
        sent = await self.announce(generation)
        assert sent.status == 202
        return generation

    # What comes out

    async def row(self, generation: Generation) -> Row:
        """Return the record of *generation*."""
        return {row.id: row for row in await self.ledger.rows()}[generation.id]

    async def ids(self) -> set[str]:
        """Return the ids that have a record."""
        return {row.id for row in await self.ledger.rows()}

    def calls(self, generation: Generation, operation: Operation = Operation.DELETE) -> list[Call]:
        """Return the API's log of *generation*."""
        return [c for c in self.simulator.calls if c.generation_id == generation.id and c.operation is operation]

    async def hurry(self) -> None:
        """Bring the next attempts forward to now, as waiting would. Whoever is to make them has to find that out."""
        await self.ledger.execute(
            "UPDATE records SET wake_at = :now WHERE state = 'scheduled' AND due_at <= :now AND wake_at > :now"
        )
        if self.is_enqueueing:
            with contextlib.suppress(*connection.QUEUE_ERRORS):
                await self.enqueue()

    async def expire_leases(self) -> None:
        """End the leases of workers that were killed, as waiting a minute would."""
        await self.ledger.execute("UPDATE records SET wake_at = :now WHERE state = 'deleting'")

    async def enqueue(self, *, times: int = 1) -> None:
        """Enqueue the jobs of all scheduled records for their next attempts, so many *times* under ids of their own."""
        rows = [row for row in await self.ledger.rows() if row.state == "scheduled" and row.wake_at is not None]
        pool = connection.connect(Secret(self.redis.url), retries=0)
        try:
            now = datetime.now(UTC)
            jobs = [CleanupJob(Key("default", row.id), row.attempts + 1, row.wake_at or now) for row in rows]
            await enqueue.enqueue_jobs(pool, enqueue.queue_of(DEFAULT_ACCOUNT), jobs, now=now)
            for number, job in itertools.product(range(1, times), jobs):
                await pool.enqueue_job(
                    enqueue.CLEANUP,
                    *job.arguments,
                    _job_id=f"{job.id}:{number}",
                    _defer_by=max(job.at - now, _NO_TIME),
                )
        finally:
            await pool.aclose(close_connection_pool=True)

    async def jobs(self) -> int:
        """Count the jobs of attempts in Redis; those of early looks end without one here."""
        ids: Any = await self.redis.command("ZRANGE", connection.QUEUE, 0, -1)
        return sum(not one.endswith(b":copy") for one in ids)

    async def enqueued(self, number: int) -> None:
        """Wait until *number* jobs are in Redis: the web side enqueues them a moment after its answers."""

        async def are_there() -> bool:
            return await self.jobs() == number

        await eventually(are_there, seconds=20)

    async def until(self, generation: Generation, state: str, *, seconds: float = 20, is_hurried: bool = True) -> Row:
        """Wait until the record of *generation* is in *state*."""
        async with asyncio.timeout(seconds):
            while True:
                row = await self.row(generation)
                if row.state == state:
                    return row
                if is_hurried:
                    await self.hurry()
                await asyncio.sleep(0.2)

    async def drain(self, *, seconds: float = 30) -> None:
        """Let everything come to its end, waits cut short; what does not is for the judge."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(row.state not in FINAL for row in await self.ledger.rows()):
                    await self.hurry()
                    await asyncio.sleep(0.3)

    async def judged(self, *, may_fail: Sequence[Generation] = ()) -> Verdict:
        """Judge all that happened so far."""
        calls = self.simulator.calls
        forwards = judge_forwards(
            told=self.told,
            inboxes=self.inboxes,
            rows=await self.ledger.deliveries() if self.inboxes else (),
            deletions=calls.deletions if isinstance(calls, WatchedCalls) else (),
        )
        return judge(
            sent=self.sent,
            rows=await self.ledger.rows(),
            simulator=self.simulator,
            logs=[process.log for process in self.processes],
            secrets=SECRETS,
            may_fail=frozenset(one.id for one in may_fail),
            unhealthy=self.health_monitor.breaches,
            forwards=forwards,
        )

    async def held(self, generation: Generation) -> None:
        """Wait until a call about *generation* stands at its gate."""
        async with asyncio.timeout(20):
            while generation.id not in self.simulator.gates.waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await self.simulator.gates.reached(generation.id)
                        return
                await self.hurry()

    async def health(self) -> tuple[int, dict[str, Any]]:
        """Ask whether it is ready; the answer must come within a second or so (I7)."""
        answer = await self.client.get(f"{self.url}/health/ready", timeout=2)
        return answer.status_code, answer.json()

    async def metric(self, name: str) -> float:
        """Read one number from the metrics."""
        text = (await self.client.get(f"{self.url}/metrics")).text
        (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    async def record(self, generation: Generation) -> dict[str, Any]:
        """Read the record as an operator does."""
        answer = await self.client.get(
            f"{self.url}/api/records/{generation.id}", headers={"authorization": f"Bearer {TOKEN}"}
        )
        found: dict[str, Any] = json.loads(answer.raise_for_status().content)
        return found


@contextlib.asynccontextmanager
async def running(
    starter: ProcessStarter,
    folder: Path,
    ledger: Ledger,
    *,
    environment: Mapping[str, str] | None = None,
    is_looking: bool = False,
    **options: str,
) -> AsyncIterator[System]:
    """Run a simulator and a Redis with *options* for a System whose processes the test starts; end all of it.

    Without *is_looking* the ledger wants no early look of any record: the API's calls are those of attempts alone.
    """
    simulator = Simulator(api_key=API_KEY, webhook_secret=SECRET, seed=0)
    simulator.calls = calls = WatchedCalls(ledger.copied_at)
    server = RedisServer(folder / "redis", options=options)
    await server.start()
    async with (
        contextlib.nullcontext() if is_looking else ledger.without_looks(),
        simulator.serve(),
        httpx.AsyncClient(verify=False, trust_env=False, timeout=10, limits=_MANY) as client,  # noqa: S501
        HealthMonitor(client, server.reach, ledger.reach).running() as health_monitor,
    ):
        system = System(starter, folder, simulator, server, ledger, client, health_monitor, dict(environment or {}))
        looking = asyncio.create_task(calls.keep_looking())
        try:
            yield system
        finally:
            looking.cancel()
            for generation_id in list(simulator.gates.waiting):
                simulator.release(generation_id)
            try:
                await asyncio.gather(*(process.kill() for process in system.processes))
            finally:
                server.thaw()
                server.kill()


async def at_once(
    starter: ProcessStarter, folder: Path, scenarios: Mapping[str, Callable[[System], Awaitable[T]]]
) -> dict[str, T]:
    """Play *scenarios*, each in a system of its own on SQLite, at the same time: most of it is waiting.

    Return what they returned, by their names.
    """
    ledgers = {}
    for name in scenarios:
        (folder / name).mkdir()
        ledgers[name] = await migrated_sqlite(folder / name)

    async def play(name: str) -> T:
        async with running(starter, folder / name, ledgers[name]) as system:
            return await _noted(scenarios[name], system)

    async with asyncio.TaskGroup() as group:
        played = {name: group.create_task(play(name)) for name in scenarios}
    for ledger in ledgers.values():
        ledger.close()
    return {name: task.result() for name, task in played.items()}


async def _noted(scenario: Callable[[System], Awaitable[T]], system: System) -> T:
    """Play *scenario*, and let its failure tell in which system it was."""
    try:
        return await scenario(system)
    except BaseException as error:
        error.add_note(f"on {type(system.ledger).__name__}, in {system.folder}")
        raise


async def overdue(system: System, generation: Generation) -> None:
    """Wait until *generation* is due."""
    row = await system.row(generation)
    assert row.due_at is not None
    due_at = row.due_at
    await eventually(lambda: datetime.now(UTC) > due_at)


def on_both(scenario: Callable[[System], Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Make a test that runs *scenario* on SQLite and PostgreSQL at the same time: most of it is waiting."""

    async def test(both: tuple[System, System]) -> None:
        async with asyncio.TaskGroup() as group:
            for system in both:
                group.create_task(_noted(scenario, system))

    # Not functools.wraps: pytest would look for the scenario's own argument.
    test.__name__, test.__qualname__, test.__module__ = scenario.__name__, scenario.__qualname__, scenario.__module__
    return test
