"""The states of a record, and the table of the moves between them. A move that is not in the table is illegal."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from service.core.errors import ExplainedError


class State(StrEnum):
    """Where a record is in its life."""

    SCHEDULED = "scheduled"  # waits for its due time, or for the next attempt
    DELETING = "deleting"  # a worker has the lease and calls the API
    DELETED = "deleted"  # gone at the API; the record stays
    FAILED = "failed"  # given up; needs an operator
    HELD = "held"  # on hold until an operator releases it
    KEPT = "kept"  # never deleted, by policy or by an operator


class Move(StrEnum):
    """What can happen to a record; each move appends a row to the record's history."""

    RECEIVE = "receive"
    KEEP = "keep"
    CLAIM = "claim"
    RESCHEDULE = "reschedule"  # another due time, after the early look or a changed policy
    HOLD = "hold"
    RELEASE = "release"
    CONFIRM = "confirm"
    DEFER = "defer"
    LOSE_LEASE = "lose_lease"
    GIVE_UP = "give_up"
    RETRY = "retry"
    REOPEN = "reopen"
    FORGET = "forget"


TABLE: Mapping[tuple[State | None, Move], State] = MappingProxyType(
    {
        (None, Move.RECEIVE): State.SCHEDULED,
        (None, Move.KEEP): State.KEPT,
        (State.SCHEDULED, Move.CLAIM): State.DELETING,
        (State.SCHEDULED, Move.RESCHEDULE): State.SCHEDULED,
        (State.SCHEDULED, Move.HOLD): State.HELD,
        (State.SCHEDULED, Move.KEEP): State.KEPT,
        # Without an attempt: its target did not take the webhook, or sync.so does not know its id.
        (State.SCHEDULED, Move.GIVE_UP): State.FAILED,
        (State.HELD, Move.KEEP): State.KEPT,
        (State.HELD, Move.RELEASE): State.SCHEDULED,
        (State.KEPT, Move.RELEASE): State.SCHEDULED,
        (State.DELETING, Move.CONFIRM): State.DELETED,
        (State.DELETING, Move.DEFER): State.SCHEDULED,
        (State.DELETING, Move.LOSE_LEASE): State.SCHEDULED,
        (State.DELETING, Move.GIVE_UP): State.FAILED,
        (State.FAILED, Move.RETRY): State.SCHEDULED,
        (State.FAILED, Move.HOLD): State.HELD,
        (State.FAILED, Move.KEEP): State.KEPT,
        (State.DELETED, Move.REOPEN): State.SCHEDULED,
        # To forget is to remove the personal data; nobody wants a failed record any more, so it is not deleted.
        (State.DELETED, Move.FORGET): State.DELETED,
        (State.KEPT, Move.FORGET): State.KEPT,
        (State.FAILED, Move.FORGET): State.KEPT,
    }
)

# The moves of an operator that lead to one state each. A record that is there already is not moved.
TARGETS: Mapping[Move, State] = MappingProxyType(
    {
        Move.HOLD: State.HELD,
        Move.RELEASE: State.SCHEDULED,
        Move.KEEP: State.KEPT,
        Move.RETRY: State.SCHEDULED,
        Move.REOPEN: State.SCHEDULED,
    }
)
_IN_PROGRESS = ", and its DELETE may be in progress"
_KEEP_FIRST = "; keep it first, or wait until its generation is deleted"
_REASONS: Mapping[tuple[State | None, Move], str] = MappingProxyType(
    {
        (State.DELETED, Move.REOPEN): ", and the API had shown its generation or confirmed the DELETE",
        (State.SCHEDULED, Move.FORGET): _KEEP_FIRST,
        (State.HELD, Move.FORGET): _KEEP_FIRST,
        (State.DELETING, Move.FORGET): f"{_IN_PROGRESS}; forget it once it is deleted",
    }
)


class IllegalMoveError(ExplainedError):
    """A move that is not in the table; the record is unchanged."""

    def __init__(self, state: State | None, move: Move) -> None:
        why = _REASONS.get((state, move), _IN_PROGRESS if state is State.DELETING else "")
        super().__init__(f"cannot {move}: the record is {state or 'unknown'}{why}")
        self.state = state
        self.move = move


def interrupting_moves(state: State, *, is_copied: bool) -> list[Move]:
    """Return the moves that come before one that stops a record: a worker without a copy yet loses its lease.

    After the copy its DELETE may be in progress, and nothing can stop it.
    """
    return [Move.LOSE_LEASE] if state is State.DELETING and not is_copied else []


def operator_moves(state: State, wanted: Move, *, is_copied: bool, is_unseen: bool) -> list[Move]:
    """Return the operator's move *wanted* after those that it needs first; none for a record that is there already.

    *is_copied*: this attempt has its copy. *is_unseen*: it is deleted because the API did not know it, and no copy
    was ever made; only then the answer may have been about another organisation, and the record can be reopened.

    Raises: IllegalMoveError for a record that must stay deleted.
    """
    if state is TARGETS[wanted]:
        return []
    if wanted is Move.REOPEN and state is State.DELETED and not is_unseen:
        raise IllegalMoveError(state, wanted)
    stops = wanted in (Move.HOLD, Move.KEEP)
    return [*(interrupting_moves(state, is_copied=is_copied) if stops else ()), wanted]


def retry_moves(*, is_held: bool, has_due: bool) -> list[Move]:
    """Return the moves of a failed record that is retried: a webhook that came meanwhile may hold it, or keep it."""
    if is_held:
        return [Move.RETRY, Move.HOLD]
    # A scheduled record without a due time would wait forever.
    return [Move.RETRY] if has_due else [Move.RETRY, Move.KEEP]


def state_after(state: State | None, *moves: Move) -> State:
    """Return the state after *moves* from *state*; None is a record that does not exist yet.

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
