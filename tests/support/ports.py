"""Ports for servers that a test starts, kills and starts again."""

import random
import socket
from pathlib import Path

_FIRST = 10_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_CHOICE = random.SystemRandom()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on and that no outgoing connection will be given.

    The kernel's own choice, for port 0, is out of the range that it gives to outgoing connections as well: until the
    server under test listens there, or while it is down, any client on the machine may get that very port.
    """
    while True:
        port = _CHOICE.randrange(_FIRST, _first_ephemeral())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _first_ephemeral() -> int:
    try:
        first = int(_EPHEMERAL.read_text().split()[0])
    except OSError:  # not Linux: macOS begins at 49152
        return 49_152
    # A machine that gives out all ports leaves none to keep clear of.
    return first if first > _FIRST + 1000 else 2**16
