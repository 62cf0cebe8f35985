"""The few things that all three services do with sockets."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import zmq

from broker.protocol.limits import Limits

#: Of the kernel's own choice, 1 MiB and 4 MiB this was fastest; more than a cache holds is slower
#: (docs/decisions/0008-wire-path.md).
_SOCKET_BUFFER_BYTES = 1 << 20
#: Time for a handshake, also on a loaded machine; what has not finished it then is closed.
_HANDSHAKE_MS = 5000
#: a plain number: ``&`` of pyzmq's enums takes longer than the question itself
_POLLIN = int(zmq.POLLIN)
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(frozen=True)
class Curve:
    """The keys of one end of a connection, 32 bytes each.

    ``server`` is the other end's public key on the side that connects. On the side that listens it
    is None, and ``domain`` is what the ZAP handler is asked about.
    """

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes | None = None
    domain: str = ""

    def apply(self, sock: zmq.Socket[bytes]) -> None:
        """Make a socket speak CURVE, and nothing else."""
        sock.curve_publickey = self.public
        sock.curve_secretkey = self.secret
        if self.server is not None:
            sock.curve_serverkey = self.server
        else:
            sock.curve_server = True
            sock.zap_domain = self.domain.encode()


def configure(sock: zmq.Socket[bytes], limits: Limits, curve: Curve | None = None) -> None:
    """What every socket of ours has: no queue limits of its own (windows and credits bound what
    is in flight), limits for the size of a frame and the time of a handshake, keepalive, and
    encryption if there are keys.
    """
    sock.linger = 0
    sock.sndhwm = 0
    sock.rcvhwm = 0
    sock.sndbuf = _SOCKET_BUFFER_BYTES
    sock.rcvbuf = _SOCKET_BUFFER_BYTES
    sock.maxmsgsize = max(limits.max_frame_bytes, limits.max_header_bytes)
    sock.tcp_keepalive = 1
    sock.handshake_ivl = _HANDSHAKE_MS
    if curve is not None:
        curve.apply(sock)


def has_message(sock: zmq.Socket[bytes]) -> bool:
    """Whether a message can be received; asking is cheaper than the exception that says no."""
    return bool(cast(int, sock.getsockopt(zmq.EVENTS)) & _POLLIN)


def receive(sock: zmq.Socket[bytes], max_frames: int) -> list[zmq.Frame] | None:
    """The frames of the next message, if there is one; of more than ``max_frames`` the first, the
    last of which says ``more``: libzmq limits the size of a frame and not their number.
    """
    if not has_message(sock):
        return None
    frames = [frame := sock.recv(zmq.NOBLOCK, copy=False)]
    while frame.more:
        frame = sock.recv(copy=False)
        if len(frames) < max_frames:
            frames.append(frame)
    return frames


#: number and value of an event, as libzmq's monitors send them
_EVENT = struct.Struct("=Hi")


class Monitor:
    """What the transport says of a socket's connections."""

    def __init__(self, sock: zmq.Socket[bytes], events: int) -> None:
        self._of = sock
        self.socket = sock.get_monitor_socket(events)

    def read(self) -> list[tuple[int, int]]:
        """``(event, file descriptor)`` of everything that happened since the last call."""
        happened: list[tuple[int, int]] = []
        while True:
            try:
                event, _ = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return happened
            happened.append(_EVENT.unpack(event))

    def close(self) -> None:
        self._of.disable_monitor()
        self.socket.close(linger=0)


#: wake-ups that are taken back at once
_WAKEUPS = 4096


class Wakeup:
    """Wakes a poller from another thread."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def set(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody is left to wake
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Take back every wake-up so far; what woke must be looked for after this."""
        with contextlib.suppress(BlockingIOError):
            while len(self.reader.recv(_WAKEUPS)) == _WAKEUPS:
                pass

    def close(self) -> None:
        self.reader.close()
        self._writer.close()


class Waiter:
    """Waits for sockets by their file descriptors.

    ``zmq.Poller`` asks libzmq about every socket before and after it sleeps, several system calls
    each. A descriptor of libzmq (``ZMQ_FD``) only tells of changes, and any call on its socket may
    take that news. So ``sockets``, which are sent on too, are asked once before sleeping. On
    ``monitors`` nothing is done but to read them empty: once asked they need no more than their
    descriptors.
    """

    def __init__(
        self,
        wakeup: Wakeup,
        sockets: Iterable[zmq.Socket[bytes]],
        monitors: Iterable[Monitor] = (),
    ) -> None:
        self._sockets = list(sockets)
        self._not_asked_yet = [monitor.socket for monitor in monitors]
        self._by_descriptor: dict[int, Any] = {wakeup.reader.fileno(): wakeup}
        for sock in (*self._sockets, *self._not_asked_yet):
            self._by_descriptor[cast(int, sock.getsockopt(zmq.FD))] = sock
        self._poll = select.poll()
        for descriptor in self._by_descriptor:
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, next_timer: float | None, now: float) -> set[Any]:
        """Wait for a socket, the wake-up or the next timer; which of them may have something."""
        asked = [*self._sockets, *self._not_asked_yet]
        self._not_asked_yet = []
        ready: set[Any] = {sock for sock in asked if has_message(sock)}
        wait_ms = None if next_timer is None else max(0, int(1000 * (next_timer - now)) + 1)
        for descriptor, _ in self._poll.poll(0 if ready else wait_ms):
            ready.add(self._by_descriptor[descriptor])
        return ready
