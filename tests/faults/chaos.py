"""Random faults against a whole system for a bounded time, then recovery."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import redis.asyncio as redis

from service.simulator import Generation, Operation
from tests.faults.chaotic_apps import ChaoticApps, Harm
from tests.faults.databases import Postgres
from tests.faults.forwarding import hurry
from tests.faults.judging import FINAL
from tests.faults.processes import Process, ProcessError
from tests.faults.system import System
from tests.support.ports import free_port

FAULTS_OF_GET: Mapping[str, float] = {
    "500": 0.04, "409": 0.02, "reset": 0.04, "drop": 0.03, "html": 0.03, "truncated": 0.03, "processing": 0.02,
    "404": 0.01,
}  # fmt: skip
FAULTS_OF_DELETE: Mapping[str, float] = {
    "500": 0.05, "409": 0.05, "502": 0.03, "reset": 0.05, "drop": 0.03, "lost": 0.1, "truncated": 0.05, "html": 0.03,
    "429:retry_after=1": 0.005, "202": 0.03,
}  # fmt: skip
# Leases that workers took while they were healed may have to end, too.
_LEASES_END_EVERY_SECONDS = 8.0


@dataclass
class Member:
    """One process that is killed and comes back, at the same place."""

    command: str
    port: int
    process: Process


@dataclass
class Chaos:
    """A run: processes and servers die and freeze while webhooks come in without a pause.

    *postgres* is the ledger's server where the run may harm it; *without* is the part that its workers lack. With
    *has_apps* webhooks are forwarded, and the apps are harmed as well.
    """

    system: System
    random: random.Random
    postgres: Postgres | None = None
    without: str | None = None
    members: list[Member] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    healing_seconds: float = 0.0
    has_apps: bool = False
    apps: ChaoticApps | None = None

    async def run(self, seconds: float, *, apis: int = 2, workers: int = 2, healed_within: float = 45) -> None:
        """Do harm for so many *seconds*, heal, and bring everything to its end, but for no longer than that may take.

        No job is enqueued for it: whoever begins what is left does so by itself.
        """
        if self.has_apps:
            self.apps = ChaoticApps(self.system, self.random, lambda: self.ports)
        async with self.apps.running() if self.apps else contextlib.nullcontext():
            await self._run(seconds, apis, workers, healed_within)

    async def _run(self, seconds: float, apis: int, workers: int, healed_within: float) -> None:
        self.system.simulator.plan.mix("GET", FAULTS_OF_GET)
        self.system.simulator.plan.mix("DELETE", FAULTS_OF_DELETE)
        for command, number in (("api", apis), ("worker", workers)):
            self.members += [Member(command, free_port(), Process(0, self.system.folder)) for _ in range(number)]
        await asyncio.gather(*map(self._start, self.members))
        end = time.monotonic() + seconds
        kinds = [self._to_processes, self._to_servers, *([self.apps.harms] if self.apps else [])]
        await asyncio.gather(self._send(end), *(self._harm(one, end) for one in kinds))
        await self._strike_last()
        begun = time.monotonic()
        await self._heal(healed_within)
        self.healing_seconds = time.monotonic() - begun

    async def _start(self, member: Member) -> None:
        """Start *member* as a supervisor does: again if it ends because the ledger does not answer."""
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(ProcessError):
                    if member.command == "api":
                        member.process = await self.system.api(MAYFLY_PORT=str(member.port))
                    else:
                        member.process = await self.system.worker(without=self.without)
                    return
                await asyncio.sleep(0.2)

    async def _send(self, end: float) -> None:
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < end:
                status = self.random.choice(("COMPLETED", "COMPLETED", "COMPLETED", "FAILED"))
                group.create_task(self._announce(self.system.generation(status=status)))
                await asyncio.sleep(self.random.uniform(0.01, 0.06))

    async def _announce(self, generation: Generation) -> None:
        bodies = self.apps.webhooks_of(generation) if self.apps else [None]
        for place, body in enumerate(bodies):
            if place:
                await asyncio.sleep(self.random.uniform(0, 1.5))
            at = datetime.now(UTC)
            for _ in range(self.random.choice((1, 1, 1, 2))):  # some are told twice, by the same webhook
                port = self.random.choice(self.ports)
                await self.system.announce(generation, seconds=12, port=port, at=at, body=body)

    @property
    def ports(self) -> list[int]:
        """Where the web sides listen."""
        return [member.port for member in self.members if member.command == "api"]

    async def _harm(self, kinds: Callable[[], list[Harm]], end: float) -> None:
        """Do one harm after the other, each of *kinds* once before any of them again."""
        left: list[Harm] = []
        while time.monotonic() < end:
            if not left:
                left = kinds()
                self.random.shuffle(left)
            harm = left.pop()
            self.told.append(harm.__name__)
            await harm()
            await asyncio.sleep(self.random.uniform(0.1, 0.4))

    def _to_processes(self) -> list[Harm]:
        in_an_attempt = [self._kill_in_an_attempt] if self.apps else []
        return [self._kill, self._kill, self._stop, self._freeze, self._freeze, *in_an_attempt]

    def _to_servers(self) -> list[Harm]:
        return [
            *(self._freeze_redis, self._kill_redis, self._flush, self._drop_payloads, self._fill_redis),
            *(self._lock, self._steal_leases, self._cut_off_the_api),
            *((self._kill_postgres, self._freeze_postgres, self._freeze_both_servers) if self.postgres else ()),
        ]

    async def _kill(self) -> None:
        member = self.random.choice(self.members)
        await member.process.kill()
        await asyncio.sleep(self.random.uniform(0, 0.3))
        await self._start(member)

    async def _kill_in_an_attempt(self) -> None:
        """Kill a worker while an app takes long over its answer."""
        assert self.apps is not None
        await self.apps.slow_down()
        member = self.random.choice([one for one in self.members if one.command == "worker"])
        await member.process.kill()
        await self._start(member)

    async def _stop(self) -> None:
        member = self.random.choice([one for one in self.members if one.command == "worker"])
        member.process.send(signal.SIGTERM)
        await asyncio.sleep(self.random.uniform(0, 0.3))
        await member.process.kill()
        await self._start(member)

    async def _freeze(self) -> None:
        member = self.random.choice(self.members)
        member.process.send(signal.SIGSTOP)
        await asyncio.sleep(self.random.uniform(0.2, 1.5))
        member.process.send(signal.SIGCONT)

    async def _cut_off_the_api(self) -> None:
        self.system.simulator.switches.outage = True
        await asyncio.sleep(self.random.uniform(0.1, 1))
        self.system.simulator.switches.outage = False

    async def _freeze_redis(self) -> None:
        self.system.redis.freeze()
        await asyncio.sleep(self.random.uniform(0.2, 2.5))
        self.system.redis.thaw()

    async def _kill_redis(self) -> None:
        self.system.redis.kill()
        await asyncio.sleep(self.random.uniform(0, 1))
        await self.system.redis.start()

    async def _flush(self) -> None:
        await self._tell_redis("FLUSHALL")

    async def _drop_payloads(self) -> None:
        """Leave ids in the queue that have no job any more, as jobs do that expire."""
        with contextlib.suppress(redis.RedisError, OSError):
            async with self.system.redis.client() as client:
                if keys := [key async for key in client.scan_iter("arq:job:*")]:
                    await client.delete(*keys)

    async def _fill_redis(self) -> None:
        await self._tell_redis("CONFIG", "SET", "maxmemory", "1")
        await asyncio.sleep(self.random.uniform(0.2, 1))
        await self._tell_redis("CONFIG", "SET", "maxmemory", "0")

    async def _tell_redis(self, *words: str) -> None:
        with contextlib.suppress(redis.RedisError, OSError):
            await self.system.redis.command(*words)

    async def _lock(self) -> None:
        tables = ("records", "deliveries") if self.apps else ("records",)
        async with self.system.ledger.lock(self.random.choice(tables)):
            await asyncio.sleep(self.random.uniform(0.2, 1))

    async def _steal_leases(self) -> None:
        """End leases under workers that live, as a long sleep of theirs would."""
        await self.system.expire_leases()

    async def _kill_postgres(self) -> None:
        assert self.postgres is not None
        self.postgres.kill()
        await asyncio.sleep(self.random.uniform(0, 1))
        await self.postgres.start()

    async def _freeze_postgres(self) -> None:
        assert self.postgres is not None
        self.postgres.freeze()
        await asyncio.sleep(self.random.uniform(0.5, 2.5))
        self.postgres.thaw()

    async def _freeze_both_servers(self) -> None:
        await asyncio.gather(self._freeze_postgres(), self._freeze_redis())

    async def _strike_last(self) -> None:
        """Take the jobs of records that are due in a moment, and the workers; whatever else was done, these remain."""
        await asyncio.gather(*(self._announce(self.system.generation()) for _ in range(10)))
        await asyncio.sleep(0.2)
        await self._flush()
        workers = [member for member in self.members if member.command == "worker"]
        await asyncio.gather(*(member.process.kill() for member in workers))

    async def _heal(self, seconds: float) -> None:
        """Let everything run again and wait until nothing is under way; the waits for leases are cut short."""
        for operation in (Operation.GET, Operation.DELETE):
            self.system.simulator.plan.mix(operation, {})
        if self.apps is not None:
            self.apps.heal()
            await self.apps.unblock()
        for member in self.members:
            if member.process.exit_code is not None:
                await self._start(member)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await self.system.expire_leases()
            if self.apps is not None:
                await self.apps.hasten()
            await self._drain(min(left, _LEASES_END_EVERY_SECONDS))
            if await self._is_over():
                return

    async def _drain(self, seconds: float) -> None:
        """Cut waits short until all has come to its end, but no longer than *seconds*."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not await self._is_over():
            await self.system.hurry()
            if self.apps is not None:
                await hurry(self.system)
            await asyncio.sleep(0.3)

    async def _is_over(self) -> bool:
        final = ", ".join(f"'{one}'" for one in FINAL)
        left = await self.system.ledger.number(f"SELECT count(*) FROM records WHERE state NOT IN ({final})")  # noqa: S608
        return left == 0 and (self.apps is None or await self.apps.is_over())
