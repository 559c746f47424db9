"""The key of a record."""

from collections.abc import Sequence
from typing import Final

import msgspec

# The account of a service without [[account]] in its configuration.
DEFAULT_ACCOUNT: Final = "default"


class Key(msgspec.Struct, frozen=True, gc=False):
    """The key of a record: the account that received the webhook, and the generation's id, an opaque string."""

    account: str
    id: str


def choose_account(accounts: Sequence[str], name: str | None) -> str:
    """Return *name*, or without one the only one of *accounts*, the configured ones, else the default account."""
    return name or (accounts[0] if len(accounts) == 1 else DEFAULT_ACCOUNT)


def describe_missing(key: Key, others: Sequence[str]) -> str:
    """Say that there is no record of *key*, and which *others* of the accounts have one of its id."""
    if not others:
        return f"there is no record of generation {key.id}"
    has = f"account {others[0]} has one" if len(others) == 1 else f"accounts {', '.join(others)} have one each"
    return f"there is no record of generation {key.id} in account {key.account}, but {has}"


def describe_unsaid(generation_id: str, accounts: Sequence[str]) -> str:
    """Say that a generation without a record can be held only in an account that is named, one of *accounts*."""
    return (
        f"generation {generation_id} has no record yet, and its webhook may come to any of the accounts "
        f"{', '.join(accounts)}; held in another one it would be deleted nevertheless"
    )
