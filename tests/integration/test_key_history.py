"""Several unknown generations pause deletions while their key never showed one."""

from functools import partial

import pytest

from service.ledger import key_history, pausing
from service.ledger.key_history import MAX_UNKNOWN, KeyOfAccount
from service.ledger.pausing import Kind
from tests.support.ledger import ACCOUNT, ACTOR, utc_now

WRONG = [Kind.WRONG_ORGANISATION]


async def believed(database, key_id="one", *, is_shown=False, unknown=0):
    write = partial(
        key_history.note_answers,
        key=KeyOfAccount(ACCOUNT, key_id),
        is_shown=is_shown,
        unknown=unknown,
        now=utc_now(),
        actor=ACTOR,
    )
    return await database.write(write)


async def note(database, key_id="one", **answers):
    await believed(database, key_id, **answers)
    return [pause.kind for pause in await database.read(pausing.find_pauses)]


async def test_the_fifth_unknown_generation_in_a_row_pauses(database):
    found = [await note(database, unknown=1) for _ in range(MAX_UNKNOWN)]

    assert found == [[]] * (MAX_UNKNOWN - 1) + [WRONG]
    assert await database.read(partial(pausing.peek_allowance, account=ACCOUNT, now=utc_now())) == 0


async def test_many_unknown_generations_in_one_commit_pause(database):
    assert await note(database, unknown=MAX_UNKNOWN + 40) == WRONG


async def test_no_more_than_five_unknown_generations_are_believed(database):
    assert [await believed(database, unknown=number) for number in (3, 4, 1)] == [3, 2, 0]
    assert await believed(database, is_shown=True, unknown=4) == 4
    assert await believed(database, unknown=7) == 7


async def test_a_key_that_showed_a_generation_may_know_none_of_the_others(database):
    await note(database, is_shown=True)

    assert await note(database, unknown=100) == []


async def test_a_generation_that_is_shown_ends_the_pause_for_good(database):
    await note(database, unknown=MAX_UNKNOWN)

    assert await note(database, is_shown=True, unknown=3) == []
    assert await note(database, unknown=100) == []


async def test_another_key_is_judged_by_itself(database):
    await note(database, is_shown=True)

    assert await note(database, "another", unknown=MAX_UNKNOWN) == WRONG


async def test_an_operators_resume_ends_the_pause_for_good(database):
    await note(database, unknown=MAX_UNKNOWN)

    assert await database.write(key_history.resume_all) == WRONG
    assert await note(database, unknown=100) == []


async def test_a_resume_of_another_pause_trusts_no_key(database):
    await database.write(key_history.resume_all)

    assert await note(database, unknown=MAX_UNKNOWN) == WRONG


@pytest.mark.parametrize(("key_id", "left"), [("one", WRONG), ("another", [])])
async def test_a_start_ends_the_pause_of_another_key_only(database, key_id, left):
    await note(database, unknown=MAX_UNKNOWN)
    await database.write(partial(key_history.resume_for_key, key=KeyOfAccount(ACCOUNT, key_id)))

    assert [pause.kind for pause in await database.read(pausing.find_pauses)] == left
