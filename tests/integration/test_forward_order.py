"""Random histories of deliveries: whatever answers, lost leases and replays of time come, order and promise hold."""

import json
from collections import defaultdict
from datetime import timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.core.forwarding import MAX_ATTEMPTS, DeliveryState, Reply
from service.ledger.delivering import ClaimedDelivery, Due
from service.ledger.delivery_schema import deliveries, requirements
from tests.support import attempts as ours
from tests.support.attempts import CRM, FILMS, LEASE, claim, find_due, forwarding, insert, settle
from tests.support.ledger import utc_now

TARGETS = (CRM, FILMS)
GENERATIONS = st.sampled_from(["g1", "g2"])
ANSWERS = st.sampled_from([200, 204, 503, 503, None, 410])
MINUTES = st.sampled_from([0, 0, 1, 60, 24 * 60])
PLACES = st.integers(0, 9)
STEPS = st.one_of(
    st.tuples(st.just("receive"), GENERATIONS),
    st.tuples(st.just("receive"), GENERATIONS),
    st.tuples(st.just("resend"), PLACES),
    st.tuples(st.just("jobs"), st.permutations(range(5)), st.sampled_from([1, 1, 1, 0, 2])),
    st.tuples(st.sampled_from(["net", "net", "pass"]), MINUTES),
    st.tuples(st.sampled_from(["end", "end", "end", "unknown"]), PLACES, ANSWERS),
    st.tuples(st.sampled_from(["kill", "give_up"]), PLACES),
)


class History:
    """A ledger with several workers, and beside it what was received and what each target has seen."""

    def __init__(self, database) -> None:
        self.database = database
        self.now = utc_now()
        self.received: list[tuple[str, bytes]] = []
        self.running: list[ClaimedDelivery] = []
        self.seen: dict[str, list[tuple[str, int, str]]] = defaultdict(list)  # generation, place, Mayfly-Delivery

    async def receive(self, generation):
        body = json.dumps({"id": generation, "place": len(self.received)}).encode()
        self.received.append((generation, body))
        await self.store(generation, body)

    async def resend(self, place):
        if self.received:
            await self.store(*self.received[place % len(self.received)])

    async def store(self, generation, body):
        await insert(self.database, forwarding(generation, body=body, targets=TARGETS, received_at=self.now))

    async def jobs(self, places, ahead):
        """Jobs of Redis in any order, for the next attempts, later ones or those that are over."""
        rows = await ours.rows(self.database)
        chosen = [rows[-1 - place] for place in places if place < len(rows)]
        await self.begin([Due(row.target, row.id, row.attempts + ahead) for row in chosen])

    async def net(self, minutes):
        self.now += timedelta(minutes=minutes)
        for target in TARGETS:
            await self.begin(await find_due(self.database, target=target.id, now=self.now))

    async def begin(self, wanted):
        for claimed in await claim(self.database, *((one.id, one.attempt) for one in wanted), now=self.now):
            if claimed is not None:
                await self.check_order(claimed)
                self.seen[claimed.target].append((claimed.key.id, json.loads(claimed.body)["place"], claimed.id))
                self.running.append(claimed)

    async def check_order(self, claimed):
        """What is sent is the first of its generation that is neither delivered nor failed."""
        for row in await ours.rows(self.database):
            if (row.target, row.generation) == (claimed.target, claimed.key.id) and row.seq < claimed.seq:
                assert row.state != DeliveryState.WAITING, "an earlier webhook waits"

    async def end(self, place, status):
        if self.running:
            claimed = self.running.pop(place % len(self.running))
            await settle(self.database, claimed, Reply(status), now=self.now)

    async def unknown(self, place, status):
        """The commit of the outcome was not confirmed, and is made again."""
        if self.running:
            await settle(self.database, self.running[place % len(self.running)], Reply(status), now=self.now)
            await self.end(place, status)

    async def kill(self, place):
        """A worker dies with the app's answer; its lease ends."""
        if self.running:
            self.running.pop(place % len(self.running))

    async def give_up(self, _place):
        await ours.give_up(self.database, now=self.now, target=CRM.id)

    async def pass_(self, minutes):
        self.now += timedelta(minutes=minutes)

    async def finish(self):
        """Let all targets answer 2xx from now on; what was begun is lost."""
        self.running.clear()
        for _ in range(len(self.received) + 2):
            self.now += max(LEASE, timedelta(days=2))
            await self.net(0)
            while self.running:
                await self.end(0, 200)


def firsts(seen, generation):
    """Return the places of the webhooks of *generation* in the order in which a target saw each first."""
    found: list[int] = []
    for one, place, _ in seen:
        if one == generation and place not in found:
            found.append(place)
    return found


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, min_size=10, max_size=50))
async def test_each_target_sees_each_generation_in_order_and_nothing_is_lost(database, steps):
    for table in (deliveries, requirements):
        await database.write(lambda connection, table=table: connection.execute(table.delete()))
    history = History(database)
    for name, *arguments in steps:
        await getattr(history, {"pass": "pass_"}.get(name, name))(*arguments)
    await history.finish()

    rows = await ours.rows(database)
    assert len(rows) == len(history.received) * len(TARGETS)
    for target in TARGETS:
        seen = history.seen[target.id]
        mine = {json.loads(row.body)["place"]: row for row in rows if row.target == target.id}
        assert mine.keys() == set(range(len(history.received)))
        for generation in ("g1", "g2"):
            order = firsts(seen, generation)
            assert order == sorted(order)
        for place, row in mine.items():
            names = {name for _, number, name in seen if number == place}
            assert names <= {row.id}
            assert row.state in (DeliveryState.DELIVERED, DeliveryState.FAILED)
            # What was never sent was given up after days, and says so.
            assert names or (row.state == DeliveryState.FAILED and "3 days" in row.last_error)
            assert row.wake_at is row.leased_until is None
            assert row.attempts <= MAX_ATTEMPTS + sum(name == row.id for _, _, name in seen)
