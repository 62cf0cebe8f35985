"""A ROUTER's connections as the transport sees them, and how to be rid of one.

libzmq has no call that drops one connection of a ROUTER. But its monitor tells each connection's
file descriptor, and :func:`cut` shuts that down, which libzmq sees as the peer's leaving.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from broker.transport.kernel import Progress, borrow, tcp_bytes

#: Messages taken from a connection before its hello; a peer of ours sends a handful at most.
_STRANGE_MESSAGES = 64
#: Connections with a session that are looked at in one sweep: 2 ms for all.
_LOOKS = 256
#: What the kernel may hold beyond the message in hand, twice libzmq's buffer for a socket.
_SLACK_BYTES = 16 << 20
#: A name that the ROUTER gives a connection.
_NAME_BYTES = 5
_LINGER_NOT = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Connection:
    """One accepted connection. ``name`` is the ROUTER's, once it said anything."""

    descriptor: int
    since: float
    #: of the peer, as ``HOST:PORT``; "" where it could not be seen any more
    address: str = ""
    name: bytes = b""
    user: str = ""
    messages: int = 0
    #: bytes that came on it while it had a session, which are not held against it
    excused_bytes: int = 0
    heard_at: float = 0.0
    progress: Progress = field(default_factory=Progress)
    #: whether ``progress`` was looked at since the last message
    watched: bool = False
    #: on the wire: all messages that we have taken, and those that we have sent
    taken_bytes: int = 0
    sent_bytes: int = 0
    largest_bytes: int = 0
    #: what had been taken when far more than that had come
    suspected_at_bytes: int = -1

    def account(self, acked_bytes: int, received_bytes: int) -> tuple[int, int]:
        """``(queued, unfinished)`` bytes: sent and not on the peer's machine, come and not taken.

        What the kernel has counted beyond our own count is written off: handshakes, ZMTP's pings.
        """
        self.sent_bytes = max(self.sent_bytes, acked_bytes)
        self.taken_bytes = min(self.taken_bytes, received_bytes)
        return self.sent_bytes - acked_bytes, received_bytes - self.taken_bytes


@dataclass(frozen=True)
class Allowance:
    """What connections may do: until a hello is accepted, and afterwards.

    A stranger has ``hello_s`` to say hello, may send ``strange_bytes`` and a few messages until
    then, and there are at most ``max_strangers``: over that the oldest goes, since an honest hello
    takes milliseconds. With a session a connection may send ``message_bytes`` until a message ends,
    and leave ``queued_bytes`` and one message untaken. libzmq has no limit for either, but the
    kernel counts the bytes of each connection.
    """

    hello_s: float
    max_strangers: int
    strange_bytes: int
    message_bytes: int = 1 << 62
    queued_bytes: int = 1 << 62


class Connections:
    """Connections by descriptor: *strangers*, oldest first, until the core knows them.

    ``known`` are the ROUTER's names of connections with a session.
    """

    def __init__(self, known: Container[bytes], allowance: Allowance) -> None:
        self._known_names = known
        self._allowance = allowance
        self._by_name: dict[bytes, Connection] = {}
        self._strangers: dict[int, Connection] = {}
        self._known: dict[int, Connection] = {}

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known)

    @property
    def n_strangers(self) -> int:
        return len(self._strangers)

    @property
    def too_many_strangers(self) -> bool:
        return len(self._strangers) > self._allowance.max_strangers

    def __iter__(self) -> Iterator[Connection]:
        yield from list(self._strangers.values())
        yield from list(self._known.values())

    def accepted(self, descriptor: int, now: float, address: str = "") -> None:
        """A connection came, from this address."""
        self.closed(descriptor)
        self._strangers[descriptor] = Connection(descriptor, now, address)

    def spoke(self, descriptor: int, name: bytes, user: str, now: float) -> Connection | None:
        """A message came on it; None where no connection of this name is known to have it."""
        connection = self._at(descriptor)
        if connection is None or connection.name not in (b"", name):
            return None
        connection.name, connection.user = name, user
        connection.heard_at, connection.watched = now, False
        self._by_name[name] = connection
        return connection

    def displaced(self, descriptor: int, name: bytes) -> bytes:
        """The name that was taken to have this descriptor and cannot, for ``name`` came later; or
        b"". The last message of a connection that is gone may come after the next was given its
        descriptor, and lay a claim to it.
        """
        connection = self._at(descriptor)
        if connection is None or not _later(name, connection.name):
            return b""
        older, connection.name = connection.name, b""
        self._by_name.pop(older, None)
        return older

    def named(self, name: bytes) -> Connection | None:
        """The connection that the ROUTER calls so."""
        return self._by_name.get(name)

    def sent(self, name: bytes, nbytes: int) -> None:
        """A message was queued for it."""
        connection = self._by_name.get(name)
        if connection is not None:
            connection.sent_bytes += nbytes
            connection.largest_bytes = max(connection.largest_bytes, nbytes)

    def too_strange(self, connection: Connection) -> bool:
        """Count a message; whether that was one too many for a connection without a hello."""
        if connection.name in self._known_names:
            connection.messages = 0
            return False
        connection.messages += 1
        return connection.messages > _STRANGE_MESSAGES

    def closed(self, descriptor: int) -> Connection | None:
        """It is gone; what was known of it."""
        known = self._known.pop(descriptor, None) or self._strangers.pop(descriptor, None)
        if known is not None:
            self._by_name.pop(known.name, None)
        return known

    def _at(self, descriptor: int) -> Connection | None:
        return self._known.get(descriptor) or self._strangers.get(descriptor)

    def surplus(self, at_most: int) -> list[Connection]:
        """The strangers that must go for no more than ``at_most`` connections to remain."""
        found: list[Connection] = []
        strangers = iter(list(self._strangers.values()))
        while (
            len(self._strangers) - len(found) > self._allowance.max_strangers
            or len(self) - len(found) > at_most
        ) and (connection := next(strangers, None)):
            if connection.name in self._known_names:
                self._known[connection.descriptor] = self._strangers.pop(connection.descriptor)
            else:
                found.append(connection)
        return found

    def overdrawn(self) -> list[tuple[Connection, str]]:
        """Connections with a session that send without end, or do not take what is theirs.

        A few in each call, in turns.
        """
        found = []
        for connection in list(itertools.islice(self._known.values(), _LOOKS)):
            self._known[connection.descriptor] = self._known.pop(connection.descriptor)
            acked, received = tcp_bytes(connection.descriptor)
            if not received:  # the kernel does not say, as of local sockets
                continue
            queued, unfinished = connection.account(acked, received)
            if queued > self._allowance.queued_bytes + connection.largest_bytes + _SLACK_BYTES:
                found.append((connection, f"{queued} bytes that it does not take"))
            elif unfinished <= self._allowance.message_bytes + _SLACK_BYTES:
                connection.suspected_at_bytes = -1
            elif connection.suspected_at_bytes != connection.taken_bytes:
                # whole messages, perhaps, that we have not come to; the next look will tell
                connection.suspected_at_bytes = connection.taken_bytes
            else:
                found.append((connection, f"{unfinished} bytes and no end of the message"))
        return found

    def moving(self, now: float, silent_s: float) -> list[Connection]:
        """Those with a session, silent for so long, on which a message is still on its way."""
        found = []
        for connection in self._known.values():
            if now < connection.heard_at + silent_s:
                continue
            made = connection.progress.made(connection.descriptor)
            if connection.watched and made:
                connection.heard_at = now
                found.append(connection)
            connection.watched = True
        return found

    def overdue(self, now: float) -> list[tuple[Connection, str]]:
        """Strangers whose time, or allowance, is spent, and which of them."""
        for connection in list(self._known.values()):
            if connection.name not in self._known_names:
                connection.since = now
                connection.excused_bytes = tcp_bytes(connection.descriptor)[1]
                self._strangers[connection.descriptor] = self._known.pop(connection.descriptor)
        found = []
        for connection in list(self._strangers.values()):
            excused = connection.excused_bytes
            if connection.name in self._known_names:
                self._known[connection.descriptor] = self._strangers.pop(connection.descriptor)
            elif now - connection.since >= self._allowance.hello_s:
                found.append((connection, f"no hello within {self._allowance.hello_s:g} s"))
            elif tcp_bytes(connection.descriptor)[1] > excused + self._allowance.strange_bytes:
                allowed = self._allowance.strange_bytes
                found.append((connection, f"over {allowed} bytes and no hello"))
        return found


def _later(name: bytes, other: bytes) -> bool:
    """Whether the ROUTER gave ``name`` after ``other``: it counts, in 32 bits behind a zero. A name
    that a peer chose has no order; ours choose none.
    """
    if any(len(each) != _NAME_BYTES or each[0] for each in (name, other)):
        return False
    ahead = int.from_bytes(name[1:]) - int.from_bytes(other[1:])
    return 0 < ahead % (1 << 32) < 1 << 31


def cut(descriptor: int, local_port: object) -> str:
    """Shut a connection down; the peer's address, or "" where there was nothing to shut.

    Between libzmq's word and this call the descriptor may have become something else, so it must
    be a connected socket on our own port (``local_port``, of :func:`port_of`).
    """

    def shut(sock: socket.socket) -> str:
        peer = sock.getpeername()
        if port_of(sock.getsockname()) != local_port:
            return ""
        if sock.family != socket.AF_UNIX:  # no farewell: the kernel forgets it at libzmq's close
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        sock.shutdown(socket.SHUT_RDWR)
        return _shown(peer)

    return borrow(descriptor, shut, "")


def peer_address(descriptor: int, local_port: object) -> str:
    """The peer's address, or "" where the descriptor is no connection of our port any more."""

    def look(sock: socket.socket) -> str:
        return _shown(sock.getpeername()) if port_of(sock.getsockname()) == local_port else ""

    return borrow(descriptor, look, "")


def _shown(peer: object) -> str:
    if not isinstance(peer, tuple):
        return "local"
    host, port = peer[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def port_of(address: object) -> object:
    """The port of a socket's address; the path of a local one."""
    return address[1] if isinstance(address, tuple) else address
