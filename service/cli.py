"""The mayfly command: its subcommands, and the processes that serve. A command loads only what it needs."""

import asyncio
import gc
import importlib
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import click

from service import __version__
from service.commands.suggesting import SuggestingGroup
from service.config.settings import Settings, require_api_key, require_key_or_secret
from service.runtime.metrics import Metrics

Side = Callable[[Settings, Any, Metrics, asyncio.Event], Awaitable[None]]

# Loaded on demand: loading all of them would add half a second to each start.
ELSEWHERE: Final[Mapping[str, str]] = {
    "demo": "service.commands.trying",
    "simulate": "service.commands.trying",
    "send": "service.commands.sending",
    "records": "service.commands.records",
    "explain": "service.commands.explaining",
    "batches": "service.commands.batches",
    "forwards": "service.commands.forwards",
    "stats": "service.commands.operating",
    "pause": "service.commands.operating",
    "resume": "service.commands.operating",
    "policy": "service.commands.policy",
    "sweep": "service.commands.sweeping",
    "doctor": "service.commands.doctor",
}


class Commands(SuggestingGroup):
    """A group that loads the module of a command on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Name all commands, those that run the service first."""
        return [*self.commands, *ELSEWHERE]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load the command of that name."""
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module(ELSEWHERE[cmd_name]), cmd_name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mayfly")
def main() -> None:
    """Delete sync.so generations once their time is up, after keeping a durable record of each.

    Everything is set by environment variables; the README lists them. Begin with `mayfly demo`.
    """


@main.command()
def up() -> None:
    """Run everything in one process: webhooks in, deletions out.

    Needs SYNC_API_KEY; SYNC_WEBHOOK_SECRET is fetched with it unless it is set. Without MAYFLY_DATABASE_URL and
    MAYFLY_REDIS_URL it keeps an SQLite ledger and a Redis of its own in MAYFLY_DATA_DIR. Ctrl-C or SIGTERM stops it
    after the deletions in progress.
    """
    from service.web.app import run_web  # noqa: PLC0415 - each command loads what it runs
    from workers.main import run_worker  # noqa: PLC0415

    _run_service([run_web, run_worker], require_api_key, is_migrating=True, is_deleting=True)


@main.command()
def api() -> None:
    """Run the web side: receive webhooks and serve the operator API.

    Needs SYNC_WEBHOOK_SECRET, or SYNC_API_KEY to fetch it with. Run as many as the traffic needs, on one PostgreSQL
    and one Redis.
    """
    from service.web.app import run_web  # noqa: PLC0415

    _run_service([run_web], require_key_or_secret)


@main.command()
@click.option("--check", is_flag=True, help="Only report, by the exit code, whether the worker here is alive.")
def worker(*, check: bool) -> None:
    """Run the worker, which deletes.

    Needs SYNC_API_KEY. Several may run at once: the ledger gives each record to one of them. It serves its own health
    and metrics on MAYFLY_HOST and MAYFLY_PORT, 8081 unless set; on one machine each needs a port of its own, and 0 lets
    the system choose one.
    """
    if check:
        from service.commands.running import settings_or_exit  # noqa: PLC0415
        from workers.heartbeat import is_alive  # noqa: PLC0415

        sys.exit(0 if is_alive(settings_or_exit().data_dir, now_seconds=time.time()) else 1)
    from service.web.app import run_worker_web  # noqa: PLC0415
    from workers.main import run_worker  # noqa: PLC0415

    _run_service([run_worker_web, run_worker], require_api_key, is_deleting=True, is_worker=True)


@main.command()
def migrate() -> None:
    """Migrate the ledger's tables to this release.

    `mayfly up` does it by itself. With `api` and `worker` on PostgreSQL, run it once before each new release.
    """
    from service.commands.running import run, settings_or_exit  # noqa: PLC0415
    from service.jobs.embedded_redis import prepare_data_dir  # noqa: PLC0415
    from service.ledger import migrating  # noqa: PLC0415
    from service.ledger.database import MIGRATION_SECONDS  # noqa: PLC0415
    from service.ledger.opening import open_database  # noqa: PLC0415

    async def work(settings: Settings) -> None:
        prepare_data_dir(settings.data_dir)
        async with open_database(settings.ledger_url, write_seconds=MIGRATION_SECONDS) as database:
            before, after = await database.write(migrating.migrate)
        click.echo(f"The ledger's tables are at {after}" + (" already." if before == after else "."))

    run(work(settings_or_exit()))


def _run_service(
    sides: list[Side],
    *requirements: Callable[[Settings], None],
    is_migrating: bool = False,
    is_deleting: bool = False,
    is_worker: bool = False,
) -> None:
    from service.commands.running import run, settings_or_exit, warn_of_policy  # noqa: PLC0415

    settings = settings_or_exit(*requirements, is_worker=is_worker)
    warn_of_policy(settings)
    _collect_rarely()
    run(_run_sides(settings, sides, is_migrating=is_migrating, is_deleting=is_deleting, is_receiving=not is_worker))


def _collect_rarely() -> None:
    """Exclude imported objects from garbage collection, and collect less often: a full collection took 50 ms.

    Measured with 256 connections: the p99 of a webhook was 81 ms before and 38 ms since.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


async def _run_sides(
    settings: Settings, sides: list[Side], *, is_migrating: bool, is_deleting: bool, is_receiving: bool
) -> None:
    """Run *sides* over one set of resources until a signal comes or one of them ends.

    Raises: SettingsError where the key is another organisation's; else what the first of them raised, after the others
    have finished.
    """
    from service.commands.running import on_stop  # noqa: PLC0415
    from service.resources import open_resources  # noqa: PLC0415
    from service.sync.organisation import (  # noqa: PLC0415
        check_organisations,
        fetch_secrets,
        warn_if_not_compared,
    )
    from service.web.server import check_address  # noqa: PLC0415

    stop = asyncio.Event()
    on_stop(stop.set)
    settings = await fetch_secrets(settings) if is_receiving else settings
    uncompared = await check_organisations(settings) if is_deleting else []
    metrics = Metrics()
    check_address(settings.host, settings.port)
    async with open_resources(settings, is_migrating=is_migrating) as resources:
        warn_if_not_compared(uncompared)
        # Not a TaskGroup: it would cancel the other side in the middle of its deletions.
        running = [_stop_after(side(settings, resources, metrics, stop), stop) for side in sides]
        ends = await asyncio.gather(*running, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            raise end


async def _stop_after(side: Awaitable[None], stop: asyncio.Event) -> None:
    """Stop the other side when one ends: half a service would look healthy."""
    try:
        await side
    finally:
        stop.set()
