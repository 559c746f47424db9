"""Random histories of one ledger: whatever webhooks, moves, claims and clocks come, a held record is never deleted."""

from datetime import datetime
from functools import partial

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.core.holding import Hold
from service.core.key import Key
from service.core.lifecycle import IllegalMoveError, Move, State
from service.ledger import holding, reading
from service.ledger.claiming import Claim
from service.ledger.moving import Grace
from service.ledger.outcomes import CopyResult
from service.ledger.schema import metadata
from tests.support.ledger import (
    ACCOUNT,
    HOUR,
    arrival,
    claim,
    confirmed,
    copy,
    deferred,
    end_holds,
    given_up,
    lose_leases,
    move,
    receive,
    settle,
    utc_now,
)

GRACE = Grace(HOUR, HOUR)
IDS = st.sampled_from(["g1", "g2"])
# How far a clock is ahead or behind, and when something is due or ends; hours.
HOURS = st.sampled_from([-30, -2, 0, 2, 30])
MOVES = st.sampled_from([Move.HOLD, Move.HOLD, Move.RELEASE, Move.KEEP, Move.RETRY])
STEPS = st.one_of(
    st.tuples(st.just("announce"), IDS, HOURS, st.sampled_from([None, None, "legal"])),
    st.tuples(st.just("hold_unseen"), IDS),
    st.tuples(st.just("move"), IDS, MOVES, HOURS),
    st.tuples(st.sampled_from(["claim", "claim", "copy", "copy", "confirm", "defer", "give_up", "lose", "end"]), HOURS),
)


class History:
    """A ledger, and beside it the holds that an operator was promised, with their ends."""

    def __init__(self, database) -> None:
        self.database = database
        self.is_postgresql = "Postgres" in type(database).__name__
        self.claims: list[Claim] = []
        self.copied: list[Claim] = []
        self.promised: dict[str, datetime | None] = {}

    async def announce(self, name, due_in, hold):
        await receive(self.database, arrival(id=name, due_in=due_in * HOUR, hold=hold))

    async def move(self, name, wanted, hours):
        until = utc_now() + hours * HOUR if hours > 0 and wanted is Move.HOLD else None
        try:
            moved = await move(self.database, Key(ACCOUNT, name), wanted, until=until, grace=GRACE)
        except IllegalMoveError:
            return
        if wanted is Move.HOLD:
            before = self.promised.get(name, until)
            self.promised[name] = None if before is None or until is None else max(before, until)
        elif moved is not None and wanted in (Move.RELEASE, Move.KEEP):
            self.promised.pop(name, None)

    async def hold_unseen(self, name):
        """Store a hold as if the record's webhook had been committed at the same time, unless it is too late."""
        key = Key(ACCOUNT, name)
        row = await self.database.read(partial(reading.find_row, key=key))
        is_late = row is not None and (row.state != State.DELETING or row.copied_attempt == row.attempts)
        if is_late and row.state != State.SCHEDULED:
            return
        write = partial(holding.hold_unseen, key=key, hold=Hold("ann", "why", None), now=utc_now())
        await self.database.write(write)
        self.promised[name] = None

    async def claim(self, ahead):
        self.claims += await claim(self.database, now=utc_now() + ahead * HOUR)

    async def copy(self, ahead):
        for item in self.claims:
            if await copy(self.database, item, now=utc_now() + ahead * HOUR) is CopyResult.KEPT:
                assert item.key.id not in self.promised, "its DELETE follows"
                self.copied.append(item)

    async def confirm(self, _ahead):
        await settle(self.database, *(confirmed(item) for item in self.copied))

    async def defer(self, ahead):
        await settle(self.database, *(deferred(one, retry_at=utc_now() + ahead * HOUR) for one in self.claims))

    async def give_up(self, _ahead):
        await settle(self.database, *(given_up(item) for item in self.claims))

    async def lose(self, ahead):
        await lose_leases(self.database, now=utc_now() + ahead * HOUR)

    async def end(self, ahead):
        at = utc_now() + ahead * HOUR
        await end_holds(self.database, now=at, min_ttl=HOUR)
        clock = min(at, utc_now()) if self.is_postgresql else at
        self.promised = {name: end for name, end in self.promised.items() if end is None or end > clock}

    async def check(self):
        """Check that what an operator was told is held is on hold, or will be once it is received or claimed."""
        for name in self.promised:
            key = Key(ACCOUNT, name)
            row = await self.database.read(partial(reading.find_row, key=key))
            hold = await self.database.read(partial(holding.find_hold, key=key))
            waits = row is None or row.state in (State.SCHEDULED, State.DELETING, State.FAILED)

            assert (row is not None and row.state == State.HELD) or (waits and hold is not None)


def clear(connection):
    """Empty the ledger."""
    for table in metadata.sorted_tables:
        connection.execute(table.delete())
    return 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=5, max_size=25))
async def test_a_held_record_is_never_deleted_whatever_happens(database, steps):
    await database.write(clear)
    history = History(database)
    for name, *arguments in steps:
        await getattr(history, name)(*arguments)
        await history.check()
