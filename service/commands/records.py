"""`mayfly records`: the records of the ledger, read directly; no running service is needed."""

from datetime import UTC, datetime
from functools import partial
from typing import Any

import click
import msgspec
from rich.table import Table
from sqlalchemy import Row

from service.commands.record_moves import move_commands
from service.commands.running import as_json, fail, open_ledger, print_json, run, settings_or_exit
from service.config.settings import Settings
from service.core.attempts import Outcome
from service.core.key import DEFAULT_ACCOUNT, Key
from service.core.lifecycle import State
from service.ledger import reading
from service.ledger.reading import MAX_PAGE, Filter
from service.ledger.views import BLOCKED, FullRecord, Record, RecordPage, find_record, present_record
from service.runtime.terminal import STATE_STYLES, cell, console, format_relative, format_time, plain

_WIDE = 100


@click.group()
def records() -> None:
    """Show records of generations, and hold, release, keep, retry or reopen them."""


@records.command("list")
@click.option("--state", type=click.Choice(list(State), case_sensitive=False), help="Only records in this state.")
@click.option("--status", help="Only generations with this sync.so status, such as FAILED, in any case.")
@click.option("--project", help="Only generations of this project id.")
@click.option("--find", "text", help="Only those with this text in id, file name, model or error.")
@click.option("--limit", type=click.IntRange(1, MAX_PAGE), default=50, show_default=True, help="How many.")
@click.option("--cursor", help="The page after this cursor, which the previous page printed.")
@as_json
def list_records(
    *,
    state: State | None,
    status: str | None,
    project: str | None,
    text: str | None,
    limit: int,
    cursor: str | None,
    is_json: bool,
) -> None:
    """List records, newest first.

    With --json it prints a page as the API answers it, {"items": […], "nextCursor": …}.
    """
    wanted = Filter(state=state, status=status, project_id=project, text=text)

    async def work(settings: Settings) -> RecordPage:
        async with open_ledger(settings) as database:
            rows: list[Row[Any]] = []
            after = cursor
            while True:  # a page of a search may be short
                read = partial(reading.read_page, wanted=wanted, limit=limit - len(rows), cursor=after)
                page = await database.read(read)
                rows += page.rows
                after = page.next_cursor
                if after is None or len(rows) == limit:
                    return RecordPage([present_record(row) for row in rows], after)

    page = run(work(settings_or_exit()))
    if is_json:
        print_json(page)
    else:
        _print_page(page)


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
            return f"{format_relative(now, record.next_attempt_at)}{retried}"
        case State.DELETED if record.deleted_at is not None:
            gone = "" if record.outcome == Outcome.DELETED else ", was gone already"
            return f"{format_relative(now, record.deleted_at)}{gone}"
        case State.FAILED:
            return f"needs an operator: {record.last_error}"
        case State.HELD if record.hold is not None:
            return f"held: {record.hold.reason}"
        case State.KEPT:
            return record.retention.rule
        case _:
            return "now"


@records.command()
@click.argument("generation_id", metavar="ID")
@as_json
def show(generation_id: str, *, is_json: bool) -> None:
    """Show the record of generation ID with its history.

    The output has URLs with tokens that open the media.
    """

    settings = settings_or_exit()

    async def work() -> FullRecord | None:
        async with open_ledger(settings) as database:
            return await database.read(partial(find_record, key=Key(DEFAULT_ACCOUNT, generation_id)))

    record = run(work()) if generation_id.isprintable() else None
    if record is None:
        fail(f"there is no record of generation {generation_id}")
    if is_json:
        print_json(record)
    else:
        _print_record(record)
        _print_obstacles(record, is_dry_run=settings.is_dry_run)


def _print_obstacles(record: FullRecord, *, is_dry_run: bool) -> None:
    """Say what blocks the deletion of a record that waits for one."""
    for pause in record.blocked_by:
        until = f", until {format_time(pause.until)}" if pause.until else ""
        why = f"({pause.kind}) since {format_time(pause.since)}{until}, by {plain(pause.actor)}: {plain(pause.reason)}"
        click.echo(f"\nNot deleted now: deletions are paused {why}. mayfly resume ends it.")
    if is_dry_run and record.state in BLOCKED:
        click.echo("\nNot deleted now: MAYFLY_DRY_RUN is set here.")


for _command in move_commands():
    records.add_command(_command)


# The history and what blocks a deletion are printed after the table, and the bodies repeat the other fields.
_ONLY_IN_JSON = frozenset({"events", "notification", "copy", "blockedBy"})


def _print_record(record: FullRecord) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in msgspec.to_builtins(record, builtin_types=(datetime,)).items():
        if name not in _ONLY_IN_JSON and value not in (None, [], {}):
            table.add_row(name, cell(_format_value(value)))
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
