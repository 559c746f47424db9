"""`mayfly records hold` and `release` with a filter: all records that match, after a preview with their number."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, NoReturn

import click

from service.commands.record_filters import LABEL
from service.commands.running import EXIT_FAILED, EXIT_SETTINGS, fail, open_ledger, run
from service.config.settings import Settings
from service.core.lifecycle import Move, State
from service.ledger import bulk
from service.ledger.bulk import CONCERNED, Moved, Wanted
from service.ledger.reading import Filter
from service.runtime.terminal import plain

_NAMES: Final = ("state", "status", "project", "text", "labels")


def filter_options(move: Move) -> list[click.Parameter]:
    """Return the options that choose records by what they are, and those of the preview."""
    states = click.Choice(list(State), case_sensitive=False)
    options: list[click.Parameter] = [
        click.Option(["--state"], type=states, help="All records in this state, in place of ids."),
        click.Option(["--status"], help="All generations with this sync.so status, in place of ids."),
        click.Option(["--project"], help="All generations of this project id, in place of ids."),
        click.Option(["--label", "labels"], type=LABEL, multiple=True, help="All with this label, in place of ids."),
        click.Option(["--find", "text"], help="All with this text in id, file name, model or error, in place of ids."),
        click.Option(["--dry-run", "is_dry_run"], is_flag=True, help="With a filter: only count."),
    ]
    if move is Move.RELEASE:
        help_ = "With a filter: release only if so many match, as --dry-run shows; it answers the question."
        options.append(click.Option(["--expect"], type=click.IntRange(0), help=help_))
    return options


def pop_filter(options: dict[str, Any], *, has_ids: bool) -> Filter | None:
    """Take the filter out of *options*; None without one. The account alone is one unless there are ids."""
    state, status, project, text, labels = (options.pop(name, None) for name in _NAMES)
    chosen = Filter(state=state, status=status, project_id=project, text=text, labels=dict(labels or ()))
    if chosen == Filter() and has_ids:
        return None
    chosen = replace(chosen, account=options.get("account"))
    return None if chosen == Filter() else chosen


def move_all(settings: Settings, wanted: Wanted, *, is_dry_run: bool, is_sure: bool, expected: int | None) -> NoReturn:
    """Show how many records match, ask, move them and exit."""
    counts = run(_count(settings, wanted.chosen))
    click.echo(_describe(wanted.move, counts))
    found = sum(counts[state] for state in CONCERNED[wanted.move])
    if is_dry_run or not found:
        sys.exit(0)
    is_release = wanted.move is Move.RELEASE
    if not is_sure and expected is None and not _confirm(wanted.move, found):
        sys.exit(EXIT_FAILED)
    if is_release and is_sure and expected is None:
        fail(f"nothing was released: add --expect {found}, the number that you have seen, in place of --yes")
    moved = run(_move(settings, wanted, found if expected is None else expected))
    click.echo(_report(wanted.move, moved))
    sys.exit(0)


def refuse_mixture(*, has_ids: bool, chosen: Filter | None, options: Mapping[str, Any]) -> None:
    """Exit with code 2 unless there are ids or a filter, and not both; a preview is of a filter alone."""
    told = None
    if has_ids and chosen is not None:
        told = "give ids or a filter, not both"
    elif not has_ids and chosen is None:
        told = "give ids, or a filter such as --project"
    elif has_ids and (options.get("is_dry_run") or options.get("expect") is not None):
        told = "--dry-run and --expect are for a filter, not for ids"
    if told is not None:
        click.echo(f"mayfly: {told}", err=True)
        sys.exit(EXIT_SETTINGS)


async def _count(settings: Settings, chosen: Filter) -> dict[State, int]:
    async with open_ledger(settings) as database:
        return await database.read(partial(bulk.count_matching, chosen=chosen))


async def _move(settings: Settings, wanted: Wanted, expected: int) -> Moved:
    async with open_ledger(settings) as database:
        return await bulk.move_matching(database, wanted, now=lambda: datetime.now(UTC), expected=expected)


def _describe(move: Move, counts: Mapping[State, int]) -> str:
    """Return how many records match, by state, and what becomes of those that the move does not concern."""
    if not any(counts.values()):
        return "No record matches."
    shown = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    others = {state for state, number in counts.items() if number and state not in CONCERNED[move]}
    stay = f" Those {' and '.join(sorted(others))} stay as they are." if others else ""
    return f"These match: {shown}.{stay}"


def _confirm(move: Move, found: int) -> bool:
    number = "1 record" if found == 1 else f"{found} records"
    if sys.stdin.isatty():
        return click.confirm(f"{move.capitalize()} {number}?")
    advice = "--yes" if move is Move.HOLD else f"--expect {found}"
    click.echo(plain(f"mayfly: nothing was moved; add {advice} to {move} {number}"), err=True)
    return False


def _report(move: Move, moved: Moved) -> str:
    done = ("is " if moved.moved == 1 else "are ") + ("held" if move is Move.HOLD else "released")
    parts = [f"{moved.moved} {done}"]
    if moved.already:
        parts.append(f"{moved.already} were so already")
    if moved.too_late:
        parts.append(f"{moved.too_late} came too late: deleted, or their DELETE may be in progress")
    return "; ".join(parts) + "."
