"""`mayfly records forget`: removes what is personal from records that nobody needs any more."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

import click

from service.commands import record_moves
from service.commands.record_moves import IDS_HELP, RefusedError, read_ids, refuse_missing
from service.commands.running import EXIT_FAILED, actor, fail, of_account, open_ledger, run, settings_or_exit
from service.config.settings import Settings
from service.core.errors import ExplainedError
from service.core.key import Key, choose_account
from service.core.lifecycle import IllegalMoveError
from service.ledger import forgetting
from service.ledger.database import Database
from service.runtime.terminal import plain

_HELP = """Remove what is personal from the records of generations ID that are deleted, kept or failed.

Inputs, URLs, both bodies, file names, errors and reasons are gone for good; id, state, outcome, times and history stay.
A failed record becomes kept: it needs no operator any more, and its generation is not deleted. MAYFLY_RECORD_TTL does
this by itself for deleted ones.
"""


@click.command(help=_HELP + IDS_HELP)
@click.argument("generation_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--reason", help="Why; it is stored in the record's history.")
@of_account
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget(generation_ids: tuple[str, ...], *, reason: str | None, account: str | None, yes: bool) -> None:
    """Forget records; the help is above."""
    settings = settings_or_exit()
    ids = read_ids(generation_ids)
    if not yes:
        _ask(len(ids))
    sys.exit(EXIT_FAILED if run(_forget_all(settings, _keys(settings, ids, account), reason)) else 0)


def _ask(number: int) -> None:
    """Return if the operator says yes, else exit with code 1."""
    if not record_moves.is_terminal():
        fail("nothing was forgotten: what is personal would be removed for good; add --yes")
    what = "this record" if number == 1 else f"these {number} records"
    if not click.confirm(f"Remove what is personal from {what} for good?"):
        fail("nothing was forgotten")


def _keys(settings: Settings, ids: Sequence[str], account: str | None) -> list[Key]:
    return [Key(choose_account(settings.account_ids, account), one) for one in ids]


async def _forget_all(settings: Settings, keys: Sequence[Key], reason: str | None) -> int:
    """Forget each record in a transaction of its own, report each on a line, and return how many were not forgotten."""
    failed = 0
    async with open_ledger(settings) as database:
        for key in keys:
            try:
                await _forget_one(database, key, reason)
                click.echo(f"{plain(key.id)} is forgotten.")
            except ExplainedError as error:
                failed += 1
                click.echo(f"mayfly: {plain(str(error))}", err=True)
    return failed


async def _forget_one(database: Database, key: Key, reason: str | None) -> None:
    write = partial(forgetting.forget_record, key=key, now=datetime.now(UTC), actor=actor(), reason=reason)
    try:
        is_there = key.id.isprintable() and await database.write(write)
    except IllegalMoveError as error:
        raise RefusedError(f"{key.id}: {error}") from error
    if not is_there:
        raise await refuse_missing(database, key)
