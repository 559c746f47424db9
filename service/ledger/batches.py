"""Finished batches: each is stored before its webhook is answered, and stays until all of its generations are known.

A batch wants to be looked at as long as it has a look_at. While a worker does so, that is the end of its lease; another
one takes it over then. *tries* tells the two apart.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Row, func, select, tuple_, update
from sqlalchemy import delete as delete_from
from sqlalchemy.dialects import postgresql, sqlite

from service.core.batch import Batch, BatchState
from service.core.key import Key
from service.core.reapplying import is_decided_by_policy
from service.ledger import pausing, requiring
from service.ledger.adopting import adopt, find_known
from service.ledger.inserting import Arrival, Receipt
from service.ledger.receiving import receive
from service.ledger.schema import batches

_OPEN: Final = (BatchState.WAITING, BatchState.UNRESOLVED)


class BatchArrival(msgspec.Struct, frozen=True):
    """The verified notification of a finished batch; *body* as it came, *query* is that of its request."""

    key: Key
    batch: Batch
    body: str
    received_at: datetime
    sent_at: datetime
    query: str = ""


class Claimed(msgspec.Struct, frozen=True):
    """A batch that a worker looks at; *tries* counts from 1 and is what the worker is told from others by."""

    key: Key
    tries: int
    created_at: datetime | None
    sent_at: datetime
    webhook_url: str | None
    request_query: str | None
    output_url: str | None
    expected: int | None


class Resolution(msgspec.Struct, frozen=True):
    """What one look led to: *wait* until the next one, None for none; *error* says what is not resolved."""

    state: BatchState
    recorded: int
    errors: int
    unresolved: int
    source: str
    error: str | None
    wait: timedelta | None


def receive_batch(connection: Connection, arrival: BatchArrival) -> tuple[BatchState, bool]:
    """Store a finished batch; return its state, and whether it is new. A known one stays as it is."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    values = {
        "account": arrival.key.account,
        "id": arrival.key.id,
        "state": str(BatchState.WAITING),
        "status": arrival.batch.status,
        "created_at": arrival.batch.created_at,
        "received_at": arrival.received_at,
        "sent_at": arrival.sent_at,
        "webhook_url": arrival.batch.webhook_url,
        "request_query": arrival.query or None,
        "output_url": arrival.batch.output_url,
        "expected": arrival.batch.total,
        "look_at": arrival.received_at,
        "notification": arrival.body,
    }
    statement = insert(batches).values(values).on_conflict_do_nothing(index_elements=["account", "id"])
    if connection.execute(statement.returning(batches.c.id)).first() is not None:
        return BatchState.WAITING, True
    known = connection.execute(select(batches.c.state).where(*_is(arrival.key))).one()
    return BatchState(known.state), False


def find_due_batches(connection: Connection, account: str, *, now: datetime, limit: int) -> Sequence[Key]:
    """Return up to *limit* batches of *account* that are to be looked at, the longest waiting first.

    None while the API refuses the account's key or wants no calls.
    """
    if pausing.find_closing(connection, account, now=now) is not None:
        return []
    due = (
        select(batches.c.account, batches.c.id)
        .where(batches.c.account == account, batches.c.look_at <= now)
        .order_by(batches.c.look_at)
        .limit(limit)
    )
    return [Key(row.account, row.id) for row in connection.execute(due)]


def claim_batch(connection: Connection, key: Key, *, now: datetime, lease: timedelta) -> Claimed | None:
    """Begin to look at a batch that is due; None if it is not, or if its account may not ask the API."""
    if pausing.find_closing(connection, key.account, now=now) is not None:
        return None
    statement = (
        update(batches)
        .where(*_is(key), batches.c.state.in_(_OPEN), batches.c.look_at <= now)
        .values(look_at=now + lease, tries=batches.c.tries + 1)
        .returning(*batches.c)
    )
    row = connection.execute(statement).first()
    if row is None:
        return None
    names = ("tries", "created_at", "sent_at", "webhook_url", "request_query", "output_url", "expected")
    return Claimed(key, *(getattr(row, name) for name in names))


def move_look(connection: Connection, claimed: Claimed, *, at: datetime) -> bool:
    """Move the end of the lease, or of a look that was not begun; return False if another worker has the batch."""
    statement = update(batches).where(*_is_mine(claimed)).values(look_at=at).returning(batches.c.id)
    return connection.execute(statement).first() is not None


def adopt_of_batch(connection: Connection, claimed: Claimed, arrivals: Sequence[Arrival]) -> list[Receipt | None]:
    """Store the generations of a batch that have no record, and count them there, in one transaction.

    A record that a sweep or a webhook made before is kept longer, or held, if the override of the batch says so and no
    other override or operator has decided. All of them wait for the targets that the batch waits for.
    """
    receipts = adopt(connection, arrivals)
    _announce_again(connection, [one for one, receipt in zip(arrivals, receipts, strict=True) if receipt is None])
    requiring.inherit_requirements(connection, claimed.key, [one.key for one in arrivals])
    new = sum(receipt is not None for receipt in receipts)
    statement = update(batches).where(*_is(claimed.key)).values(scheduled=batches.c.scheduled + new)
    connection.execute(statement)
    return receipts


def _announce_again(connection: Connection, arrivals: Sequence[Arrival]) -> None:
    overridden = [one for one in arrivals if not is_decided_by_policy(one.retention.rule)]
    if not overridden:
        return
    known = find_known(connection, overridden[0].key.account, [one.key.id for one in overridden])
    receive(connection, [one for one in overridden if is_decided_by_policy(known[one.key.id].rule)])


def settle_batch(
    connection: Connection, claimed: Claimed, found: Resolution, *, now: datetime, give_up_after: timedelta
) -> Row[Any] | None:
    """Store what a look led to and return the batch; None if another worker has it.

    It is given up once it has waited for *give_up_after* in all; time without a worker does not count.
    """
    row = connection.execute(select(batches).where(*_is_mine(claimed)).with_for_update()).first()
    if row is None:
        return None
    waited = timedelta(seconds=row.waited_seconds)
    state, look_at = found.state, None
    if found.wait is not None:
        is_over = waited >= give_up_after
        state = BatchState.FAILED if is_over else state
        look_at = None if is_over else now + found.wait
        waited += found.wait
    values = {
        "state": str(state),
        "known": max(0, found.recorded - row.scheduled),
        "errors": found.errors,
        "unresolved": found.unresolved,
        "source": found.source,
        "last_error": found.error,
        "look_at": look_at,
        "waited_seconds": int(waited.total_seconds()),
        "resolved_at": now if state is BatchState.RESOLVED else None,
    }
    return connection.execute(update(batches).where(*_is(claimed.key)).values(values).returning(*batches.c)).one()


def retry_batch(connection: Connection, key: Key, *, now: datetime) -> bool:
    """Let a batch be looked at again now, whatever its state; return False if there is none."""
    values = {"state": str(BatchState.WAITING), "look_at": now, "waited_seconds": 0, "resolved_at": None}
    statement = update(batches).where(*_is(key)).values(values).returning(batches.c.id)
    return connection.execute(statement).first() is not None


def find_batch(connection: Connection, key: Key) -> Row[Any] | None:
    """Return a batch, None if there is none."""
    return connection.execute(select(batches).where(*_is(key))).first()


def read_batches(connection: Connection, *, state: BatchState | None, limit: int) -> Sequence[Row[Any]]:
    """Return up to *limit* batches, in *state* unless it is None, the newest first."""
    statement = select(batches).order_by(batches.c.received_at.desc(), batches.c.account, batches.c.id).limit(limit)
    return connection.execute(statement if state is None else statement.where(batches.c.state == state)).all()


def count_batches(connection: Connection) -> dict[BatchState, int]:
    """Return how many batches are in each state."""
    counted = connection.execute(select(batches.c.state, func.count()).group_by(batches.c.state))
    found: Mapping[str, int] = {row[0]: row[1] for row in counted}
    return {state: found.get(state, 0) for state in BatchState}


def forget_batches(connection: Connection, *, before: datetime, limit: int) -> int:
    """Remove up to *limit* batches that were resolved before that time; return how many."""
    old = (
        select(batches.c.account, batches.c.id)
        .where(batches.c.state == BatchState.RESOLVED, batches.c.resolved_at < before)
        .limit(limit)
    )
    keys = [(row.account, row.id) for row in connection.execute(old)]
    if keys:
        connection.execute(delete_from(batches).where(tuple_(batches.c.account, batches.c.id).in_(keys)))
    return len(keys)


def _is(key: Key) -> tuple[Any, ...]:
    return batches.c.account == key.account, batches.c.id == key.id


def _is_mine(claimed: Claimed) -> tuple[Any, ...]:
    return *_is(claimed.key), batches.c.state.in_(_OPEN), batches.c.tries == claimed.tries
