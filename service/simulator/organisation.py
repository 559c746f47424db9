"""The state of one sync.so organisation and the operations on it, without HTTP except for sending webhooks."""

import asyncio
import bisect
import random
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

import httpx
import msgspec

from service.core.signature import sign
from service.simulator.asset import Asset
from service.simulator.batch import Batch
from service.simulator.calls import Call
from service.simulator.faults import Plan
from service.simulator.gates import Gates
from service.simulator.generation import UNFINISHED, Generation, sample_input, sanitised


class Switches(msgspec.Struct, forbid_unknown_fields=True):
    """Settings for all calls to the API, which can change while the simulator runs."""

    outage: bool = False  # every connection is closed without an answer
    unauthorized: bool = False  # 401 as for a revoked key
    latency_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # before each GET and DELETE of a generation
    rate: Annotated[float, msgspec.Meta(gt=0)] | None = None  # calls in each second; 429 beyond
    processing_seconds: Annotated[float, msgspec.Meta(ge=0)] = 2.0  # for generations that are made through the API
    # Their final statuses, in turn.
    endings: Annotated[tuple[Literal["COMPLETED", "FAILED", "REJECTED"], ...], msgspec.Meta(min_length=1)] = (
        "COMPLETED",
    )
    # What is not documented, each as the most harmful answer by default, and as the others that are possible.
    dead_cursor: Literal["end", "400", "restart"] = "end"  # a page after a cursor that was deleted
    lists_batches: bool = True  # whether generations of batches are in the list
    media_redirects: bool = False  # whether media URLs answer 302, to the storage
    media_outlives: bool = False  # whether media can be read once the generation is deleted


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook sent: the answer's status, or the name of the error; the id may be that of a batch."""

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
        self.batches: dict[str, Batch] = {}
        self.assets: dict[str, Asset] = {}
        self.idempotency: dict[str, tuple[bytes, str]] = {}  # by key: a digest of the request, the generation's id
        self.created_count = 0
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
        source: str | None = None,
        generation_source: str | None = "api",
        faults: Mapping[str, Sequence[str]] | None = None,
        **overrides: object,
    ) -> Generation:
        """Add a generation; *faults* are scripts by operation, *overrides* wire fields by wire name.

        With *processing_seconds* it starts as PENDING, becomes PROCESSING, then *status*, and its webhook is sent.
        """
        generation = Generation(
            id=generation_id or self.new_id(),
            status=status if processing_seconds is None else "PENDING",
            created_at=created_at or datetime.now(UTC),
            token=self.new_id(),
            url=self.url,
            input=sample_input(text=text_input),
            model=model,
            webhook_url=webhook_url,
            output_file_name=sanitised(output_file_name),
            project_id=project_id,
            webhook_copies=webhook_copies,
            source=source,
            generation_source=generation_source,
            overrides=overrides,
        )
        return self._register(generation, faults or {}, ending=status, processing_seconds=processing_seconds)

    def add_asset(self, *, kind: str = "VIDEO", name: str = "take-07.mp4", size: int = 0, is_own: bool = True) -> Asset:
        """Add an uploaded file; *is_own* is false for another member's, which the key may not delete."""
        asset = Asset(self.new_id(), datetime.now(UTC), self.new_id(), self.url, kind, name, size, is_own=is_own)
        self.assets[asset.id] = asset
        return asset

    def _register(
        self,
        generation: Generation,
        faults: Mapping[str, Sequence[str]],
        *,
        ending: str,
        processing_seconds: float | None,
    ) -> Generation:
        for operation, script in faults.items():
            self.plan.script(operation, script, generation.id)
        self.generations[generation.id] = generation
        bisect.insort(self._order, (generation.created_at_text, generation.id))
        if processing_seconds is not None:
            self.start(self._process(generation, ending, seconds=processing_seconds))
        return generation

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Run *work* in the background until it ends or the simulator stops."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def next_ending(self) -> str:
        """Return the final status of the next generation that is made through the API."""
        self.created_count += 1
        return self.switches.endings[(self.created_count - 1) % len(self.switches.endings)]

    def remove(self, generation_id: str) -> Generation | None:
        """Delete a generation, whatever its status; None if there is none."""
        generation = self.generations.pop(generation_id, None)
        if generation is not None:
            generation.deleted_at = datetime.now(UTC)
            self.removed[generation_id] = generation
        return generation

    def newest(self, cursor: str | None = None) -> Iterator[Generation]:
        """Yield existing generations, newest first, after *cursor*.

        What the API does with a cursor that was deleted is undocumented. By default it is the end, as a premature end
        does the most harm to a client that deletes while paging; see ``Switches.dead_cursor``.
        """
        position = len(self._order)
        if cursor is not None and cursor in self.generations:
            position = bisect.bisect_left(self._order, (self.generations[cursor].created_at_text, cursor))
        elif cursor is not None and self.switches.dead_cursor != "restart":
            return
        for index in range(position - 1, -1, -1):
            if generation := self.generations.get(self._order[index][1]):
                yield generation

    def webhook(self, generation_id: str, *, at: datetime | None = None) -> tuple[bytes, dict[str, str]]:
        """Return body and headers of the signed webhook for a generation, deleted or not, as sent *at*."""
        generation = self.generations.get(generation_id) or self.removed[generation_id]
        body = generation.notification()
        return body, self._signed_headers(body, at or datetime.now(UTC))

    def _signed_headers(self, body: bytes, at: datetime) -> dict[str, str]:
        signature = sign(body, secret=self.webhook_secret.encode(), at=at)
        return {"Content-Type": "application/json", "Sync-Signature": signature}

    async def deliver(self, generation_id: str, *, copies: int = 1) -> list[Delivery]:
        """Send the webhook for a generation now, *copies* times at once; it is never retried."""
        generation = self.generations.get(generation_id) or self.removed[generation_id]
        if generation.webhook_url is None:
            raise ValueError(f"generation {generation_id} has no webhook_url")
        body = generation.notification()
        sending = [self.send(generation_id, generation.webhook_url, body) for _ in range(copies)]
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

    async def send(self, subject_id: str, url: str, body: bytes) -> Delivery:
        """Sign and post *body*, the webhook about the generation or batch *subject_id*."""
        if self._client is None:  # made on demand: loading the certificates takes 60 ms
            self._client = httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=30)
        at = datetime.now(UTC)
        try:
            answer = await self._client.post(url, content=body, headers=self._signed_headers(body, at))
            delivery = Delivery(at, subject_id, answer.status_code)
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            delivery = Delivery(at, subject_id, None, type(exc).__name__)
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

    def new_id(self) -> str:
        if self.plan.seed is None:
            return str(UUID(bytes=random.SystemRandom().randbytes(16), version=4))
        return str(UUID(int=self._random.getrandbits(128), version=4))
