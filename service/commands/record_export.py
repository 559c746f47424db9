"""`mayfly records export`: all records that match, on standard output."""

import asyncio
import os
import sys

import click

from service.commands.record_filters import filtered
from service.commands.running import EXIT_FAILED, open_ledger, run, settings_or_exit
from service.config.settings import Settings
from service.ledger.exporting import Format, export_lines
from service.ledger.reading import Filter
from service.runtime.terminal import plain_json


@click.command()
@filtered
@click.option(
    "--format",
    "form",
    type=click.Choice(list(Format), case_sensitive=False),
    default=Format.JSONL,
    show_default=True,
    help="JSON Lines, or CSV with a line of names.",
)
def export(*, wanted: Filter, form: Format) -> None:
    """Print all records that match, newest first, one a line.

    The output has URLs with tokens that open the media. In CSV a text that a spreadsheet would run as a formula begins
    with an apostrophe.
    """

    async def work(settings: Settings) -> None:
        async with open_ledger(settings) as database:
            async for lines in export_lines(database, wanted, form):
                await asyncio.to_thread(_print, lines.decode())

    run(work(settings_or_exit()))


def _print(lines: str) -> None:
    """Print *lines* with control characters escaped as in JSON; exit once nobody reads them, as after `| head`."""
    try:
        click.echo(plain_json(lines), nl=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        sys.exit(EXIT_FAILED)
