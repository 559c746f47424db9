"""Rows 14, 17 and 27 once more, with leases that end by themselves. It takes a minute; conftest.py puts it first."""

import asyncio
import signal
from typing import Any

import pytest

from service.simulator import Generation, Operation
from tests.faults.system import System

# A lease, the wait of the one who finds that it has ended, and a machine that others use.
_PATIENCE_SECONDS = 90


@pytest.mark.timeout(_PATIENCE_SECONDS + 60)
async def test_the_lease_of_a_killed_or_frozen_worker_ends_after_exactly_a_minute(system: System):
    found = await play(system)

    # Whoever takes over looks every five seconds.
    assert {name: 0 <= late < 12 for name, late in found.pop("late").items()} == dict.fromkeys(
        ("looking", "deleting", "asleep"), True
    )
    assert found == {
        # The first DELETE of the one was done and never answered.
        "deletes": {"looking": [200], "deleting": [None], "asleep": [200]},
        "attempts": {"looking": 2, "deleting": 2, "asleep": 2},
        "outcomes": {"looking": "deleted", "deleting": "deleted", "asleep": "deleted"},
        "is_overwritten": False,
        "exit_codes": [-signal.SIGKILL, None, None],
        "breaches": [],
    }


async def play(system: System) -> dict[str, Any]:
    """Kill a worker at two steps, freeze another one, and let a third find their records once the leases end.

    Nothing is cut short here: no lease is ended by SQL, no time is moved, and nothing is enqueued by the test.
    """
    await system.api()
    killed = await system.worker()
    looking = await system.accepted(system.generation(get=["hold"]))
    deleting = await system.accepted(system.generation(delete=["hold-after"]))
    await asyncio.gather(system.held(looking), system.held(deleting))
    await killed.kill()
    frozen = await system.worker()
    asleep = await system.accepted(system.generation(get=["hold"]))
    await system.held(asleep)
    frozen.send(signal.SIGSTOP)
    generations = {"looking": looking, "deleting": deleting, "asleep": asleep}
    leases = {row.id: row.wake_at for row in await system.ledger.rows() if row.state == "deleting"}
    heir = await system.worker()
    for generation in generations.values():
        await system.until(generation, "deleted", seconds=_PATIENCE_SECONDS, is_hurried=False)
    before = await system.ledger.rows()
    system.simulator.release(asleep.id)
    frozen.send(signal.SIGCONT)
    await frozen.logged("cleanup.lease_lost", seconds=15)

    def late(generation: Generation) -> float:
        """Return how long after its lease had ended the second attempt at *generation* began."""
        (_, second) = system.calls(generation, Operation.GET)
        ended_at = leases[generation.id]
        assert ended_at is not None
        return (second.at - ended_at).total_seconds()

    return {
        "late": {name: late(generation) for name, generation in generations.items()},
        "deletes": {name: [c.status for c in system.calls(one)] for name, one in generations.items()},
        "attempts": {name: (await system.row(one)).attempts for name, one in generations.items()},
        "outcomes": {name: (await system.row(one)).outcome for name, one in generations.items()},
        "is_overwritten": before != await system.ledger.rows(),
        "exit_codes": [process.exit_code for process in (killed, frozen, heir)],
        "breaches": (await system.judged()).all,
    }
