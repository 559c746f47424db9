"""`mayfly demo`, `simulate` and `send`: trying Mayfly out, with or without a sync.so account."""

import asyncio
import sys
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import click
import httpx

from service.commands.running import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    fail,
    of_account,
    on_stop,
    own_url,
    run,
    settings_or_exit,
)
from service.config.settings import Settings, SettingsError, require_key_or_secret
from service.core.key import DEFAULT_ACCOUNT, choose_account
from service.core.overrides import WEBHOOK_PATH
from service.core.signature import sign
from service.runtime.logging import configure_logging
from service.runtime.terminal import plain
from service.simulator import Generation, Simulator, serve_forever
from service.simulator.control import describe_routes
from service.simulator.generation import sample_input
from service.simulator.wire import is_loopback
from service.sync.organisation import fetch_secrets

SIMULATOR_SECRET: Final = "whsec_simulator_only"  # noqa: S105 - of the simulator, protects nothing
_SEND_SECONDS: Final = 30.0
_SECONDS: Final = click.FloatRange(0.01, 86_400)
_CONTROL_ROUTES: Final = "\n".join(f"  {route}\n      {sentence}" for route, sentence in describe_routes())
_STATUSES: Final = ("COMPLETED", "FAILED", "REJECTED", "PROCESSING")


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


@click.command()
@click.option(
    "--status", type=click.Choice(_STATUSES), default="COMPLETED", show_default=True, help="The sample's status."
)
@click.option("--id", "generation_id", help="The sample's generation id; a new one unless given.")
@click.option("--file", "body_file", type=click.File("rb"), help="Send this body instead of a sample; - is stdin.")
@click.option("--url", help="Where to; MAYFLY_HOST and MAYFLY_PORT unless given. Its query may have overrides.")
@click.option("--at", help="The send time to sign, such as 2026-12-31T00:00:00Z; now unless given.")
@of_account
def send(
    *,
    status: str,
    generation_id: str | None,
    body_file: BinaryIO | None,
    url: str | None,
    at: str | None,
    account: str | None,
) -> None:
    """Sign a webhook with the webhook secret of the account, post it, and print the answer.

    The exit code is 0 for an answer of 2xx, 1 for any other answer or none.
    """
    settings = settings_or_exit(partial(_require_secret, account=account))
    sender = choose_account(settings.account_ids, account)
    secret = run(_find_secret(settings, sender))
    target = url or f"{own_url(settings)}{WEBHOOK_PATH}{'' if sender == DEFAULT_ACCOUNT else f'/{sender}'}"
    body = body_file.read() if body_file else _sample_body(settings, status, generation_id or str(uuid.uuid4()), target)
    headers = {"content-type": "application/json", "sync-signature": sign(body, secret=secret, at=_parse_instant(at))}
    try:
        answer = httpx.post(target, content=body, headers=headers, timeout=_SEND_SECONDS, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"no answer from {target.partition('?')[0]} ({type(error).__name__}): check that mayfly up runs there")
    click.echo(f"{answer.status_code} {plain(answer.reason_phrase)}", err=True)
    click.echo("\n".join(plain(line) for line in answer.text.split("\n")))
    sys.exit(0 if answer.is_success else EXIT_FAILED)


def _require_secret(settings: Settings, *, account: str | None) -> None:
    """Raise SettingsError unless the account to send for has a secret to sign with."""
    sender = choose_account(settings.account_ids, account)
    if sender not in settings.keys:
        raise SettingsError([f"there is no account {sender!a}: there is {', '.join(settings.account_ids)}"])
    require_key_or_secret(_only(settings, sender))


async def _find_secret(settings: Settings, account: str) -> bytes:
    """Return the webhook secret of *account*, fetched with its key where it is not set, as the service does.

    Raises: SettingsError.
    """
    found = await fetch_secrets(_only(settings, account))
    return found.keys[account].webhook_secrets[0].reveal().encode()


def _only(settings: Settings, account: str) -> Settings:
    return replace(settings, keys={account: settings.keys[account]})


def _sample_body(settings: Settings, status: str, generation_id: str, url: str) -> bytes:
    sample = Generation(
        id=generation_id,
        status=status,
        created_at=datetime.now(UTC),
        token=str(uuid.uuid4()),
        url=settings.base_url,
        input=sample_input(text=False),
        webhook_url=url,
    )
    return sample.notification()


def _parse_instant(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter("an instant such as 2026-12-31T00:00:00Z", param_hint="--at") from None
    if instant.tzinfo is None:
        raise click.BadParameter("it needs a time zone, such as 2026-12-31T00:00:00Z", param_hint="--at")
    return instant
