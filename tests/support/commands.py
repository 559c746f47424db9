"""Running a mayfly command inside the test process: a new process takes a second to start."""

import logging
import os

import structlog
from click.testing import CliRunner, Result

from service.cli import main


def command(*arguments: str, stdin: bytes = b"", **environment: str) -> Result:
    """Run a command with nothing set but *environment*. It brings its own loop: call it from a thread."""
    unset = dict.fromkeys(name for name in os.environ if name.startswith(("SYNC_", "MAYFLY_")))
    before = logging.getLogger().handlers[:]
    try:
        return CliRunner().invoke(main, list(arguments), input=stdin, env=unset | environment, catch_exceptions=False)
    finally:
        # It sends the logs to a stream that ends with it.
        structlog.reset_defaults()
        logging.getLogger().handlers[:] = before
