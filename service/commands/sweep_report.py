"""What `mayfly sweep` shows: how many generations there are, by status and project, and what becomes of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.core.adopting import Fit, read_created_at
from service.runtime.terminal import cell, console, format_relative, format_time, plain
from service.sync.listing import Listed, Listing
from workers.sweep import Adopted, Found

_MANY = 12
_SHOWN = 10
_FITS = {
    Fit.RUNNING: "have not ended",
    Fit.UNKNOWN_STATUS: "have a status that this release does not know",
    Fit.FOREIGN: "have no webhookUrl of this account here",
    Fit.RECENT: "are younger, or do not say when they were made",
    Fit.BATCH: "are batches",
    Fit.NOT_ASKED_FOR: "are not in the plan",
}


class SweepReport(msgspec.Struct, rename="camel", kw_only=True):
    """A sweep of one account. *listed* counts what the API shows, *new* is what fits and has no record.

    *left_out* counts by reason what does not fit, *known* by state what has a record, *statuses* and *projects* what is
    new; *held* are holds made before there is a record. *adopted* counts by state; it is empty in a dry run. *vanished*
    are ids of a plan that are no longer there, or have not ended. *failure* says why the list is not complete.
    """

    account: str
    is_dry_run: bool
    listed: int
    unreadable: int
    oddities: list[str]
    left_out: dict[str, int]
    known: dict[str, int]
    new: int
    held: int
    statuses: dict[str, int]
    projects: dict[str, int]
    oldest: datetime | None
    first_due_at: datetime | None = None
    adopted: dict[str, int] = {}
    vanished: list[str] = []
    failure: str | None = None
    held_now: int = 0  # what a plan holds and what had a record already
    not_held: list[str] = []  # where it was too late


def make_report(account: str, found: Found, *, first_due_at: datetime | None) -> SweepReport:
    """Return the report on what was *found*; *first_due_at* is the first due time if it is adopted now."""
    listing = found.listing
    return SweepReport(
        account=account,
        is_dry_run=True,
        listed=listing.read,
        unreadable=listing.unreadable,
        oddities=listing.oddities,
        left_out={fit.value: found.fits[fit] for fit in _FITS if found.fits[fit]},
        known=dict(Counter(str(known.state) for known in found.known.values())),
        new=len(found.unknown),
        held=sum(item.generation.id in found.held for item in found.unknown),
        statuses=_count(item.generation.status for item in found.unknown),
        projects=_count(item.generation.project_id or "" for item in found.unknown),
        oldest=_oldest(found.unknown),
        first_due_at=first_due_at,
        failure=listing.failure,
    )


def note_adopted(report: SweepReport, adopted: Adopted) -> None:
    """Note in *report* what was adopted."""
    report.is_dry_run = False
    report.adopted = {str(state): number for state, number in adopted.states.items()}
    report.first_due_at = adopted.first_due_at


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _oldest(items: Iterable[Listed]) -> datetime | None:
    ages = (read_created_at(item.generation.created_at) for item in items)
    return min((at for at in ages if at is not None), default=None)


def print_report(report: SweepReport, *, has_several: bool, now: datetime) -> None:
    """Print a report for people; *has_several* accounts are swept."""
    if has_several:
        click.echo(f"Account {plain(report.account)}:")
    if report.failure is not None:
        return
    click.echo(f"{_generations(report.listed)} at sync.so.")
    for fit, words in _FITS.items():
        if number := report.left_out.get(fit.value, 0):
            click.echo(f"  {number} {words}: left alone")
    for state, number in report.known.items():
        click.echo(f"  {number} known already: {state}")
    click.echo(
        f"  {report.new} without a record" + (", the oldest of " + format_time(report.oldest) if report.oldest else "")
    )
    if report.held:
        click.echo(f"  {report.held} of these are on hold already")
    if report.vanished:
        shown = ", ".join(plain(one) for one in report.vanished[:_SHOWN]) + (
            " …" if len(report.vanished) > _SHOWN else ""
        )
        click.echo(f"  {len(report.vanished)} of the plan are no longer there, or have not ended: {shown}")
    if report.new:
        _print_table("status", report.statuses)
        _print_table("project", {name or "(none)": number for name, number in report.projects.items()})
    _print_unreadable(report)
    _print_outcome(report, now)


def _print_table(heading: str, numbers: Mapping[str, int]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(heading)
    table.add_column("generations", justify="right")
    shown = list(numbers.items())[:_MANY]
    for name, number in shown:
        table.add_row(cell(name), str(number))
    if len(numbers) > _MANY:
        table.add_row(f"({len(numbers) - _MANY} more)", str(sum(numbers.values()) - sum(number for _, number in shown)))
    click.echo()
    console().print(table)


def _print_unreadable(report: SweepReport) -> None:
    if report.unreadable:
        click.echo(
            f"mayfly: warning: {report.unreadable} items of the list cannot be read, and are left alone:", err=True
        )
        for oddity in report.oddities:
            click.echo(f"mayfly: warning:   {plain(oddity)}", err=True)


def _print_outcome(report: SweepReport, now: datetime) -> None:
    click.echo()
    if report.is_dry_run:
        click.echo("Nothing was adopted." + (f" {describe_first(report.first_due_at, now)}" if report.new else ""))
        return
    states = ", ".join(f"{number} {state}" for state, number in report.adopted.items())
    when = f" {describe_first(report.first_due_at, now)}" if report.adopted else ""
    click.echo(f"Adopted: {states or 'none'}.{when}")
    if report.held_now:
        click.echo(f"Put on hold, as the plan says, of what was known already: {report.held_now}.")
    for problem in report.not_held:
        click.echo(f"mayfly: not put on hold: {plain(problem)}", err=True)


def describe_first(first_due_at: datetime | None, now: datetime) -> str:
    """Say when the first generation is deleted."""
    if first_due_at is None:
        return "None of them would be deleted: they are kept or held."
    when = f"{format_relative(now, first_due_at)}, at {format_time(first_due_at)}"
    return f"The first is deleted {when}: each is kept for its whole ttl from its adoption on."


def _generations(number: int) -> str:
    return f"{number} generation{'' if number == 1 else 's'}"


@contextmanager
def progress_bar(account: str) -> Iterator[Callable[[Listing], None]]:
    """Show how many generations have been read, on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} read"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"listing {plain(account)}", total=None)
        yield lambda listing: progress.update(task, completed=listing.read)
