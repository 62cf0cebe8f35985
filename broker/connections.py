"""A ROUTER's connections as the transport sees them, and how to be rid of one.

libzmq has no call that drops one connection of a ROUTER. But its monitor tells each connection's
file descriptor, and :func:`cut` shuts that down, which libzmq sees as the peer's leaving.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from broker.protocol.kernel import Progress, borrow, tcp_bytes

#: Messages taken from a connection before its hello; a peer of ours sends a handful at most.
_STRANGE_MESSAGES = 64
_LINGER_NOT = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Connection:
    """One accepted connection. ``name`` is the ROUTER's, once it said anything."""

    descriptor: int
    since: float
    name: bytes = b""
    user: str = ""
    messages: int = 0
    #: bytes that came on it while it had a session, which are not held against it
    excused_bytes: int = 0
    heard_at: float = 0.0
    progress: Progress = field(default_factory=Progress)
    #: whether ``progress`` was looked at since the last message
    watched: bool = False


class Connections:
    """Connections by descriptor: *strangers*, oldest first, until the core knows them.

    A stranger has ``hello_s`` to say hello, may send ``max_bytes`` and a few messages until then,
    and there are at most ``max_strangers``: over that the oldest goes, since an honest hello takes
    milliseconds. ``known`` are the ROUTER's names of connections with a session.
    """

    def __init__(
        self, known: Container[bytes], hello_s: float, max_strangers: int, max_bytes: int
    ) -> None:
        self._known_names = known
        self._hello_s = hello_s
        self._max_strangers = max_strangers
        self._max_bytes = max_bytes
        self._strangers: dict[int, Connection] = {}
        self._known: dict[int, Connection] = {}

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known)

    @property
    def n_strangers(self) -> int:
        return len(self._strangers)

    @property
    def too_many_strangers(self) -> bool:
        return len(self._strangers) > self._max_strangers

    def __iter__(self) -> Iterator[Connection]:
        yield from list(self._strangers.values())
        yield from list(self._known.values())

    def accepted(self, descriptor: int, now: float) -> None:
        """A connection came."""
        self.closed(descriptor)
        self._strangers[descriptor] = Connection(descriptor, now)

    def spoke(self, descriptor: int, name: bytes, user: str, now: float) -> Connection | None:
        """A message came on it; None where no connection of this name is known to have it."""
        connection = self._known.get(descriptor) or self._strangers.get(descriptor)
        if connection is None or connection.name not in (b"", name):
            return None
        connection.name, connection.user = name, user
        connection.heard_at, connection.watched = now, False
        return connection

    def too_strange(self, connection: Connection) -> bool:
        """Count a message; whether that was one too many for a connection without a hello."""
        if connection.name in self._known_names:
            connection.messages = 0
            return False
        connection.messages += 1
        return connection.messages > _STRANGE_MESSAGES

    def closed(self, descriptor: int) -> Connection | None:
        """It is gone; what was known of it."""
        return self._known.pop(descriptor, None) or self._strangers.pop(descriptor, None)

    def surplus(self, at_most: int) -> list[Connection]:
        """The strangers that must go for no more than ``at_most`` connections to remain."""
        found: list[Connection] = []
        strangers = iter(list(self._strangers.values()))
        while (
            len(self._strangers) - len(found) > self._max_strangers
            or len(self) - len(found) > at_most
        ) and (connection := next(strangers, None)):
            if connection.name in self._known_names:
                self._known[connection.descriptor] = self._strangers.pop(connection.descriptor)
            else:
                found.append(connection)
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
            elif now - connection.since >= self._hello_s:
                found.append((connection, f"no hello within {self._hello_s:g} s"))
            elif tcp_bytes(connection.descriptor)[1] > excused + self._max_bytes:
                found.append((connection, f"over {self._max_bytes} bytes and no hello"))
        return found


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
        return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "local"

    return borrow(descriptor, shut, "")


def port_of(address: object) -> object:
    """The port of a socket's address; the path of a local one."""
    return address[1] if isinstance(address, tuple) else address
