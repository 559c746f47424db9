"""Sending answers, also malformed ones that no framework sends."""

import asyncio
import contextlib
import ipaddress

from litestar.types import Scope, Send

from service.simulator.answers import Answer
from service.simulator.server import hang_up


async def respond(send: Send, answer: Answer, *, claimed_length: int | None = None) -> None:
    await _start(send, answer, claimed_length=claimed_length)
    await send({"type": "http.response.body", "body": answer.body, "more_body": claimed_length is not None})


async def truncate(scope: Scope, send: Send, answer: Answer) -> None:
    """Send half of the body with twice its Content-Length, then close the connection."""
    half = Answer(answer.status, answer.body[: len(answer.body) // 2], answer.content_type)
    await respond(send, half, claimed_length=len(answer.body) * 2)
    hang_up(scope)


async def drip(send: Send, answer: Answer, *, interval_seconds: float) -> None:
    await _start(send, answer)
    for byte in answer.body:
        await send({"type": "http.response.body", "body": bytes((byte,)), "more_body": True})
        await asyncio.sleep(interval_seconds)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def flood(send: Send, *, megabytes: int) -> None:
    """Send one JSON string of *megabytes*."""
    await _start(send, Answer(200, b""), claimed_length=megabytes << 20)
    chunk = b"x" * (1 << 20)
    for index in range(megabytes):
        body = b'"' + chunk[1:] if index == 0 else chunk
        await send({"type": "http.response.body", "body": body, "more_body": index < megabytes - 1})


async def _start(send: Send, answer: Answer, *, claimed_length: int | None = None) -> None:
    headers = [(b"content-type", answer.content_type), *answer.headers] if answer.status != 204 else []
    if answer.status != 204:
        length = len(answer.body) if claimed_length is None else claimed_length
        headers.append((b"content-length", b"%d" % length))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
