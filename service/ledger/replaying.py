"""Replays of deliveries, by their ids or of all that match a filter, in bounded steps.

A delivery keeps its id, by which its target knows it. Its attempts count on, and its schedule begins anew.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, func, literal, select, tuple_, update

from service.core.forwarding import DeliveryState
from service.core.replaying import Replay, judge_replay
from service.ledger.bulk import ExpectationError
from service.ledger.cursors import Place
from service.ledger.database import Database
from service.ledger.delivery_reading import DeliveryFilter, filter_deliveries, find_targets
from service.ledger.delivery_schema import deliveries

# How many deliveries one transaction replays: some milliseconds, for which webhooks wait.
BATCH: Final = 200


class Replayed(msgspec.Struct, frozen=True):
    """What a replay did to one delivery: *attempt* is the number of its next attempt."""

    id: str
    target: str
    result: Replay
    attempt: int


class ReplayCounts(msgspec.Struct, rename="camel", frozen=True):
    """What a replay by filter did: *already* were due, an attempt at those *attempted* is made now.

    *is_complete* is False if the time was over first.
    """

    replayed: int
    already: int
    attempted: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Matching:
    """How many deliveries in each state match, and how many others of each target that is not configured."""

    counts: dict[DeliveryState, int]
    without_target: dict[str, int]


@dataclass(frozen=True, slots=True)
class WantedReplay:
    """A replay of all deliveries to *configured* targets that *chosen* matches, which names one state."""

    chosen: DeliveryFilter
    configured: frozenset[str]

    @classmethod
    def of(cls, chosen: DeliveryFilter, configured: frozenset[str]) -> "WantedReplay":
        """Return it; without a state it is about those that have failed."""
        return cls(replace(chosen, state=chosen.state or DeliveryState.FAILED), configured)


def count_deliveries(connection: Connection, wanted: WantedReplay) -> Matching:
    """Count what matches."""
    statement = select(deliveries.c.target, deliveries.c.state, func.count()).where(*filter_deliveries(wanted.chosen))
    if wanted.chosen.target is None and wanted.chosen.generation is None:
        # So that the index of target and state serves.
        statement = statement.where(deliveries.c.target.in_(find_targets(connection)))
    counts = dict.fromkeys(DeliveryState, 0)
    others: Counter[str] = Counter()
    for target, state, number in connection.execute(statement.group_by(deliveries.c.target, deliveries.c.state)):
        if target in wanted.configured:
            counts[DeliveryState(state)] += number
        else:
            others[target] += number
    return Matching(counts, dict(others))


def replay_one(
    connection: Connection, *, delivery_id: str, configured: frozenset[str], now: datetime
) -> Replayed | None:
    """Replay the delivery of that id, or say why it stays as it is; None if there is none."""
    found = _replay(connection, deliveries.c.id == delivery_id, configured, now)
    return found[0] if found else None


async def replay_matching(
    database: Database,
    wanted: WantedReplay,
    *,
    now: Callable[[], datetime],
    expected: int | None,
    note: Callable[[Sequence[Replayed]], None] = lambda _step: None,
    seconds: float = float("inf"),
) -> ReplayCounts:
    """Replay all deliveries that match, *expected* ones and no more, for *seconds* at most; *note* gets each step.

    Raises: ExpectationError if another number matches; LedgerUnavailableError, with the steps before it committed.
    """
    matching = await database.read(partial(count_deliveries, wanted=wanted))
    found = sum(matching.counts.values())
    if found != expected:
        match = "1 delivery matches" if found == 1 else f"{found} deliveries match"
        raise ExpectationError(f"{match}, not {expected}: nothing was replayed, look at the count again")
    deadline, total = time.monotonic() + seconds, Counter[Replay]()
    targets, after = sorted(wanted.configured), None
    while targets and (left := found - total.total()) and time.monotonic() < deadline:
        size = min(BATCH, left)
        step = await database.read(partial(_read_step, wanted=wanted, target=targets[0], after=after, limit=size))
        if step:
            replayed = await database.write(partial(_replay_step, wanted=wanted, places=step, now=now()))
            note(replayed)
            total.update(one.result for one in replayed)
            after = step[-1]
        if len(step) < size:
            del targets[0]
            after = None
    is_complete = not targets or total.total() >= found
    advanced = total[Replay.REPLAYED] + total[Replay.ADVANCED]
    return ReplayCounts(advanced, total[Replay.ALREADY], total[Replay.ATTEMPTED], is_complete)


_PLACE: Final = (deliveries.c.received_at, deliveries.c.seq)


def _read_step(
    connection: Connection, *, wanted: WantedReplay, target: str, after: Place | None, limit: int
) -> list[Place]:
    """Return the next places after *after*, oldest first, as the webhooks of a generation are sent."""
    statement = select(*_PLACE).where(*filter_deliveries(wanted.chosen), deliveries.c.target == target)
    if after is not None:
        bound = (literal(value, column.type) for value, column in zip(after, _PLACE, strict=True))
        statement = statement.where(tuple_(*_PLACE) > tuple_(*bound))
    rows = connection.execute(statement.order_by(*_PLACE).limit(limit))
    return [(row.received_at, row.seq) for row in rows]


def _replay_step(
    connection: Connection, *, wanted: WantedReplay, places: Sequence[Place], now: datetime
) -> list[Replayed]:
    condition = deliveries.c.seq.in_([seq for _, seq in places]) & (deliveries.c.state == wanted.chosen.state)
    # What a worker has locked is at an attempt. Workers lock several rows in their own order: no deadlock with them.
    return _replay(connection, condition, wanted.configured, now, is_skipping_locked=True)


def _replay(
    connection: Connection,
    condition: ColumnElement[bool],
    configured: frozenset[str],
    now: datetime,
    *,
    is_skipping_locked: bool = False,
) -> list[Replayed]:
    """Replay what fulfils *condition*. The rows stay locked, so what is decided about them holds."""
    names = ("seq", "id", "target", "state", "attempts", "wake_at", "leased_until")
    chosen = select(*(deliveries.c[name] for name in names)).where(condition)
    locked = chosen.order_by(deliveries.c.seq).with_for_update(skip_locked=is_skipping_locked)
    rows = connection.execute(locked).all()
    results = [_judge(row, configured, now) for row in rows]
    ended = [row.seq for row, result in zip(rows, results, strict=True) if result is Replay.REPLAYED]
    late = [row.seq for row, result in zip(rows, results, strict=True) if result is Replay.ADVANCED]
    if ended:
        anew = {"state": str(DeliveryState.WAITING), "since": now, "wake_at": now, "tries": 0, "finished_at": None}
        connection.execute(update(deliveries).where(deliveries.c.seq.in_(ended)).values(anew))
    if late:
        connection.execute(update(deliveries).where(deliveries.c.seq.in_(late)).values(wake_at=now))
    return [Replayed(row.id, row.target, result, row.attempts + 1) for row, result in zip(rows, results, strict=True)]


def _judge(row: Row[Any], configured: frozenset[str], now: datetime) -> Replay:
    is_configured = row.target in configured
    return judge_replay(DeliveryState(row.state), row.wake_at, row.leased_until, is_configured=is_configured, now=now)
