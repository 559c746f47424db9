"""Whether the API key and our webhook secrets belong to one organisation: with another one's key all seem gone.

Source: sync.so API v2 reference, "Get webhook secret"; an organisation has one secret.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import httpx
import msgspec
import structlog

from service.config.settings import Settings, SettingsError
from service.core.secret import Secret

log = structlog.get_logger()

SECRET_PATH: Final = "/v2/organizations/webhook/secret"  # noqa: S105 - a path
OTHER_ORGANISATION: Final = (
    "the API key's organisation has another webhook secret; check SYNC_WEBHOOK_SECRET and SYNC_API_KEY"
)
_SECONDS: Final = 5.0


def is_same_organisation(status: int, body: bytes, secrets: Sequence[Secret]) -> bool | None:
    """Whether one of *secrets* is in the API's answer; None where one of the two is not known."""
    if status != httpx.codes.OK or not secrets:
        return None
    try:
        theirs = msgspec.json.decode(body, type=dict[str, object]).get("secret")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    # What is not a whole secret, such as a masked one, proves nothing.
    if not isinstance(theirs, str) or not theirs.startswith("whsec_") or "*" in theirs:
        return None
    return Secret(theirs) in secrets


async def check_organisation(settings: Settings) -> str | None:
    """Compare the key with the webhook secrets where both are set; return why that was not possible.

    Raises: SettingsError if they belong to two organisations.
    """
    if settings.api_key is None or not settings.webhook_secrets:
        return None
    headers = {"x-api-key": settings.api_key.reveal(), "accept": "application/json"}
    try:
        async with asyncio.timeout(_SECONDS), httpx.AsyncClient(trust_env=False, follow_redirects=False) as client:
            answer = await client.get(f"{settings.base_url}{SECRET_PATH}", headers=headers)
        found, why = is_same_organisation(answer.status_code, answer.content, settings.webhook_secrets), "its answer"
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:  # TimeoutError is an OSError
        found, why = None, type(error).__name__
    if found is False:
        raise SettingsError([OTHER_ORGANISATION])
    return why if found is None else None


def warn_if_not_compared(why: str | None) -> None:
    """Log that key and webhook secret were not compared at the start, once the rest of it has succeeded."""
    if why is not None:
        what_now = "started without; mayfly doctor compares them again"
        log.warning("organisation.not_compared", error=why, what_now=what_now)
