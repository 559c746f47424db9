"""What the doctor finds out about the service itself: what answers at its port, its workers, records that wait."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Literal

import httpx
import msgspec
from sqlalchemy import Connection

from service.commands.running import is_ledger_missing, own_url
from service.config.settings import Settings
from service.core.lifecycle import State
from service.ledger import heartbeats, reading
from service.ledger.views import Stats, read_stats
from service.runtime.causes import describe_cause
from service.web.health import LATE, Health

# Longer than /health/ready takes, which answers within a second.
_ANSWER_SECONDS: Final = 5.0
_MAX_ANSWER: Final = 64 * 1024
_SHOWN_IDS: Final = 5


class Finding(msgspec.Struct, frozen=True):
    """The result for one part; *detail* says what to do if it is not ok."""

    part: str
    status: Literal["ok", "warning", "failing"]
    detail: str


async def check_service(settings: Settings) -> list[Finding]:
    """Ask MAYFLY_HOST and MAYFLY_PORT for /health/ready: nothing, Mayfly and its state, or something else is there."""
    if settings.port == 0:
        return []  # the system chooses it at each start
    url = own_url(settings)
    try:
        async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=_ANSWER_SECONDS) as client:
            answer = await client.get(f"{url}/health/ready")
    except httpx.ConnectError as error:
        return [_nothing_there(settings, url, describe_cause(error))]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        detail = f"what listens at {url} gives no answer ({describe_cause(error)}); check MAYFLY_HOST and MAYFLY_PORT"
        return [Finding("service", "failing", detail)]
    return [_judge_health(url, answer)]


def _nothing_there(settings: Settings, url: str, cause: str) -> Finding:
    detail = f"nothing answers at {url} ({cause})"
    if is_ledger_missing(settings):
        return Finding("service", "ok", f"{detail}: not started yet")
    return Finding("service", "warning", f"{detail}: start Mayfly, or check MAYFLY_HOST and MAYFLY_PORT")


def _judge_health(url: str, answer: httpx.Response) -> Finding:
    try:
        health = msgspec.json.decode(answer.content[:_MAX_ANSWER], type=Health)
    except msgspec.MsgspecError:
        detail = f"another program answers at {url} ({answer.status_code}); set MAYFLY_PORT to a port that is free"
        return Finding("service", "failing", detail)
    if health.status == "ok":
        return Finding("service", "ok", f"Mayfly is ready at {url}")
    parts = [f"{name}: {part.detail or part.status}" for name, part in health.parts.items() if part.status != "ok"]
    if health.status == "degraded":
        return Finding("service", "warning", f"Mayfly is ready at {url}, but {'; '.join(parts)}")
    return Finding("service", "failing", f"Mayfly is not ready at {url}: {'; '.join(parts)}")


def check_records(connection: Connection, accounts: Sequence[str], *, now: datetime) -> list[Finding]:
    """Judge what the ledger says of workers, deletions and records that wait for an operator.

    *accounts* are those that are configured.
    """
    stats = read_stats(connection, accounts, now=now)
    found = _judge_deletions(stats, now)
    if failed := stats.records[State.FAILED]:
        detail = f"{failed} given up, each needs an operator: {_name_some(connection, State.FAILED, failed)}"
        found.append(Finding("failed records", "warning", detail))
    if held := stats.records[State.HELD]:
        found.append(Finding("held records", "ok", f"{held} on hold: {_name_some(connection, State.HELD, held)}"))
    return found


def _judge_deletions(stats: Stats, now: datetime) -> list[Finding]:
    is_running, sentence = heartbeats.describe_worker(stats.worker_seen_at, now=now)
    found = [Finding("worker", "ok" if is_running else "warning", sentence)]
    has_several = len(stats.accounts) > 1
    for one in stats.pauses:
        part = f"deletions of {one.account or 'all accounts'}" if has_several else "deletions"
        found.append(Finding(part, "warning", f"paused ({one.kind}): {one.reason}"))
    paused = {one.account for one in stats.pauses}
    for account in stats.accounts:
        part = f"deletions of {account.account}" if has_several else "deletions"
        late = timedelta(seconds=account.oldest_overdue_seconds)
        if not account.configured and account.waiting:
            waiting = f"nothing deletes its {account.waiting} records, of which {account.due} are due"
            detail = f"the account is not configured: {waiting}; add its [[account]], or keep its records"
            found.append(Finding(part, "failing" if account.due else "warning", detail))
        elif late > LATE and not paused & {None, account.account}:
            detail = f"the oldest is {late // timedelta(minutes=1)} min overdue: check that a worker runs"
            found.append(Finding(part, "failing", detail))
    return found


def _name_some(connection: Connection, state: State, number: int) -> str:
    """Name the newest records of *state*, and the command that lists all of them."""
    page = reading.read_page(connection, wanted=reading.Filter(state=state), limit=_SHOWN_IDS, cursor=None)
    names = ", ".join(row.id for row in page.rows)
    more = f" and {number - len(page.rows)} more" if number > len(page.rows) else ""
    return f"{names}{more}; mayfly records list --state {state}"
