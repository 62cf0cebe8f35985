"""What the kernel knows of libzmq's connections.

libzmq hands a message over when all of its frames are here, so a large reply on a slow network is
silence to everybody above it, heartbeats waiting behind it. The kernel counts its bytes.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import TypeVar

from broker.protocol.limits import KIB

#: Where ``tcpi_bytes_acked`` and ``tcpi_bytes_received`` lie in Linux's ``struct tcp_info``.
_ACKED_AT, _RECEIVED_AT = 120, 128
#: So many are a message on its way; heartbeats alone, which the kernel of a
#: peer that hangs would take too, are far fewer.
_LEAST_MOVED = 64 * KIB

T = TypeVar("T")


class Progress:
    """Whether bytes flow on one connection."""

    def __init__(self) -> None:
        self._seen = 0

    def made(self, descriptor: int) -> bool:
        """Whether a message has moved on, either way, since the last time that it had."""
        moved = sum(tcp_bytes(descriptor))
        if abs(moved - self._seen) < _LEAST_MOVED:  # less than before: another connection
            return False
        self._seen = moved
        return True


def tcp_bytes(descriptor: int) -> tuple[int, int]:
    """Bytes that the other end's kernel acknowledged and that this one received; zeros where it
    does not say, as of local sockets.
    """
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return 0, 0

    def ask(sock: socket.socket) -> tuple[int, int]:
        info = sock.getsockopt(socket.IPPROTO_TCP, option, _RECEIVED_AT + 8)
        acked, received = info[_ACKED_AT:_RECEIVED_AT], info[_RECEIVED_AT:]
        return int.from_bytes(acked, sys.byteorder), int.from_bytes(received, sys.byteorder)

    return borrow(descriptor, ask, (0, 0))


def borrow(descriptor: int, use: Callable[[socket.socket], T], otherwise: T) -> T:
    """Use libzmq's descriptor as a socket, which stays libzmq's; ``otherwise`` where it is none."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return otherwise
    try:
        return use(sock)
    except OSError:
        return otherwise
    finally:
        sock.detach()
