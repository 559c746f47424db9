"""What the doctor finds out about the targets that webhooks are forwarded to: can they be reached, what waits for them.

Nothing is sent to a target: a connection, with TLS for https, changes nothing in an app. `mayfly send --forward` posts.
"""

import asyncio
import contextlib
import socket
import ssl
from typing import Final

import httpx

from service.commands.service_checks import Finding
from service.config.settings import Settings
from service.core.forwarding import Target
from service.core.overrides import WEBHOOK_PATH
from service.forwarding.posting import make_tls
from service.runtime.causes import describe_cause

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
