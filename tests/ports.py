"""Ports for processes that are told where to listen, and come back to the same place."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000

#: Each is held by an abstract socket of this name for as long as the process lives, so that two
#: runs of the tests beside each other cannot be given the same one.
_held: dict[int, socket.socket] = {}


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on and that no outgoing connection is given.

    A port of the system's own choice (bind to 0, close) can go to any connection that is opened
    before its process listens: these are taken from below the range of such ports.
    """
    for port in _candidates():
        if port not in _held and _is_free(port) and _hold(port):
            return port
    raise OSError(errno.EADDRINUSE, "no free port for a test")


def _candidates() -> Iterator[int]:
    try:
        lowest_outgoing = int(_RANGE.read_text().split()[0])
    except OSError:
        lowest_outgoing = 32_768
    ports = list(range(_LOWEST, max(lowest_outgoing, _LOWEST + 10_000)))
    random.SystemRandom().shuffle(ports)
    return iter(ports)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _hold(port: int) -> bool:
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0draftmq-test-port-{port}")
    except OSError:
        holder.close()
        return False
    _held[port] = holder
    return True
