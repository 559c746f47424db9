"""Ports for servers that a test starts, kills and starts again."""

import random
import socket
from collections.abc import Iterator
from pathlib import Path

_FIRST = 10_000
_BLOCK = 100
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on and that no outgoing connection will be given.

    The kernel's own choice, for port 0, is out of the range that it gives to outgoing connections as well: until the
    server under test listens there, or while it is down, any client on the machine may get that very port.

    Nor does another process of the tests get it: each takes from a block of its own.
    """
    return next(port for port in _PORTS if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _own_ports() -> Iterator[int]:
    """Yield the ports of one block, over and over."""
    firsts = list(range(_FIRST, _first_ephemeral() - _BLOCK, _BLOCK))
    random.SystemRandom().shuffle(firsts)
    for first in firsts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as claim:
            # The block is ours for as long as this process has the UDP port of its first number.
            try:
                claim.bind(("127.0.0.1", first))
            except OSError:
                continue
            while True:
                yield from range(first, first + _BLOCK)
    raise RuntimeError("all blocks of ports are taken")


def _first_ephemeral() -> int:
    try:
        first = int(_EPHEMERAL.read_text().split()[0])
    except OSError:  # not Linux: macOS begins at 49152
        return 49_152
    # A machine that gives out all ports leaves none to keep clear of.
    return first if first > _FIRST + 1000 else 2**16


_PORTS = _own_ports()
