"""`mayfly doctor`: checks everything that a deletion needs, and says what to do about each part that fails."""

import asyncio
import os
import sys
import tempfile
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click
import msgspec
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Connection, text

from service.commands.account_checks import check_accounts
from service.commands.running import (
    EXIT_FAILED,
    as_json,
    is_ledger_missing,
    open_ledger,
    print_json,
    run,
    settings_or_exit,
)
from service.commands.service_checks import Finding, check_records, check_service
from service.commands.target_checks import check_deliveries, check_targets
from service.config.rules_advice import find_warnings
from service.config.settings import Settings
from service.core.overrides import WEBHOOK_PATH
from service.core.secret import Secret
from service.jobs import connection
from service.jobs.connection import QueueError
from service.jobs.embedded_redis import EmbeddedRedisError, embedded_redis
from service.ledger import migrating
from service.ledger.database import LedgerUnavailableError
from service.ledger.migrating import SchemaError
from service.runtime.causes import describe_cause
from service.runtime.terminal import console

_MARKS = {"ok": "[green]✓ ok[/]", "warning": "[yellow]! check[/]", "failing": "[bold red]✗ failing[/]"}


class Report(msgspec.Struct, frozen=True):
    """All findings; *ok* is false if a part is failing."""

    ok: bool
    findings: list[Finding]


@click.command()
@as_json
@click.option(
    "--role",
    type=click.Choice(["up", "api", "worker"]),
    default="up",
    show_default=True,
    help="The command to check for: api needs no API key, worker no webhook secret.",
)
def doctor(*, is_json: bool, role: str) -> None:
    """Check the settings, the ledger, Redis, the API key, the targets and the clock, and say what to do.

    It changes no record, but commits a row of its own. It asks the API with each account's key for a page of one
    generation and the webhook secret, and what answers at MAYFLY_HOST and MAYFLY_PORT for its health. It connects to
    each target and sends nothing there. The exit code is 0 if nothing is failing, 1 if something is, 2 if the
    settings are invalid.
    """
    findings = run(examine(settings_or_exit(is_worker=role == "worker"), role))
    report = Report(all(finding.status != "failing" for finding in findings), findings)
    if is_json:
        print_json(report)
    else:
        _print_report(report)
    sys.exit(0 if report.ok else EXIT_FAILED)


def _print_report(report: Report) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in report.findings:
        table.add_row(finding.part, _MARKS[finding.status], escape(finding.detail))
    console().print(table)


async def examine(settings: Settings, role: str = "up") -> list[Finding]:
    """Run all checks, also when some fail; *role* is the command that runs with these settings."""
    inside = (_check_policy, _check_data_dir, _check_dry_run)
    of_role = (partial(check_accounts, role=role), partial(check_targets, role=role))
    outside = (_check_ledger, _check_redis, *of_role, check_service)
    found = await asyncio.gather(*(check(settings) for check in (*inside, *outside)))
    return [finding for findings in found for finding in findings]


async def _check_policy(settings: Settings) -> list[Finding]:
    """Name the rules in force and what is odd about them, and where sync.so sends webhooks."""
    file, found = settings.rules_file, []
    if file.path is not None:
        warnings = find_warnings(file, min_ttl=settings.min_ttl, now=datetime.now(UTC))
        detail = "; ".join(warnings) or f"{len(file.rules.rules)} rules in {file.path}"
        found.append(Finding("policy", "warning" if warnings else "ok", detail))
    if settings.public_url is not None:
        found.append(Finding("public URL", "ok", f"the webhookUrl to set is {settings.public_url}{WEBHOOK_PATH}"))
    return found


def _nearest_existing(path: Path) -> tuple[Path, Path]:
    """Return the absolute *path*, and itself or its nearest parent that exists."""
    path = path.absolute()
    return path, next(one for one in (path, *path.parents) if one.exists())


async def _check_data_dir(settings: Settings) -> list[Finding]:
    """Check that the data directory is writable or can be made."""
    folder, nearest = _nearest_existing(settings.data_dir)
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [Finding("data dir", "failing", f"{nearest} is not writable; check MAYFLY_DATA_DIR")]
    made = "" if nearest == folder else ", does not exist yet: the first start makes it"
    return [Finding("data dir", "ok", f"{folder}{made}")]


async def _check_ledger(settings: Settings) -> list[Finding]:
    if is_ledger_missing(settings):
        return [Finding("ledger", "ok", "SQLite, does not exist yet: the first start makes it")]
    now = datetime.now(UTC)
    try:
        async with open_ledger(settings) as database:
            await database.write(partial(migrating.check_commits, now=now))
            found = await database.read(_check_durability)
            found += await database.read(partial(check_records, accounts=settings.account_ids, now=now))
            targets = [target.id for target in settings.targets]
            found += await database.read(partial(check_deliveries, targets=targets, now=now))
    except SchemaError as error:
        return [Finding("ledger", "failing", str(error))]
    except LedgerUnavailableError as error:
        return [Finding("ledger", "failing", f"{error}; check MAYFLY_DATABASE_URL and the disk")]
    kind = "PostgreSQL" if settings.ledger_url.get_backend_name() == "postgresql" else "SQLite"
    return [
        Finding("ledger", "ok", f"{kind}, its tables fit this release, and it commits"),
        *found,
    ]


def _check_durability(connection: Connection) -> list[Finding]:
    """Warn of a PostgreSQL that may lose what it has committed; synchronous_commit is set by Mayfly itself."""
    if connection.dialect.name != "postgresql":
        return []
    names = ("fsync", "full_page_writes")
    off = [n for n in names if connection.scalar(text("SELECT current_setting(:name)"), {"name": n}) == "off"]
    if not off:
        return []
    detail = f"{' and '.join(off)} off: a power cut can lose or destroy the ledger; set to on in postgresql.conf"
    return [Finding("durability", "warning", detail)]


async def _check_redis(settings: Settings) -> list[Finding]:
    """Check the Redis of MAYFLY_REDIS_URL; without one, start the embedded one in a temporary folder."""
    try:
        async with AsyncExitStack() as stack:
            if settings.redis_url is not None:
                return await _check_redis_at(settings.redis_url, "")
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mayfly-doctor-"))
            url = await stack.enter_async_context(embedded_redis(Path(folder)))
            return await _check_redis_at(url, ": the embedded one, in a trial")
    except EmbeddedRedisError as error:
        return [Finding("redis", "failing", str(error))]


async def _check_redis_at(url: Secret, detail: str) -> list[Finding]:
    pool = connection.connect(url, retries=0)
    try:
        warnings = await connection.check_config(pool)
    except QueueError as error:
        return [Finding("redis", "failing", str(error))]
    except connection.QUEUE_ERRORS as error:
        return [Finding("redis", "failing", f"it does not answer ({describe_cause(error)}); check MAYFLY_REDIS_URL")]
    finally:
        await pool.aclose(close_connection_pool=True)
    if warnings:
        return [Finding("redis", "warning", warning) for warning in warnings]
    return [Finding("redis", "ok", f"it answers, evicts no jobs and keeps them over a restart{detail}")]


async def _check_dry_run(settings: Settings) -> list[Finding]:
    if not settings.is_dry_run:
        return []
    return [Finding("dry run", "warning", "MAYFLY_DRY_RUN is on: nothing is deleted")]
