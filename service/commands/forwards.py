"""`mayfly forwards`: deliveries of webhooks to targets, read directly from the ledger; no running service is needed."""

from datetime import UTC, datetime
from functools import partial
from typing import Final

import click
import msgspec
from rich.table import Table
from rich.text import Text

from service.commands.forward_filters import delivery_filters
from service.commands.forward_replays import replay
from service.commands.running import as_json, fail, open_ledger, print_json, run, settings_or_exit
from service.config.settings import Settings
from service.core.forwarding import DeliveryState
from service.ledger.delivery_reading import DeliveryFilter
from service.ledger.delivery_views import DeliveriesPage, Delivery, FullDelivery, list_deliveries, show_delivery
from service.ledger.reading import MAX_PAGE
from service.runtime.terminal import cell, console, format_relative, format_time, plain

_STYLES: Final = {
    DeliveryState.WAITING: "yellow",
    DeliveryState.DELIVERED: "green",
    DeliveryState.FAILED: "bold red",
}
_WIDE: Final = 140


@click.group()
def forwards() -> None:
    """Show the deliveries of webhooks to targets, and send them again."""


@forwards.command("list")
@delivery_filters
@click.option("--limit", type=click.IntRange(1, MAX_PAGE), default=50, show_default=True, help="How many.")
@click.option("--cursor", help="The page after this cursor, which the previous page printed.")
@as_json
def list_(*, wanted: DeliveryFilter, limit: int, cursor: str | None, is_json: bool) -> None:
    """List deliveries, newest first."""

    async def work(settings: Settings) -> DeliveriesPage:
        async with open_ledger(settings) as database:
            items: list[Delivery] = []
            after = cursor
            while True:  # a page of a search may be short
                read = partial(list_deliveries, wanted=wanted, limit=limit - len(items), cursor=after)
                page = await database.read(read)
                items += page.items
                after = page.next_cursor
                if after is None or len(items) == limit:
                    return DeliveriesPage(items, after)

    page = run(work(settings_or_exit()))
    if is_json:
        print_json(page)
    elif page.items:
        _print_page(page)
    else:
        click.echo("No deliveries.")


@forwards.command()
@click.argument("delivery_id", metavar="ID")
@as_json
def show(delivery_id: str, *, is_json: bool) -> None:
    """Show the delivery ID, its Mayfly-Delivery, with what its target gets and how the target's last answer began.

    The output has URLs with tokens that open the media.
    """

    async def work(settings: Settings) -> FullDelivery | None:
        async with open_ledger(settings) as database:
            return await database.read(partial(show_delivery, delivery_id=delivery_id))

    delivery = run(work(settings_or_exit())) if delivery_id.isprintable() else None
    if delivery is None:
        fail(f"there is no delivery {delivery_id}")
    if is_json:
        print_json(delivery)
    else:
        _print_delivery(delivery)


forwards.add_command(replay)


def _print_page(page: DeliveriesPage) -> None:
    output, now = console(), datetime.now(UTC)
    # Two ids of 36 characters: a narrow terminal shows fewer columns rather than broken lines.
    narrow = ("id", "target", "state", "what comes next")
    wide = ("id", "target", "generation", "status", "state", "attempts", "what comes next")
    headings = wide if output.width >= _WIDE else narrow
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True, overflow="ellipsis", min_width=36 if heading == "id" else None)
    for one in page.items:
        cells: dict[str, str | Text] = {
            "id": cell(one.id),
            "target": cell(one.target),
            "generation": cell(one.generation),
            "status": cell(one.status),
            "state": f"[{_STYLES[one.state]}]{one.state}[/]",
            "attempts": str(one.attempts),
            "what comes next": cell(describe_next(one, now)),
        }
        table.add_row(*(cells[heading] for heading in headings))
    output.print(table)
    if page.next_cursor:
        click.echo(f"\nMore: --cursor {page.next_cursor}")


def describe_next(one: Delivery, now: datetime) -> str:
    """Describe in a few words what happens next to the delivery, or what happened."""
    error = f": {one.last_error}" if one.last_error else ""
    if one.state is DeliveryState.DELIVERED:
        return f"nothing; delivered {format_relative(now, one.finished_at)}" if one.finished_at else "nothing"
    if one.state is DeliveryState.FAILED:
        return f"needs an operator{error}"
    if one.leased_until is not None and one.leased_until > now:
        return "an attempt is made now"
    if one.behind is not None:
        return f"waits for {one.behind}, an earlier one of this generation"
    number = f"attempt {one.attempts + 1}"
    if one.next_attempt_at is not None and one.next_attempt_at > now:
        return f"{number} {format_relative(now, one.next_attempt_at)}{error}"
    return f"{number} now{error}"


def _print_delivery(delivery: FullDelivery) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for field in msgspec.structs.fields(FullDelivery):
        value = getattr(delivery, field.name)
        if value is not None and field.name != "body":
            shown = format_time(value) if isinstance(value, datetime) else str(value)
            table.add_row(field.encode_name, cell(shown))
    table.add_row("next", cell(describe_next(delivery, datetime.now(UTC))))
    console().print(table)
    click.echo(f"\n{plain(delivery.body)}")
