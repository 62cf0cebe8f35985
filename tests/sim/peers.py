"""The processes: each core with what its service does around it (``service.py``, ``peer.py``)."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
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
from broker.protocol import Packet, RemoteProtocolError, encode, payload_hash
from broker.protocol import messages as m
from broker.protocol.link import Arrived, Connected, Disconnected, Reopen, SendTo, Tick
from broker.protocol.peer import lost_message
from tests.broker.rig import model
from tests.sim.mappings import MAPPINGS
from tests.sim.network import Connection, Socket
from trainer_client.core import (
    CancelRequest,
    ClientConfig,
    ClientCore,
    Deliver,
    Fail,
    KeepMapping,
    Submit,
)
from worker.core import Compute, Computed, Exit, Forget, Learn, WorkerCore

if TYPE_CHECKING:
    from tests.sim.world import World

#: What ``poll`` rounds a wait up to.
_POLL_S = 0.001
_SECRET = 0x5DEECE66D


class Process:
    """A core in one life of a peer, with a clock of its own and an inbox for when it is stopped."""

    core: Any
    tick: object

    def __init__(self, world: World, name: str, life: int) -> None:
        self.world = world
        self.name = name
        self.life = life
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
        self.die(quietly=False, after_s=0.06)

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

    def act(self, actions: Iterable[Any]) -> None:
        gone = []
        for action in actions:
            if not isinstance(action, Send):
                continue
            connection = self.connections.get(action.connection)
            if connection is None:
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


class WorkerProcess(PeerProcess):
    """A worker core with a target that turns a request's bytes into others, one at a time."""

    side = Side.WORKER

    def __init__(
        self,
        world: World,
        name: str,
        life: int,
        *,
        serves: str,
        credits: int,
        max_mappings: int,
        token_s: float,
    ) -> None:
        super().__init__(world, name, life)
        self.core = WorkerCore(
            name,
            life,
            _description(serves),
            world.endpoints,
            self.now,
            credits=credits,
            max_mappings=max_mappings,
            drain_s=5.0,
        )
        self.token_s = token_s
        self.slowness = 1.0
        self.known_mappings: set[str] = set()
        self.open(world.endpoints)

    def perform(self, action: Any) -> None:
        if isinstance(action, Compute):
            request = action.packet.message
            took_s = request.n_tokens * self.token_s * self.slowness
            if (ask := self.world.asks.get(request.id)) and ask.nature == "deadly":
                self.world.later(took_s / 2, self.world.crash, self)
            else:
                self.world.later(took_s, self._computed, action.packet, took_s)
        elif isinstance(action, Learn):
            offer = action.packet.message
            assert _sound(action.packet)
            self.known_mappings.add(offer.mapping_id)
        elif isinstance(action, Forget):
            self.known_mappings.discard(action.mapping_id)
        elif isinstance(action, Exit):
            self.world.exited(self, action.error)

    def _computed(self, packet: Packet, took_s: float) -> None:
        if self.alive:
            self.receive(Computed(packet.message.id, self._answer(packet, took_s)))  # type: ignore[union-attr]

    def _answer(self, packet: Packet, took_s: float) -> Packet:
        """What ``worker.answers.Answerer`` makes, without a target."""
        request = packet.message
        assert isinstance(request, m.Request)
        ask = self.world.asks.get(request.id)
        if not _sound(packet):
            return _failure(request, "damaged", "the payload is not what was sent")
        if request.mapping_id and request.mapping_id not in self.known_mappings:
            return _failure(request, "bad_request", "no usable vocab mapping")
        if ask is not None and ask.nature == "bad":
            return _failure(request, "bad_request", "token ids out of range")
        if ask is not None and ask.nature in ("failing", "flaky"):
            ask.attempts += 1
            if ask.nature == "failing" or ask.attempts == 1:
                return _failure(request, "target_failed", "the target raised")
        (tokens,) = struct.unpack("<Q", packet.payload[0])
        reply = m.Reply(
            request.id,
            str(self),
            self.core.description.model,
            self.core.description.fingerprint,
            self.core.description.aux_layer_ids,
            payload_hash(packet),
            request.mapping_id,
            request.encoding,
            took_s,
            "",
            (m.TensorSpec("supervision", "uint8", (8,), 1),),
        )
        return encode(reply, [struct.pack("<Q", tokens ^ _SECRET)])


@dataclass(eq=False)
class Ask:
    """A request that a caller made, and what the caller was told."""

    label: int
    #: ok, bad, failing, flaky (fails once), deadly (the worker that begins it dies) or unmapped
    #: (its client does not have the mapping that it names)
    nature: str
    packet: Packet
    client: ClientProcess
    submitted_at: float
    #: on the client's clock
    deadline: float
    attempts: int = 0
    #: how often a target began with it
    forwards: int = 0
    cancelled: bool = False
    #: how much longer it was wanted when the faults stopped; None for one that had ended
    healed_with_s: float | None = None
    #: "result", or the code of the failure; empty while it is unfinished
    ended: str = ""

    @property
    def id(self) -> m.RequestId:
        assert isinstance(self.packet.message, m.Request)
        return self.packet.message.id

    def served_by(self, models: set[str]) -> bool:
        """Whether these workers can answer it."""
        assert isinstance(self.packet.message, m.Request)
        wanted = self.packet.message.model
        return wanted in models if wanted else len(models) == 1

    @property
    def expected(self) -> bytes:
        """The bytes that the target makes of this request's."""
        (tokens,) = struct.unpack("<Q", self.packet.payload[0])
        return struct.pack("<Q", tokens ^ _SECRET)


class ClientProcess(PeerProcess):
    """A client core with a caller."""

    side = Side.CLIENT

    def __init__(self, world: World, name: str, life: int, *, job: str, resend_s: float) -> None:
        super().__init__(world, name, life)
        config = ClientConfig(resend_s=resend_s, resend_max_s=2 * resend_s)
        self.core = ClientCore(
            name, life, world.endpoints, self.now, job=job, rank=0, config=config
        )
        self._number = 0
        self.open(world.endpoints)
        for offer in MAPPINGS:
            self.core.handle(KeepMapping(offer), self.now)

    def submit(
        self,
        label: int,
        nature: str,
        *,
        n_tokens: int,
        step: int,
        model: str,
        mapping_id: str,
        deadline_s: float,
    ) -> Ask:
        self._number += 1
        request = m.Request(
            m.RequestId(self.name, self.life, self._number),
            "generate",
            model,
            step,
            n_tokens,
            mapping_id,
            "probs",
            deadline_s,
            (m.TensorSpec("input_ids", "uint8", (8,), 1),),
        )
        packet = encode(request, [struct.pack("<Q", label)])
        deadline = self.now + deadline_s
        ask = Ask(label, nature, packet, self, self.world.now, deadline)
        self.world.asks[ask.id] = ask
        self.receive(Submit(packet, deadline))
        return ask

    def cancel(self, ask: Ask) -> None:
        if not ask.ended and not ask.cancelled:
            ask.cancelled = True
            self.receive(CancelRequest(ask.id))

    def perform(self, action: Any) -> None:
        if isinstance(action, (Deliver, Fail)):
            self.world.ended(self, action)


def _sound(packet: Packet) -> bool:
    try:
        packet.verify()
    except RemoteProtocolError:
        return False
    return True


@functools.cache
def _description(serves: str) -> m.ModelDescription:
    return model(serves)


def _failure(request: m.Request, code: str, text: str) -> Packet:
    return encode(m.Failure(request.id, code, text))
