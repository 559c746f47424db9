"""`mayfly forwards replay`: deliveries are sent again, by their ids, or all that match after a preview."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import NoReturn

import click

from service.commands.forward_filters import delivery_filters
from service.commands.record_moves import IDS_HELP, is_terminal, read_ids
from service.commands.running import EXIT_FAILED, EXIT_SETTINGS, fail, open_ledger, run, settings_or_exit
from service.config.settings import Settings
from service.core.errors import ExplainedError
from service.core.replaying import NotReplayedError, Replay, require_replayed, require_target
from service.ledger.database import Database
from service.ledger.delivery_reading import DeliveryFilter
from service.ledger.replaying import (
    Matching,
    ReplayCounts,
    WantedReplay,
    count_deliveries,
    replay_matching,
    replay_one,
)
from service.runtime.terminal import plain

_HELP = """Send each delivery ID again now, or with a filter all deliveries that match.

One that has failed or is delivered begins anew, under the same Mayfly-Delivery; one that waits is brought forward. A
filter is about those that have failed, unless --state says another.
"""
_SOON = "A worker that runs sends them within seconds."


@click.command(help=_HELP + IDS_HELP)
@click.argument("delivery_ids", metavar="[ID]...", nargs=-1)
@delivery_filters
@click.option("--dry-run", "is_dry_run", is_flag=True, help="With a filter: only count.")
@click.option("--yes", "is_sure", is_flag=True, help="With a filter: do not ask.")
@click.option("--expect", type=click.IntRange(0), help="With a filter: replay only if so many match; do not ask.")
def replay(
    delivery_ids: tuple[str, ...], *, wanted: DeliveryFilter, is_dry_run: bool, is_sure: bool, expect: int | None
) -> None:
    """Replay what the arguments name."""
    settings = settings_or_exit()
    has_filter = wanted != DeliveryFilter()
    told = None
    if delivery_ids and has_filter:
        told = "give ids or a filter, not both"
    elif not delivery_ids and not has_filter:
        told = "give ids, or a filter such as --target"
    elif delivery_ids and (is_dry_run or expect is not None):
        told = "--dry-run and --expect are for a filter, not for ids"
    if told is not None:
        click.echo(f"mayfly: {told}", err=True)
        sys.exit(EXIT_SETTINGS)
    if delivery_ids:
        sys.exit(EXIT_FAILED if run(_replay_ids(settings, read_ids(delivery_ids))) else 0)
    try:
        require_target(wanted.target, _configured(settings))
    except NotReplayedError as error:
        fail(str(error))
    _replay_all(settings, wanted, is_dry_run=is_dry_run, is_sure=is_sure, expected=expect)


def _configured(settings: Settings) -> frozenset[str]:
    return frozenset(target.id for target in settings.targets)


async def _replay_ids(settings: Settings, ids: Sequence[str]) -> int:
    """Replay each delivery in a transaction of its own, report it on a line, and return how many were not replayed."""
    failed = 0
    async with open_ledger(settings) as database:
        for one in ids:
            try:
                click.echo(plain(await _replay_id(database, one, _configured(settings))))
            except ExplainedError as error:
                failed += 1
                click.echo(f"mayfly: {plain(str(error))}", err=True)
    if failed < len(ids):
        click.echo(_SOON)
    return failed


async def _replay_id(database: Database, delivery_id: str, configured: frozenset[str]) -> str:
    replayed = None
    if delivery_id.isprintable():
        work = partial(replay_one, delivery_id=delivery_id, configured=configured, now=datetime.now(UTC))
        replayed = await database.write(work)
    if replayed is None:
        raise NotReplayedError(f"there is no delivery {delivery_id}")
    try:
        require_replayed(replayed.result, replayed.target)
    except NotReplayedError as error:
        raise NotReplayedError(f"{delivery_id}: {error}") from None
    done = {
        Replay.REPLAYED: "begins anew",
        Replay.ADVANCED: "is brought forward",
        Replay.ALREADY: "is due already",
    }
    return f"{delivery_id} {done[replayed.result]}: attempt {replayed.attempt} to {replayed.target} is next."


def _replay_all(
    settings: Settings, chosen: DeliveryFilter, *, is_dry_run: bool, is_sure: bool, expected: int | None
) -> NoReturn:
    """Show how many deliveries match, ask, replay them and exit."""
    wanted = WantedReplay.of(chosen, _configured(settings))
    matching = run(_count(settings, wanted))
    click.echo(plain(_describe(matching, wanted)))
    found = sum(matching.counts.values())
    if is_dry_run or not found:
        sys.exit(0)
    if not is_sure and expected is None and not _confirm(found):
        sys.exit(EXIT_FAILED)
    counts = run(_replay(settings, wanted, found if expected is None else expected))
    click.echo(_report(counts))
    sys.exit(0)


async def _count(settings: Settings, wanted: WantedReplay) -> Matching:
    async with open_ledger(settings) as database:
        return await database.read(partial(count_deliveries, wanted=wanted))


async def _replay(settings: Settings, wanted: WantedReplay, expected: int) -> ReplayCounts:
    async with open_ledger(settings) as database:
        return await replay_matching(database, wanted, now=lambda: datetime.now(UTC), expected=expected)


def _describe(matching: Matching, wanted: WantedReplay) -> str:
    """Return how many deliveries match, and what becomes of those whose target is not configured."""
    shown = ", ".join(f"{number} {state}" for state, number in matching.counts.items() if number)
    others = ", ".join(f"{number} to {target}" for target, number in sorted(matching.without_target.items()))
    stay = f" Those of targets that are not in MAYFLY_CONFIG stay as they are: {others}." if others else ""
    return (f"These match: {shown}." if shown else f"No delivery that is {wanted.chosen.state} matches.") + stay


def _confirm(found: int) -> bool:
    number = "1 delivery" if found == 1 else f"{found} deliveries"
    if is_terminal():
        return click.confirm(f"Send {number} again?")
    click.echo(f"mayfly: nothing was replayed; add --yes to send {number} again", err=True)
    return False


def _report(counts: ReplayCounts) -> str:
    parts = [f"{counts.replayed} {'is' if counts.replayed == 1 else 'are'} sent again"]
    if counts.already:
        parts.append(f"{counts.already} {'was' if counts.already == 1 else 'were'} due already")
    if counts.attempted:
        parts.append(f"{counts.attempted} {'is' if counts.attempted == 1 else 'are'} being attempted now")
    return "; ".join(parts) + f". {_SOON}"
