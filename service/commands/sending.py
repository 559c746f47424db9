"""`mayfly send`: a signed webhook, as sync.so sends it, for the service or directly for the targets."""

import contextlib
import sys
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import BinaryIO, Final

import click
import httpx

from service.commands.forward_trial import Sample, require_targets, try_targets
from service.commands.running import EXIT_FAILED, as_json, fail, of_account, own_url, run, settings_or_exit
from service.config.settings import Settings, SettingsError, require_key_or_secret
from service.core.forwarding import choose_targets
from service.core.generation import MalformedError, read_generation
from service.core.key import DEFAULT_ACCOUNT, choose_account
from service.core.overrides import WEBHOOK_PATH
from service.core.signature import sign
from service.runtime.terminal import plain
from service.simulator import Generation
from service.simulator.generation import sample_input
from service.sync.organisation import fetch_secrets

_SEND_SECONDS: Final = 30.0
_STATUSES: Final = ("COMPLETED", "FAILED", "REJECTED", "PROCESSING")


@click.command()
@click.option(
    "--status", type=click.Choice(_STATUSES), default="COMPLETED", show_default=True, help="The sample's status."
)
@click.option("--id", "generation_id", help="The sample's generation id; a new one unless given.")
@click.option("--file", "body_file", type=click.File("rb"), help="Send this body instead of a sample; - is stdin.")
@click.option("--url", help="Where to; MAYFLY_HOST and MAYFLY_PORT unless given. Its query may have overrides.")
@click.option("--at", help="The send time to sign, such as 2026-12-31T00:00:00Z; now unless given.")
@click.option("--forward", "is_forward", is_flag=True, help="Show what each target would get, and post it there.")
@as_json
@of_account
def send(
    *,
    status: str,
    generation_id: str | None,
    body_file: BinaryIO | None,
    url: str | None,
    at: str | None,
    is_forward: bool,
    is_json: bool,
    account: str | None,
) -> None:
    """Sign a webhook with the webhook secret of the account, post it, and print the answer.

    The service that takes it forwards it to the targets of MAYFLY_CONFIG. With --forward it goes to those directly: no
    service needs to run, nothing is stored, and --url is only the sample's webhookUrl, which may have labels.

    The exit code is 0 for an answer of 2xx, of each target that gets it with --forward; 1 for any other answer or none.
    """
    if is_json and not is_forward:
        raise click.UsageError("--json is for --forward; without that, the answer is printed as it came")
    require_secret = partial(_require_secret, account=account)
    settings = settings_or_exit(require_secret, require_targets) if is_forward else settings_or_exit(require_secret)
    sender = choose_account(settings.account_ids, account)
    secret = run(_find_secret(settings, sender))
    target = url or f"{own_url(settings)}{WEBHOOK_PATH}{'' if sender == DEFAULT_ACCOUNT else f'/{sender}'}"
    body = body_file.read() if body_file else _sample_body(settings, status, generation_id or str(uuid.uuid4()), target)
    sample = Sample(sender, body, "application/json", sign(body, secret=secret, at=_parse_instant(at)))
    if is_forward:
        has_arrived = run(try_targets(settings, sample, is_json=is_json))
    else:
        has_arrived = _post(target, sample)
        _print_targets(settings, sample, is_forwarded=has_arrived)
    sys.exit(0 if has_arrived else EXIT_FAILED)


def _post(url: str, sample: Sample) -> bool:
    """Post *sample* to the service at *url*, print the answer, and return whether it was accepted."""
    headers = {"content-type": sample.content_type, "sync-signature": sample.signature}
    try:
        answer = httpx.post(url, content=sample.body, headers=headers, timeout=_SEND_SECONDS, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"no answer from {url.partition('?')[0]} ({type(error).__name__}): check that mayfly up runs there")
    click.echo(f"{answer.status_code} {plain(answer.reason_phrase)}", err=True)
    click.echo("\n".join(plain(line) for line in answer.text.split("\n")))
    return answer.is_success


def _print_targets(settings: Settings, sample: Sample, *, is_forwarded: bool) -> None:
    """Say on standard error to which targets a service with these settings forwards *sample*."""
    if not is_forwarded or not settings.targets:
        return
    with contextlib.suppress(MalformedError):  # what is no Mayfly may have taken it
        targets = choose_targets(settings.targets, sample.account, read_generation(sample.body))
        names = ", ".join(target.id for target in targets) or "no target"
        click.echo(f"With this MAYFLY_CONFIG the service forwards it to {names}: mayfly forwards list", err=True)


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
