"""What the doctor finds out about the accounts: key, webhook secret and organisation of each, and the API's clock."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

import httpx

from service.commands.service_checks import Finding
from service.config.accounts import Account
from service.config.settings import Settings
from service.core.key import DEFAULT_ACCOUNT
from service.runtime.causes import describe_cause
from service.sync.organisation import OTHER_ORGANISATION, SECRET_PATH, is_same_organisation, read_secret

# The Date header has whole seconds, and the answer takes time: a smaller difference says nothing.
_SKEW_NOTED: Final = timedelta(seconds=30)
_API_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What the API answered to an account's key: a page of one generation, and the webhook secret."""

    page: httpx.Response
    secret: httpx.Response


async def check_accounts(settings: Settings, role: str) -> list[Finding]:
    """Check each account for *role*, the command that runs; the parts name the account unless there is only one."""
    accounts = settings.accounts
    answers = await asyncio.gather(*(_ask(settings.base_url, one) for one in accounts))
    found = []
    for one, answer in zip(accounts, answers, strict=True):
        label = "" if [mine.id for mine in accounts] == [DEFAULT_ACCOUNT] else f" of {one.id}"
        findings = [
            _check_secret(one, answer, role),
            _check_key(one, answer, role),
            *(_compare(one, answer.secret) if isinstance(answer, Answers) else ()),
        ]
        found += [Finding(f"{finding.part}{label}", finding.status, finding.detail) for finding in findings]
    # One API answers all keys, so its clock is compared once.
    dates = [answer.page.headers.get("date", "") for answer in answers if isinstance(answer, Answers)]
    return found + (check_clock(dates[0], settings.webhook_tolerance) if dates else [])


async def _ask(base_url: str, account: Account) -> Answers | str | None:
    """Ask the API with the key of *account*: return why there is no answer, or None without a key.

    To list one generation is the cheapest call that needs the key and changes nothing.
    """
    if account.keys.api_key is None:
        return None
    headers = {"x-api-key": account.keys.api_key.reveal(), "accept": "application/json"}
    try:
        async with asyncio.timeout(_API_SECONDS), httpx.AsyncClient(trust_env=False, follow_redirects=False) as client:
            page = await client.get(f"{base_url}/v2/generations", params={"limit": 1}, headers=headers)
            return Answers(page, await client.get(f"{base_url}{SECRET_PATH}", headers=headers))
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        return describe_cause(error)


def _check_secret(account: Account, answer: Answers | str | None, role: str) -> Finding:
    part, name, key_name = "webhook secret", account.secret_name, account.key_name
    if secrets := account.keys.webhook_secrets:
        return Finding(part, "ok", f"{len(secrets)} set by {name}")
    if role == "worker":
        return Finding(part, "ok", "not set, and not needed by worker")
    copy = f"copy the whsec_… secret from sync.so/settings/webhooks into {name}"
    if answer is None:
        return Finding(part, "failing", f"{name} is not set: {copy}, or set {key_name}, with which Mayfly fetches it")
    if isinstance(answer, Answers) and read_secret(answer.secret.status_code, answer.secret.content):
        return Finding(part, "ok", f"{name} is not set: it is fetched with {key_name} at each start")
    why = answer if isinstance(answer, str) else f"HTTP {answer.secret.status_code}"
    return Finding(part, "failing", f"{name} is not set, and cannot be fetched with {key_name} ({why}): {copy}")


def _check_key(account: Account, answer: Answers | str | None, role: str) -> Finding:
    name = account.key_name
    if answer is None and role == "api":
        return Finding("API key", "ok", "not set, and not needed by api")
    if answer is None:
        return Finding("API key", "failing", f"{name} is not set: put an API key of your sync.so organisation into it")
    if isinstance(answer, str):
        return Finding("API key", "failing", f"the API is unreachable ({answer}); check SYNC_BASE_URL and the network")
    return judge_page(answer.page.status_code, answer.page.content, name)


def judge_page(status: int, body: bytes, key_name: str) -> Finding:
    """Judge the API's answer to the key that the variable *key_name* has."""
    if status == 200 and body.lstrip().startswith(b"["):
        return Finding("API key", "ok", f"the API accepts {key_name}")
    if status == 200:
        return Finding("API key", "failing", "the answer is not the Sync API's; check SYNC_BASE_URL")
    if status in (401, 402, 403):
        return Finding("API key", "failing", f"the API refuses it ({status}); check {key_name} and the account")
    if 300 <= status < 400 or status == 404:
        return Finding("API key", "failing", f"this is not the Sync API ({status}); check SYNC_BASE_URL")
    return Finding("API key", "warning", f"the API answered {status}; try again later")


def _compare(account: Account, answer: httpx.Response) -> Sequence[Finding]:
    """Compare the webhook secrets with the key's organisation: with another one's key every generation seems gone."""
    is_same = is_same_organisation(answer.status_code, answer.content, account.keys.webhook_secrets)
    if is_same is None:
        return ()
    if is_same:
        return [Finding("organisation", "ok", "the API key and the webhook secret belong together")]
    detail = f"{OTHER_ORGANISATION}; check {account.secret_name} and {account.key_name}"
    return [Finding("organisation", "failing", detail)]


def check_clock(header: str, tolerance: timedelta) -> list[Finding]:
    """Compare this machine's clock with the API's Date *header*: signatures contain the time."""
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
