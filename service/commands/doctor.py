"""`mayfly doctor`: checks everything that a deletion needs, and says what to do about each part that fails."""

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Final

import click
import httpx
import msgspec
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Connection, text

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
from service.config.rules_advice import find_warnings
from service.config.settings import Settings, SettingsError, require_api_key, require_webhook_secret
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
from service.sync.organisation import OTHER_ORGANISATION, SECRET_PATH, is_same_organisation

# The Date header has whole seconds, and the answer takes time: a smaller difference says nothing.
_SKEW_NOTED: Final = timedelta(seconds=30)
_API_SECONDS: Final = 10.0
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
    help="The command to check for: api needs no SYNC_API_KEY, worker no SYNC_WEBHOOK_SECRET.",
)
def doctor(*, is_json: bool, role: str) -> None:
    """Check the settings, the ledger, Redis, the API key and the clock, and say what to do.

    It changes no record, but commits a row of its own. It asks the API for a page of one generation, and what answers
    at MAYFLY_HOST and MAYFLY_PORT for its health. The exit code is 0 if nothing is failing, 1 if something is, 2 if the
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
    inside = (_check_webhook_secret, _check_policy, _check_data_dir, _check_dry_run)
    outside = (_check_ledger, _check_redis, _check_api, check_service)
    found = await asyncio.gather(*(check(settings) for check in (*inside, *outside)))
    return [_excuse(finding, settings, role) for findings in found for finding in findings]


def _excuse(finding: Finding, settings: Settings, role: str) -> Finding:
    """Accept that a secret is missing which *role* does not use."""
    is_unneeded = (role, finding.part) in {("api", "API key"), ("worker", "webhook secret")}
    is_set = settings.api_key if role == "api" else settings.webhook_secrets
    return Finding(finding.part, "ok", f"not set, and not needed by {role}") if is_unneeded and not is_set else finding


async def _check_webhook_secret(settings: Settings) -> list[Finding]:
    return [_check_required("webhook secret", require_webhook_secret, settings, f"{len(settings.webhook_secrets)} set")]


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


def _check_required(part: str, require: Callable[[Settings], None], settings: Settings, detail: str) -> Finding:
    try:
        require(settings)
    except SettingsError as error:
        return Finding(part, "failing", str(error))
    return Finding(part, "ok", detail)


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
            found += await database.read(partial(check_records, now=now))
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


async def _check_api(settings: Settings) -> list[Finding]:
    """List one generation: the cheapest call that needs the key and changes nothing."""
    required = _check_required("API key", require_api_key, settings, "")
    if settings.api_key is None:
        return [required]
    headers = {"x-api-key": settings.api_key.reveal(), "accept": "application/json"}
    try:
        async with asyncio.timeout(_API_SECONDS), httpx.AsyncClient(trust_env=False, follow_redirects=False) as client:
            answer = await client.get(f"{settings.base_url}/v2/generations", params={"limit": 1}, headers=headers)
            secret = await client.get(f"{settings.base_url}{SECRET_PATH}", headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        detail = f"the API is unreachable ({describe_cause(error)}); check SYNC_BASE_URL and the network"
        return [Finding("API key", "failing", detail)]
    return [
        _judge_answer(answer.status_code, answer.content),
        *_check_organisation(secret, settings.webhook_secrets),
        *_check_clock(answer.headers.get("date", ""), settings.webhook_tolerance),
    ]


def _judge_answer(status: int, body: bytes) -> Finding:
    if status == 200 and body.lstrip().startswith(b"["):
        return Finding("API key", "ok", "the API accepts it")
    if status == 200:
        return Finding("API key", "failing", "the answer is not the Sync API's; check SYNC_BASE_URL")
    if status in (401, 402, 403):
        return Finding("API key", "failing", f"the API refuses it ({status}); check SYNC_API_KEY and the account")
    if 300 <= status < 400 or status == 404:
        return Finding("API key", "failing", f"this is not the Sync API ({status}); check SYNC_BASE_URL")
    return Finding("API key", "warning", f"the API answered {status}; try again later")


def _check_organisation(answer: httpx.Response, secrets: Sequence[Secret]) -> list[Finding]:
    """Compare the webhook secrets with the key's organisation: with another one's key every generation seems gone."""
    is_same = is_same_organisation(answer.status_code, answer.content, secrets)
    if is_same is None:
        return []
    if is_same:
        return [Finding("organisation", "ok", "the API key and the webhook secret belong together")]
    return [Finding("organisation", "failing", OTHER_ORGANISATION)]


def _check_clock(header: str, tolerance: timedelta) -> list[Finding]:
    """Compare this machine's clock with the API's: signatures contain the time."""
    try:
        theirs = parsedate_to_datetime(header)
    except ValueError:
        return [Finding("clock", "warning", "the API's answer has no date to compare with")]
    skew = abs(datetime.now(UTC) - theirs.astimezone(UTC))
    if skew > _SKEW_NOTED:
        detail = (
            f"it differs from the API's by {skew.total_seconds():.0f} s; set it, or webhooks will be refused as stale"
        )
        return [Finding("clock", "failing" if skew > tolerance else "warning", detail)]
    return [Finding("clock", "ok", "it agrees with the API's")]


async def _check_dry_run(settings: Settings) -> list[Finding]:
    if not settings.is_dry_run:
        return []
    return [Finding("dry run", "warning", "MAYFLY_DRY_RUN is on: nothing is deleted")]
