"""What the doctor finds out about the targets that webhooks are forwarded to: can they be reached, what waits for them.

Nothing is sent to a target: a connection, with TLS for https, changes nothing in an app. `mayfly send --forward` posts.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Final

import httpx
from sqlalchemy import Connection

from service.commands.service_checks import Finding
from service.config.settings import Settings
from service.core.forwarding import Target
from service.core.overrides import WEBHOOK_PATH
from service.forwarding.posting import make_tls
from service.ledger.delivery_reading import COUNTED, count_open
from service.runtime.causes import describe_cause
from service.web.health import LATE

_CONNECT_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 1.0
_PORTS: Final = {"http": 80, "https": 443}


async def check_targets(settings: Settings, role: str) -> list[Finding]:
    """Connect to each target, unless *role*, the command that runs, is api, which forwards nothing itself."""
    if role == "api" or not settings.targets:
        return []
    tls = make_tls()
    return list(await asyncio.gather(*(_check_target(target, tls) for target in settings.targets)))


async def _check_target(target: Target, tls: ssl.SSLContext) -> Finding:
    part = f"target {target.id}"
    try:
        url = httpx.URL(target.url.reveal())
    except httpx.InvalidURL:
        return Finding(part, "failing", "its url is invalid: check it in MAYFLY_CONFIG")
    port = url.port or _PORTS[url.scheme]
    where = f"{url.scheme}://{url.netloc.decode()}"
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await _connect(url.raw_host.decode(), port, tls if url.scheme == "https" else None)
    except TimeoutError:
        return _judge_failure(part, where, f"no connection within {_CONNECT_SECONDS:g} s")
    except socket.gaierror as error:
        return _judge_failure(part, where, f"its name cannot be resolved: {error.strerror}")
    except OSError as error:
        return _judge_failure(part, where, describe_cause(error))
    if f"{WEBHOOK_PATH}/" in f"{url.path}/":
        detail = f"its path is that of a Mayfly's webhooks ({WEBHOOK_PATH}): set its url to that of your app"
        return Finding(part, "warning", detail)
    signed = "" if target.secrets else "; without secret_env, apps cannot verify what is late"
    detail = f"{where} accepts connections; mayfly send --forward sends it a webhook{signed}"
    return Finding(part, "ok", detail)


async def _connect(host: str, port: int, tls: ssl.SSLContext | None) -> None:
    """Connect, and close again.

    Raises: OSError, of TLS as well.
    """
    _, writer = await asyncio.open_connection(host, port, ssl=tls)
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await writer.wait_closed()


def _judge_failure(part: str, where: str, cause: str) -> Finding:
    detail = (
        f"{where} is not reached ({cause}); its webhooks wait, for three days at most: check its url and the network"
    )
    return Finding(part, "failing", detail)


def check_deliveries(connection: Connection, targets: Collection[str], *, now: datetime) -> list[Finding]:
    """Judge what the ledger says of deliveries; *targets* are those that are configured."""
    counts = count_open(connection)
    found = []
    for target, one in counts.items():
        waiting, since = f"{_describe_number(one.waiting)} wait", one.waiting_since
        part, listed = f"deliveries to {target}", f"mayfly forwards list --target {target} --state waiting"
        if since is not None and target not in targets:
            advice = "add its [[forward]] again, or they fail after three days"
            detail = f"{waiting}, and nobody sends them: the target is not configured; {advice}; {listed}"
            found.append(Finding(part, "warning", detail))
        elif since is not None and now - since > LATE:
            detail = f"{waiting}, the oldest for {(now - since) // timedelta(minutes=1)} min"
            found.append(Finding(part, "warning", f"{detail}: check its app and that a worker runs; {listed}"))
    if failed := [f"{_describe_number(one.failed)} to {target}" for target, one in counts.items() if one.failed]:
        detail = f"{', '.join(failed)}: not sent again, unless you replay them; mayfly forwards list --state failed"
        found.append(Finding("failed deliveries", "warning", detail))
    return found


def _describe_number(counted: int) -> str:
    return f"{counted} or more" if counted >= COUNTED else str(counted)
