"""How things look on a terminal: the colour of each state, and where tables are printed."""

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
    """Return where tables are printed: as wide as the terminal, and never cut where no terminal is."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
