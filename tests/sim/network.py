"""A network that behaves as ZeroMQ over TCP does, without a socket.

A connection is first in, first out. When it is cut, what was under way is lost but for a prefix
that had already reached the other end. A DEALER connects again by itself and keeps what it was
given meanwhile, until its owner opens it anew. A ROUTER has a new name for each connection, says
what it knows to be undeliverable, and never learns of a half-open connection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from broker.core import BadBytes, ConnectionLost, Received
from broker.peer.link import Arrived, Connected, Disconnected
from broker.protocol import Packet
from broker.protocol import messages as m
from tests.sim.chance import Stream

if TYPE_CHECKING:
    from tests.sim.peers import BrokerProcess, PeerProcess
    from tests.sim.world import World

#: As in ``broker.transport.sockets``: a DEALER waits so long before it tries again.
_RECONNECT_FIRST_S, _RECONNECT_LAST_S = 0.05, 1.0
_DELAY_S = 0.001
#: One message in so many is held up on its way, by up to so long.
_TAIL_SHARE, _TAIL_S = 0.05, 0.05
#: A part of a large reply is on its way for so long at the most.
_PART_S = 0.1


class Way:
    """One direction of a connection."""

    __slots__ = ("arrived", "kept", "last_at", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.arrived = 0
        #: messages with a higher number are lost
        self.kept = float("inf")
        self.last_at = 0.0

    def lose(self, luck: Stream) -> None:
        """Lose what is under way, but for a prefix that had come through."""
        self.kept = min(self.kept, self.arrived + luck.below(self.sent - self.arrived + 1))


class Connection:
    """One TCP connection, between one socket of a peer and one life of a broker."""

    __slots__ = ("broker", "down", "name", "read", "severed", "socket", "up")

    def __init__(self, name: bytes, socket: Socket, broker: BrokerProcess) -> None:
        #: the peer's socket still takes what came this way
        self.read = True
        self.severed = False
        self.name = name
        self.socket = socket
        self.broker = broker
        self.up = Way()
        self.down = Way()

    @property
    def pair(self) -> tuple[str, str]:
        return self.socket.owner.name, self.broker.name


class Socket:
    """A peer's DEALER to one endpoint."""

    def __init__(self, network: Network, owner: PeerProcess, endpoint: str) -> None:
        self.network = network
        self.owner = owner
        self.endpoint = endpoint
        self.connection: Connection | None = None
        self.closed = False
        self._generation = 0
        self._wait_s = _RECONNECT_FIRST_S
        self._outbox: list[Packet] = []
        self._dial(_DELAY_S)

    def send(self, packet: Packet) -> None:
        if self.connection is None:
            self._outbox.append(packet)
        else:
            self.network.transmit(self.connection, self.connection.up, packet)

    def reopen(self) -> None:
        """Drop the connection and what is queued for it; connect again."""
        self._outbox.clear()
        self._wait_s = _RECONNECT_FIRST_S
        self._hang_up(quietly=False)
        self._dial(_DELAY_S)

    def close(self, *, quietly: bool = False) -> None:
        """End with the process; ``quietly`` as a host does that loses power."""
        self.closed = True
        self._hang_up(quietly=quietly)

    def _hang_up(self, *, quietly: bool) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.read = False
            self.network.sever(connection, peer_hears=False, broker_hears=not quietly)

    def lost(self) -> None:
        """The connection is gone, and the transport has noticed."""
        self._dial(self._wait_s)

    def _dial(self, wait_s: float) -> None:
        self._generation += 1
        self.network.later(wait_s, self._try, self._generation)

    def _try(self, generation: int) -> None:
        if self.closed or generation != self._generation:
            return
        broker = self.network.world.brokers.get(self.endpoint)
        pair = (self.owner.name, self.endpoint)
        if broker is None or broker.stopped or self.owner.stopped or pair in self.network.parted:
            self._wait_s = min(2 * self._wait_s, _RECONNECT_LAST_S)
            self._dial(self._wait_s)
            return
        self._wait_s = _RECONNECT_FIRST_S
        self.connection = self.network.connect(self, broker)
        self.owner.receive(Connected(self.endpoint))
        waiting, self._outbox = self._outbox, []
        for packet in waiting:
            self.send(packet)


class Network:
    """All connections, and what is wrong with them."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: (peer, broker) between which nothing passes -> what waits for that to end, in order
        self.parted: dict[tuple[str, str], list[tuple[Callable[..., None], tuple[Any, ...]]]] = {}
        #: (peer, broker) -> how many times slower than usual
        self.lag: dict[tuple[str, str], float] = {}
        #: (peer, broker, is up) -> where the next messages are damaged: "header" or "payload"
        self.damage: dict[tuple[str, str, bool], list[str]] = {}
        self._luck: dict[tuple[str, str], Stream] = {}
        self._names = 0

    def later(self, wait_s: float, call: Callable[..., None], *args: Any) -> None:
        self.world.at(self.world.now + wait_s, call, *args)

    def luck(self, pair: tuple[str, str]) -> Stream:
        """The stream of chance of one link."""
        stream = self._luck.get(pair)
        if stream is None:
            stream = self._luck[pair] = Stream(self.world.schedule.seed, pair)
        return stream

    # -- connections ----------------------------------------------------------------------------

    def connect(self, socket: Socket, broker: BrokerProcess) -> Connection:
        self._names += 1
        connection = Connection(b"%d" % self._names, socket, broker)
        broker.connections[connection.name] = connection
        return connection

    def sever(
        self, connection: Connection, *, peer_hears: bool = True, broker_hears: bool = True
    ) -> None:
        """End a connection. An end that does not hear of it goes on sending into the void."""
        if connection.severed:
            return
        connection.severed = True
        luck = self.luck(connection.pair)
        connection.up.lose(luck)
        connection.down.lose(luck)
        if peer_hears:
            self._pass(luck.random() * 0.02, connection.pair, self._tell_peer, connection)
        if broker_hears:
            self._pass(luck.random() * 0.02, connection.pair, self._tell_broker, connection)

    def _tell_peer(self, connection: Connection) -> None:
        socket = connection.socket
        if socket.connection is connection and not socket.closed:
            socket.connection = None
            socket.owner.receive(Disconnected(socket.endpoint))
            socket.lost()

    def _tell_broker(self, connection: Connection) -> None:
        broker = connection.broker
        if broker.connections.pop(connection.name, None) is not None:
            broker.receive(ConnectionLost(connection.socket.owner.side, connection.name))

    # -- messages -------------------------------------------------------------------------------

    def transmit(self, connection: Connection, way: Way, packet: Packet) -> None:
        """Send a packet on its way."""
        if connection.severed:  # into the void
            return
        is_up = way is connection.up
        pair = connection.pair
        luck = self.luck(pair)
        delay_s = _DELAY_S * (0.5 + luck.random()) * self.lag.get(pair, 1.0)
        if luck.random() < _TAIL_SHARE:
            delay_s += luck.random() * _TAIL_S
        damaged: Packet | None = packet
        if (where := self.damage.get((*pair, is_up))) and len(where):
            damaged = _damaged(packet, where.pop())
        took_s = luck.random() * _PART_S if isinstance(packet.message, m.Part) else 0.0
        way.sent += 1
        way.last_at = max(way.last_at, self.world.now + delay_s) + took_s
        self.world.at(way.last_at, self._arrive, connection, way, way.sent, damaged)

    def _arrive(self, connection: Connection, way: Way, number: int, packet: Packet | None) -> None:
        pair = connection.pair
        if pair in self.parted:
            self.parted[pair].append((self._arrive, (connection, way, number, packet)))
            return
        if number > way.kept:
            return
        way.arrived = number
        broker, socket = connection.broker, connection.socket
        if way is connection.up:
            side = socket.owner.side
            if packet is None:
                broker.receive(BadBytes(side, connection.name, "damaged"))
            else:
                broker.receive(Received(side, connection.name, packet))
        elif connection.read and socket.connection in (connection, None):
            if packet is None:
                socket.owner.garbage(socket.endpoint)
            else:
                socket.owner.receive(Arrived(socket.endpoint, packet))

    def _pass(
        self, wait_s: float, pair: tuple[str, str], call: Callable[..., None], *args: Any
    ) -> None:
        """Call after a while, or when the two ends can reach each other again."""

        def attempt() -> None:
            if pair in self.parted:
                self.parted[pair].append((call, args))
            else:
                call(*args)

        self.later(wait_s, attempt)

    # -- partitions -----------------------------------------------------------------------------

    def part(self, peer: str, broker: str) -> None:
        self.parted.setdefault((peer, broker), [])

    def heal(self, peer: str, broker: str) -> None:
        """TCP tries again until it gets through: what waited arrives now."""
        for call, args in self.parted.pop((peer, broker), []):
            call(*args)


def _damaged(packet: Packet, where: str) -> Packet | None:
    """The packet with a flipped bit in its payload, or None where its header was hit."""
    if where == "header" or not packet.payload:
        return None
    first = bytes(packet.payload[0])
    flipped = bytes([first[0] ^ 1]) + first[1:]
    return replace(packet, frames=(packet.frames[0], flipped, *packet.frames[2:]))
