"""The few things that all three services do with sockets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from broker.protocol.limits import Limits
from broker.protocol.wire import Buffer

#: 4 MiB took two-hop throughput from 0.53 to 0.8 GiB/s where the kernel's defaults are small.
_SOCKET_BUFFER_BYTES = 4 << 20
#: A handshake takes a few round trips. libzmq waits 30 s for one whose bytes were lost.
_HANDSHAKE_MS = 3000
_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def configure(sock: zmq.Socket[bytes], limits: Limits) -> None:
    """What every socket of ours has: no queue limits of its own (windows and credits bound what
    is in flight), a limit for the size of a frame, keepalive.
    """
    sock.linger = 0
    sock.sndhwm = 0
    sock.rcvhwm = 0
    sock.sndbuf = _SOCKET_BUFFER_BYTES
    sock.rcvbuf = _SOCKET_BUFFER_BYTES
    sock.maxmsgsize = max(limits.max_frame_bytes, limits.max_header_bytes)
    sock.tcp_keepalive = 1
    sock.handshake_ivl = _HANDSHAKE_MS


class Monitor:
    """What the transport says of a socket's connections."""

    def __init__(self, sock: zmq.Socket[bytes], events: int = _MONITORED) -> None:
        self._of = sock
        self.socket = sock.get_monitor_socket(events)

    def read(self) -> list[tuple[int, int]]:
        """``(event, file descriptor)`` of everything that happened since the last call."""
        happened = []
        while self.socket.poll(0):
            message: Any = recv_monitor_message(self.socket)
            happened.append((int(message["event"]), int(message["value"])))
        return happened

    def close(self) -> None:
        self._of.disable_monitor()
        self.socket.close(linger=0)


class Dealer:
    """A DEALER socket to one endpoint, opened anew when its owner wants that."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.endpoint = endpoint
        self._context = context
        self._open()

    def _open(self) -> None:
        self.socket = self._context.socket(zmq.DEALER)
        configure(self.socket, Limits())
        self.socket.reconnect_ivl = 50  # ms: a restarted broker is found again in no time
        self.socket.reconnect_ivl_max = 1000
        self.monitor = Monitor(self.socket)
        self.socket.connect(self.endpoint)

    def reopen(self) -> None:
        """Drop the connection and whatever is still queued for it; connect again."""
        self.close()
        self._open()

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue a message; never blocks, for windows and credits bound what is queued."""
        self.socket.send_multipart(frames, copy=False)

    def receive(self) -> list[zmq.Frame] | None:
        """The next message, or None."""
        try:
            return self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None

    def changes(self) -> list[bool]:
        """True for each connection made, False for each lost, in order."""
        return [event == zmq.EVENT_HANDSHAKE_SUCCEEDED for event, _ in self.monitor.read()]

    def close(self, linger_s: float = 0.0) -> None:
        """Close the socket; what is queued may take ``linger_s`` to leave."""
        self.monitor.close()
        self.socket.close(linger=int(1000 * linger_s))


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
        with contextlib.suppress(BlockingIOError):
            while self.reader.recv(4096):
                pass

    def close(self) -> None:
        self.reader.close()
        self._writer.close()


def poll(poller: zmq.Poller, next_timer: float | None, now: float) -> set[Any]:
    """Wait for sockets or for the next timer; what is ready, as registered (sockets, fds)."""
    wait_ms = None if next_timer is None else max(0, int(1000 * (next_timer - now)) + 1)
    return {ready for ready, _ in poller.poll(wait_ms)}
