"""Whether a key ever showed a generation: to a key of another organisation every generation is unknown."""

from datetime import datetime
from typing import Final

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.ledger import pausing
from service.ledger.pausing import ACCOUNT, Kind, Pause
from service.ledger.schema import keys

# So many generations that a key does not know, before it ever showed one, pause deletions.
MAX_UNKNOWN: Final = 5
_REASON: Final = f"the API knows none of {MAX_UNKNOWN} generations in a row, and never showed this key one"


def note_answers(
    connection: Connection, key_id: str, *, is_shown: bool, unknown: int, now: datetime, actor: str
) -> int:
    """Note that the API showed a generation to the key of *key_id*, or did not know *unknown* of them.

    Return how many of the unknown are believed to be gone: all to a key that has shown one, else MAX_UNKNOWN in all.
    Locks come in the order keys, pauses, as in resume_all().
    """
    mine = (keys.c.account == ACCOUNT, keys.c.key_id == key_id)
    if (not is_shown and not unknown) or connection.scalar(select(keys.c.is_trusted).where(*mine)):
        return unknown
    _insert_key(connection, key_id)
    if is_shown:
        connection.execute(update(keys).where(*mine).values(is_trusted=True))
        pausing.resume(connection, [Kind.WRONG_ORGANISATION])
        return unknown
    counted = update(keys).where(*mine).values(unknown=keys.c.unknown + unknown).returning(keys.c.unknown)
    total: int = connection.scalars(counted).one()
    if total >= MAX_UNKNOWN:
        pausing.pause(connection, Pause(Kind.WRONG_ORGANISATION, now, actor, _REASON, None))
    return max(0, min(unknown, MAX_UNKNOWN - (total - unknown)))


def _insert_key(connection: Connection, key_id: str) -> None:
    if connection.scalar(select(keys.c.unknown).where(keys.c.account == ACCOUNT, keys.c.key_id == key_id)) is not None:
        return
    try:
        with connection.begin_nested():
            connection.execute(insert(keys).values(account=ACCOUNT, key_id=key_id, is_trusted=False, unknown=0))
    except IntegrityError:  # another worker inserted it meanwhile
        return


def resume_for_key(connection: Connection, key_id: str) -> None:
    """End the pause of another key: a worker starts with the key of *key_id*, which has not caused it."""
    unknown = connection.scalar(select(keys.c.unknown).where(keys.c.account == ACCOUNT, keys.c.key_id == key_id)) or 0
    if unknown < MAX_UNKNOWN:
        pausing.resume(connection, [Kind.WRONG_ORGANISATION])


def resume_all(connection: Connection) -> list[Kind]:
    """End every pause, as an operator asks, and return those that were in force.

    An operator who ends the pause for a wrong organisation has looked: the keys so far do not cause another one.
    """
    if any(one.kind is Kind.WRONG_ORGANISATION for one in pausing.find_pauses(connection)):
        connection.execute(update(keys).where(keys.c.account == ACCOUNT).values(is_trusted=True))
    return pausing.resume(connection, list(Kind))
