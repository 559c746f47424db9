"""`mayfly records hold`, `release`, `keep`, `retry` and `reopen`: an operator's moves, of one record or of several."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import click
from sqlalchemy import Connection, Row

from service.commands.running import EXIT_FAILED, actor, open_ledger, run, settings_or_exit
from service.config.settings import Settings
from service.core.durations import parse_duration
from service.core.errors import ExplainedError
from service.core.key import DEFAULT_ACCOUNT, Key
from service.core.lifecycle import TARGETS, IllegalMoveError, Move, State
from service.ledger import moving, reading
from service.ledger.database import Database
from service.ledger.moving import Grace
from service.runtime.terminal import format_relative, format_time, plain

_STDIN: Final = "-"
_EXPLAINED: Final = {
    Move.HOLD: "Stop the deletion of each generation ID until it is released.",
    Move.RELEASE: """Let each generation ID, which is held or kept, be deleted.

    One that was held is deleted when it is due. If that is past, it is deleted at once, so the command asks first:
    --yes answers, --grace lets it wait. One that was kept is due after MAYFLY_MIN_TTL, or after --grace.
    """,
    Move.KEEP: "Never delete the generations ID, whether they are scheduled, held or given up.",
    Move.RETRY: "Try each generation ID again, which was given up.",
    Move.REOPEN: """Schedule each generation ID again that is deleted because the API did not know it.

    That happens with the API key of another organisation. It is possible only if no copy was ever made. The record is
    due after MAYFLY_MIN_TTL, or after --grace.
    """,
}
IDS_HELP: Final = "\n\n    ID may be given several times; - reads ids from standard input, one a line."


class _DurationType(click.ParamType[timedelta]):
    """A duration such as 1h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:  # noqa: ANN401 - click's signature
        """Parse *value*, or fail with what is accepted."""
        try:
            return value if isinstance(value, timedelta) else parse_duration(value)
        except ValueError as error:
            self.fail(f"it accepts {error}", param, ctx)


class RefusedError(ExplainedError):
    """A record was not moved; the text says why."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the command line asks for, for each of its records; *refused* says why some of them stay as they are."""

    move: Move
    reason: str | None
    grace: Grace
    refused: Mapping[str, str]


def move_commands() -> list[click.Command]:
    """Return the command of each move of an operator."""
    return [_move_command(move) for move in TARGETS]


def _move_command(move: Move) -> click.Command:
    def act(
        generation_ids: tuple[str, ...], reason: str | None, *, grace: timedelta | None = None, yes: bool = False
    ) -> None:
        settings = settings_or_exit()
        ids = read_ids(generation_ids)
        is_asking = move is Move.RELEASE and grace is None and not yes
        refused = _ask_about(run(_find_overdue(settings, ids))) if is_asking else {}
        wanted = _Wanted(move, reason, Grace.of(grace or timedelta(0), settings.min_ttl), refused)
        sys.exit(EXIT_FAILED if run(_move_all(settings, ids, wanted)) else 0)

    command = click.command(move.value, help=_EXPLAINED[move] + IDS_HELP)(act)
    command.params = [
        click.Argument(["generation_ids"], metavar="ID...", nargs=-1, required=True),
        click.Option(["--reason"], help="Why; it is stored in the record's history."),
    ]
    if move in (Move.RELEASE, Move.REOPEN):
        grace = click.Option(["--grace"], type=_DurationType(), help="Wait at least so long, such as 1h.")
        command.params.append(grace)
    if move is Move.RELEASE:
        command.params.append(click.Option(["--yes"], is_flag=True, help="Do not ask before a deletion at once."))
    return command


def read_ids(generation_ids: Sequence[str]) -> list[str]:
    """Return the ids, those of standard input in place of ``-``; empty lines there are none."""
    found: list[str] = []
    for one in generation_ids:
        if one == _STDIN:
            found += [line.strip() for line in sys.stdin if line.strip()]
        else:
            found.append(one)
    return found


async def _move_all(settings: Settings, ids: Sequence[str], wanted: _Wanted) -> int:
    """Move each record in a transaction of its own, report each on a line, and return how many were not moved."""
    failed = 0
    async with open_ledger(settings) as database:
        for generation_id in ids:
            try:
                click.echo(await _move_one(database, generation_id, wanted))
            except ExplainedError as error:
                failed += 1
                click.echo(f"mayfly: {plain(str(error))}", err=True)
    return failed


async def _move_one(database: Database, generation_id: str, wanted: _Wanted) -> str:
    """Move a record and return the line to print.

    Raises: ExplainedError with the reason why it is as it was.
    """
    if generation_id in wanted.refused:
        raise RefusedError(wanted.refused[generation_id])
    key = Key(DEFAULT_ACCOUNT, generation_id)
    row = await database.read(partial(reading.find_row, key=key)) if generation_id.isprintable() else None
    try:
        moved = await database.write(partial(_write_move, key=key, wanted=wanted)) if row is not None else None
    except IllegalMoveError as error:
        raise RefusedError(f"{generation_id}: {error}") from error
    if row is None or moved is None:
        raise RefusedError(f"there is no record of generation {generation_id}")
    return _describe(row, moved, wanted.move)


async def _find_overdue(settings: Settings, ids: Sequence[str]) -> dict[str, datetime]:
    """Return when each of those records was due that a release would have deleted at once."""
    overdue = {}
    async with open_ledger(settings) as database:
        for generation_id in filter(str.isprintable, ids):
            row = await database.read(partial(reading.find_row, key=Key(DEFAULT_ACCOUNT, generation_id)))
            is_held = row is not None and row.state == State.HELD and row.due_at is not None
            if row is not None and is_held and row.due_at <= datetime.now(UTC):
                overdue[generation_id] = row.due_at
    return overdue


def _ask_about(overdue: Mapping[str, datetime]) -> dict[str, str]:
    """Ask on a terminal whether to release each record, and return why those are not released that stay held."""
    refused = {}
    for generation_id, due_at in overdue.items():
        was_due = f"it was due {format_relative(datetime.now(UTC), due_at)}"
        if not is_terminal():
            advice = "add --yes, or --grace 1h to let it wait"
            refused[generation_id] = f"{generation_id} stays held: {was_due} and would be deleted now; {advice}"
        elif not click.confirm(f"{plain(generation_id)}: {was_due} and will be deleted now. Release it?"):
            refused[generation_id] = f"{generation_id} stays held"
    return refused


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def _write_move(connection: Connection, *, key: Key, wanted: _Wanted) -> Row[Any] | None:
    return moving.move_record(
        connection,
        key,
        wanted.move,
        now=datetime.now(UTC),
        actor=actor(),
        reason=wanted.reason,
        grace=wanted.grace,
    )


def _describe(before: Row[Any], after: Row[Any], move: Move) -> str:
    shown = plain(after.id)
    if before.state == TARGETS[move]:
        return f"{shown} is {after.state} already."
    if after.state == State.SCHEDULED and move is not Move.RETRY:
        now = datetime.now(UTC)
        if after.wake_at <= now:
            return f"{shown} is scheduled. It is due now."
        return (
            f"{shown} is scheduled. It is due {format_relative(now, after.wake_at)}, at {format_time(after.wake_at)}."
        )
    if after.state == State.KEPT and move is Move.RELEASE:
        return f"{shown} is kept. It has no due time; release it again to have it deleted."
    return f"{shown} is {after.state}."
