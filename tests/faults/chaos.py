"""Random faults against a whole system for a bounded time, then healing: what is left is for the judge."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import redis.asyncio as redis

from service.simulator import Generation, Operation
from tests.faults.judging import FINAL
from tests.faults.processes import Process, free_port
from tests.faults.system import System

FAULTS_OF_GET: Mapping[str, float] = {
    "500": 0.04, "409": 0.02, "reset": 0.04, "drop": 0.03, "html": 0.03, "truncated": 0.03, "processing": 0.02,
    "404": 0.01,
}  # fmt: skip
FAULTS_OF_DELETE: Mapping[str, float] = {
    "500": 0.05, "409": 0.05, "502": 0.03, "reset": 0.05, "drop": 0.03, "lost": 0.1, "truncated": 0.05, "html": 0.03,
    "429:retry_after=1": 0.005, "202": 0.03,
}  # fmt: skip


@dataclass
class Member:
    """One process that is killed and comes back, at the same place."""

    command: str
    port: int
    process: Process


@dataclass
class Chaos:
    """A run: members die and freeze, Redis too, while webhooks come in without a pause."""

    system: System
    random: random.Random
    members: list[Member] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    async def run(self, seconds: float, *, apis: int = 2, workers: int = 2) -> None:
        """Do harm for so many *seconds*, heal, and bring everything to its end."""
        self.system.simulator.plan.mix("GET", FAULTS_OF_GET)
        self.system.simulator.plan.mix("DELETE", FAULTS_OF_DELETE)
        for command, number in (("api", apis), ("worker", workers)):
            self.members += [Member(command, free_port(), Process(0, self.system.folder)) for _ in range(number)]
        await asyncio.gather(*map(self._start, self.members))
        end = time.monotonic() + seconds
        await asyncio.gather(self._send(end), self._harm(end))
        await self._heal()

    async def _start(self, member: Member) -> None:
        member.process = self.system.spawn(member.command, MAYFLY_PORT=str(member.port))
        await member.process.logged("web.started" if member.command == "api" else "worker.started")

    async def _send(self, end: float) -> None:
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < end:
                generation = self.system.generation()
                group.create_task(self._announce(generation))
                await asyncio.sleep(self.random.uniform(0.01, 0.06))

    async def _announce(self, generation: Generation) -> None:
        at = datetime.now(UTC)
        for _ in range(self.random.choice((1, 1, 1, 2))):  # some are told twice, by the same webhook
            await self.system.announce(generation, seconds=12, port=self.random.choice(self._ports()), at=at)

    def _ports(self) -> list[int]:
        return [member.port for member in self.members if member.command == "api"]

    async def _harm(self, end: float) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            *(self._kill, self._kill, self._stop, self._freeze, self._freeze),
            *(self._freeze_redis, self._kill_redis, self._flush, self._lock, self._steal_leases),
        ]
        while time.monotonic() < end:
            kind = self.random.choice(kinds)
            self.told.append(kind.__name__)
            await kind()
            await asyncio.sleep(self.random.uniform(0.1, 0.5))

    async def _kill(self) -> None:
        member = self.random.choice(self.members)
        await member.process.kill()
        await asyncio.sleep(self.random.uniform(0, 0.3))
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

    async def _freeze_redis(self) -> None:
        self.system.redis.freeze()
        await asyncio.sleep(self.random.uniform(0.2, 2.5))
        self.system.redis.thaw()

    async def _kill_redis(self) -> None:
        self.system.redis.kill()
        await asyncio.sleep(self.random.uniform(0, 1))
        await self.system.redis.start()

    async def _flush(self) -> None:
        with contextlib.suppress(redis.RedisError, OSError):
            await self.system.redis.command("FLUSHALL")

    async def _lock(self) -> None:
        async with self.system.ledger.lock():
            await asyncio.sleep(self.random.uniform(0.2, 1))

    async def _steal_leases(self) -> None:
        """End leases under workers that live, as a long sleep of theirs would."""
        await self.system.expire_leases()

    async def _heal(self) -> None:
        """Let everything run again and wait until nothing is under way; a minute's waits are cut short."""
        for operation in (Operation.GET, Operation.DELETE):
            self.system.simulator.plan.mix(operation, {})
        for member in self.members:
            if member.process.exit_code is not None:
                await self._start(member)
        for _ in range(5):
            await self.system.expire_leases()
            await self.system.drain(seconds=8)
            if all(row.state in FINAL for row in await self.system.ledger.rows()):
                return
