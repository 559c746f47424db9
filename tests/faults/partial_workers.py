"""Workers with one part left out or wrong, to show what it is for; no setting of Mayfly does this."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

import workers.account
import workers.target
from service import cli
from service.core.forwarding import Reply
from service.forwarding.posting import Outgoing
from service.ledger import requiring
from service.ledger.outcomes import Copy, CopyResult
from workers.attempt import Cleaner


class NoSafetyNet:
    """In place of the safety net: nothing is enqueued again, nothing is cleaned from the ledger, no lease ends."""

    def __init__(self, *, stopping: asyncio.Event, **_parts: Any) -> None:  # noqa: ANN401
        self._stopping = stopping

    async def run(self) -> None:
        """Do nothing until the worker stops."""
        await self._stopping.wait()


async def no_copy(_copy: Copy) -> CopyResult:
    """Report a stored copy without storing one."""
    return CopyResult.KEPT


def without_copy(**parts: Any) -> Cleaner:  # noqa: ANN401
    """Return a cleaner without its copy step."""
    return Cleaner(**(parts | {"copy": no_copy}))


class NoPoster:
    """In place of a poster: all is well, and nothing is sent."""

    async def post(self, _webhook: Outgoing) -> Reply:
        """Answer for the target."""
        return Reply(200)


@asynccontextmanager
async def without_posts(*_parts: Any) -> AsyncIterator[NoPoster]:  # noqa: ANN401
    """Open a poster that sends nothing."""
    yield NoPoster()


def no_requirements(*_parts: Any, **_others: Any) -> set[int]:  # noqa: ANN401
    """Let no record wait."""
    return set()


def crashing_at(generation_id: str) -> Callable[..., Cleaner]:
    """Return a factory of cleaners that raise an error for one generation."""

    def build(**parts: Any) -> Cleaner:  # noqa: ANN401
        async def copy(item: Copy) -> CopyResult:
            if item.claim.key.id == generation_id:
                raise KeyError("a fault")
            kept: CopyResult = await parts["copy"](item)
            return kept

        return Cleaner(**(parts | {"copy": copy}))

    return build


class Clock:
    """A clock that jumps: an hour ahead at SIGUSR1, an hour back at SIGUSR2."""

    def __init__(self) -> None:
        self._off = timedelta(0)
        signal.signal(signal.SIGUSR1, lambda *_: self._jump(timedelta(hours=1)))
        signal.signal(signal.SIGUSR2, lambda *_: self._jump(timedelta(hours=-1)))

    def now(self) -> datetime:
        """Return the time of this clock."""
        return datetime.now(UTC) + self._off

    def _jump(self, difference: timedelta) -> None:
        self._off += difference
        structlog.get_logger().info("clock.jumped", off=self._off.total_seconds())


def main(arguments: Sequence[str]) -> None:
    """Run ``mayfly worker`` without what the last of *arguments* names."""
    command, left_out = arguments
    parts: Any = workers.account
    targets: Any = workers.target
    requirements: Any = requiring
    if left_out == "safety net":
        parts.Overdue = NoSafetyNet
    elif left_out == "copy":
        parts.Cleaner = without_copy
    elif left_out == "net of deliveries":
        targets.Net = NoSafetyNet
    elif left_out == "posts":
        targets.open_poster = without_posts
    elif left_out == "requirements":
        requirements.keep_waiting = no_requirements
    elif left_out.startswith("crash"):
        parts.Cleaner = crashing_at(left_out.removeprefix("crash"))
    elif left_out == "a steady clock":
        parts._now = targets._now = Clock().now
    cli.main([command])
