"""A worker whose standard error cannot be written to."""

import os
from collections.abc import Sequence

from service import cli


def main(arguments: Sequence[str]) -> None:
    """Run ``mayfly worker`` with its standard error full, closed, or a pipe without a reader."""
    command, how = arguments
    if how == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    elif how == "closed":
        os.close(2)
    else:
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(reader)
    cli.main([command])
