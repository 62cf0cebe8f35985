"""What must hold after every event, when the faults have stopped, and when everyone has left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core import ConnectionLost, Received, Send, Side
from broker.core.inspect import validate
from broker.protocol import messages as m
from broker.protocol.link import Arrived, LinkState, Reopen, SendTo
from tests.sim.footprint import footprint
from tests.sim.peers import Ask, BrokerProcess, ClientProcess, Process, WorkerProcess
from trainer_client.core import Deliver, Fail
from worker.core import Compute, Exit

if TYPE_CHECKING:
    from tests.sim.world import World

#: After the last fault, a request that is wanted for so much longer must end in a result: patience
#: with a silent peer, a reconnect, a resend, and the work of all requests in a row.
RECOVERY_S = 40.0
#: Sizes are looked at after so many events.
_EVERY = 64
#: Containers that exist before anyone has come: counters, handlers, links and the like.
_EMPTY_ITEMS = 40
#: Items that a core may hold for each peer, unfinished request, held answer and mapping.
_ITEMS_EACH = 24
#: What a healthy cluster does: every request takes one forward then, and no connection two.
_CALM = ("start", "submit", "cancel", "drain", "slow")
_HELLOS = (m.ClientHello, m.WorkerHello)


class InvariantError(AssertionError):
    """An invariant does not hold. ``name`` stays the same while a schedule is shrunk."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name


def require(holds: object, name: str, *text: object) -> None:
    if not holds:
        raise InvariantError(name, " ".join(map(str, text)))


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
        if self._calm:
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
                (owner.name, owner.life) == (session.id, session.incarnation),
                "stolen session",
                f"{broker}: the session of {session.id}/{session.incarnation} is on the connection",
                f"of {owner.name}/{owner.life}",
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
                or event.connection not in broker.core.client_connections,
                "cancelled but kept",
                f"{broker} still has {cancelled}",
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
                    (message.id.client, message.id.incarnation) == (owner.name, owner.life),
                    "answer to a stranger",
                    f"{broker} sends the answer to {message.id} to {owner}",
                )
            elif isinstance(message, m.Request):
                given = self._given.setdefault((broker, action.connection), set())
                given.add(message.id)
                credits = owner.core.credits
                require(
                    len(given) <= credits,
                    "credits exceeded",
                    f"{broker} gave {owner} {len(given)} requests, it has {credits} credits",
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
                    f"{worker} computes with a mapping that it was not told",
                )
                self._one_forward(action.packet.message.id)  # type: ignore[union-attr]
            elif isinstance(action, Exit):
                self._may_leave(worker, action, owed, now)

    def _may_leave(
        self, worker: WorkerProcess, action: Exit, owed: set[tuple[str, m.RequestId]], now: float
    ) -> None:
        """Refused, or drained: it has answered everyone whom it can reach, or its time is up."""
        if action.error:
            refused = f"{worker} was refused: {action.error}"
            require(worker in self.world.leftovers, "wrongly refused", refused)
            return
        core = worker.core
        left = [str(request_id) for endpoint, request_id in owed if core.links[endpoint].ready]
        require(
            not left or now >= core.leave_at,
            "left with requests",
            f"{worker} drained and never answered {left}",
        )

    def _one_forward(self, request_id: m.RequestId) -> None:
        ask = self.world.asks[request_id]
        ask.forwards += 1
        require(
            ask.forwards == 1
            or not self._calm
            or ask.nature != "ok"
            or self.world.seen
            or not all(b.core.config.held_answer_bytes for b in self.world.brokers.values()),
            "second forward",
            f"{request_id} is computed again, and nothing went wrong",
        )

    def _on_time(self, client: ClientProcess, now: float) -> None:
        deadlines = [self.world.asks[request_id].deadline for request_id in client.core.tickets]
        if deadlines:
            first, timer = min(deadlines), client.core.next_timer
            require(first > now, "deadline passed", f"{client} holds a request past its deadline")
            require(
                timer is not None and timer <= first,
                "deadline not watched",
                f"{client} wakes at {timer}, its first deadline is {first}",
            )

    def _within_window(self, client: ClientProcess) -> None:
        for endpoint, flying in client.core.in_flight.items():
            broker = self.world.brokers.get(endpoint)
            if broker is not None and client.core.links[endpoint].ready:
                require(
                    len(flying) <= broker.core.config.window,
                    "window exceeded",
                    f"{client} has {len(flying)} requests at {broker}",
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
                f"{process}: {action}",
            )

    def _bounded(self, process: Process) -> None:
        sizes = footprint(process.core)
        known = self._known_items(process)
        bound = _EMPTY_ITEMS + _ITEMS_EACH * known
        require(
            sum(sizes.values()) <= bound,
            "grows without bound",
            f"{process} holds {sum(sizes.values())} items for {known} peers and requests: {sizes}",
        )

    def _known_items(self, process: Process) -> int:
        """Peers there and lately there, unfinished requests, held answers, mappings."""
        core = process.core
        if isinstance(process, BrokerProcess):
            sessions = len(core.clients) + len(core.workers) + len(self.world.lives)
            stores = len(core.answers) + len(core.mappings)
            return sessions + len(core.entries) + stores
        held = core.held if isinstance(process, WorkerProcess) else core.tickets
        return len(core.links) + len(held) + len(core.mappings)

    # -- when a request ends --------------------------------------------------------------------

    def ended(self, client: ClientProcess, ask: Ask | None, action: Deliver | Fail) -> None:
        """A caller is told how its request ended."""
        require(ask is not None, "nobody asked", f"{client} was told of {action.id}")
        assert ask is not None
        require(ask.client is client, "another's request", f"{client} was told of {action.id}")
        require(not ask.ended, "ended twice", f"{action.id}: {ask.ended}, then {action}")
        require(not ask.cancelled, "ended after cancel", action.id)
        if isinstance(action, Deliver):
            reply = action.packet.message
            require(
                bytes(action.packet.payload[0]) == ask.expected and reply.id == ask.id,  # type: ignore[union-attr]
                "another's tensors",
                f"{action.id} was given the bytes of another request, or damaged ones",
            )
            require(ask.nature in ("ok", "flaky"), "impossible result", f"{ask.nature} request")
        else:
            why = self._unexplained(ask, action)
            require(not why, f"unexplained {action.code}", f"{action.id}, {ask.nature}: {why}")

    def _unexplained(self, ask: Ask, failure: Fail) -> str:
        """What speaks against this error, or nothing."""
        seen = self.world.seen
        late = ask.client.now >= ask.deadline
        patient = not late or self._had_time(ask)
        leftover = ask.client in self.world.leftovers
        explained = {
            "bad_request": ask.nature == "bad",
            "target_failed": ask.nature in ("failing", "flaky"),
            "lost_workers": ask.nature in ("deadly", "failing") or self._losses() >= 2,
            "deadline": late and not patient,
            "expired": late or "jump" in seen,
            "refused": leftover,
        }
        if explained.get(failure.code, False):
            return ""
        return f"{failure.text} (faults seen: {seen}, late: {late}, had time: {patient})"

    def _losses(self) -> int:
        """How often a worker may have been taken for dead."""
        return sum(1 for op in self.world.schedule.ops if op.kind not in ("start", "submit")) + (
            self.world.seen.get("loss", 0)
        )

    def _had_time(self, ask: Ask) -> bool:
        """It was still wanted for long enough after the last fault, and someone could serve it."""
        return (
            ask.healed_with_s is not None
            and ask.healed_with_s >= RECOVERY_S
            and ask.client not in self.world.leftovers
            and ask.nature != "unmapped"
            and bool(self.world.brokers)
            and ask.served_by({w.core.description.model for w in self.world.workers.values()})
        )

    # -- at the end -----------------------------------------------------------------------------

    def all_ended(self) -> None:
        left = sorted(ask.label for ask in self.world.unfinished)
        require(not left, "never ended", f"requests {left} have not ended")

    def at_rest(self) -> bool:
        return not self._restless()

    def drained(self) -> None:
        require(not (what := self._restless()), "does not drain", what)

    def _restless(self) -> str:
        """What is still there of requests that have all ended, or nothing."""
        for broker in self.world.brokers.values():
            core = broker.core
            if core.entries or core.poolless or core.mappingless:
                return f"{broker} still has {list(map(str, core.entries))}"
            if any(worker.running for worker in core.workers.values()):
                return f"{broker} counts requests as running on {core.workers.values()}"
            if any(len(pool.queue) for pool in core.pools.values()):
                return f"{broker} has a queue"
            for client in self.world.clients.values():
                kept = [str(i) for i in self._answer_ids(client) if i in core.answers]
                if kept:
                    return f"{broker} still holds answers to {kept}"
        for worker in self.world.workers.values():
            if worker.core.held:
                return f"{worker} still holds {list(map(str, worker.core.held))}"
        for leftover in self.world.leftovers:
            if leftover.alive and not self._fenced(leftover):
                return f"{leftover} was not fenced off by {leftover.name}"
        return ""

    def _answer_ids(self, client: ClientProcess) -> list[m.RequestId]:
        asks = self.world.asks.values()
        return [ask.id for ask in asks if ask.client is client]

    def _fenced(self, leftover: Any) -> bool:
        links = leftover.core.links
        return all(links[name].state is LinkState.REFUSED for name in self.world.brokers)

    def forgotten(self) -> None:
        """Nobody is there any more: a broker is as it was when it began, but for bounded stores."""
        for broker in self.world.brokers.values():
            sizes = footprint(broker.core)
            fresh = footprint(type(broker.core)(broker.core.incarnation, broker.core.config))
            stores = ("answers", "mappings", "counters")
            kept = {n: size for n, size in sizes.items() if size > fresh[n] and n not in stores}
            require(not kept, "not forgotten", f"{broker} keeps {kept} of peers that have left")
            timer = broker.core.next_timer
            require(timer is None, "leaked timer", f"{broker} still wakes at {timer}")
