"""One side's ROUTER socket, and what its transport says of connections."""

from __future__ import annotations

import collections
import errno
import os
import time
from collections.abc import Callable, Container
from typing import cast

import zmq

from broker.core import BadBytes, BrokerConfig, ConnectionLost, Event, Moving, Received, Send, Side
from broker.errors import BrokerError
from broker.protocol import RemoteProtocolError, VersionMismatchError, decode
from broker.transport.connections import Allowance, Connection, Connections, cut, peer_address
from broker.transport.local import LocalPath
from broker.transport.sockets import (
    HANDSHAKE_FAILED,
    Curve,
    Monitor,
    configure,
    has_message,
    receive,
)

#: Messages taken from one socket before the other gets a turn, and the time for it: a list of 4,000
#: requests takes 50 ms to read.
_BATCH, _BATCH_S = 64, 0.02
#: Failed handshakes whose connections are not gone yet.
_MAX_BROKEN = 64
#: The peer has closed its connection: before it said who it is, as probes of TCP ports do.
_HUNG_UP = (0, errno.EPIPE, errno.ECONNRESET)
#: How often strangers are looked at, while there are any connections.
_SWEEP_S = 0.2
#: What a connection that is gone said last is looked for so long, however much comes on others.
_LAST_WORDS_S = 1.0
#: What a frame takes on the wire beside its bytes, at the most: ZMTP's 9 bytes, CURVE's 33.
_FRAME_OVERHEAD_BYTES = 42
#: What a stopping broker waits for its goodbyes to leave.
_LINGER_S = 0.5


class Port:
    """One ROUTER socket, with what its transport says of lost connections.

    Connections are named by the ROUTER, not by the peers, so nobody can take another's name. A
    closed TCP connection is known at once: the monitor names its file descriptor, and so does
    each message that came from it. ``known`` are the connections that said hello; ``note`` logs.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        side: Side,
        address: str,
        config: BrokerConfig,
        known: Container[bytes],
        curve: Curve | None,
        note: Callable[..., None],
    ) -> None:
        self.side = side
        self.limits = config.limits
        self._keyed = curve is not None
        self._note = note
        self.connections = Connections(known, _allowance(side, config))
        #: after two missed heartbeats it is asked whether bytes flow
        self._silent_s = 2 * config.heartbeat_s
        self._next_sweep: float | None = None
        self._events: list[Event] = []
        #: connections that are gone, by name, and since when: until the ROUTER has been read empty
        #: their last messages may still lie there
        self._leaving: dict[bytes, tuple[Connection, float]] = {}
        #: why handshakes have failed, in the order in which their connections will be gone
        self._broken: collections.deque[str] = collections.deque(maxlen=_MAX_BROKEN)
        self.socket = context.socket(zmq.ROUTER)
        configure(self.socket, config.limits, curve)
        self.socket.router_mandatory = True
        self.socket.ipv6 = "[" in address
        self.socket.backlog = 4096
        self.monitor = Monitor(
            self.socket, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILED
        )
        self._path = LocalPath(address)
        self.received_bytes = 0
        self.sent_bytes = 0
        try:
            with self._path.taken():
                self.socket.bind(address)
        except BrokerError:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise BrokerError(
                f"cannot listen for {side.value}s on {address!r}: {error}; "
                + ("is another broker there? " if error.errno == zmq.EADDRINUSE else "")
                + f"choose another with --{side.value}s"
            ) from error
        self.endpoint = self.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._own_port = _port_of_endpoint(self.endpoint)

    def events(self, now: float, ready: Container[object]) -> list[Event]:
        """What came on sockets that are ``ready``, a batch at most."""
        if self.monitor.socket in ready:
            self._read_monitor(now)
        leaving = list(self._leaving.items())
        for _ in range(_BATCH if leaving or self.socket in ready else 0):
            message = receive(self.socket, self.limits.max_frames + 2)
            if message is None:
                break
            name, *frames = message
            nbytes = sum(map(len, frames))
            self.received_bytes += nbytes
            self._receive(name.bytes, frames, nbytes, now)
            if time.monotonic() >= now + _BATCH_S:
                break
        read_empty = not leaving or not has_message(self.socket)
        for gone, (connection, since) in leaving:
            if read_empty or now >= since + _LAST_WORDS_S:
                del self._leaving[gone]
                self._lost(connection)
        events, self._events = self._events, []
        return events

    @property
    def next_at(self) -> float | None:
        """When :meth:`events` or :meth:`sweep` have something to do, though nothing comes."""
        return 0.0 if self._leaving or self._events else self._next_sweep

    def wants_sweep(self, now: float) -> bool:
        """Whether strangers should be looked at."""
        due = self._next_sweep is not None and now >= self._next_sweep
        return due or self.connections.too_many_strangers

    def sweep(self, now: float, at_most: int) -> int:
        """Cut off strangers that are too many or take too long; how many."""
        surplus = self.connections.surplus(at_most)
        for connection in surplus:
            self._cut(connection, "too many connections without a hello")
        if self._next_sweep is not None and now >= self._next_sweep:
            for connection, why in self.connections.overdue(now) + self.connections.overdrawn():
                self._cut(connection, why)
            for connection in self.connections.moving(now, self._silent_s):
                self._events.append(Moving(self.side, connection.name))
            self._next_sweep = now + _SWEEP_S if len(self.connections) else None
        return len(surplus)

    def cut_off(self, name: bytes) -> str:
        """Close a connection; its peer's address, or "" where there is none."""
        connection = self.connections.named(name)
        if connection is None:
            return ""
        self.connections.closed(connection.descriptor)
        return cut(connection.descriptor, self._own_port)

    def cut_revoked(self, allowed: Callable[[str], bool]) -> None:
        """Cut off connections whose key may not connect any more."""
        for connection in self.connections:
            if connection.user and not allowed(connection.user):
                self._cut(connection, f"the key {connection.user} was revoked")

    def _read_monitor(self, now: float) -> None:
        for event, value in self.monitor.read():
            if event == zmq.EVENT_ACCEPTED:
                self.connections.accepted(value, now, peer_address(value, self._own_port))
                self._next_sweep = self._next_sweep or now + _SWEEP_S
            elif event == zmq.EVENT_DISCONNECTED:
                connection = self.connections.closed(value)
                if self._broken and (connection is None or not connection.name):
                    self._note_broken(self._broken.popleft(), connection)
                if connection is not None and connection.name:
                    self._leaving[connection.name] = connection, now
            else:  # of which connection the next tells that is gone without a word
                self._broken.append(_handshake(event, value))

    def _note_broken(self, why: str, connection: Connection | None) -> None:
        if why:
            address = connection.address if connection is not None else ""
            self._note("handshake_failed", side=self.side.value, address=address, why=why)

    def address_of(self, name: bytes) -> str:
        """The address of a connection's peer, or "" where there is none."""
        connection = self.connections.named(name)
        return connection.address if connection is not None else ""

    def _receive(self, name: bytes, frames: list[zmq.Frame], nbytes: int, now: float) -> None:
        connection = self._connection(name, frames, now)
        if connection is None:
            return
        connection.taken_bytes += nbytes + len(frames) * _FRAME_OVERHEAD_BYTES
        if frames[-1].more:
            self._cut(connection, f"a message of more than {len(frames)} frames")
            return
        if self.connections.too_strange(connection):
            self._cut(connection, "many messages and no hello")
            return
        try:
            packet = decode(frames, self.limits)
            self._events.append(Received(self.side, name, packet, connection.user))
        except RemoteProtocolError as error:
            other = isinstance(error, VersionMismatchError)
            self._events.append(BadBytes(self.side, name, str(error), other))

    def _connection(self, name: bytes, frames: list[zmq.Frame], now: float) -> Connection | None:
        """What a message came on; None where that is gone, for nobody waits for an answer then."""
        if not frames:
            return None
        try:
            descriptor = cast(int, frames[0].get(zmq.SRCFD))
            user = cast(str, frames[0].get("User-Id")) if self._keyed else ""
        except zmq.ZMQError:  # noise that passed for a ZMTP 1 peer has neither
            return None
        connection = self._speaker(descriptor, name, user, now)
        if connection is None:  # news of it waits in the monitor: accepted, closed, in use again
            self._read_monitor(now)
            if older := self.connections.displaced(descriptor, name):
                self._events.append(ConnectionLost(self.side, older))
            connection = self._speaker(descriptor, name, user, now)
        return connection

    def _speaker(self, descriptor: int, name: bytes, user: str, now: float) -> Connection | None:
        if name in self._leaving:
            return self._leaving[name][0]
        return self.connections.spoke(descriptor, name, user, now)

    def _cut(self, connection: Connection, why: str) -> None:
        address = cut(connection.descriptor, self._own_port)
        if address:
            self._note("cut_off", side=self.side.value, address=address, why=why)
        self._lost(self.connections.closed(connection.descriptor))

    def _lost(self, connection: Connection | None) -> None:
        if connection is not None and connection.name:
            self._events.append(ConnectionLost(self.side, connection.name))

    def send(self, action: Send) -> bool:
        """Queue a message; False when the connection is gone, and :meth:`events` will not say so
        when it has told what came on it last.
        """
        try:
            self.socket.send_multipart((action.connection, *action.frames), copy=False)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                self._read_monitor(time.monotonic())
                return action.connection in self._leaving
            raise
        nbytes = sum(map(len, action.frames))
        self.sent_bytes += nbytes
        self.connections.sent(action.connection, nbytes)
        return True

    def close(self) -> None:
        self._path.leave()
        self.monitor.close()
        self.socket.close(linger=int(1000 * _LINGER_S))


def _allowance(side: Side, config: BrokerConfig) -> Allowance:
    limits, of_clients = config.limits, side is Side.CLIENT
    return Allowance(
        config.hello_s,
        config.max_strangers,
        strange_bytes=limits.max_header_bytes + 65536,  # a hello, and some
        message_bytes=limits.max_request_bytes if of_clients else limits.max_reply_bytes,
        queued_bytes=config.max_client_bytes if of_clients else config.max_total_bytes,
    )


def _handshake(event: int, value: int) -> str:
    """Why a handshake failed; nothing where the peer merely hung up."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "the key is not allowed here"
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return "" if value in _HUNG_UP else os.strerror(value)
    if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return "one side has keys and the other has none (--key)"
    if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
        return "the peer expects another key of this broker (--broker-key)"
    return f"not ZeroMQ's handshake (protocol error {value:#x})"


def _port_of_endpoint(endpoint: str) -> object:
    kind, _, rest = endpoint.partition("://")
    return int(rest.rpartition(":")[2]) if kind == "tcp" else rest
