"""A peer's socket: one DEALER to one broker, at one address at a time."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence

import zmq

from broker.keys.addresses import connecting
from broker.protocol.limits import Limits
from broker.protocol.wire import Buffer
from broker.transport.kernel import Progress, borrow
from broker.transport.names import Lookup, Route
from broker.transport.sockets import HANDSHAKE_FAILED, Curve, Monitor, configure, has_message

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_MONITORED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | HANDSHAKE_FAILED
)


class Dealer:
    """A DEALER socket to one endpoint, opened anew when its owner wants that.

    A host's name is looked up at each opening, in a thread; ``wake`` is called when the answer is
    there for :meth:`advance`. Until then the addresses that are known from before are tried. With
    several addresses, one that refuses, or has said nothing for a moment, is followed by the next.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        curve: Curve | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.endpoint = endpoint
        self._context = context
        self._curve = curve
        self._address = connecting(endpoint)
        self._named = self._address.named
        self._lookup = Lookup(self._address.host, wake)
        self._route = Route([] if self._named else [self._address.host])
        self._descriptor = -1
        self._progress = Progress()
        #: why the last handshakes failed, as far as this side was told
        self._why = ""
        #: counts openings and closings: who waits for ``socket`` must look again
        self.generation = 0
        #: when the next address is to be tried, if this one says nothing
        self.next_at: float | None = None
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: Monitor | None = None
        self.reopen()

    def reopen(self) -> str:
        """Drop the connection and whatever is still queued for it; connect again.

        Where this process has no file descriptor left for that, the old socket stays. Says why
        there is no new one.
        """
        why = self._lookup.ask(time.monotonic()) if self._named else ""
        if self._route.addresses:
            return self._connect() or why
        self._drop()
        return why

    def advance(self, now: float) -> str:
        """Go to the next address where that is due, or the host has others now; why not."""
        answer = self._lookup.take()
        if answer is not None:
            addresses, why = answer
            if why:
                return "" if self._descriptor >= 0 else why
            self._route.found(addresses)
            if self._descriptor < 0 and self._route.current not in addresses:
                return self._connect()
        if self.next_at is not None and now >= self.next_at:
            return self._connect()
        return ""

    def worked(self) -> None:
        """A broker answers there: this address is tried first from now on."""
        self._route.worked()

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue a message; never blocks, for windows and credits bound what is queued."""
        if self.socket is not None:
            self.socket.send_multipart(frames, copy=False)

    def receive(self) -> list[zmq.Frame] | None:
        """The next message, or None."""
        if self.socket is None or not has_message(self.socket):
            return None
        return self.socket.recv_multipart(zmq.NOBLOCK, copy=False)

    def changes(self) -> list[tuple[bool, str]]:
        """For each connection made or lost, in order: whether made, and why it cannot be, if that
        is known.
        """
        changes: list[tuple[bool, str]] = []
        for event, value in self.monitor.read() if self.monitor is not None else ():
            if event == zmq.EVENT_CONNECTED:
                self._descriptor, self.next_at = value, None
                if _leads_to_itself(value):
                    self._drop()  # at once, for it has the port that a broker may want
                    return [*changes, (False, self._itself())]
                continue
            if event == zmq.EVENT_CLOSED:
                if why := self._refused():
                    return [*changes, (False, why)]
                continue
            made = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if not made:
                self._descriptor = -1
            self._why = "" if made else self._trouble(event, value) or self._why
            changes.append((made, self._why))
        return changes

    def moving(self) -> bool:
        """Whether a message has moved on its way, out or in, since this was asked last."""
        return self._descriptor >= 0 and self._progress.made(self._descriptor)

    def close(self, linger_s: float = 0.0) -> None:
        """Close the socket; what is queued may take ``linger_s`` to leave."""
        self._drop(linger_s)

    # -- inside -----------------------------------------------------------------------------------

    def _connect(self) -> str:
        """Open a socket to the next address of the route; why that cannot be."""
        try:
            fresh = self._open(self._route.next())
        except zmq.ZMQError as error:
            self.next_at = None
            if error.errno not in _NO_DESCRIPTORS:
                return f"cannot connect to {self.endpoint}: {error}"
            return "this process has no file descriptor left; raise its limit (ulimit -n)"
        self._drop()
        self.socket, self.monitor = fresh
        if len(self._route.addresses) > 1:
            self.next_at = time.monotonic() + self._route.patience_s
        return ""

    def _open(self, host: str) -> tuple[zmq.Socket[bytes], Monitor]:
        sock = self._context.socket(zmq.DEALER)
        monitor = None
        try:
            configure(sock, Limits(), self._curve)
            sock.ipv6 = ":" in host
            sock.reconnect_ivl = 50  # ms: a restarted broker is found again in no time
            sock.reconnect_ivl_max = 400  # however long it was away: full rate in a second
            monitor = Monitor(sock, _MONITORED)
            sock.connect(self._at(host) if self._named else self.endpoint)
        except zmq.ZMQError:
            if monitor is not None:
                monitor.close()
            sock.close(linger=0)
            raise
        return sock, monitor

    def _at(self, host: str) -> str:
        host = f"[{host}]" if ":" in host else host
        return f"tcp://{host}:{self._address.port}"

    def _drop(self, linger_s: float = 0.0) -> None:
        if self.socket is not None and self.monitor is not None:
            self.monitor.close()
            self.socket.close(linger=int(1000 * linger_s))
        self.socket = self.monitor = self.next_at = None
        self._descriptor = -1
        self.generation += 1

    def _refused(self) -> str:
        """Nothing listens at the current address. With others, go on to the next; after the last of
        a round say so, and have the owner wait before the next round.
        """
        if len(self._route.addresses) < 2:
            return ""  # libzmq tries it again, more often than we should
        if not self._route.round_over:
            return self._connect()
        tried = ", ".join(self._route.addresses)
        return f"no broker answers at {self.endpoint}, at none of its addresses ({tried})"

    def _itself(self) -> str:
        return (
            f"nothing listens at {self.endpoint}, and this process was connected to itself there "
            "(the port is one of those that this host gives to connections); is the broker running?"
        )

    def _trouble(self, event: int, value: int) -> str:
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return (
                f"the broker at {self.endpoint} does not accept this key here: it is not on its "
                "allow-list (--allow), or is there in another role (trainer, worker)"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            if value != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                return f"what listens at {self.endpoint} does not speak ZeroMQ as a broker does"
            if self._curve is not None:
                return f"the broker at {self.endpoint} has no key (draftmq broker --key), this has"
            return (
                f"the broker at {self.endpoint} lets only keys in, and this has none: give --key "
                "and --broker-key"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._curve and not self._why:
            return (
                f"the broker at {self.endpoint} broke the handshake off: its key is probably not "
                "the one given with --broker-key"
            )
        return ""


def _leads_to_itself(descriptor: int) -> bool:
    """Whether both ends of a TCP connection are the same: where a port is free, a connection to it
    from the same host may be given that very port.
    """

    def same(sock: socket.socket) -> bool:
        return sock.family != socket.AF_UNIX and sock.getsockname() == sock.getpeername()

    return borrow(descriptor, same, False)
