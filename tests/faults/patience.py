"""What takes a whole lease, a minute: played by a process of its own while the other fault tests run.

Here nothing is cut short: no lease is ended by SQL, no time is moved, no job is enqueued. What is found goes as JSON
to standard output, for test_whole_leases.py to judge.
"""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from service.simulator import Generation, Operation
from tests.faults.databases import migrated_sqlite
from tests.faults.processes import ROOT, Nursery
from tests.faults.system import System, running

# A lease, the wait of the one who finds that it has ended, and a machine that others use.
PATIENCE_SECONDS = 90


class Patience:
    """The process that plays it."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.patience", str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    def found(self) -> dict[str, Any]:
        """Wait for its end and return what it found."""
        output, _ = self._process.communicate(timeout=PATIENCE_SECONDS + 20)
        assert self._process.returncode == 0
        found: dict[str, Any] = json.loads(output)
        return found

    def close(self) -> None:
        """End it, if nobody has waited for it."""
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=20)


async def play(system: System) -> dict[str, Any]:
    """Kill a worker at two steps and freeze another one, and let a third find their records once the leases end."""
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
        await system.until(generation, "deleted", seconds=PATIENCE_SECONDS, is_hurried=False)
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


async def main(folder: Path) -> None:
    """Play it in *folder*."""
    nursery = Nursery()
    ledger = await migrated_sqlite(folder)
    try:
        async with running(nursery, folder, ledger) as system:
            print(json.dumps(await play(system)))
    finally:
        ledger.close()
        nursery.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
