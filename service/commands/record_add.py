"""`mayfly records add`: generations that no webhook of Mayfly's tells of, by their ids."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final

import click

from service.commands.record_filters import LABEL
from service.commands.record_moves import RefusedError, read_ids
from service.commands.running import (
    EXIT_FAILED,
    EXIT_SETTINGS,
    actor,
    as_json,
    of_account,
    open_ledger,
    print_json,
    run,
    settings_or_exit,
)
from service.config.settings import Settings
from service.core.asking import read_asked
from service.core.errors import ExplainedError
from service.core.generation import MalformedError
from service.core.key import Key, choose_account
from service.core.lifecycle import State
from service.core.matchers import Facts
from service.core.overrides import InvalidOverrideError, Overrides
from service.core.retention import Retention, decide_asked_retention
from service.ledger.account_reading import find_others
from service.ledger.adding import add_records, make_arrival
from service.ledger.database import Database
from service.ledger.inserting import Receipt
from service.ledger.views import find_record, present_full
from service.runtime.terminal import format_relative, format_time, plain

_HELP: Final = """Schedule the deletion of generations ID that no webhook tells Mayfly of.

    One that is still processing waits until it has ended. A record that is there is merged: the later due time counts,
    and a hold. An id that sync.so does not know makes its record failed, within some minutes. Without --ttl, --expires
    and --hold the policy decides.

    ID may be given several times; - reads ids from standard input, one a line.
    """


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked for, for each id; *is_guessed*: no account was named, and there are several."""

    asked: Overrides
    account: str
    is_guessed: bool
    is_json: bool


@click.command("add", help=_HELP)
@click.argument("generation_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--ttl", help="How long to keep it from now on: 90s, 15m, 24h, 7d, 2w, forever.")
@click.option("--expires", help="Until when to keep it: 2026-12-31, or an instant with its offset.")
@click.option("--hold", metavar="REASON", help="Hold it, for this reason, until it is released.")
@click.option("--label", "labels", type=LABEL, multiple=True, help="A label, NAME=VALUE; may be repeated.")
@of_account
@as_json
def add(
    generation_ids: tuple[str, ...],
    *,
    ttl: str | None,
    expires: str | None,
    hold: str | None,
    labels: tuple[tuple[str, str], ...],
    account: str | None,
    is_json: bool,
) -> None:
    """Add records; the help is above."""
    settings = settings_or_exit()
    chosen = choose_account(settings.account_ids, account)
    try:
        asked = read_asked(ttl=ttl, expires=expires, hold=hold, labels=dict(labels))
        _decide(settings, asked, chosen, datetime.now(UTC))
    except InvalidOverrideError as error:
        _exit_with(str(error))
    if chosen not in settings.account_ids:
        _exit_with(f"there is no account {chosen[:64]!a}: there is {', '.join(settings.account_ids)}")
    is_guessed = account is None and len(settings.account_ids) > 1
    wanted = _Wanted(asked, chosen, is_guessed, is_json)
    sys.exit(EXIT_FAILED if run(_add_all(settings, read_ids(generation_ids), wanted)) else 0)


def _exit_with(problem: str) -> None:
    click.echo(f"mayfly: {plain(problem)}", err=True)
    sys.exit(EXIT_SETTINGS)


def _decide(settings: Settings, asked: Overrides, account: str, now: datetime) -> Retention:
    return decide_asked_retention(settings.policy, Facts(account=account), asked, by=actor(), now=now)


async def _add_all(settings: Settings, ids: Sequence[str], wanted: _Wanted) -> int:
    """Add each in a transaction of its own, report each on a line, and return how many were not added."""
    failed = 0
    async with open_ledger(settings) as database:
        for one in ids:
            try:
                await _add_one(settings, database, Key(wanted.account, one), wanted)
            except ExplainedError as error:
                failed += 1
                click.echo(f"mayfly: {plain(str(error))}", err=True)
    return failed


async def _add_one(settings: Settings, database: Database, key: Key, wanted: _Wanted) -> None:
    """Add one and say what becomes of it.

    Raises: ExplainedError with the reason why nothing was stored.
    """
    now = datetime.now(UTC)
    retention = _decide(settings, wanted.asked, key.account, now)
    try:
        arrival = make_arrival(key, retention, now=now, actor=actor())
        find = partial(find_record, key=key, now=now, is_dry_run=settings.is_dry_run)
        if wanted.is_guessed and await database.read(find) is None:
            await _refuse_other(database, key)
        (receipt,) = await database.write(partial(add_records, arrivals=[arrival]))
    except (InvalidOverrideError, MalformedError) as error:
        raise RefusedError(f"{key.id}: {error}") from error
    if not wanted.is_json:
        click.echo(_describe(key.id, receipt))
    elif (found := await database.read(find)) is not None:
        print_json(present_full(found))


async def _refuse_other(database: Database, key: Key) -> None:
    if others := await database.read(partial(find_others, key=key)):
        raise RefusedError(f"{key.id}: account {others[0]} has a record of it; add --account {others[0]}")


def _describe(generation_id: str, receipt: Receipt) -> str:
    shown = plain(generation_id)
    done = "is added" if receipt.is_new else "was there already, and is changed" if receipt.is_moved else "is unchanged"
    if receipt.state is State.SCHEDULED and receipt.due_at is not None:
        now = datetime.now(UTC)
        due = f"due {format_relative(now, receipt.due_at)}, at {format_time(receipt.due_at)}"
        return f"{shown} {done}. It is {due}, and not before it has ended."
    return f"{shown} {done}. It is {_STATES.get(receipt.state, receipt.state)}."


_STATES: Final[Mapping[State, str]] = {State.KEPT: "kept, and never deleted", State.DELETED: "deleted already"}
