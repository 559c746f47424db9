"""Attempts at deliveries: claim one, store what it led to, find what is due. The WHERE of each statement decides races.

A claim gives the row a lease and a new attempt number. An outcome other than success counts only with that number; a
success is a fact, whoever else has begun another attempt meanwhile. Records that wait for a delivery are locked before
it, and learn its outcome in the same transaction.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Connection, Select, bindparam, exists, or_, select, update

from service.core.forwarding import GIVE_UP_AFTER, DeliveryState, Outcome, Reply
from service.core.key import Key
from service.ledger.delivery_schema import deliveries
from service.ledger.fulfilling import Ready, fail_requirements, lock_required, settle_requirement
from service.ledger.instant import Instant
from service.ledger.requiring import ACTOR_PREFIX

_earlier = deliveries.alias()
# The order of one generation's webhooks: what is still on its way, or waits to be tried again, comes first. One that
# has failed holds up nothing.
_IS_BEHIND: Final = exists().where(
    _earlier.c.target == deliveries.c.target,
    _earlier.c.account == deliveries.c.account,
    _earlier.c.generation == deliveries.c.generation,
    _earlier.c.seq < deliveries.c.seq,
    _earlier.c.wake_at.is_not(None),
)
_GIVEN_UP: Final = f"no 2xx in {GIVE_UP_AFTER.days} days: its target did not answer"


class Due(msgspec.Struct, frozen=True, gc=False):
    """A delivery whose attempt number *attempt*, from 1, is due."""

    target: str
    id: str
    attempt: int


class ClaimedDelivery(msgspec.Struct, frozen=True, gc=False):
    """A delivery that only this worker makes an attempt at, until its lease ends.

    *attempt* counts from 1, and *tries* from 1 after each replay. *body*, *content_type* and *signature* as they came.
    """

    seq: int
    id: str
    target: str
    key: Key
    attempt: int
    tries: int
    received_at: datetime
    is_required: bool
    body: bytes
    content_type: str
    signature: str


class Ended(msgspec.Struct, frozen=True, gc=False):
    """What an attempt at *claimed* led to."""

    claimed: ClaimedDelivery
    reply: Reply
    outcome: Outcome


class Settlement(msgspec.Struct, frozen=True, gc=False):
    """What follows in the ledger: the attempts that are due next, of this delivery or of the one behind it.

    *ready* are the records that waited for it. It is not *is_ours* if another attempt has begun meanwhile, which will
    say what becomes of the delivery.
    """

    is_ours: bool
    due: Sequence[tuple[Due, datetime]] = ()
    ready: Sequence[Ready] = ()


_claim = (
    update(deliveries)
    .where(
        deliveries.c.id == bindparam("b_id"),
        deliveries.c.attempts == bindparam("b_attempt") - 1,
        deliveries.c.wake_at.is_not(None),
        # A first one is due at once: the clock of the host that received it may be ahead of this one's.
        or_(deliveries.c.tries == 0, deliveries.c.wake_at <= bindparam("b_now", type_=Instant)),
        ~_IS_BEHIND,
    )
    .values(
        attempts=deliveries.c.attempts + 1,
        tries=deliveries.c.tries + 1,
        wake_at=bindparam("b_until", type_=Instant),
        leased_until=bindparam("b_until", type_=Instant),
    )
    .returning(deliveries)
)


def claim_deliveries(
    connection: Connection, wanted: Sequence[Due], *, now: datetime, lease: timedelta
) -> list[ClaimedDelivery | None]:
    """Claim each of *wanted* for *lease*.

    None: it has ended, is not due, is at another attempt, or an earlier webhook of its generation comes first.
    """
    values = {"b_now": now, "b_until": now + lease}
    rows = {
        one: connection.execute(_claim, values | {"b_id": one.id, "b_attempt": one.attempt}).first()
        for one in sorted(set(wanted), key=attrgetter("id"))  # see settle_deliveries()
    }
    # Of two jobs for one attempt the first gets the claim.
    return [None if (row := rows.pop(one, None)) is None else _claimed(row) for one in wanted]


def _claimed(row: Any) -> ClaimedDelivery:  # noqa: ANN401 - a row
    return ClaimedDelivery(
        row.seq,
        row.id,
        row.target,
        Key(row.account, row.generation),
        row.attempts,
        row.tries,
        row.received_at,
        row.is_required,
        row.body,
        row.content_type,
        row.signature,
    )


def settle_deliveries(connection: Connection, ended: Sequence[Ended], *, now: datetime) -> list[Settlement]:
    """Store what attempts led to; the result has the order of *ended*."""
    lock_required(connection, *(one.claimed.seq for one in ended if one.claimed.is_required))
    # Whoever waits for several deliveries takes them in the order of their ids, to avoid deadlocks.
    places = sorted(range(len(ended)), key=lambda place: ended[place].claimed.id)
    settled = {place: _settle(connection, ended[place], now) for place in places}
    return [settled[place] for place in range(len(ended))]


def _settle(connection: Connection, ended: Ended, now: datetime) -> Settlement:
    claimed, outcome = ended.claimed, ended.outcome
    mine: tuple[ColumnElement[bool], ...] = (deliveries.c.seq == claimed.seq,)
    if outcome.state is not DeliveryState.DELIVERED:
        mine = (*mine, deliveries.c.attempts == claimed.attempt, deliveries.c.leased_until.is_not(None))
    wake_at = None if outcome.wait is None else now + outcome.wait
    values = {
        "state": str(outcome.state),
        "wake_at": wake_at,
        "leased_until": None,
        "finished_at": now if wake_at is None else None,
        "last_status": ended.reply.status,
        "last_answer": ended.reply.answer or None,
        "last_error": outcome.error,
    }
    if connection.execute(update(deliveries).where(*mine).values(values)).rowcount == 0:
        return Settlement(is_ours=False)
    if wake_at is not None:
        return Settlement(is_ours=True, due=[(Due(claimed.target, claimed.id, claimed.attempt + 1), wake_at)])
    return Settlement(is_ours=True, due=_find_next(connection, claimed), ready=_tell_records(connection, ended, now))


def _tell_records(connection: Connection, ended: Ended, now: datetime) -> list[Ready]:
    """Let the records that wait for a delivery know that it has ended; return those whose attempt can start."""
    claimed, outcome = ended.claimed, ended.outcome
    if not claimed.is_required:
        return []
    return settle_requirement(
        connection,
        delivery=claimed.seq,
        state=outcome.state,
        target=claimed.target,
        error=outcome.error,
        now=now,
        actor=f"{ACTOR_PREFIX}{claimed.target}",
    )


def _find_next(connection: Connection, claimed: ClaimedDelivery) -> list[tuple[Due, datetime]]:
    """Return the attempt at the next webhook of the same generation, which has waited for this one."""
    same = (
        deliveries.c.target == claimed.target,
        deliveries.c.account == claimed.key.account,
        deliveries.c.generation == claimed.key.id,
    )
    columns = (deliveries.c.id, deliveries.c.attempts, deliveries.c.wake_at)
    waiting = select(*columns).where(*same, deliveries.c.wake_at.is_not(None)).order_by(deliveries.c.seq).limit(1)
    row = connection.execute(waiting).first()
    return [] if row is None else [(Due(claimed.target, row.id, row.attempts + 1), row.wake_at)]


def find_due_deliveries(connection: Connection, target: str, *, now: datetime, limit: int) -> list[Due]:
    """Return up to *limit* deliveries to *target* whose attempt can begin, or has lost its lease, longest due first."""
    due = (
        select(deliveries.c.id, deliveries.c.attempts)
        .where(deliveries.c.target == target, deliveries.c.wake_at <= now, ~_IS_BEHIND)
        .order_by(deliveries.c.wake_at)
        .limit(limit)
    )
    return [Due(target, row.id, row.attempts + 1) for row in connection.execute(due)]


def has_given_up(connection: Connection, *, now: datetime, target: str | None, known: Sequence[str] = ()) -> bool:
    """Whether give_up() would end any."""
    return connection.execute(_select_old(target, known, now).limit(1)).first() is not None


def _select_old(target: str | None, known: Sequence[str], now: datetime) -> Select[tuple[int]]:
    whose = deliveries.c.target == target if target is not None else deliveries.c.target.not_in(known)
    return (
        select(deliveries.c.seq)
        .where(whose, deliveries.c.wake_at.is_not(None), deliveries.c.since <= now - GIVE_UP_AFTER)
        .where(or_(deliveries.c.leased_until.is_(None), deliveries.c.leased_until <= now))
    )


def give_up(
    connection: Connection, *, now: datetime, limit: int, target: str | None, known: Sequence[str] = ()
) -> list[int]:
    """End up to *limit* deliveries to *target* that have waited for days while it did not answer; return their seqs.

    A *target* of None is all that are not in *known*: nobody makes attempts at those of a target that was removed.
    """
    found = [row.seq for row in connection.execute(_select_old(target, known, now).limit(limit))]
    lock_required(connection, *found)
    still = _select_old(target, known, now).where(deliveries.c.seq.in_(found)).with_for_update(skip_locked=True)
    seqs = [row.seq for row in connection.execute(still)]
    error = _GIVEN_UP if target is not None else "its target is not in the configuration any more"
    values = {
        "state": str(DeliveryState.FAILED),
        "wake_at": None,
        "leased_until": None,
        "finished_at": now,
        "last_error": error,
    }
    if seqs:
        connection.execute(update(deliveries).where(deliveries.c.seq.in_(seqs)).values(values))
        fail_requirements(connection, seqs, now=now, actor=f"{ACTOR_PREFIX}{target or 'that was removed'}")
    return seqs
