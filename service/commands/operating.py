"""`mayfly stats`, `pause` and `resume`: how the ledger stands, and stopping the deletions of all workers."""

from datetime import UTC, datetime
from functools import partial

import click
from rich.table import Table

from service.commands.running import actor, as_json, open_ledger, print_json, run, settings_or_exit
from service.config.settings import Settings
from service.core.lifecycle import State
from service.ledger import pausing
from service.ledger.pausing import Kind, Pause
from service.ledger.views import Stats, read_stats
from service.runtime.terminal import console

MEANINGS = {
    State.SCHEDULED: "wait for their due time or the next attempt",
    State.DELETING: "being deleted right now",
    State.DELETED: "gone at sync.so; the record stays",
    State.FAILED: "given up, wait for a person",
    State.HELD: "stopped by a person or a wish",
    State.KEPT: "never to be deleted",
}


@click.command()
@as_json
def stats(*, is_json: bool) -> None:
    """Count the records in each state, and tell how late the deletions are and whether they are paused."""

    async def work(settings: Settings) -> Stats:
        async with open_ledger(settings) as database:
            return await database.read(partial(read_stats, now=datetime.now(UTC)))

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
    click.echo("Deletions run." if not found.pauses else "Deletions are paused:")
    for pause in found.pauses:
        until = f", until {_format_time(pause.until)}" if pause.until else ""
        click.echo(f"  {pause.kind} since {_format_time(pause.since)}{until}, by {pause.actor}: {pause.reason}")


def _format_time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


@click.command()
@click.option("--reason", default="no reason given", help="Why, for those who find the deletions paused.")
def pause(reason: str) -> None:
    """Stop deleting: no worker begins a new deletion until `mayfly resume`, over restarts too.

    Webhooks are still taken and stored. A deletion that is under way ends.
    """

    async def work(settings: Settings) -> bool:
        wanted = Pause(Kind.OPERATOR, datetime.now(UTC), actor(), reason[:500], None)
        async with open_ledger(settings) as database:
            return await database.write(partial(pausing.pause, wanted=wanted))

    is_new = run(work(settings_or_exit()))
    click.echo("Deletions are paused." if is_new else "Deletions were paused already; the first reason stands.")


@click.command()
def resume() -> None:
    """Go on deleting: end every pause, whatever its reason.

    Those that Mayfly began end by themselves, too: for a refused key once a probe finds that it works, for the daily
    limit at midnight UTC. A pause whose reason still holds comes back.
    """

    async def work(settings: Settings) -> list[Kind]:
        async with open_ledger(settings) as database:
            return await database.write(partial(pausing.resume, kinds=list(Kind)))

    ended = run(work(settings_or_exit()))
    click.echo(f"Deletions go on. Ended: {', '.join(ended)}." if ended else "There was no pause to end.")
