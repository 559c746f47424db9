"""`mayfly demo` and `simulate`: trying Mayfly out without a sync.so account."""

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

import click

from service.commands.running import EXIT_FAILED, EXIT_INTERRUPTED, fail, on_stop, run
from service.runtime.logging import configure_logging
from service.simulator import Simulator, serve_forever
from service.simulator.control import describe_routes
from service.simulator.wire import is_loopback

SIMULATOR_SECRET: Final = "whsec_simulator_only"  # noqa: S105 - of the simulator, protects nothing
_SECONDS: Final = click.FloatRange(0.01, 86_400)
_CONTROL_ROUTES: Final = "\n".join(f"  {route}\n      {sentence}" for route, sentence in describe_routes())


@click.command()
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Also save the most varied table as SVG."
)
def demo(picture: Path | None) -> None:
    """Show what Mayfly does, in under a minute, without keys or servers.

    A simulator of the Sync API and all of Mayfly run in this process, on real sockets, a real Redis and a ledger in a
    temporary folder. Generations complete or fail, the API answers with errors, and Mayfly copies and deletes. At the
    end the demo checks what was copied and deleted; the exit code is 0 if all of it is right.
    """
    from service.demo import run_demo  # noqa: PLC0415 - all of Mayfly, which simulate and send do not need

    async def work() -> bool:
        if (running := asyncio.current_task()) is not None:
            on_stop(running.cancel)
        return await run_demo(picture)

    try:
        sys.exit(0 if run(work()) else EXIT_FAILED)
    except asyncio.CancelledError:
        sys.exit(EXIT_INTERRUPTED)


@click.command(
    epilog=f"""These routes control it, with JSON and, from this machine, without a key. What they take is in
deploy/docs/reference.md, "The simulator"; an error says which field is wrong.

\b
{_CONTROL_ROUTES}

\b
  curl -X PATCH http://127.0.0.1:8090/simulator/switches -d '{{"outage": true}}'
"""
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8090,
    show_default=True,
    help="Port to listen on; 0 lets the system choose.",
)
@click.option("--api-key", default="sk-simulator", show_default=True, help="The key that it accepts.")
@click.option("--webhook-secret", default=SIMULATOR_SECRET, show_default=True, help="The secret that it signs with.")
@click.option("--webhook-url", help="Make sample generations, and send their webhooks there.")
@click.option("--every", type=_SECONDS, default=5.0, show_default=True, help="Seconds between two samples.")
@click.option("--processing", type=_SECONDS, default=2.0, show_default=True, help="Seconds that a sample takes.")
@click.option("--count", type=click.IntRange(1), help="How many samples to make; unlimited unless given.")
@click.option("--allow-remote", is_flag=True, help="Allow an address that other machines can reach.")
def simulate(
    *,
    host: str,
    port: int,
    api_key: str,
    webhook_secret: str,
    webhook_url: str | None,
    every: float,
    processing: float,
    count: int | None,
    allow_remote: bool,
) -> None:
    """Run a simulator of the Sync API, for development and tests.

    It has the routes of the API that the official SDKs call, in memory: generations, batches, assets and models. It
    sends signed webhooks, and its output URLs lead to a few bytes of media.
    """
    if not allow_remote and not is_loopback(host):
        fail(f"the simulator is for this machine alone; --allow-remote lets it listen on {host}")
    configure_logging(None)
    run(
        _run_simulator(
            host=host,
            port=port,
            api_key=api_key,
            webhook_secret=webhook_secret,
            webhook_url=webhook_url,
            every_seconds=every,
            processing_seconds=processing,
            count=count,
            allow_remote=allow_remote,
        )
    )


async def _run_simulator(*, host: str, port: int, **options: Any) -> None:  # noqa: ANN401 - serve_forever() has their types
    def print_directions(simulator: Simulator) -> None:
        if (serving := asyncio.current_task()) is not None:
            on_stop(serving.cancel)
        click.echo(_directions(simulator.url, options["api_key"], options["webhook_secret"], options["webhook_url"]))

    try:
        await serve_forever(host=host, port=port, on_ready=print_directions, **options)
    except asyncio.CancelledError:
        return
    except OSError as error:
        fail(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port")


def _directions(url: str, api_key: str, webhook_secret: str, webhook_url: str | None) -> str:
    samples = (
        f"It sends the webhooks of sample generations to {webhook_url}."
        if webhook_url
        else "With --webhook-url 'http://127.0.0.1:8080/webhooks/sync?ttl=1m' it also makes samples and sends webhooks."
    )
    return f"""The simulator of the Sync API listens at {url}. Point Mayfly at it, in another terminal:

  export SYNC_BASE_URL={url}
  export SYNC_API_KEY={api_key}
  export SYNC_WEBHOOK_SECRET={webhook_secret}
  mayfly up

{samples} Ctrl-C ends it."""
