"""`mayfly sweep`: adopt generations that no webhook told of, now; or plan it, edit the plan, and apply it."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

import click
from arq.connections import ArqRedis

from service.commands.record_moves import DurationType, is_terminal
from service.commands.running import (
    EXIT_FAILED,
    EXIT_SETTINGS,
    actor,
    as_json,
    fail,
    open_ledger,
    print_json,
    run,
    settings_or_exit,
)
from service.commands.sweep_plan import NEW, Plan, PlanError, PlanLine, read_plan, write_plan
from service.commands.sweep_report import (
    SweepReport,
    describe_first,
    make_report,
    note_adopted,
    print_report,
    progress_bar,
)
from service.config.accounts import Account
from service.config.settings import Settings, require_api_key
from service.core.adopting import Scope
from service.core.key import Key
from service.core.lifecycle import IllegalMoveError, Move, State
from service.jobs import connection
from service.jobs.embedded_redis import embedded_redis, prepare_data_dir
from service.ledger import moving, reading
from service.ledger.database import Database
from service.runtime.metrics import Metrics
from service.runtime.terminal import plain
from service.sync.client import open_sync_api
from service.sync.rate_limit import Budget, SpareCalls
from workers.sweep import Found, Sweeper

# How long one call waits for deletions that need the whole budget.
_CALL_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the command line asks for, with a scope for each account; *plans* has what is applied."""

    scopes: Sequence[Scope]
    is_dry_run: bool
    is_asking: bool
    is_json: bool
    plan_path: Path | None
    plans: Mapping[str, Plan]


@click.command()
@click.option("--account", help="Only this account; else all that are swept.")
@click.option("--older-than", type=DurationType(), help="Only generations that were created so long ago, such as 30d.")
@click.option(
    "--all", "is_all", is_flag=True, help="Whatever their webhookUrl is, other people's and the Studio's too."
)
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only show what would be adopted.")
@click.option("--plan", "plan", type=click.Path(dir_okay=False, path_type=Path), help="Write a plan, adopt nothing.")
@click.option("--apply", "applied", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="Adopt a plan.")
@click.option("--yes", is_flag=True, help="Do not ask before --all and --apply.")
@as_json
def sweep(
    account: str | None,
    older_than: timedelta | None,
    plan: Path | None,
    applied: Path | None,
    *,
    is_all: bool,
    is_dry_run: bool,
    yes: bool,
    is_json: bool,
) -> None:
    """List the generations at sync.so and adopt those whose webhook did not come.

    Workers do the same each hour. Adopted are those whose webhookUrl is the account's under MAYFLY_PUBLIC_URL, and what
    `adopt` in MAYFLY_CONFIG says. Each is kept for its whole ttl from now on. What has a record stays as it is.

    For an account that has generations already: --older-than 30d --all --plan FILE writes what would be adopted, a line
    for each. Delete lines, or put "hold": "reason" into them; then --apply FILE adopts those lines and nothing else.
    """
    if applied is not None and (is_all or older_than is not None or plan is not None):
        raise click.UsageError("--apply takes what is in the file: leave out --all, --older-than and --plan")
    if plan is not None and plan.exists():
        raise click.UsageError(f"{plan} is there already, perhaps edited: name another file")
    settings = settings_or_exit(require_api_key)
    accounts = _select_accounts(settings, account)
    plans = {} if applied is None else _read_plan_or_exit(applied, [one.id for one in accounts])
    if applied is None:
        created_before = None if older_than is None else datetime.now(UTC) - older_than
        scopes = _select_scopes(settings, accounts, is_all=is_all, created_before=created_before)
    else:
        scopes = [mine.scope(name, settings.public_url) for name, mine in plans.items()]
    is_rehearsed = is_dry_run or plan is not None
    is_asking = (is_all or applied is not None) and not yes and not is_rehearsed
    if is_asking and (is_json or not is_terminal()):
        fail("nothing was adopted: it would schedule deletions, and nobody can be asked; add --yes, or --dry-run")
    wanted = _Wanted(scopes, is_rehearsed, is_asking, is_json, plan, plans)
    sys.exit(EXIT_FAILED if run(_sweep_all(settings, wanted)) else 0)


def _select_accounts(settings: Settings, name: str | None) -> list[Account]:
    found = [one for one in settings.accounts if name in (None, one.id)]
    if not found:
        names = ", ".join(one.id for one in settings.accounts)
        click.echo(f"mayfly: no account has that name; there is {plain(names)}", err=True)
        sys.exit(EXIT_SETTINGS)
    return found


def _select_scopes(
    settings: Settings, accounts: Sequence[Account], *, is_all: bool, created_before: datetime | None
) -> list[Scope]:
    scopes = [Scope(one.id, settings.public_url, "all" if is_all else one.adopt, created_before) for one in accounts]
    found = [scope for scope in scopes if not scope.is_empty]
    if not found:
        advice = "set MAYFLY_PUBLIC_URL, or `adopt` of the account in MAYFLY_CONFIG, or add --all"
        click.echo(f"mayfly: nothing is known to be yours: {advice}", err=True)
        sys.exit(EXIT_SETTINGS)
    return found


def _read_plan_or_exit(path: Path, accounts: Sequence[str]) -> dict[str, Plan]:
    try:
        return read_plan(path, accounts)
    except PlanError as error:
        for problem in error.problems:
            click.echo(f"mayfly: {plain(problem)}", err=True)
        fail("nothing was adopted: correct the plan, and apply it again")
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")


async def _sweep_all(settings: Settings, wanted: _Wanted) -> int:
    """Sweep each account, and return how many of them failed; a plan is written once all are complete."""
    reports: list[SweepReport] = []
    lines: list[PlanLine] = []
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_ledger(settings))
        pool = await stack.enter_async_context(_open_budget_store(settings))
        for scope in wanted.scopes:
            sweeper = _make_sweeper(settings, scope, database, partial(Budget, pool=pool))
            report = await _sweep_one(sweeper, wanted, lines)
            reports.append(report)
            if not wanted.is_json:
                print_report(report, has_several=len(wanted.scopes) > 1, now=datetime.now(UTC))
            if report.failure is not None:
                advice = "nothing of this account was adopted; try again"
                click.echo(f"mayfly: {plain(scope.account)}: {plain(report.failure)}; {advice}", err=True)
    failed = sum(report.failure is not None or bool(report.not_held) for report in reports)
    if wanted.plan_path is not None and not failed:
        _write_plan_or_exit(wanted.plan_path, lines, is_json=wanted.is_json)
    if wanted.is_json:
        print_json(reports)
    return failed


@asynccontextmanager
async def _open_budget_store(settings: Settings) -> AsyncIterator[ArqRedis]:
    """Open the Redis that has the budget: the workers', or the embedded one, which `mayfly up` shares."""
    async with AsyncExitStack() as stack:
        redis_url = settings.redis_url
        if redis_url is None:
            prepare_data_dir(settings.data_dir)
            redis_url = await stack.enter_async_context(embedded_redis(settings.data_dir))
        pool = connection.connect(redis_url, retries=1)
        stack.push_async_callback(pool.aclose, close_connection_pool=True)
        yield pool


def _write_plan_or_exit(path: Path, lines: Sequence[PlanLine], *, is_json: bool) -> None:
    try:
        write_plan(path, lines)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
    if not is_json:
        click.echo(f"{plain(str(path))} has {len(lines)} lines. Edit it, then: mayfly sweep --apply {plain(str(path))}")


def _make_sweeper(settings: Settings, scope: Scope, database: Database, make_budget: Callable[..., Budget]) -> Sweeper:
    (account,) = (one for one in settings.accounts if one.id == scope.account)
    key = account.keys.api_key
    assert key is not None  # noqa: S101 - require_api_key()
    metrics, stopping = Metrics(), asyncio.Event()
    budget = make_budget(account.rate, key=key, clock=time.monotonic, stopping=stopping)
    return Sweeper(
        scope=scope,
        policy=settings.policy,
        database=database,
        open_api=partial(
            open_sync_api, settings.base_url, key, connections=1, metrics=metrics, on_throttled=budget.close_for
        ),
        acquire=partial(SpareCalls(budget, time.monotonic).wait, _CALL_SECONDS, stopping),
        now=lambda: datetime.now(UTC),
        metrics=metrics,
        actor=f"sweep by {actor()}",
    )


async def _sweep_one(sweeper: Sweeper, wanted: _Wanted, lines: list[PlanLine]) -> SweepReport:
    """List, and adopt unless it is a dry run or the operator says no; add to *lines* those of a plan."""
    account = sweeper.scope.account
    with progress_bar(account) as progress:
        found = await sweeper.find(progress)
    plan = wanted.plans.get(account, Plan())
    now = datetime.now(UTC)
    report = make_report(account, found, first_due_at=_first_due_at(sweeper, found, plan, now))
    if found.listing.failure is not None:
        return report
    report.vanished = sorted(plan.ids - {item.generation.id for item in found.listing.items})
    if wanted.plan_path is not None:
        lines += _plan_lines(sweeper, found, now)
    is_refused = found.unknown and wanted.is_asking and not _confirm(report, plan, found, now)
    if wanted.is_dry_run or is_refused:
        return report
    adopted = await sweeper.adopt(found.unknown, holds=plan.holds)
    note_adopted(report, adopted)
    await _hold_known(sweeper, plan, report)
    return report


async def _hold_known(sweeper: Sweeper, plan: Plan, report: SweepReport) -> None:
    """Hold what the plan holds and what had a record: who wrote a hold into its line relies on it."""
    for generation_id, reason in plan.holds.items():
        key = Key(sweeper.scope.account, generation_id)
        row = await sweeper.database.read(partial(reading.find_row, key=key))
        if row is None or row.state in (State.HELD, State.KEPT):
            continue  # also what was adopted just now
        hold = partial(moving.move_record, key=key, wanted=Move.HOLD, actor=sweeper.actor, reason=reason)
        try:
            await sweeper.database.write(partial(hold, now=datetime.now(UTC)))
            report.held_now += 1
        except IllegalMoveError as error:
            report.not_held.append(f"{generation_id}: {error}")


def _confirm(report: SweepReport, plan: Plan, found: Found, now: datetime) -> bool:
    held = sum(item.generation.id in plan.holds or item.generation.id in found.held for item in found.unknown)
    parts = [f"{len(found.unknown)} generations are adopted now, {held} of them on hold."]
    parts += [f"{len(found.known)} are known already and stay as they are."] if found.known else []
    parts += [f"{len(report.vanished)} of the plan are no longer there."] if report.vanished else []
    click.echo(" ".join([*parts, describe_first(report.first_due_at, now)]))
    return click.confirm("Adopt them?")


def _first_due_at(sweeper: Sweeper, found: Found, plan: Plan, now: datetime) -> datetime | None:
    """Return the first due time of what would be scheduled if it were adopted *now*."""
    free = (
        item.generation
        for item in found.unknown
        if item.generation.id not in plan.holds and item.generation.id not in found.held
    )
    decided = (sweeper.decide(generation, now=now) for generation in free)
    return min((one.due_at for one in decided if one.due_at is not None and one.hold_reason is None), default=None)


def _plan_lines(sweeper: Sweeper, found: Found, now: datetime) -> Iterator[PlanLine]:
    for item in found.listing.items:
        generation = item.generation
        known, retention = found.known.get(generation.id), sweeper.decide(generation, now=now)
        yield PlanLine(
            generation.id,
            sweeper.scope.account,
            generation.created_at,
            generation.status,
            generation.model,
            generation.project_id,
            generation.output_file_name,
            str(known.state) if known else NEW,
            known.due_at if known else retention.due_at,
            known.rule if known else retention.rule,
            None if known else found.held.get(generation.id, retention.hold_reason),
        )
