"""Whether a key ever showed a generation: to a key of another organisation every generation is unknown."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.ledger import pausing
from service.ledger.pausing import Kind, Pause
from service.ledger.schema import keys

# So many generations that a key does not know, before it ever showed one, pause deletions.
MAX_UNKNOWN: Final = 5
_REASON: Final = f"the API knows none of {MAX_UNKNOWN} generations in a row, and never showed this key one"


@dataclass(frozen=True, slots=True)
class KeyOfAccount:
    """Which API key, by its Secret.identify(), an account uses."""

    account: str
    key_id: str


def note_answers(
    connection: Connection, key: KeyOfAccount, *, is_shown: bool, unknown: int, now: datetime, actor: str
) -> int:
    """Note that the API showed a generation to *key*, or did not know *unknown* of them.

    Return how many of the unknown are believed to be gone: all to a key that has shown one, else MAX_UNKNOWN in all.
    Locks come in the order keys, pauses, as in resume_all().
    """
    mine = _is_key(key)
    if (not is_shown and not unknown) or connection.scalar(select(keys.c.is_trusted).where(*mine)):
        return unknown
    _insert_key(connection, key)
    if is_shown:
        connection.execute(update(keys).where(*mine).values(is_trusted=True))
        pausing.resume(connection, [Kind.WRONG_ORGANISATION], key.account)
        return unknown
    counted = update(keys).where(*mine).values(unknown=keys.c.unknown + unknown).returning(keys.c.unknown)
    total: int = connection.scalars(counted).one()
    if total >= MAX_UNKNOWN:
        pausing.pause(connection, Pause(Kind.WRONG_ORGANISATION, now, actor, _REASON, None, key.account))
    return max(0, min(unknown, MAX_UNKNOWN - (total - unknown)))


def _is_key(key: KeyOfAccount) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return keys.c.account == key.account, keys.c.key_id == key.key_id


def _insert_key(connection: Connection, key: KeyOfAccount) -> None:
    if connection.scalar(select(keys.c.unknown).where(*_is_key(key))) is not None:
        return
    try:
        with connection.begin_nested():
            connection.execute(insert(keys).values(account=key.account, key_id=key.key_id, is_trusted=False, unknown=0))
    except IntegrityError:  # another worker inserted it meanwhile
        return


def resume_for_key(connection: Connection, key: KeyOfAccount) -> None:
    """End the pause of another key of the account: a worker starts with *key*, which has not caused it."""
    unknown = connection.scalar(select(keys.c.unknown).where(*_is_key(key))) or 0
    if unknown < MAX_UNKNOWN:
        pausing.resume(connection, [Kind.WRONG_ORGANISATION], key.account)


def resume_all(connection: Connection, account: str | None = None) -> list[Kind]:
    """End every pause, or those of *account* alone, as an operator asks, and return those that were in force.

    An operator who ends the pause for a wrong organisation has looked: the keys so far do not cause another one.
    """
    for one in pausing.find_pauses(connection):
        if one.kind is Kind.WRONG_ORGANISATION and account in (None, one.account):
            connection.execute(update(keys).where(keys.c.account == one.account).values(is_trusted=True))
    return pausing.resume(connection, list(Kind), account)
