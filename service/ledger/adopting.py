"""Adopting generations of a list that have no record, and when a sweep of an account last was complete."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, select

from service.core.holding import NO_REASON
from service.core.key import Key
from service.core.lifecycle import State
from service.ledger import heartbeats, holding
from service.ledger.history import Entry, append_entries
from service.ledger.inserting import Arrival, Receipt, insert_new, receipt_of_new
from service.ledger.schema import KEYS_OF_ACCOUNT, records

# How many ids one statement has; SQLite takes 32 766 parameters.
_IDS_AT_ONCE: Final = 1000
# A sweep that fails or is killed begins no sooner again, however often workers restart.
TURN: Final = timedelta(minutes=10)

_select_known = select(records.c.id, records.c.state, records.c.due_at, records.c.rule).where(KEYS_OF_ACCOUNT)


@dataclass(frozen=True, slots=True)
class Known:
    """The record of a generation."""

    state: State
    due_at: datetime | None
    rule: str


def find_known(connection: Connection, account: str, ids: Sequence[str]) -> dict[str, Known]:
    """Return the records of those of *ids* that have one."""
    return {
        row.id: Known(State(row.state), row.due_at, row.rule)
        for some in _split(ids)
        for row in connection.execute(_select_known, {"account": account, "ids": some})
    }


def find_held(connection: Connection, account: str, ids: Sequence[str]) -> dict[str, str]:
    """Return the reasons of the holds that were made for some of *ids* before there was a record."""
    return {
        key.id: hold.reason or NO_REASON
        for some in _split(ids)
        for key, hold in holding.find_holds(connection, [Key(account, one) for one in some]).items()
    }


def adopt(connection: Connection, arrivals: Sequence[Arrival]) -> list[Receipt | None]:
    """Store those of *arrivals*, one per generation, that have no record, and return a receipt or None for each.

    A record stays as it is, whatever its state: what was deleted, held or kept is not adopted again.
    """
    ordered = sorted(arrivals, key=lambda arrival: (arrival.key.account, arrival.key.id))  # as in receive()
    inserted, entries = insert_new(connection, ordered), list[Entry]()
    receipts = {
        arrival.key: receipt_of_new(arrival, inserted, entries) for arrival in ordered if arrival.key in inserted.new
    }
    holding.remove_holds(connection, [key for key in receipts if key in inserted.found])
    append_entries(connection, entries)
    return [receipts.get(arrival.key) for arrival in arrivals]


def _split(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _IDS_AT_ONCE):
        yield ids[start : start + _IDS_AT_ONCE]


def take_turn(connection: Connection, account: str, *, now: datetime) -> bool:
    """Whether a sweep of *account* may begin: none has begun within TURN, by whatever worker."""
    return heartbeats.take_turn(connection, f"sweep:{account}", now=now, every=TURN)


def note_complete(connection: Connection, account: str, *, now: datetime) -> None:
    """Store that a sweep of *account* was complete at *now*."""
    heartbeats.record_beat(connection, _complete(account), now=now)


def last_complete(connection: Connection, account: str) -> datetime | None:
    """Return when a sweep of *account* last was complete; None if never."""
    return heartbeats.last_beat(connection, _complete(account))


def _complete(account: str) -> str:
    return f"swept:{account}"
