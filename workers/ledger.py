"""The ledger's calls that jobs, attempts and the safety net of a worker need."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import structlog
from sqlalchemy import Connection

from service.core.generation import Generation
from service.core.key import Key
from service.core.retention import Retention
from service.ledger import batches, claiming, daily_limit, heartbeats, holding, looking, outcomes, pausing, settling
from service.ledger import outlook as outlooks
from service.ledger.claiming import Claim, NotYet, Wanted
from service.ledger.database import Database
from service.ledger.key_history import KeyOfAccount
from service.ledger.looking import Ended, Known, Looked
from service.ledger.outcomes import CopyResult, Settled
from service.ledger.outlook import Outlook
from workers.overdue import AT_ONCE, LATE

log = structlog.get_logger()

# Longer than the longest attempt (a GET of 10 s, a DELETE of 30 s, three commits), and short, because the record of a
# worker that died waits for its end.
LEASE: Final = timedelta(seconds=60)
_LEASES_AT_ONCE: Final = 500
_BEAT_SECONDS: Final = 10.0
_HOLDS_AT_ONCE: Final = 500
_HOLDS_SECONDS: Final = 10.0


class WorkerLedger:
    """The ledger's calls that jobs, attempts and the safety net of *key*'s account need."""

    def __init__(
        self,
        database: Database,
        *,
        limit: int | None,
        is_dry_run: bool,
        actor: str,
        key: KeyOfAccount,
        min_ttl: timedelta,
        now: Callable[[], datetime],
    ) -> None:
        self._key = key
        self.account = key.account
        self._database = database
        self._limit = limit
        self._is_dry_run = is_dry_run
        self._actor = actor
        self._min_ttl = min_ttl
        self._now = now
        self._holds_again_at = float("-inf")
        self._beat_again_at = float("-inf")
        self._is_started = False

    async def peek(self) -> int:
        """Return how many records the pauses allow."""
        return await self._database.read(partial(pausing.peek_allowance, account=self.account, now=self._now()))

    async def beat(self) -> None:
        """Store that a worker was seen, at most every ten seconds; at first end what another configuration left."""
        if time.monotonic() < self._beat_again_at:
            return
        await self._database.write(self._write_beat)
        self._is_started = True
        self._beat_again_at = time.monotonic() + _BEAT_SECONDS

    def _write_beat(self, connection: Connection) -> None:
        now = self._now()
        heartbeats.record_beat(connection, heartbeats.WORKER, now=now)
        if self._is_started:
            return
        if self._is_dry_run:
            return
        if daily_limit.end_pause(connection, self.account, limit=self._limit, now=now):
            log.info("deletions.resumed", what_now="MAYFLY_MAX_DELETES_PER_DAY was raised or removed")
        if number := claiming.bring_forward_rehearsed(connection, self.account, now=now):
            log.info("deletions.brought_forward", records=number, what_now="MAYFLY_DRY_RUN was switched off")

    async def read_outlook(self, since: datetime | None, until: datetime) -> Outlook:
        """Read what the safety net needs to know."""
        read = partial(
            outlooks.read_outlook,
            account=self.account,
            now=self._now(),
            late=LATE,
            since=since,
            until=until,
            limit=AT_ONCE,
        )
        return await self._database.read(read)

    async def end_leases(self) -> int:
        """End the leases of workers that died."""
        write = partial(
            claiming.end_expired_leases,
            account=self.account,
            now=self._now(),
            limit=_LEASES_AT_ONCE,
            actor=self._actor,
        )
        return await self._database.write(write)

    async def end_holds(self) -> int:
        """End the holds that have reached their end, a bounded number at once; look for them every ten seconds."""
        if time.monotonic() < self._holds_again_at:
            return 0
        ended = 0
        if await self._database.read(partial(holding.has_ended, account=self.account, now=self._now())):
            end = partial(holding.end_holds, account=self.account, min_ttl=self._min_ttl, limit=_HOLDS_AT_ONCE)
            ended = await self._database.write(partial(end, now=self._now()))
        if ended < _HOLDS_AT_ONCE:
            self._holds_again_at = time.monotonic() + _HOLDS_SECONDS
        return ended

    async def claim(self, limit: int) -> Sequence[Claim]:
        """Claim due records."""
        write = partial(
            claiming.claim_due, account=self.account, now=self._now(), lease=LEASE, limit=limit, actor=self._actor
        )
        return await self._database.write(write)

    async def claim_wanted(self, wanted: Sequence[Wanted]) -> Sequence[Claim | NotYet | None]:
        """Claim the records that jobs ask for."""
        write = partial(
            claiming.claim_wanted,
            account=self.account,
            wanted=wanted,
            now=self._now(),
            lease=LEASE,
            actor=self._actor,
        )
        return await self._database.write(write)

    async def copy(self, items: Sequence[outcomes.Copy]) -> Sequence[CopyResult]:
        """Commit copies."""
        write = partial(
            settling.store_copies,
            account=self.account,
            copies=items,
            now=self._now(),
            limit=self._limit,
            actor=self._actor,
        )
        return await self._database.write(write)

    async def settle(self, items: Sequence[outcomes.Settlement]) -> Sequence[Settled]:
        """Commit the outcomes of attempts."""
        write = partial(settling.settle_attempts, key=self._key, settlements=items, now=self._now(), actor=self._actor)
        return await self._database.write(write)

    async def find_due_batches(self, late: timedelta, limit: int) -> Sequence[Key]:
        """Return the batches whose look is due for longer than *late*; none while the API refuses its key."""
        read = partial(batches.find_due_batches, account=self.account, now=self._now() - late, limit=limit)
        return await self._database.read(read)

    async def find_due_looks(self, late: timedelta, limit: int) -> Sequence[Key]:
        """Return the records whose early look is due for longer than *late*; none while the API refuses its key."""
        read = partial(looking.find_due_looks, account=self.account, now=self._now() - late, limit=limit)
        return await self._database.read(read)

    async def is_look_wanted(self, key: Key) -> bool:
        """Whether the record of *key* wants its early look, and the API may be asked."""
        return await self._database.read(partial(looking.is_wanted, key=key))

    async def store_look(
        self, key: Key, generation: Generation, body: str, decide: Callable[[Known], Retention | None]
    ) -> Looked | None:
        """Commit what the API showed early."""
        write = partial(
            looking.store_look,
            key=key,
            used=self._key,
            generation=generation,
            body=body,
            decide=decide,
            now=self._now(),
            actor=self._actor,
        )
        return await self._database.write(write)

    async def put_off_look(
        self, key: Key, wait: Callable[[int], timedelta], throttle: timedelta | None, shown: Generation | None
    ) -> None:
        """Commit that a look failed, for how long the API wants no calls, and what it showed that has not ended."""
        write = partial(looking.put_off_look, key=key, wait=wait, throttle=throttle, shown=shown)
        await self._database.write(partial(write, now=self._now(), actor=self._actor))

    async def end_look(self, key: Key, error: str, wait: Callable[[int], timedelta]) -> Ended:
        """Commit that there is nothing to look at, or not yet."""
        write = partial(looking.end_look, key=key, error=error, wait=wait, now=self._now(), actor=self._actor)
        return await self._database.write(write)
