"""The table of moves: which are legal, and where they lead."""

from itertools import product

import pytest

from service.core.lifecycle import (
    TABLE,
    TARGETS,
    IllegalMoveError,
    Move,
    State,
    interrupting_moves,
    operator_moves,
    state_after,
)

LEGAL = [
    (None, Move.RECEIVE, State.SCHEDULED),
    (None, Move.KEEP, State.KEPT),
    (State.SCHEDULED, Move.CLAIM, State.DELETING),
    (State.SCHEDULED, Move.RESCHEDULE, State.SCHEDULED),
    (State.SCHEDULED, Move.HOLD, State.HELD),
    (State.SCHEDULED, Move.KEEP, State.KEPT),
    (State.SCHEDULED, Move.GIVE_UP, State.FAILED),
    (State.HELD, Move.RELEASE, State.SCHEDULED),
    (State.HELD, Move.KEEP, State.KEPT),
    (State.KEPT, Move.RELEASE, State.SCHEDULED),
    (State.DELETING, Move.CONFIRM, State.DELETED),
    (State.DELETING, Move.DEFER, State.SCHEDULED),
    (State.DELETING, Move.LOSE_LEASE, State.SCHEDULED),
    (State.DELETING, Move.GIVE_UP, State.FAILED),
    (State.FAILED, Move.RETRY, State.SCHEDULED),
    (State.FAILED, Move.HOLD, State.HELD),
    (State.FAILED, Move.KEEP, State.KEPT),
    (State.DELETED, Move.REOPEN, State.SCHEDULED),
    (State.DELETED, Move.FORGET, State.DELETED),
    (State.KEPT, Move.FORGET, State.KEPT),
    (State.FAILED, Move.FORGET, State.KEPT),
]
OPERATORS = (Move.HOLD, Move.RELEASE, Move.KEEP, Move.RETRY, Move.REOPEN)
ILLEGAL = [pair for pair in product((None, *State), Move) if pair not in [(before, move) for before, move, _ in LEGAL]]


@pytest.mark.parametrize(("before", "move", "then"), LEGAL)
def test_a_legal_move_leads_where_the_design_says(before, move, then):
    assert state_after(before, move) is then


@pytest.mark.parametrize(("before", "move"), ILLEGAL)
def test_any_other_move_is_illegal_and_is_named_in_the_error(before, move):
    with pytest.raises(IllegalMoveError) as refusal:
        state_after(before, move)

    assert (refusal.value.state, refusal.value.move) == (before, move)
    assert str(refusal.value).startswith(f"cannot {move}: the record is {before or 'unknown'}")
    assert ("may be in progress" in str(refusal.value)) == (before is State.DELETING)


def test_the_table_has_the_legal_moves_and_no_other():
    assert len(TABLE) == len(LEGAL)
    assert len(LEGAL) + len(ILLEGAL) == (len(State) + 1) * len(Move)


def test_only_reopen_leads_out_of_deleted():
    leading_out = [move for (before, move), then in TABLE.items() if before is State.DELETED and then is not before]

    assert leading_out == [Move.REOPEN]


@pytest.mark.parametrize("state", [State.SCHEDULED, State.HELD, State.DELETING])
def test_what_will_be_deleted_is_not_forgotten_and_the_error_says_what_to_do(state):
    with pytest.raises(IllegalMoveError, match=r"keep it first|forget it once it is deleted") as refusal:
        state_after(state, Move.FORGET)

    assert str(refusal.value).startswith(f"cannot forget: the record is {state}")


def test_the_moves_of_an_operator_lead_to_the_state_that_they_name():
    assert tuple(TARGETS) == OPERATORS
    assert all(then is TARGETS[move] for (_, move), then in TABLE.items() if move in TARGETS)


@pytest.mark.parametrize("wanted", OPERATORS)
def test_a_move_to_the_state_that_a_record_is_in_already_is_no_move(wanted):
    assert operator_moves(TARGETS[wanted], wanted, is_copied=True, is_unseen=False) == []


def test_only_a_record_deleted_unseen_can_be_reopened():
    assert operator_moves(State.DELETED, Move.REOPEN, is_copied=False, is_unseen=True) == [Move.REOPEN]
    with pytest.raises(IllegalMoveError, match="cannot reopen: the record is deleted, and the API had shown"):
        operator_moves(State.DELETED, Move.REOPEN, is_copied=False, is_unseen=False)


@pytest.mark.parametrize("wanted", [Move.HOLD, Move.KEEP])
def test_a_hold_and_a_keep_first_end_the_lease_of_a_worker_without_a_copy(wanted):
    assert operator_moves(State.DELETING, wanted, is_copied=False, is_unseen=False) == [Move.LOSE_LEASE, wanted]
    assert operator_moves(State.DELETING, wanted, is_copied=True, is_unseen=False) == [wanted]


def test_a_record_becomes_deleted_from_deleting_alone():
    leading_there = [pair for pair, then in TABLE.items() if then is State.DELETED and pair[0] is not then]

    assert leading_there == [(State.DELETING, Move.CONFIRM)]


def test_several_moves_lead_where_each_leads_in_turn():
    assert state_after(State.DELETING, Move.LOSE_LEASE, Move.HOLD) is State.HELD
    assert state_after(State.HELD) is State.HELD
    with pytest.raises(IllegalMoveError, match="cannot claim: the record is held"):
        state_after(State.SCHEDULED, Move.HOLD, Move.CLAIM)
    with pytest.raises(ValueError, match="no record"):
        state_after(None)


@pytest.mark.parametrize("is_copied", [True, False])
@pytest.mark.parametrize("state", State)
def test_only_a_worker_without_a_copy_is_interrupted(state, is_copied):
    wanted = [Move.LOSE_LEASE] if state is State.DELETING and not is_copied else []

    assert interrupting_moves(state, is_copied=is_copied) == wanted
