"""What must hold after every event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core import ConnectionLost, Received, Send, Side
from broker.core.inspect import validate
from broker.peer.link import Arrived, Reopen, SendTo
from broker.protocol import messages as m
from tests.sim.actors import ClientProcess, WorkerProcess
from tests.sim.footprint import footprint
from tests.sim.peers import BrokerProcess, Process
from tests.sim.violation import require
from worker.core import Compute, Exit

if TYPE_CHECKING:
    from tests.sim.world import World

#: Sizes are looked at after so many events.
_EVERY = 64
#: Containers that exist before anyone has come: counters, handlers, links and the like.
_EMPTY_ITEMS = 40
#: Items that a core may hold for each peer, unfinished request, held answer and mapping.
_ITEMS_EACH = 24
#: What a healthy cluster does: every request takes one forward then, and no connection two.
_CALM = ("start", "submit", "cancel", "drain", "slow")
_HELLOS = (m.ClientHello, m.WorkerHello)


class Invariants:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: broker connection -> requests that it was given and has not answered
        self._given: dict[tuple[BrokerProcess, bytes], set[m.RequestId]] = {}
        #: worker -> what it has to answer: broker and request
        self._owed: dict[WorkerProcess, set[tuple[str, m.RequestId]]] = {}
        #: nothing but what a cluster is for
        self._calm = all(op.kind in _CALM for op in world.schedule.ops)

    # -- after every event ----------------------------------------------------------------------

    def after(self, process: Process, event: Any, actions: list[Any], now: float) -> None:
        if isinstance(process, BrokerProcess):
            validate(process.core)
            if isinstance(event, Received) and type(event.packet.message) in _HELLOS:
                self._sessions_belong(process)
            self._broker_sends(process, event, actions)
        else:
            process.core.validate()
        if isinstance(process, WorkerProcess):
            self._worker_acts(process, event, actions, now)
        elif isinstance(process, ClientProcess):
            self._on_time(process, now)
            self._within_window(process)
        if self._calm and not self.world.seen:
            self._undisturbed(process, actions)
        if self.world.events % _EVERY == 0:
            self._bounded(process)

    def _sessions_belong(self, broker: BrokerProcess) -> None:
        """A session's connection is that of the peer, in the life, that it is named for."""
        core = broker.core
        for session in (*core.clients.values(), *core.workers.values()):
            connection = broker.connections.get(session.connection)
            if connection is None:
                continue
            owner = connection.socket.owner
            require(
                (owner.name, owner.incarnation) == (session.id, session.incarnation),
                "stolen session",
                broker,
                "has the session of",
                session.id,
                session.incarnation,
                "on the connection of",
                owner.name,
                owner.incarnation,
            )

    def _broker_sends(self, broker: BrokerProcess, event: Any, actions: list[Any]) -> None:
        if isinstance(event, Received) and event.side is Side.WORKER:
            self._worker_said(broker, event)
        elif isinstance(event, ConnectionLost):
            self._given.pop((broker, event.connection), None)
        elif isinstance(event, Received) and isinstance(event.packet.message, m.Cancel):
            cancelled = event.packet.message.id
            require(
                cancelled not in broker.core.entries
                or event.connection not in broker.core.client_connections
                or event.connection in broker.rude,
                "cancelled but kept",
                broker,
                "still has",
                cancelled,
            )
        for action in actions:
            if not isinstance(action, Send):
                continue
            connection = broker.connections.get(action.connection)
            if connection is None:
                continue
            message = self.world.packet(action.frames).message
            owner = connection.socket.owner
            if isinstance(message, (m.Reply, m.Failure)):
                require(
                    (message.id.client, message.id.incarnation) == (owner.name, owner.incarnation),
                    "answer to a stranger",
                    broker,
                    "sends the answer to",
                    message.id,
                    "to",
                    owner,
                )
            elif isinstance(message, m.Request):
                given = self._given.setdefault((broker, action.connection), set())
                given.add(message.id)
                credits = owner.core.credits
                require(
                    len(given) <= credits,
                    "credits exceeded",
                    broker,
                    "gave",
                    owner,
                    len(given),
                    "requests, its credits are",
                    credits,
                )

    def _worker_said(self, broker: BrokerProcess, event: Received) -> None:
        message = event.packet.message
        key = (broker, event.connection)
        if isinstance(message, m.WorkerHello):
            self._given[key] = set(message.held)
        elif isinstance(message, (m.Reply, m.Failure)):
            self._given.get(key, set()).discard(message.id)

    def _worker_acts(
        self, worker: WorkerProcess, event: Any, actions: list[Any], now: float
    ) -> None:
        owed = self._owed.setdefault(worker, set())
        if isinstance(event, Arrived) and isinstance(event.packet.message, m.Request):
            owed.add((event.endpoint, event.packet.message.id))
        for action in actions:
            if isinstance(action, SendTo):
                if isinstance(action.packet.message, (m.Reply, m.Failure)):
                    owed.discard((action.endpoint, action.packet.message.id))
            elif isinstance(action, Compute):
                mapping = action.packet.message.mapping_id  # type: ignore[union-attr]
                require(
                    not mapping or mapping in worker.core.mappings,
                    "unknown mapping computed",
                    worker,
                    "computes with a mapping that it was not told",
                )
                self._one_forward(action.packet.message.id)  # type: ignore[union-attr]
            elif isinstance(action, Exit):
                self._may_leave(worker, action, owed, now)

    def _may_leave(
        self, worker: WorkerProcess, action: Exit, owed: set[tuple[str, m.RequestId]], now: float
    ) -> None:
        """Refused, or drained: it has answered everyone whom it can reach, or its time is up."""
        if action.error:
            leftover = worker in self.world.leftovers
            require(leftover, "wrongly refused", worker, "was refused:", action.error)
            return
        core = worker.core
        left = [str(request_id) for endpoint, request_id in owed if core.links[endpoint].ready]
        require(
            not left or now >= core.leave_at,
            "left with requests",
            worker,
            "drained and never answered",
            left,
        )

    def _one_forward(self, request_id: m.RequestId) -> None:
        ask = self.world.asks[request_id]
        ask.forwards += 1
        require(
            ask.forwards == 1
            or not self._calm
            or ask.nature != "ok"
            or self.world.seen
            or not all(b.core.config.held_answer_bytes for b in self.world.brokers.values())
            or any(b.core.counters["hedges"] for b in self.world.brokers.values()),
            "second forward",
            request_id,
            "is computed again, and nothing went wrong",
        )

    def _on_time(self, client: ClientProcess, now: float) -> None:
        deadlines = [self.world.asks[request_id].deadline for request_id in client.core.tickets]
        if deadlines:
            first, timer = min(deadlines), client.core.next_timer
            require(first > now, "deadline passed", client, "holds a request past its deadline")
            require(
                timer is not None and timer <= first,
                "deadline not watched",
                client,
                "wakes at",
                timer,
                "and its first deadline is",
                first,
            )

    def _within_window(self, client: ClientProcess) -> None:
        for endpoint, flying in client.core.in_flight.items():
            broker = self.world.brokers.get(endpoint)
            if broker is not None and client.core.links[endpoint].ready:
                require(
                    len(flying) <= broker.core.config.window,
                    "window exceeded",
                    client,
                    "has",
                    len(flying),
                    "requests at",
                    broker,
                )

    def _undisturbed(self, process: Process, actions: list[Any]) -> None:
        """Nothing goes wrong, so nobody is taken for lost."""
        for action in actions:
            wanted = isinstance(action, Send) and isinstance(
                self.world.packet(action.frames).message, m.HelloWanted
            )
            require(
                not wanted and not isinstance(action, Reopen),
                "lost without a fault",
                process,
                action,
            )

    def _bounded(self, process: Process) -> None:
        sizes = footprint(process.core)
        known = self._known_items(process)
        bound = _EMPTY_ITEMS + _ITEMS_EACH * known
        require(
            sum(sizes.values()) <= bound,
            "grows without bound",
            process,
            "holds",
            sum(sizes.values()),
            "items for",
            known,
            "peers and requests:",
            sizes,
        )

    def _known_items(self, process: Process) -> int:
        """Peers there and lately there, unfinished requests, held answers, mappings."""
        core = process.core
        if isinstance(process, BrokerProcess):
            sessions = len(core.clients) + len(core.workers) + len(self.world.lives)
            sessions += len(self.world.rude_names)
            stores = len(core.answers) + len(core.mappings)
            return sessions + len(core.entries) + stores
        held = core.held if isinstance(process, WorkerProcess) else core.tickets
        return len(core.links) + len(held) + len(core.mappings)
