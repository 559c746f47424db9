"""`mayfly records`: the records of the ledger, read directly; no running service is needed."""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

import click
import msgspec
from rich.table import Table

from service.commands.record_add import add
from service.commands.record_export import export
from service.commands.record_filters import filtered
from service.commands.record_forget import forget
from service.commands.record_moves import move_commands
from service.commands.running import as_json, fail, of_account, open_ledger, print_json, run, settings_or_exit
from service.config.settings import Settings
from service.core.attempts import Outcome
from service.core.key import Key, choose_account, describe_missing
from service.core.lifecycle import State
from service.ledger import reading
from service.ledger.account_reading import find_others, require_account
from service.ledger.explanations import Explanation, explain_key
from service.ledger.reading import MAX_PAGE, MAX_PAGE_BYTES, Filter
from service.ledger.views import Found, FullRecord, Record, RecordPage, find_record, present_full, present_page
from service.runtime.terminal import STATE_STYLES, cell, console, format_relative, format_time, plain

_WIDE = 100


@click.group()
def records() -> None:
    """Show records of generations, add some, and hold, release, keep, retry, reopen or forget them."""


@records.command("list")
@filtered
@click.option("--limit", type=click.IntRange(1, MAX_PAGE), default=50, show_default=True, help="How many.")
@click.option("--cursor", help="The page after this cursor, which the previous page printed.")
@as_json
def list_records(*, wanted: Filter, limit: int, cursor: str | None, is_json: bool) -> None:
    """List records, newest first.

    With --json it prints a page as the API answers it, {"items": […], "nextCursor": …}, which ends early at 4 MiB.
    """

    async def work(settings: Settings) -> RecordPage:
        async with open_ledger(settings) as database:
            items: list[Record] = []
            after, room = cursor, MAX_PAGE_BYTES
            while True:  # a page of a search may be short
                left = limit - len(items)
                page = await database.read(
                    partial(reading.read_page, wanted=wanted, limit=left, cursor=after, room=room)
                )
                items += _present(page, is_json=is_json)
                after = page.next_cursor
                if is_json:
                    room -= page.size
                if after is None or len(items) == limit or (is_json and page.is_full):
                    return RecordPage(items, after)

    page = run(work(settings_or_exit()))
    if is_json:
        print_json(page)
    else:
        _print_page(page)


def _present(page: reading.Page, *, is_json: bool) -> list[Record]:
    """Return the records of *page*; a table shows none of the parts that may be large."""
    items = present_page(page).items
    if is_json:
        return items
    return [msgspec.structs.replace(item, input=None, options=None, segments=None) for item in items]


def _print_page(page: RecordPage) -> None:
    if not page.items:
        click.echo("No records.")
        return
    output, now = console(), datetime.now(UTC)
    table = Table(box=None, pad_edge=False)
    # An id has 36 characters: a narrow terminal shows fewer columns rather than broken lines.
    headings = ["id", "status", "state", "what comes next", *(["received"] if output.width >= _WIDE else [])]
    for heading in headings:
        table.add_column(heading, no_wrap=True, overflow="ellipsis", min_width=36 if heading == "id" else None)
    for record in page.items:
        state = f"[{STATE_STYLES[record.state]}]{record.state}[/]"
        cells = (
            cell(record.id),
            cell(record.status),
            state,
            cell(_describe_next(record, now)),
            format_time(record.received_at),
        )
        table.add_row(*cells[: len(headings)])
    output.print(table)
    if page.next_cursor:
        click.echo(f"\nMore: --cursor {page.next_cursor}")


def _describe_next(record: Record, now: datetime) -> str:
    """Describe in a few words what happens next to the record, or what happened."""
    match record.state:
        case State.SCHEDULED if record.next_attempt_at is not None:
            retried = f", attempt {record.attempts + 1}: {record.last_error}" if record.last_error else ""
            at = f"{format_relative(now, record.next_attempt_at)}{retried}"
            return f"waits for target {record.waits_for}" if record.waits_for else at
        case State.DELETED if record.deleted_at is not None:
            gone = "" if record.outcome == Outcome.DELETED else ", was gone already"
            forgotten = ", forgotten" if record.forgotten_at else ""
            return f"{format_relative(now, record.deleted_at)}{gone}{forgotten}"
        case State.FAILED:
            return f"needs an operator: {record.last_error}"
        case State.HELD if record.hold is not None:
            until = f" until {format_time(record.hold.until)}" if record.hold.until else ""
            return f"held{until}: {record.hold.reason}"
        case State.KEPT:
            return record.retention.rule
        case _:
            return "now"


@records.command()
@click.argument("generation_id", metavar="ID")
@of_account
@as_json
def show(generation_id: str, *, account: str | None, is_json: bool) -> None:
    """Show the record of generation ID with its history; --json has both bodies as they came, too.

    The output has URLs with tokens that open the media.
    """

    settings = settings_or_exit()

    key = Key(choose_account(settings.account_ids, account), generation_id)

    async def work() -> Found | str:
        now, is_dry_run = datetime.now(UTC), settings.is_dry_run
        async with open_ledger(settings) as database:
            await database.read(partial(require_account, name=key.account, configured=settings.account_ids))
            found = await database.read(partial(find_record, key=key, now=now, is_dry_run=is_dry_run))
            if found is not None:
                return found
            others = await database.read(partial(find_others, key=key))
            explained = await database.read(partial(explain_key, key=key, now=now, is_dry_run=is_dry_run))
            return _describe_missing(key, others, explained)

    if not generation_id.isprintable():
        fail(f"there is no record of generation {generation_id}")
    found = run(work())
    if isinstance(found, str):
        fail(found)
    record = present_full(found)
    if is_json:
        print_json(record)
    else:
        _print_record(record)
        click.echo(f"\n{plain(record.explain)}")


def _describe_missing(key: Key, others: Sequence[str], explained: Explanation) -> str:
    held = f"; it is held before its first webhook, by {explained.hold.by}" if explained.hold else ""
    advice = f"add --account {others[0]}" if others else f"mayfly explain {key.id} says what to check"
    return f"{describe_missing(key, others)}{held}; {advice}"


for _command in (add, *move_commands(), forget, export):
    records.add_command(_command)


# The history and the explanation are printed after the table, and the bodies repeat the other fields.
_ONLY_IN_JSON = frozenset({"events", "notification", "copy", "explain", "blockedBy"})


def _print_record(record: FullRecord) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for field in msgspec.structs.fields(record):
        value = getattr(record, field.name)
        if field.encode_name not in _ONLY_IN_JSON and value not in (None, [], {}):
            table.add_row(field.encode_name, cell(_format_value(value)))
    console().print(table)
    history = Table(box=None, pad_edge=False, title="\nHistory", title_justify="left")
    for heading in ("at", "move", "by", "detail"):
        history.add_column(heading, overflow="fold")
    for event in record.events:
        detail = "  ".join(f"{name}={_format_value(value)}" for name, value in (event.detail or {}).items())
        history.add_row(format_time(event.at), event.move, cell(event.actor), cell(detail))
    console().print(history)


def _format_value(value: object) -> str:
    if isinstance(value, datetime):
        return format_time(value)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
