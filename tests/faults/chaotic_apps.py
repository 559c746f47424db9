"""Harm to the apps behind targets, and to deliveries on their way to them."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

import httpx

from service.simulator import Generation
from tests.faults.databases import GONE
from tests.faults.forwarding import expire_leases, forward, hurry, replay, replay_failed, target
from tests.faults.judging_forwards import Inbox
from tests.faults.system import SIGNING, System
from tests.support.app import Answer, App, AppProcess
from tests.support.waiting import eventually

Harm = Callable[[], Awaitable[None]]

_SOON: Final = (("Retry-After", "1"),)
_ELSEWHERE: Final = (("Location", "/elsewhere"),)
_ANSWERS: Final = (
    Answer(500),
    Answer(503, headers=_SOON),
    Answer(429, headers=_SOON),
    Answer(302, headers=_ELSEWHERE),
    Answer(307, headers=_ELSEWHERE),
    Answer(404, body="no such route"),
    Answer(delay=0.3),
    Answer(204, delay=1.5),
    Answer(500, delay=1.5),
    Answer(202, body="taken", drip=0.05),
    Answer(end="reset"),
    Answer(end="close"),
    Answer(delay=0.5, end="reset"),
    Answer(filler=5000, end="cut"),
    Answer(500, filler=5000, end="cut"),
    Answer(end="never"),
)
# What cannot be: a record that waits, or has failed, because of deliveries none of which is open.
_STUCK: Final = (
    "SELECT count(*) FROM records WHERE state IN ('scheduled', 'failed') AND waits_for IS NOT NULL AND NOT EXISTS "
    "(SELECT 1 FROM requirements JOIN deliveries ON deliveries.seq = requirements.delivery WHERE "
    "requirements.account = records.account AND requirements.generation = records.id AND "
    "deliveries.state <> 'delivered')"
)


class ChaoticApps:
    """The apps of *system*, one of them required and a process of its own, and what goes wrong with them."""

    def __init__(self, system: System, randomness: random.Random, ports: Callable[[], Sequence[int]]) -> None:
        self.system = system
        self.ports = ports  # of the web sides
        self.random = randomness
        self.required = AppProcess(system.folder)
        self.other = App()
        self.stuck: list[str] = []
        self.replays = 0
        system.inboxes += [
            Inbox("crm", self.required, SIGNING, is_required=True),
            Inbox("films", self.other, SIGNING, statuses=frozenset({"COMPLETED", "PROCESSING"})),
        ]
        # An app that never answers has its share of attempts back soon.
        lines = ['timeout = "3s"']
        forward(
            system,
            target("crm", self.required.port, *lines, "required = true"),
            target("films", self.other.port, *lines, 'statuses = ["COMPLETED", "PROCESSING"]'),
            ttl="1s",
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Let the apps listen until the block ends, and have an eye on what they get."""
        async with self.required, self.other:
            watching = asyncio.create_task(self._keep_watching())
            try:
                yield
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching  # raises what has ended it before

    @property
    def apps(self) -> Sequence[App]:
        """All of them."""
        return self.required, self.other

    def webhooks_of(self, generation: Generation) -> list[bytes]:
        """Return the bodies of the webhooks that sync.so sends for *generation*, in order."""
        last = generation.notification()
        fields = json.loads(last)
        running = json.dumps(fields | {"status": "PROCESSING", "outputUrl": None}).encode()
        later = json.dumps(fields | {"status": "PROCESSING", "progress": 0.5, "outputUrl": None}).encode()
        again = json.dumps(fields, indent=2).encode()
        begins = self.random.choice(([], [], [running], [running, later]))
        return [*begins, last, *self.random.choice(([], [], [again]))]

    def harms(self) -> list[Harm]:
        """Return what is done to them, in no order."""
        return [
            *(self._misbehave, self._misbehave, self._misbehave, self._refuse, self._refuse, self._kill_app),
            *(self._answer_410, self._steal_leases, self._hurry, self._hurry, self._replay_failed, self._replay_one),
        ]

    async def slow_down(self) -> None:
        """Let one of them take long over what comes next; return once it has a request."""
        app = self.random.choice(self.apps)
        before = len(app.requests)
        with contextlib.suppress(TimeoutError, OSError, ValueError):  # it may have been killed
            app.script(*[Answer(delay=1)] * 4)
            await eventually(lambda: len(app.requests) > before, seconds=1.5)

    def heal(self) -> None:
        """Let them answer again, all with 200."""
        for app in self.apps:
            app.forget_scripts()

    async def unblock(self) -> None:
        """Let jobs start again whose worker was killed: arq blocks their ids for longer than a lease."""
        async with self.system.redis.client() as client:
            if keys := [key async for key in client.scan_iter("arq:in-progress:forward:*")]:
                await client.delete(*keys)

    async def hasten(self) -> None:
        """End the leases of workers that were killed, and replay what has failed."""
        await expire_leases(self.system)
        await self._replay_failed()

    async def is_over(self) -> bool:
        """Whether no delivery waits, or has failed."""
        return await self.system.ledger.number("SELECT count(*) FROM deliveries WHERE state <> 'delivered'") == 0

    async def _misbehave(self) -> None:
        app = self.random.choice(self.apps)
        app.script(*self.random.choices((Answer(), *_ANSWERS), k=self.random.randint(5, 50)))

    async def _refuse(self) -> None:
        app = self.random.choice(self.apps)
        await app.refuse()
        await asyncio.sleep(self.random.uniform(0.1, 0.8))
        await app.accept()

    async def _kill_app(self) -> None:
        await self.required.kill9()
        await asyncio.sleep(self.random.uniform(0, 0.5))
        await self.required.start()

    async def _answer_410(self) -> None:
        app = self.random.choice(self.apps)
        ids = [one.id for one in self.system.told[-20:]]
        for generation in self.random.sample(sorted(set(ids)), k=min(3, len(set(ids)))):
            app.script(Answer(410), generation=generation)
        app.script(Answer(), Answer(), Answer(410))

    async def _steal_leases(self) -> None:
        with contextlib.suppress(*GONE):
            await expire_leases(self.system)

    async def _hurry(self) -> None:
        with contextlib.suppress(*GONE):
            await hurry(self.system)

    async def _replay_failed(self) -> None:
        with contextlib.suppress(httpx.HTTPError):
            self.replays += await replay_failed(self.system, self.random.choice(self.ports()))

    async def _replay_one(self) -> None:
        """Replay any delivery, as an operator may: mostly one that has arrived."""
        requests = self.random.choice(self.apps).requests
        if requests and (delivery := self.random.choice(requests).delivery) is not None:
            with contextlib.suppress(httpx.HTTPError):
                await replay(self.system, self.random.choice(self.ports()), delivery)

    async def _keep_watching(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            for inbox in self.system.inboxes:
                inbox.verify_new()
            with contextlib.suppress(*GONE):
                if number := await self.system.ledger.number(_STUCK):
                    self.stuck.append(f"{number} records wait for deliveries that have arrived")
