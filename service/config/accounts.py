"""The accounts, one per organisation at sync.so: their keys from the environment, the rest from the rules file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from service.config.parsers import read_header_value, read_secrets
from service.config.rules_file import Account as AccountOfFile
from service.core.adopting import Adopt
from service.core.key import DEFAULT_ACCOUNT
from service.core.rate import Rate
from service.core.secret import Secret

T = TypeVar("T")

KEY_NAME: Final = "SYNC_API_KEY"
SECRET_NAME: Final = "SYNC_WEBHOOK_SECRET"  # noqa: S105 - the name of a variable


@dataclass(frozen=True, slots=True)
class Keys:
    """What an account has of sync.so: the API key, None where it is not set, and the webhook secrets."""

    api_key: Secret | None = None
    webhook_secrets: tuple[Secret, ...] = ()


@dataclass(frozen=True, slots=True)
class Account:
    """One organisation at sync.so: its keys and the variables that they come from, and its budget."""

    id: str
    keys: Keys
    rate: Rate
    adopt: Adopt = "ours"
    key_name: str = KEY_NAME
    secret_name: str = SECRET_NAME


def read_keys(
    tables: Sequence[AccountOfFile], default: Keys, environment: Mapping[str, str], problems: list[str]
) -> dict[str, Keys]:
    """Return the keys of each account, of which *default* has SYNC_API_KEY and SYNC_WEBHOOK_SECRET.

    There is an account of *default* as long as *tables* has no other, or one of the two variables is set. Add to
    *problems* what cannot be read.
    """
    keys: dict[str, Keys] = {}
    if default != Keys() or not tables or any(table.id == DEFAULT_ACCOUNT for table in tables):
        keys[DEFAULT_ACCOUNT] = default
    for table in tables:
        of_default = keys.get(table.id, Keys())
        key, secrets = table.api_key_env, table.webhook_secret_env
        try:
            api_key = _read(environment, key, read_header_value) if key else of_default.api_key
            webhook_secrets = _read(environment, secrets, read_secrets) if secrets else of_default.webhook_secrets
        except ValueError as error:
            problems.append(f"account {table.id}: {error}")
        else:
            keys[table.id] = Keys(api_key, webhook_secrets or ())
    return keys


def _read(environment: Mapping[str, str], name: str, read: Callable[[str], T]) -> T | None:
    """Return what *name*, or the file that NAME_FILE names, has; None without both.

    Raises: ValueError, with the name and not the value.
    """
    text, path = environment.get(name, "").strip(), environment.get(f"{name}_FILE", "").strip()
    try:
        if not text and path:
            text = Path(path).read_text(encoding="utf-8").strip()
        return read(text) if text else None
    except OSError as error:
        raise ValueError(f"{name}_FILE cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{name} is invalid: it accepts the whole key or secret as sync.so shows it") from None


def join_accounts(keys: Mapping[str, Keys], tables: Sequence[AccountOfFile], rate: Rate) -> tuple[Account, ...]:
    """Return the accounts that have *keys*; where *tables* says nothing they have *rate*."""
    by_id = {table.id: table for table in tables}
    return tuple(_join(name, mine, by_id.get(name, AccountOfFile(name)), rate) for name, mine in keys.items())


def _join(name: str, keys: Keys, table: AccountOfFile, rate: Rate) -> Account:
    # SYNC_API_KEY and SYNC_WEBHOOK_SECRET are those of the default account alone.
    whose = f"a variable named by {{}} of account {name}"
    is_default = name == DEFAULT_ACCOUNT
    names = (
        table.api_key_env or (KEY_NAME if is_default else whose.format("api_key_env")),
        table.webhook_secret_env or (SECRET_NAME if is_default else whose.format("webhook_secret_env")),
    )
    return Account(name, keys, table.rate or rate, table.adopt, *names)
