"""The state of one sync.so organisation and the operations on it, without HTTP except for sending webhooks."""

import asyncio
import bisect
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import httpx
import msgspec

from service.core.signature import sign
from service.simulator.calls import Call
from service.simulator.faults import Plan
from service.simulator.gates import Gates
from service.simulator.generation import UNFINISHED, Generation, sample_input, sanitised


class Switches(msgspec.Struct, forbid_unknown_fields=True):
    """Settings for all calls to the API, which can change while the simulator runs."""

    outage: bool = False  # every connection is closed without an answer
    unauthorized: bool = False  # 401 as for a revoked key
    latency_seconds: float = 0.0  # before each GET and DELETE of a generation
    rate: float | None = None  # calls in each second; 429 beyond
    processing_seconds: float = 2.0  # for generations made by POST /v2/generate


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook sent: the answer's status, or the name of the error."""

    at: datetime
    generation_id: str
    status: int | None
    error: str | None = None


class Organisation:
    """Generations, calls, faults and webhooks of one API key.

    With a *seed* the ids, tokens and random faults are the same in each run. Without one they are new, so that a second
    run against the same Mayfly does not repeat ids.
    """

    def __init__(
        self,
        *,
        api_key: str = "sk-simulator",
        webhook_secret: str = "whsec_simulator_only",  # noqa: S107 (protects nothing)
        seed: int | None = None,
    ) -> None:
        self.api_key = api_key
        self.webhook_secret = webhook_secret
        self.url = "http://simulator.invalid"  # until it is served
        self.switches = Switches()
        self.plan = Plan(seed)
        self.gates = Gates()
        self.calls: list[Call] = []
        self.deliveries: list[Delivery] = []
        self.generations: dict[str, Generation] = {}
        self.removed: dict[str, Generation] = {}
        self._order: list[tuple[str, str]] = []
        self._random = random.Random(seed)  # noqa: S311 (ids of a stand-in)
        self._client: httpx.AsyncClient | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._second = (0, 0.0)

    @property
    def deleted(self) -> dict[str, datetime]:
        """The ids of deleted generations, each with the time of its deletion."""
        return {id_: gone.deleted_at for id_, gone in self.removed.items() if gone.deleted_at is not None}

    def add(
        self,
        *,
        generation_id: str | None = None,
        status: str = "COMPLETED",
        text_input: bool = False,
        model: str = "lipsync-2-pro",
        project_id: str | None = None,
        webhook_url: str | None = None,
        output_file_name: str | None = None,
        created_at: datetime | None = None,
        processing_seconds: float | None = None,
        webhook_copies: int = 1,
        faults: Mapping[str, Sequence[str]] | None = None,
        **overrides: object,
    ) -> Generation:
        """Add a generation; *faults* are scripts by operation, *overrides* wire fields by wire name.

        With *processing_seconds* it starts as PENDING, becomes PROCESSING, then *status*, and its webhook is sent.
        """
        generation = Generation(
            id=generation_id or self._uuid(),
            status=status if processing_seconds is None else "PENDING",
            created_at=created_at or datetime.now(UTC),
            token=self._uuid(),
            url=self.url,
            input=sample_input(text=text_input),
            model=model,
            webhook_url=webhook_url,
            output_file_name=sanitised(output_file_name),
            project_id=project_id,
            webhook_copies=webhook_copies,
            overrides=overrides,
        )
        self._register(generation, faults or {})
        if processing_seconds is not None:
            self._start_processing(generation, status, seconds=processing_seconds)
        return generation

    def _register(self, generation: Generation, faults: Mapping[str, Sequence[str]]) -> None:
        for operation, script in faults.items():
            self.plan.script(operation, script, generation.id)
        self.generations[generation.id] = generation
        bisect.insort(self._order, (generation.created_at_text, generation.id))

    def _start_processing(self, generation: Generation, status: str, *, seconds: float) -> None:
        task = asyncio.create_task(self._process(generation, status, seconds=seconds))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def remove(self, generation_id: str) -> Generation | None:
        """Delete a generation, whatever its status; None if there is none."""
        generation = self.generations.pop(generation_id, None)
        if generation is not None:
            generation.deleted_at = datetime.now(UTC)
            self.removed[generation_id] = generation
        return generation

    def newest(self, cursor: str | None = None) -> Iterator[Generation]:
        """Yield existing generations, newest first, after *cursor*; nothing if the cursor was deleted.

        What the API does with a deleted cursor is undocumented. A premature end does the most harm to a client that
        deletes while paging, so that is simulated.
        """
        position = len(self._order)
        if cursor is not None:
            if cursor not in self.generations:
                return
            position = bisect.bisect_left(self._order, (self.generations[cursor].created_at_text, cursor))
        for index in range(position - 1, -1, -1):
            if generation := self.generations.get(self._order[index][1]):
                yield generation

    def webhook(self, generation_id: str, *, at: datetime | None = None) -> tuple[bytes, dict[str, str]]:
        """Return body and headers of the signed webhook for a generation, deleted or not, as sent *at*."""
        generation = self.generations.get(generation_id) or self.removed[generation_id]
        body = generation.notification()
        signature = sign(body, secret=self.webhook_secret.encode(), at=at or datetime.now(UTC))
        return body, {"Content-Type": "application/json", "Sync-Signature": signature}

    async def deliver(self, generation_id: str, *, copies: int = 1) -> list[Delivery]:
        """Send the webhook for a generation now, *copies* times at once; it is never retried."""
        generation = self.generations.get(generation_id) or self.removed[generation_id]
        if generation.webhook_url is None:
            raise ValueError(f"generation {generation_id} has no webhook_url")
        sending = [self._send(generation_id, generation.webhook_url) for _ in range(copies)]
        return list(await asyncio.gather(*sending))

    def release(self, generation_id: str) -> int:
        """Release the calls that wait at a generation's gate; return how many."""
        return self.gates.release(generation_id)

    def is_over_rate(self) -> bool:
        """Count a call and return whether it exceeds the rate of this second."""
        if self.switches.rate is None:
            return False
        second = int(time.monotonic())
        counted = self._second[1] + 1 if self._second[0] == second else 1
        self._second = (second, counted)
        return counted > self.switches.rate

    async def _send(self, generation_id: str, url: str) -> Delivery:
        if self._client is None:  # made on demand: loading the certificates takes 60 ms
            self._client = httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=30)
        body, headers = self.webhook(generation_id)
        at = datetime.now(UTC)
        try:
            answer = await self._client.post(url, content=body, headers=headers)
            delivery = Delivery(at, generation_id, answer.status_code)
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            delivery = Delivery(at, generation_id, None, type(exc).__name__)
        self.deliveries.append(delivery)
        return delivery

    async def _process(self, generation: Generation, status: str, *, seconds: float) -> None:
        await asyncio.sleep(seconds * 0.2)
        generation.become("PROCESSING")
        await asyncio.sleep(seconds * 0.8)
        generation.become(status)
        if status not in UNFINISHED and generation.webhook_url is not None:
            await self.deliver(generation.id, copies=generation.webhook_copies)

    async def quiesce(self) -> None:
        """Cancel processing and webhooks in progress, and close the webhooks' connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _uuid(self) -> str:
        if self.plan.seed is None:
            return str(UUID(bytes=random.SystemRandom().randbytes(16), version=4))
        return str(UUID(int=self._random.getrandbits(128), version=4))
