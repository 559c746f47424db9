"""`mayfly records`: the records of the ledger, read directly; no running service is needed."""

from datetime import UTC, datetime
from functools import partial
from typing import Any

import click
import msgspec
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Row

from service.commands.running import actor, as_json, fail, open_ledger, print_json, run, settings_or_exit
from service.config.settings import Settings
from service.core.attempts import Outcome
from service.core.key import Key
from service.core.lifecycle import Move, State
from service.ledger import moving, reading
from service.ledger.pausing import ACCOUNT
from service.ledger.reading import MAX_PAGE, Filter
from service.ledger.views import FullRecord, Record, RecordPage, find_record, present_record
from service.runtime.terminal import STATE_STYLES, console

_WIDE = 100


@click.group()
def records() -> None:
    """Show records of generations, and hold, release, keep or retry single ones."""


@records.command("list")
@click.option("--state", type=click.Choice(list(State), case_sensitive=False), help="Only records in this state.")
@click.option("--status", help="Only generations with this sync.so status, such as FAILED.")
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
            escape(record.id),
            escape(record.status),
            state,
            _describe_next(record, now),
            _format_time(record.received_at),
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
            return escape(f"{_format_relative(now, record.next_attempt_at)}{retried}")
        case State.DELETED if record.deleted_at is not None:
            gone = "" if record.outcome == Outcome.DELETED else ", was gone already"
            return f"{_format_relative(now, record.deleted_at)}{gone}"
        case State.FAILED:
            return escape(f"needs an operator: {record.last_error}")
        case State.HELD if record.hold is not None:
            return escape(f"held: {record.hold.reason}")
        case State.KEPT:
            return escape(record.retention.rule)
        case _:
            return "now"


def _format_relative(now: datetime, at: datetime) -> str:
    """Format *at* relative to *now*: ``in 3 h``, ``5 min ago``."""
    seconds = int(abs(at - now).total_seconds())
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            span = f"{seconds // size} {unit}"
            return f"in {span}" if at > now else f"{span} ago"
    return "now"


def _format_time(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"


@records.command()
@click.argument("generation_id", metavar="ID")
@as_json
def show(generation_id: str, *, is_json: bool) -> None:
    """Show the record of generation ID with its history.

    The output has URLs with tokens that open the media.
    """

    async def work(settings: Settings) -> FullRecord | None:
        async with open_ledger(settings) as database:
            return await database.read(partial(find_record, key=Key(ACCOUNT, generation_id)))

    record = run(work(settings_or_exit())) if generation_id.isprintable() else None
    if record is None:
        fail(f"there is no record of generation {generation_id}")
    if is_json:
        print_json(record)
    else:
        _print_record(record)


def _add_move_command(move: Move, explained: str) -> None:
    """Add the command for an operator's *move*."""

    @records.command(move.value, help=explained)
    @click.argument("generation_id", metavar="ID")
    @click.option("--reason", help="Why; it is stored in the record's history.")
    def command(generation_id: str, reason: str | None) -> None:
        wanted = partial(
            moving.move_record,
            key=Key(ACCOUNT, generation_id),
            wanted=move,
            now=datetime.now(UTC),
            actor=actor(),
            reason=reason,
        )

        async def work(settings: Settings) -> State | None:
            async with open_ledger(settings) as database:
                row = await database.write(wanted)
                return None if row is None else State(row.state)

        state = run(work(settings_or_exit())) if generation_id.isprintable() else None
        if state is None:
            fail(f"there is no record of generation {generation_id}")
        click.echo(f"{generation_id} is {state}.")


_add_move_command(Move.HOLD, "Stop the deletion of generation ID until it is released.")
_add_move_command(
    Move.RELEASE, "Let generation ID, which is held, be deleted when it is due; at once where that is past."
)
_add_move_command(Move.KEEP, "Never delete generation ID.")
_add_move_command(Move.RETRY, "Try generation ID again, which was given up.")


# The history has a table of its own, and the bodies repeat the other fields.
_ONLY_IN_JSON = frozenset({"events", "notification", "copy"})


def _print_record(record: FullRecord) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in msgspec.to_builtins(record, builtin_types=(datetime,)).items():
        if name not in _ONLY_IN_JSON and value not in (None, [], {}):
            table.add_row(name, escape(_format_value(value)))
    console().print(table)
    history = Table(box=None, pad_edge=False, title="\nHistory", title_justify="left")
    for heading in ("at", "move", "by", "detail"):
        history.add_column(heading, overflow="fold")
    for event in record.events:
        detail = "  ".join(f"{name}={_format_value(value)}" for name, value in (event.detail or {}).items())
        history.add_row(_format_time(event.at), event.move, escape(event.actor), escape(detail))
    console().print(history)


def _format_value(value: object) -> str:
    if isinstance(value, datetime):
        return _format_time(value)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
