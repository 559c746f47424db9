"""Random histories of required targets: whatever comes, nothing is claimed or copied before they have the webhooks."""

from functools import partial

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from service.core.forwarding import DeliveryState
from service.core.key import Key
from service.core.lifecycle import IllegalMoveError, Move, State
from service.ledger import reading
from service.ledger.claiming import Claim, Wanted, claim_wanted
from service.ledger.moving import Grace
from service.ledger.outcomes import CopyResult
from service.ledger.schema import records
from service.ledger.taking import take
from tests.integration.test_histories import clear
from tests.support.ledger import ACCOUNT, ACTOR, HOUR, LEASE, claim, copy, deferred, lose_leases, move, settle, utc_now
from tests.support.requiring import CRM, LOG, MAIL, delivered, failed, replayed, rows_of_deliveries, webhook

GRACE = Grace(HOUR * 0, HOUR * 0)
IDS = st.sampled_from(["g1", "g2"])
# The second webhook of a generation has another body.
BODIES = st.sampled_from([1, 1, 2, 3])
TARGETS = st.sampled_from([(), (LOG,), (CRM,), (CRM,), (CRM, MAIL)])
DUE = st.sampled_from([-1, -1, 2])
MOVES = st.sampled_from([Move.HOLD, Move.RELEASE, Move.RELEASE, Move.RETRY, Move.KEEP])
WHICH = st.integers(0, 5)
STEPS = st.one_of(
    st.tuples(st.just("announce"), IDS, BODIES, TARGETS, DUE),
    st.tuples(st.sampled_from(["deliver", "fail", "replay"]), WHICH),
    st.tuples(st.just("move"), IDS, MOVES),
    st.tuples(st.just("announce_meanwhile"), IDS, BODIES, TARGETS, DUE),
    st.tuples(st.sampled_from(["claim", "claim", "claim_by_job", "copy", "defer", "lose", "due"])),
)


class History:
    """A ledger, and beside it which required deliveries have not succeeded."""

    def __init__(self, database) -> None:
        self.database = database
        self.claims: list[Claim] = []

    async def open_of(self, name):
        """Return the required deliveries of *name* that have not succeeded, as their own rows say."""
        rows = await rows_of_deliveries(self.database)
        return [
            row for row in rows if row.is_required and row.generation == name and row.state != DeliveryState.DELIVERED
        ]

    async def check(self, claims):
        for item in claims:
            assert await self.open_of(item.key.id) == [], "it was claimed"
        self.claims += claims

    async def announce(self, name, body, targets, due_in):
        item = webhook(*targets, id=name, outputDuration=body, due_in=due_in * HOUR)
        await self.database.write(partial(take, webhooks=[item]))

    async def announce_meanwhile(self, *webhook_of_it: object):
        """Announce a generation again between a claim and its copy."""
        await self.claim()
        await self.announce(*webhook_of_it)
        await self.copy()

    async def _end(self, end, which, states):
        rows = [row for row in await rows_of_deliveries(self.database) if row.state in states]
        if rows:
            await end(self.database, seq=rows[which % len(rows)].seq)

    async def deliver(self, which):
        await self._end(delivered, which, {DeliveryState.WAITING, DeliveryState.FAILED})

    async def fail(self, which):
        await self._end(failed, which, {DeliveryState.WAITING})

    async def replay(self, which):
        await self._end(replayed, which, {DeliveryState.FAILED, DeliveryState.DELIVERED})

    async def move(self, name, wanted):
        try:
            await move(self.database, Key(ACCOUNT, name), wanted, grace=GRACE)
        except IllegalMoveError:
            return

    async def claim(self):
        await self.check(await claim(self.database))

    async def claim_by_job(self):
        for name in ("g1", "g2"):
            row = await self.database.read(partial(reading.find_row, key=Key(ACCOUNT, name)))
            wanted = [Wanted(Key(ACCOUNT, name), row.attempts + 1 if row else 1)]
            write = partial(claim_wanted, account=ACCOUNT, wanted=wanted, now=utc_now(), lease=LEASE, actor=ACTOR)
            await self.check([one for one in await self.database.write(write) if isinstance(one, Claim)])

    async def copy(self):
        for item in self.claims:
            if await copy(self.database, item) is CopyResult.KEPT:
                assert await self.open_of(item.key.id) == [], "its DELETE follows"

    async def defer(self):
        await settle(self.database, *(deferred(item) for item in self.claims))

    async def lose(self):
        await lose_leases(self.database, now=utc_now() + HOUR)

    async def due(self):
        """Let time pass: what is scheduled is due, whatever it waits for."""
        past = utc_now() - HOUR
        passed = update(records).where(records.c.state == State.SCHEDULED).values(due_at=past, wake_at=past)
        await self.database.write(lambda connection: connection.execute(passed))

    async def finish(self):
        """Let all deliveries succeed: then nothing waits or has failed because of one."""
        for row in await rows_of_deliveries(self.database):
            await delivered(self.database, seq=row.seq)
        await self.lose()
        await self.due()
        for name in ("g1", "g2"):
            row = await self.database.read(partial(reading.find_row, key=Key(ACCOUNT, name)))

            assert row is None or row.state != State.FAILED
        await claim(self.database)
        left = await self.database.read(partial(reading.read_backlog, now=utc_now()))

        assert left.due == 0


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=5, max_size=30))
async def test_nothing_is_claimed_before_its_targets_have_its_webhooks(database, steps):
    await database.write(clear)
    history = History(database)
    for name, *arguments in steps:
        await getattr(history, name)(*arguments)
    await history.finish()
