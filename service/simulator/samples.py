"""`mayfly simulate`: a simulator that runs until it is stopped, and makes sample generations."""

import asyncio
from collections.abc import Callable
from itertools import count as counting
from itertools import islice

from service.simulator.simulator import Simulator

# The samples' final statuses, in turn; most succeed, as in production.
ENDINGS = ("COMPLETED", "COMPLETED", "FAILED", "COMPLETED", "REJECTED")


async def serve_forever(
    *,
    host: str = "127.0.0.1",
    port: int = 8090,
    api_key: str = "sk-simulator",
    webhook_secret: str = "whsec_simulator_only",  # noqa: S107 (protects nothing)
    webhook_url: str | None = None,
    every_seconds: float = 5.0,
    processing_seconds: float = 2.0,
    count: int | None = None,
    allow_remote: bool = False,
    on_ready: Callable[[Simulator], None] = lambda _: None,
) -> None:
    """Serve until cancelled; *on_ready* is called once with the simulator, which listens at its ``url``.

    With a *webhook_url* it makes a sample generation every *every_seconds*, *count* of them or without end.

    Raises: ValueError for a host that other machines can reach, unless *allow_remote*; OSError for a port in use.
    """
    simulator = Simulator(api_key=api_key, webhook_secret=webhook_secret)
    async with simulator.serve(host=host, port=port, allow_remote=allow_remote):
        on_ready(simulator)
        if webhook_url is not None:
            for number in islice(counting(), count):
                add_sample(simulator, number, webhook_url, processing_seconds=processing_seconds)
                await asyncio.sleep(every_seconds)
        await asyncio.Event().wait()


def add_sample(simulator: Simulator, number: int, webhook_url: str, *, processing_seconds: float) -> None:
    """Add sample *number*: the final statuses alternate, and every third has a text input."""
    simulator.add(
        status=ENDINGS[number % len(ENDINGS)],
        text_input=number % 3 == 1,
        webhook_url=webhook_url,
        output_file_name=f"take {number + 1}",
        processing_seconds=processing_seconds,
    )
