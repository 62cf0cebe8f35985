"""The broker as a state machine: ``handle(event, now) -> actions``.

Nothing here blocks, sleeps, reads a clock or draws a random number, so a schedule of events
replays. The broker holds no state that its peers could not tell it again: after a restart clients
resend, workers say what they hold, and mappings are asked for by their hash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from broker.core.clients import Clients
from broker.core.config import BrokerConfig
from broker.core.dispatch import Dispatcher
from broker.core.events import Action, BadBytes, ConnectionLost, Event, Moving, Received, Side
from broker.core.ledger import Ledger
from broker.core.requests import Requests
from broker.core.workers import Workers
from broker.protocol import messages as m
from broker.protocol.names import own_name, owns

_Handlers = Mapping[type, Callable[..., None]]


#: What comes to a side's port, as the broker's options call it, and which port that usually is.
_PEERS = {Side.CLIENT: "clients", Side.WORKER: "workers"}
_DEFAULT_PORT = {Side.CLIENT: 5555, Side.WORKER: 5556}


class BrokerCore(Ledger):
    """The ledger, and who may write what into it.

    :class:`Clients` and :class:`Workers` hear the peers, :class:`Requests` knows how a request
    ends, and :class:`Dispatcher` who works on it. ``incarnation`` names this life of the broker and
    must differ from any other's.
    """

    def __init__(self, incarnation: str, config: BrokerConfig | None = None) -> None:
        super().__init__(incarnation, config or BrokerConfig())
        self._dispatcher = Dispatcher(self)
        self._requests = Requests(self, self._dispatcher)
        self._clients = Clients(self, self._requests)
        self._workers = Workers(self, self._requests, self._dispatcher)
        self._handlers: dict[Side, _Handlers] = {
            Side.CLIENT: {
                m.ClientHello: self._clients.hello,
                m.Heartbeat: self._clients.heartbeat,
                m.Goodbye: self._clients.goodbye,
                m.Request: self._requests.accept,
                m.Cancel: self._clients.cancel,
                m.Received: self._clients.acknowledged,
                m.MappingOffer: self._clients.mapping_offer,
            },
            Side.WORKER: {
                m.WorkerHello: self._workers.hello,
                m.Heartbeat: self._workers.heartbeat,
                m.Goodbye: self._workers.goodbye,
                m.Draining: self._workers.draining,
                m.Reply: self._workers.reply,
                m.Part: self._workers.part,
                m.Failure: self._workers.reply,
            },
        }

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; say what is to be sent and logged. ``now`` is monotonic seconds."""
        if self.began_at is None:
            self.began_at = now
        if isinstance(event, Received):
            self._received(event, now)
        elif isinstance(event, Moving):
            if (session := self._connections(event.side).get(event.connection)) is not None:
                session.last_seen = now
                if event.side is Side.WORKER:
                    session.moved_at = now
        elif isinstance(event, ConnectionLost):
            self._connection_lost(event, now)
        elif isinstance(event, BadBytes):
            self._bad_bytes(event)
        self.timers.run(now)
        self._dispatcher.use_room(now)
        self._requests.recall(now)
        return self.take_actions()

    def goodbye(self) -> list[Action]:
        """Tell all peers that this broker stops."""
        for side in Side:
            for connection in self._connections(side):
                self.send(side, connection, m.Goodbye("the broker stops"))
        return self.take_actions()

    def _received(self, event: Received, now: float) -> None:
        message = event.packet.message
        handler = self._handlers[event.side].get(type(message))
        if handler is None:
            self.counters["bad_messages"] += 1
            if isinstance(message, (m.ClientHello, m.WorkerHello)):
                self._refuse_side(event, message)
                return
            kind = type(message).__name__
            fields = {"side": event.side.value, "connection": event.connection}
            self.log("warning", "wrong_message", kind=kind, **fields)
            return
        if isinstance(message, (m.ClientHello, m.WorkerHello)):
            name = message.client if isinstance(message, m.ClientHello) else message.worker
            if owns(name, event.user):
                self._leave_other_name(event, name, now)
                handler(event.connection, event.packet, now)
            else:
                self._refuse_name(event, name)
            return
        session = self._connections(event.side).get(event.connection)
        if session is None:
            self.send(event.side, event.connection, m.HelloWanted(self.incarnation))
            return
        session.last_seen = now
        handler(session, event.packet, now)

    def _leave_other_name(self, event: Received, name: str, now: float) -> None:
        """A connection carries one peer: who says hello in another name is no longer the first."""
        session = self._connections(event.side).get(event.connection)
        if session is None or session.id == name:
            return
        if event.side is Side.CLIENT:  # nobody comes back to a name that was given up
            self._clients.replaced(session, name, now)
        else:
            self._workers.disconnected(session, now)

    def _bad_bytes(self, event: BadBytes) -> None:
        """What was lost may have been anything: a known peer's hello tells again what matters."""
        self.counters["bad_messages"] += 1
        fields = {"side": event.side.value, "connection": event.connection}
        self.log("warning", "bad_message", error=event.error, **fields)
        if event.other_version:
            self.send(event.side, event.connection, m.Refused("version", event.error))
        elif event.connection in self._connections(event.side):
            self.send(event.side, event.connection, m.HelloWanted(self.incarnation))

    def _connection_lost(self, event: ConnectionLost, now: float) -> None:
        session = self._connections(event.side).get(event.connection)
        if session is None:
            return
        if event.side is Side.CLIENT:
            self._clients.disconnected(session, now)
        else:
            self._workers.disconnected(session, now)

    def _connections(self, side: Side) -> dict[bytes, Any]:
        return self.client_connections if side is Side.CLIENT else self.worker_connections

    def _refuse_side(self, event: Received, hello: m.ClientHello | m.WorkerHello) -> None:
        """The ports are swapped: whoever came to the wrong one would try it for ever."""
        here = event.side
        wants = Side.WORKER if here is Side.CLIENT else Side.CLIENT
        name = hello.worker if isinstance(hello, m.WorkerHello) else hello.client
        text = (
            f"this is the broker's port for {_PEERS[here]}, and {_PEERS[wants]} have one of "
            f"their own (draftmq broker --{_PEERS[wants]}, {_DEFAULT_PORT[wants]} by default); are "
            "the two swapped?"
        )
        self.send(here, event.connection, m.Refused("wrong_port", text))
        fields = {"side": here.value, "connection": event.connection}
        self.log("warning", "wrong_port", name=name, text=text, **fields)

    def _refuse_name(self, event: Received, name: str) -> None:
        text = (
            f"the name {name!r} is not this key's to use; its names end in "
            f"{own_name('', event.user)!r}"
        )
        self.send(event.side, event.connection, m.Refused("foreign_name", text))
        fields = {"side": event.side.value, "connection": event.connection}
        self.log("warning", "foreign_name", name=name, key=event.user, **fields)

    def __repr__(self) -> str:
        queued = sum(len(pool.queue) for pool in self.pools.values())
        running = sum(1 for entry in self.entries.values() if entry.under_way)
        return (
            f"<Broker clients={len(self.clients)} workers={len(self.workers)} "
            f"queued={queued} running={running}>"
        )
