"""`mayfly records hold`, `release`, `keep`, `retry` and `reopen`: an operator's moves, of one record or of several."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, NoReturn

import click
from sqlalchemy import Row

from service.commands.bulk_moves import filter_options, move_all, pop_filter, refuse_mixture
from service.commands.running import ACCOUNT_HELP, EXIT_FAILED, actor, open_ledger, run, settings_or_exit
from service.config.settings import Settings
from service.core.durations import parse_duration
from service.core.errors import ExplainedError
from service.core.generation import MalformedError
from service.core.holding import Hold, parse_until
from service.core.key import Key, choose_account, describe_missing, describe_unsaid
from service.core.lifecycle import TARGETS, IllegalMoveError, Move, State
from service.ledger import moving, reading
from service.ledger.account_reading import find_others, require_account
from service.ledger.bulk import CONCERNED, Wanted
from service.ledger.database import Database
from service.ledger.moving import Grace
from service.runtime.terminal import format_relative, format_time, plain

_STDIN: Final = "-"
_ALL_OF_IT: Final = " Without ids: only records of this account, or all of them."
_EXPLAINED: Final = {
    Move.HOLD: """Stop the deletion of each generation ID until it is released, or until --until.

    A generation without a record is held from its first webhook on. Of two holds the longer one counts.
    """,
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


class DurationType(click.ParamType[timedelta]):
    """A duration such as 1h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:  # noqa: ANN401 - click's signature
        """Parse *value*, or fail with what is accepted."""
        try:
            return value if isinstance(value, timedelta) else parse_duration(value)
        except ValueError as error:
            self.fail(f"it accepts {error}", param, ctx)


class _UntilType(click.ParamType[datetime]):
    """The end of a hold: a date, an instant or a duration from now."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:  # noqa: ANN401 - click's signature
        """Parse *value*, or fail with what is accepted."""
        try:
            return value if isinstance(value, datetime) else parse_until(value, now=datetime.now(UTC))
        except ValueError as error:
            self.fail(f"it accepts {error}", param, ctx)


class RefusedError(ExplainedError):
    """A record was not moved; the text says why."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the command line asks for, for each of its records; *refused* says why some of them stay as they are."""

    move: Move
    reason: str | None
    until: datetime | None
    grace: Grace
    refused: Mapping[str, str]
    accounts: Sequence[str]  # the configured ones, none if one of them was named


def move_commands() -> list[click.Command]:
    """Return the command of each move of an operator."""
    return [_move_command(move) for move in TARGETS]


def _move_command(move: Move) -> click.Command:
    def act(generation_ids: tuple[str, ...], **options: Any) -> None:  # noqa: ANN401 - see _options()
        settings, chosen = settings_or_exit(), pop_filter(options, has_ids=bool(generation_ids))
        refuse_mixture(has_ids=bool(generation_ids), chosen=chosen, options=options)
        if chosen is None:
            _move_ids(settings, move, read_ids(generation_ids), options)
        by = Hold(actor(), options["reason"], options.get("until"))

        def grace_of(account: str) -> Grace:
            return Grace.of(options.get("grace") or settings.min_ttl_of(account), settings.min_ttl_of(account))

        move_all(
            settings,
            Wanted(move, chosen, by, grace_of),
            is_dry_run=options["is_dry_run"],
            is_sure=options["yes"],
            expected=options.get("expect"),
        )

    command = click.command(move.value, help=_EXPLAINED[move] + IDS_HELP)(act)
    command.params = _options(move)
    return command


def _options(move: Move) -> list[click.Parameter]:
    has_filter = move in CONCERNED
    options: list[click.Parameter] = [
        click.Argument(["generation_ids"], metavar="ID...", nargs=-1, required=not has_filter),
        click.Option(["--reason"], help="Why; it is stored in the record's history."),
        click.Option(["--account"], metavar="NAME", help=ACCOUNT_HELP + (_ALL_OF_IT if has_filter else "")),
    ]
    if move is Move.HOLD:
        until = "When the hold ends: 2026-12-31, an instant or a duration such as 30d; never unless given."
        options.append(click.Option(["--until"], type=_UntilType(), help=until))
    if move in (Move.RELEASE, Move.REOPEN):
        options.append(click.Option(["--grace"], type=DurationType(), help="Wait at least so long, such as 1h."))
    if has_filter:
        yes = "Do not ask before a deletion at once." if move is Move.RELEASE else "With a filter: do not ask."
        options += [click.Option(["--yes"], is_flag=True, help=yes), *filter_options(move)]
    return options


def _move_ids(settings: Settings, move: Move, ids: Sequence[str], options: Mapping[str, Any]) -> NoReturn:
    grace = options.get("grace")
    account = choose_account(settings.account_ids, options["account"])
    keys = [Key(account, one) for one in ids]
    is_asking = move is Move.RELEASE and grace is None and not options["yes"]
    refused = _ask_about(run(_find_overdue(settings, keys))) if is_asking else {}
    grace = Grace.of(grace or timedelta(0), settings.min_ttl_of(account))
    accounts = () if options["account"] else settings.account_ids
    wanted = _Wanted(move, options["reason"], options.get("until"), grace, refused, accounts)
    sys.exit(EXIT_FAILED if run(_move_all(settings, keys, wanted)) else 0)


def read_ids(generation_ids: Sequence[str]) -> list[str]:
    """Return the ids, those of standard input in place of ``-``; empty lines there are none."""
    found: list[str] = []
    for one in generation_ids:
        if one == _STDIN:
            found += [line.strip() for line in sys.stdin if line.strip()]
        else:
            found.append(one)
    return found


async def _move_all(settings: Settings, keys: Sequence[Key], wanted: _Wanted) -> int:
    """Move each record in a transaction of its own, report each on a line, and return how many were not moved."""
    failed = 0
    async with open_ledger(settings) as database:
        for account in {key.account for key in keys}:
            await database.read(partial(require_account, name=account, configured=settings.account_ids))
        for key in keys:
            try:
                click.echo(await _move_one(database, key, wanted))
            except ExplainedError as error:
                failed += 1
                click.echo(f"mayfly: {plain(str(error))}", err=True)
    return failed


async def _move_one(database: Database, key: Key, wanted: _Wanted) -> str:
    """Move a record and return the line to print.

    Raises: ExplainedError with the reason why it is as it was.
    """
    if key.id in wanted.refused:
        raise RefusedError(wanted.refused[key.id])
    if not key.id.isprintable():
        raise RefusedError(f"there is no record of generation {key.id}")
    before = await database.read(partial(reading.find_row, key=key))
    others = await database.read(partial(find_others, key=key))
    # Held before its first webhook here, the record of another account would be deleted nevertheless.
    if before is None and others and wanted.accounts:
        raise await refuse_missing(database, key)
    if before is None and wanted.move is Move.HOLD and len(wanted.accounts) > 1:
        raise RefusedError(f"{describe_unsaid(key.id, wanted.accounts)}: add --account NAME")
    by = Hold(actor(), wanted.reason, wanted.until)
    try:
        after = await moving.move_generation(database, key, wanted.move, by, now=datetime.now(UTC), grace=wanted.grace)
    except (IllegalMoveError, MalformedError) as error:
        raise RefusedError(f"{key.id}: {error}") from error
    if after is None:
        raise await refuse_missing(database, key)
    if isinstance(after, Hold):
        return _describe_unseen(key.id, after, wanted.move)
    return _describe(before, after, wanted.move)


async def refuse_missing(database: Database, key: Key) -> RefusedError:
    """Return the error for a record that is not there; it names the account that has one of this id."""
    others = await database.read(partial(find_others, key=key)) if key.id.isprintable() else []
    return RefusedError(describe_missing(key, others) + (f": add --account {others[0]}" if others else ""))


async def _find_overdue(settings: Settings, keys: Sequence[Key]) -> dict[str, datetime]:
    """Return when each of those records was due that a release would have deleted at once."""
    overdue = {}
    async with open_ledger(settings) as database:
        for key in keys:
            row = await database.read(partial(reading.find_row, key=key)) if key.id.isprintable() else None
            is_held = row is not None and row.state == State.HELD and row.due_at is not None
            if row is not None and is_held and row.due_at <= datetime.now(UTC):
                overdue[key.id] = row.due_at
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


def _describe_unseen(generation_id: str, hold: Hold, move: Move) -> str:
    if move is Move.RELEASE:
        return f"{plain(generation_id)} has no record. Its hold is removed."
    until = f", until {format_time(hold.until)}" if hold.until else ""
    return f"{plain(generation_id)} has no record yet. It is held from its first webhook on{until}."


def _describe(before: Row[Any] | None, after: Row[Any], move: Move) -> str:
    shown = plain(after.id)
    until = f" until {format_time(after.hold_until)}" if after.hold_until else ""
    if before is not None and before.state == TARGETS[move] and before.hold_until == after.hold_until:
        return f"{shown} is {after.state} already{until}."
    if after.state == State.SCHEDULED and move is not Move.RETRY:
        now = datetime.now(UTC)
        if after.wake_at <= now:
            return f"{shown} is scheduled. It is due now."
        return (
            f"{shown} is scheduled. It is due {format_relative(now, after.wake_at)}, at {format_time(after.wake_at)}."
        )
    if after.state == State.KEPT and move is Move.RELEASE:
        return f"{shown} is kept. It has no due time; release it again to have it deleted."
    if move is Move.RETRY and before is not None and before.state == State.FAILED and before.waits_for is not None:
        return f"{shown} is {after.state}. Its webhook is sent to target {before.waits_for} again."
    return f"{shown} is {after.state}{until}."
