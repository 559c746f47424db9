"""Output on a terminal: the colour of each state, and the console for tables."""

import sys
from typing import Final

from rich.console import Console

from service.core.lifecycle import State

# The colour of each state, the same in every table.
STATE_STYLES: Final = {
    State.SCHEDULED: "yellow",
    State.DELETING: "cyan",
    State.DELETED: "green",
    State.FAILED: "bold red",
    State.HELD: "magenta",
    State.KEPT: "blue",
}


def console() -> Console:
    """Return the console for tables: as wide as the terminal, and 200 columns without one."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
