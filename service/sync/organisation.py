"""Whether the API key and our webhook secrets belong to one organisation: with another one's key all seem gone.

Source: sync.so API v2 reference, "Get webhook secret"; an organisation has one secret.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import httpx
import msgspec
import structlog

from service.config.accounts import Keys
from service.config.settings import Settings, SettingsError
from service.core.secret import Secret
from service.runtime.causes import describe_cause

log = structlog.get_logger()

SECRET_PATH: Final = "/v2/organizations/webhook/secret"  # noqa: S105 - a path
OTHER_ORGANISATION: Final = "the API key's organisation has another webhook secret"
_SECONDS: Final = 5.0


def read_secret(status: int, body: bytes) -> Secret | None:
    """Return the webhook secret in the API's answer; None where it shows none, or not the whole of it."""
    if status != httpx.codes.OK:
        return None
    try:
        theirs = msgspec.json.decode(body, type=dict[str, object]).get("secret")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    # A masked one proves nothing.
    if not isinstance(theirs, str) or not theirs.startswith("whsec_") or "*" in theirs:
        return None
    return Secret(theirs)


def is_same_organisation(status: int, body: bytes, secrets: Sequence[Secret]) -> bool | None:
    """Whether one of *secrets* is in the API's answer; None where one of the two is not known."""
    theirs = read_secret(status, body)
    return None if theirs is None or not secrets else theirs in secrets


async def check_organisations(settings: Settings) -> list[str]:
    """Compare each account's key with its webhook secrets where both are set; return why that was not possible.

    Raises: SettingsError if they belong to two organisations.
    """
    compared = [one for one in settings.accounts if one.keys.api_key is not None and one.keys.webhook_secrets]
    answers = await asyncio.gather(*(_ask(settings.base_url, one.keys) for one in compared))
    others = [
        f"{OTHER_ORGANISATION}; check {one.secret_name} and {one.key_name}"
        for one, (theirs, _) in zip(compared, answers, strict=True)
        if theirs is not None and theirs not in one.keys.webhook_secrets
    ]
    if others:
        raise SettingsError(others)
    return [f"{one.id}: {why}" for one, (theirs, why) in zip(compared, answers, strict=True) if theirs is None]


async def fetch_secrets(settings: Settings) -> Settings:
    """Return *settings* with the webhook secret of each account that has an API key alone, as the API tells it.

    Raises: SettingsError where it does not.
    """
    bare = [one for one in settings.accounts if one.keys.api_key is not None and not one.keys.webhook_secrets]
    answers = await asyncio.gather(*(_ask(settings.base_url, one.keys) for one in bare))
    problems, keys = [], dict(settings.keys)
    for one, (theirs, why) in zip(bare, answers, strict=True):
        if theirs is None:
            problems.append(
                f"{one.secret_name} is not set, and could not be fetched with {one.key_name} ({why}): copy the whsec_… "
                "secret from sync.so/settings/webhooks into it"
            )
        else:
            keys[one.id] = replace(one.keys, webhook_secrets=(theirs,))
            log.info("organisation.secret_fetched", account=one.id, what_now="webhooks are verified with it")
    if problems:
        raise SettingsError(problems)
    return replace(settings, keys=keys)


async def _ask(base_url: str, keys: Keys) -> tuple[Secret | None, str]:
    """Ask the API for the webhook secret of the organisation; without one, return why."""
    headers = {"x-api-key": keys.api_key.reveal() if keys.api_key else "", "accept": "application/json"}
    try:
        async with asyncio.timeout(_SECONDS), httpx.AsyncClient(trust_env=False, follow_redirects=False) as client:
            answer = await client.get(f"{base_url}{SECRET_PATH}", headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:  # TimeoutError is an OSError
        return None, describe_cause(error)
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        return None, "the API refuses the key"
    secret = read_secret(answer.status_code, answer.content)
    return secret, "" if secret else f"its answer, HTTP {answer.status_code}, has no whole secret"


def warn_if_not_compared(reasons: Sequence[str]) -> None:
    """Log that key and webhook secret were not compared at the start, once the rest of it has succeeded."""
    for why in reasons:
        what_now = "started without; mayfly doctor compares them again"
        log.warning("organisation.not_compared", error=why, what_now=what_now)
