"""The processes: each core with what its service does around it (``service.py``, ``peer.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from broker.core import (
    BadBytes,
    BrokerConfig,
    BrokerCore,
    ConnectionLost,
    Received,
    Send,
    Side,
)
from broker.core import Tick as BrokerTick
from broker.peer.link import Arrived, Connected, Disconnected, Reopen, SendTo, Tick
from broker.peer.loop import lost_message
from tests.sim.network import Connection, Socket

if TYPE_CHECKING:
    from broker.protocol import Packet
    from tests.sim.world import World

#: What a peer that leaves has said may take so long on its way.
LINGER_S = 2.0
#: The lives of a peer have incarnations that go down from here, as if a clock were set back before
#: each start: nothing may be learned from their order.
FIRST_INCARNATION = 1000
#: What ``poll`` rounds a wait up to.
_POLL_S = 0.001


class Process:
    """A core in one life of a peer, with a clock of its own and an inbox for when it is stopped."""

    core: Any
    tick: object

    def __init__(self, world: World, name: str, life: int) -> None:
        self.world = world
        self.name = name
        self.life = life
        self.incarnation = FIRST_INCARNATION + 1 - life
        self.alive = True
        self.stopped = False
        self._inbox: list[Any] = []
        self._wakes_at: float | None = None

    @property
    def now(self) -> float:
        """This process's monotonic clock; a suspended machine's jumps forward."""
        return self.world.now + self.world.clock_offsets[self.name]

    def receive(self, event: Any) -> None:
        """An event for the core, now, or when the process runs again."""
        if not self.alive:
            return
        if self.stopped:
            self._inbox.append(event)
        else:
            self.handle(event)

    def handle(self, event: Any) -> None:
        now = self.now
        actions = self.core.handle(event, now)
        self.world.witness(self, event, actions, now)
        self.act(actions)
        if self.alive:
            self._arm()

    def stop(self) -> None:
        self.stopped = True

    def resume(self) -> None:
        """Read what came meanwhile as the service's loop does: the monitor before the sockets."""
        if not self.stopped:
            return
        self.stopped = False
        inbox, self._inbox = self._inbox, []
        for event in sorted(inbox, key=_reading_order):
            self.receive(event)
        self.receive(self.tick)

    def act(self, actions: Iterable[Any]) -> None:
        raise NotImplementedError

    def leave(self) -> None:
        """End in good order: say goodbye, and let it leave."""
        if self.alive and not self.stopped:
            self.act(self.core.goodbye())
        self.die(quietly=False, after_s=LINGER_S)

    def die(self, *, quietly: bool, after_s: float = 0.0) -> None:
        """End at once; ``quietly`` as a host does that loses power."""
        raise NotImplementedError

    def _arm(self) -> None:
        timer = self.core.next_timer
        if timer is None:
            return
        at = max(self.world.now, timer - self.world.clock_offsets[self.name]) + _POLL_S
        if self._wakes_at is None or at < self._wakes_at:
            self._wakes_at = at
            self.world.at(at, self._wake, at)

    def _wake(self, at: float) -> None:
        if at != self._wakes_at or not self.alive:
            return
        self._wakes_at = None
        if self.stopped:
            return
        if (timer := self.core.next_timer) is not None and timer <= self.now:
            self.handle(self.tick)
        else:
            self._arm()

    def __str__(self) -> str:
        return self.name if self.life == 1 else f"{self.name}/{self.life}"


def _reading_order(event: Any) -> int:
    if isinstance(event, (Arrived, Received, BadBytes)):
        return 2
    return 1 if isinstance(event, (Connected, Disconnected, ConnectionLost)) else 0


class BrokerProcess(Process):
    """A broker core with its two ROUTER sockets."""

    tick = BrokerTick()

    def __init__(self, world: World, name: str, life: int, **config: Any) -> None:
        super().__init__(world, name, life)
        self.core = BrokerCore(f"{name}.{life}", BrokerConfig(**config))
        self.connections: dict[bytes, Connection] = {}
        #: connections of peers that have no core -> what hears what they are sent
        self.rude: dict[bytes, Callable[[Packet], None]] = {}

    def act(self, actions: Iterable[Any]) -> None:
        gone = []
        for action in actions:
            if not isinstance(action, Send):
                continue
            connection = self.connections.get(action.connection)
            if (heard := self.rude.get(action.connection)) is not None:
                heard(self.world.packet(action.frames))
            elif connection is None:
                gone.append(ConnectionLost(action.side, action.connection))
            else:
                packet = self.world.packet(action.frames)
                self.world.network.transmit(connection, connection.down, packet)
        for event in gone:
            self.receive(event)

    def die(self, *, quietly: bool, after_s: float = 0.0) -> None:
        self.alive = False
        if self.world.brokers.get(self.name) is self:
            del self.world.brokers[self.name]

        def close() -> None:
            for connection in list(self.connections.values()):
                self.world.network.sever(connection, peer_hears=not quietly, broker_hears=False)
            self.connections.clear()

        self.world.at(self.world.now + after_s, close)


class PeerProcess(Process):
    """A core with a DEALER socket for each broker."""

    tick = Tick()
    side: Side

    def __init__(self, world: World, name: str, life: int) -> None:
        super().__init__(world, name, life)
        self.sockets: dict[str, Socket] = {}

    def open(self, endpoints: Iterable[str]) -> None:
        self.sockets = {e: Socket(self.world.network, self, e) for e in endpoints}

    def garbage(self, endpoint: str) -> None:
        """Bytes came that are not a message."""
        self.receive(Arrived(endpoint, lost_message(self.core.links[endpoint])))

    def act(self, actions: Iterable[Any]) -> None:
        for action in actions:
            if isinstance(action, SendTo):
                self.world.remember(action.packet)
                self.sockets[action.endpoint].send(action.packet)
            elif isinstance(action, Reopen):
                self.sockets[action.endpoint].reopen()
            else:
                self.perform(action)

    def perform(self, action: Any) -> None:
        raise NotImplementedError

    def die(self, *, quietly: bool, after_s: float = 0.0) -> None:
        if not self.alive:
            return
        self.alive = False

        def close() -> None:
            for socket in self.sockets.values():
                socket.close(quietly=quietly)

        if after_s:
            self.world.at(self.world.now + after_s, close)
        else:
            close()
