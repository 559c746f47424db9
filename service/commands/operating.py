"""`mayfly stats`, `pause` and `resume`: statistics of the ledger, and pausing the deletions of all workers."""

from datetime import UTC, datetime
from functools import partial

import click
from rich.table import Table

from service.commands.running import actor, as_json, open_ledger, print_json, run, settings_or_exit
from service.config.settings import Settings
from service.core.batch import BatchState
from service.core.lifecycle import State
from service.ledger import heartbeats, key_history, pausing
from service.ledger.account_reading import require_account
from service.ledger.database import Database
from service.ledger.pausing import ALL_ACCOUNTS, Kind, Pause
from service.ledger.views import Stats, read_stats
from service.runtime.terminal import cell, console, format_time, plain

MEANINGS = {
    State.SCHEDULED: "wait for their due time or the next attempt",
    State.DELETING: "are being deleted now",
    State.DELETED: "are gone at sync.so; the records stay",
    State.FAILED: "were given up; each needs an operator",
    State.HELD: "are on hold, by an operator or an override",
    State.KEPT: "are never deleted",
}


@click.command()
@as_json
def stats(*, is_json: bool) -> None:
    """Show the records in each state, the age of the most overdue deletion, and the pauses."""

    async def work(settings: Settings) -> Stats:
        async with open_ledger(settings) as database:
            return await database.read(partial(read_stats, accounts=settings.account_ids, now=datetime.now(UTC)))

    found = run(work(settings_or_exit()))
    if is_json:
        print_json(found)
    else:
        _print_stats(found)


def _print_stats(found: Stats) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("state")
    table.add_column("records", justify="right")
    table.add_column("which")
    for state, number in found.records.items():
        table.add_row(state, str(number), MEANINGS[state], style=None if number else "dim")
    console().print(table)
    late = f", the longest for {found.oldest_overdue_seconds:.0f} s" if found.due else ""
    click.echo(f"\nDue now: {found.due}{late}.")
    _print_accounts(found)
    is_running, sentence = heartbeats.describe_worker(found.worker_seen_at, now=datetime.now(UTC))
    click.echo(f"{sentence[0].upper()}{sentence[1:]}.")
    waiting = found.batches[BatchState.WAITING] + found.batches[BatchState.UNRESOLVED]
    if waiting or found.batches[BatchState.FAILED]:
        given_up = f", {found.batches[BatchState.FAILED]} were given up" if found.batches[BatchState.FAILED] else ""
        click.echo(f"Batches: {waiting} are still looked at{given_up}; mayfly batches list shows them.")
    if not found.pauses:
        click.echo("Deletions are running." if is_running else "Deletions are not paused, but need a worker that runs.")
    else:
        click.echo("Deletions are paused:")
    for pause in found.pauses:
        until = f", until {format_time(pause.until)}" if pause.until else ""
        since = f"since {format_time(pause.since)}{until}"
        whose = "" if len(found.accounts) == 1 else f"{plain(pause.account or 'all accounts')}: "
        click.echo(f"  {whose}{pause.kind} {since}, by {plain(pause.actor)}: {plain(pause.reason)}")


def _print_accounts(found: Stats) -> None:
    """Print what waits in each account, if there are several or one is not configured."""
    if len(found.accounts) == 1 and found.accounts[0].configured:
        return
    click.echo()
    table = Table(box=None, pad_edge=False)
    for heading in ("account", "waiting", "due", "longest overdue"):
        table.add_column(heading, justify="left" if heading == "account" else "right")
    for one in found.accounts:
        overdue = f"{one.oldest_overdue_seconds:.0f} s" if one.due else ""
        table.add_row(cell(one.account), str(one.waiting), str(one.due), overdue)
    console().print(table)
    for one in found.accounts:
        if not one.configured and one.waiting:
            click.echo(f"Account {plain(one.account)} is not configured: nothing deletes its {one.waiting} records.")
    click.echo()


@click.command()
@click.option("--reason", default="no reason given", help="Why, for other operators.")
@click.option("--account", metavar="NAME", help="Only the deletions of this account; all unless given.")
def pause(reason: str, account: str | None) -> None:
    """Pause all deletions: no worker starts one until `mayfly resume`, also after restarts.

    Webhooks are still stored. Deletions in progress end first.
    """

    async def work(settings: Settings) -> bool:
        wanted = Pause(Kind.OPERATOR, datetime.now(UTC), actor(), reason[:500], None, account or ALL_ACCOUNTS)
        async with open_ledger(settings) as database:
            await _require_account(database, settings, account)
            return await database.write(partial(pausing.pause, wanted=wanted))

    is_new = run(work(settings_or_exit()))
    which = f"Deletions of account {account}" if account else "Deletions"
    click.echo(f"{which} are paused." if is_new else f"{which} were paused already; the first reason is kept.")


async def _require_account(database: Database, settings: Settings, account: str | None) -> None:
    if account is not None:
        await database.read(partial(require_account, name=account, configured=settings.account_ids))


@click.command()
@click.option("--account", metavar="NAME", help="Only the pauses of this account; all unless given.")
def resume(account: str | None) -> None:
    """Resume deletions: end every pause, whatever its kind.

    Pauses by Mayfly itself also end without it: for a refused key when a probe succeeds, for the daily limit at
    midnight UTC. A pause whose cause persists comes back.
    """

    async def work(settings: Settings) -> tuple[list[Kind], list[Pause]]:
        async with open_ledger(settings) as database:
            await _require_account(database, settings, account)
            ended = await database.write(partial(key_history.resume_all, account=account))
            left = await database.read(partial(pausing.find_pauses, account=account)) if account else []
            return ended, left

    ended, left = run(work(settings_or_exit()))
    which = f"Deletions of account {account}" if account else "Deletions"
    resumed = f"{which} are resumed. Ended: {', '.join(ended)}."
    if left:
        resumed = f"Ended: {', '.join(ended) or 'nothing'}. All accounts are still paused: mayfly resume ends that."
    click.echo(resumed if ended or left else "There was no pause to end.")
