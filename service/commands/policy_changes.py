"""`mayfly policy diff` and `apply`: what a policy does to records that exist, shown before it is done."""

import asyncio
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final

import click

from service.commands import record_moves
from service.commands.policy_preview import Preview, make_preview, print_preview, read_all
from service.commands.running import (
    EXIT_SETTINGS,
    actor,
    as_json,
    fail,
    open_ledger,
    print_json,
    run,
    settings_or_exit,
)
from service.config.settings import Settings
from service.core.reapplying import Change, reapply_policy
from service.ledger import reapplying
from service.ledger.database import Database
from service.ledger.reapplying import Seen

# Records in one transaction, which no webhook of SQLite can enter meanwhile; between two there is a pause.
_AT_ONCE: Final = 200
_PAUSE_SECONDS: Final = 0.02

_limit = click.option(
    "--limit",
    type=click.IntRange(0, 10_000),
    default=20,
    show_default=True,
    help="How many of the records to list, those that are due first.",
)


def settings_of_file(file: str | None) -> Settings:
    """Read the settings with the policy of *file*, by default the one that MAYFLY_CONFIG names.

    Exit with code 2 if there is none, or if the service would not start with it.
    """
    settings = settings_or_exit(environment={**os.environ, "MAYFLY_CONFIG": file} if file else os.environ)
    if settings.config_path is None:
        click.echo("mayfly: there is no file to check: name one, or set MAYFLY_CONFIG", err=True)
        raise SystemExit(EXIT_SETTINGS)
    return settings


@click.command()
@click.argument("file", required=False, type=click.Path())
@_limit
@as_json
def diff(*, file: str | None, limit: int, is_json: bool) -> None:
    """Show what FILE, by default the one that MAYFLY_CONFIG names, would do to the records that exist.

    Only records count that wait or are kept because a policy said so: overrides, holds and what an operator decided
    stay. Set MAYFLY_TTL and MAYFLY_MIN_TTL as for the service. Nothing is changed.
    """
    settings = settings_of_file(file)
    shown = run(_preview(settings, limit))
    if is_json:
        print_json(shown)
    else:
        print_preview(shown)


@click.command()
@click.argument("file", required=False, type=click.Path())
@click.option("--existing", is_flag=True, help="Change the records that exist.")
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_limit
def apply(*, file: str | None, existing: bool, dry_run: bool, yes: bool, limit: int) -> None:
    """Apply FILE, by default the one that MAYFLY_CONFIG names, to the records that exist, after the preview of diff.

    Nothing becomes due before the minimum ttl has passed from then on. A record that changes meanwhile stays as it is.
    If it is interrupted, what is done stays, and the same command does the rest.
    """
    settings = settings_of_file(file)
    if not existing:
        click.echo(
            "mayfly: a restart of the service applies a policy to new generations, and records that exist never move "
            "by themselves; add --existing to change those, after a preview",
            err=True,
        )
        raise SystemExit(EXIT_SETTINGS)
    shown = run(_preview(settings, limit))
    print_preview(shown)
    if not shown.changed or dry_run:
        click.echo("Nothing was changed.")
        return
    click.echo("\nA running service knows only the file that it read at its start. Restart it first, or new webhooks")
    click.echo("still get the old rules. Its workers find what is due earlier by themselves.")
    if not yes:
        _ask(shown)
    changed = run(_apply(settings, shown))
    click.echo(f"{changed} of {shown.changed} records were changed.")
    if changed < shown.changed:
        click.echo("The others are not as they were in the preview, or another has locked them. Run it again to check.")


def _ask(shown: Preview) -> None:
    """Return if the operator says yes, else exit with code 1."""
    if not record_moves.is_terminal():
        fail("nothing was changed: look at the preview, then add --yes")
    if not click.confirm(f"Change {shown.changed} records?"):
        fail("nothing was changed")


async def _preview(settings: Settings, limit: int) -> Preview:
    async with open_ledger(settings) as database:
        return await make_preview(database, settings, now=datetime.now(UTC), limit=limit)


async def _apply(settings: Settings, shown: Preview) -> int:
    """Change what the policy changes, of the records that the preview has seen, and return how many."""
    number = 0
    async with open_ledger(settings) as database:
        async for batch in read_all(database, settings.policy, until=shown.at):
            now = datetime.now(UTC)
            found = [one for one in batch if _is_changed(settings, one, now)]
            for start in range(0, len(found), _AT_ONCE):
                number += await _write(database, settings, found[start : start + _AT_ONCE])
                await asyncio.sleep(_PAUSE_SECONDS)
    return number


def _is_changed(settings: Settings, seen: Seen, now: datetime) -> bool:
    return isinstance(reapply_policy(settings.policy, seen.existing, now=now), Change)


async def _write(database: Database, settings: Settings, seen: Sequence[Seen]) -> int:
    now = datetime.now(UTC)
    write = partial(reapplying.apply_policy, policy=settings.policy, seen=seen, now=now, user=actor())
    return await database.write(write)
