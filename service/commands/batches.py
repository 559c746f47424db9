"""`mayfly batches`: finished batches, read directly from the ledger; no running service is needed."""

from datetime import UTC, datetime
from functools import partial

import click
import msgspec
from rich.table import Table

from service.commands.running import as_json, fail, open_ledger, print_json, run, settings_or_exit
from service.config.settings import Settings
from service.core.batch import BatchState
from service.core.key import DEFAULT_ACCOUNT, Key
from service.ledger.batch_views import BatchPage, BatchShown, FullBatch, list_batches, retry_and_show, show_batch
from service.runtime.terminal import cell, console, format_relative, format_time, plain

_account = click.option("--account", default=DEFAULT_ACCOUNT, show_default=True, help="Whose batch.")


@click.group()
def batches() -> None:
    """Show finished batches and how many of their generations have a record, or look at one again."""


@batches.command("list")
@click.option("--state", type=click.Choice([state.value for state in BatchState]), help="Only those in this state.")
@click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="How many.")
@as_json
def list_(*, state: str | None, limit: int, is_json: bool) -> None:
    """List finished batches, newest first."""

    async def work(settings: Settings) -> BatchPage:
        wanted = None if state is None else BatchState(state)
        async with open_ledger(settings) as database:
            return await database.read(partial(list_batches, state=wanted, limit=limit))

    page = run(work(settings_or_exit()))
    if is_json:
        print_json(page)
    elif page.items:
        _print_page(page)
    else:
        click.echo("No batches.")


@batches.command()
@click.argument("batch_id", metavar="ID")
@_account
@as_json
def show(batch_id: str, *, account: str, is_json: bool) -> None:
    """Show the finished batch ID; --json has its notification as it came, with a URL that opens its results."""

    async def work(settings: Settings) -> FullBatch | None:
        async with open_ledger(settings) as database:
            return await database.read(partial(show_batch, key=Key(account, batch_id)))

    batch = run(work(settings_or_exit())) if batch_id.isprintable() else None
    _print_batch(batch, batch_id, is_json=is_json)


@batches.command()
@click.argument("batch_id", metavar="ID")
@_account
@as_json
def retry(batch_id: str, *, account: str, is_json: bool) -> None:
    """Look at the finished batch ID again now, whatever its state; no record is changed."""

    async def work(settings: Settings) -> FullBatch | None:
        change = partial(retry_and_show, key=Key(account, batch_id), now=datetime.now(UTC))
        async with open_ledger(settings) as database:
            return await database.write(change)

    batch = run(work(settings_or_exit())) if batch_id.isprintable() else None
    _print_batch(batch, batch_id, is_json=is_json)
    if not is_json:
        click.echo("\nA worker that runs looks at it within seconds.")


def _print_page(page: BatchPage) -> None:
    now = datetime.now(UTC)
    table = Table(box=None, pad_edge=False)
    for heading in ("id", "state", "generations", "what comes next"):
        table.add_column(heading, overflow="fold")
    for batch in page.items:
        table.add_row(cell(batch.id), batch.state, _count(batch), cell(_describe_next(batch, now)))
    console().print(table)


def _count(batch: BatchShown) -> str:
    """Say how many generations of the batch have a record: ``38 of 40``."""
    expected = "?" if batch.expected is None else batch.expected
    return f"{batch.scheduled + batch.known} of {expected}"


def _describe_next(batch: BatchShown, now: datetime) -> str:
    error = f": {batch.last_error}" if batch.last_error else ""
    match batch.state:
        case BatchState.RESOLVED:
            return "nothing" + (f"; {batch.errors} have no generation" if batch.errors else "")
        case BatchState.FAILED:
            return f"needs an operator{error}"
        case _ if batch.next_look_at is not None and batch.next_look_at > now:
            return f"a look {format_relative(now, batch.next_look_at)}{error}"
        case _:
            return f"a look now{error}"


def _print_batch(batch: FullBatch | None, batch_id: str, *, is_json: bool) -> None:
    if batch is None:
        fail(f"there is no finished batch {plain(batch_id)}")
    if is_json:
        print_json(batch)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for field in msgspec.structs.fields(BatchShown):
        value = getattr(batch, field.name)
        if value is not None:
            shown = format_time(value) if isinstance(value, datetime) else str(value)
            table.add_row(field.encode_name, cell(shown))
    console().print(table)
