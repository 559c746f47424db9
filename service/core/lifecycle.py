"""The states of a record and the moves between them: one table, and nothing outside it is legal."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from service.core.errors import ExplainedError


class State(StrEnum):
    """Where a record is in its life."""

    SCHEDULED = "scheduled"  # waits for its due time, or for the next attempt
    DELETING = "deleting"  # one worker holds its lease and talks to the API
    DELETED = "deleted"  # gone at the API; the record stays
    FAILED = "failed"  # given up; a person decides
    HELD = "held"  # a person stopped it for now
    KEPT = "kept"  # never to be deleted, by policy or by a person


class Move(StrEnum):
    """What can happen to a record; each one appends a row to its history."""

    RECEIVE = "receive"
    KEEP = "keep"
    CLAIM = "claim"
    HOLD = "hold"
    RELEASE = "release"
    SCHEDULE = "schedule"
    CONFIRM = "confirm"
    DEFER = "defer"
    LOSE_LEASE = "lose_lease"
    GIVE_UP = "give_up"
    RETRY = "retry"


TABLE: Mapping[tuple[State | None, Move], State] = MappingProxyType(
    {
        (None, Move.RECEIVE): State.SCHEDULED,
        (None, Move.KEEP): State.KEPT,
        (State.SCHEDULED, Move.CLAIM): State.DELETING,
        (State.SCHEDULED, Move.HOLD): State.HELD,
        (State.SCHEDULED, Move.KEEP): State.KEPT,
        (State.HELD, Move.RELEASE): State.SCHEDULED,
        (State.KEPT, Move.SCHEDULE): State.SCHEDULED,
        (State.DELETING, Move.CONFIRM): State.DELETED,
        (State.DELETING, Move.DEFER): State.SCHEDULED,
        (State.DELETING, Move.LOSE_LEASE): State.SCHEDULED,
        (State.DELETING, Move.GIVE_UP): State.FAILED,
        (State.FAILED, Move.RETRY): State.SCHEDULED,
    }
)


class IllegalMoveError(ExplainedError):
    """A move that the table does not have; the record stays as it was."""

    def __init__(self, state: State | None, move: Move) -> None:
        why = ": it is copied and its DELETE may be under way" if state is State.DELETING else ""
        super().__init__(f"a record that is {state or 'unknown'} cannot {move}{why}")
        self.state = state
        self.move = move


def interrupting_moves(state: State, *, is_copied: bool) -> list[Move]:
    """Return what must come before a move that stops a record: a worker at it loses its lease, until the copy is made.

    From then on its DELETE may be under way, and nothing can stop it.
    """
    return [Move.LOSE_LEASE] if state is State.DELETING and not is_copied else []


def state_after(state: State | None, *moves: Move) -> State:
    """Return the state that *moves* lead to from *state*; None stands for a record that is not there yet.

    Raises: IllegalMoveError; ValueError for no moves from nowhere.
    """
    for move in moves:
        try:
            state = TABLE[state, move]
        except KeyError:
            raise IllegalMoveError(state, move) from None
    if state is None:
        raise ValueError("no record and no move")
    return state
