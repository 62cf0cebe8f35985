"""The two kinds of peers: a worker with a fake target, a client with a caller."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.core import Side
from broker.peer.parts import in_parts
from broker.protocol import Packet, RemoteProtocolError, encode, payload_hash
from broker.protocol import messages as m
from tests.broker.core.rig import model
from tests.sim.mappings import MAPPINGS
from tests.sim.peers import PeerProcess
from trainer_client.core import (
    CancelRequest,
    ClientConfig,
    ClientCore,
    Deliver,
    Fail,
    KeepMapping,
    Submit,
)
from worker.core import Compute, Computed, Exit, Forget, Learn, TargetFree, WorkerCore

if TYPE_CHECKING:
    from tests.sim.world import World

#: What the fake target makes of a request's bytes: no two requests have the same.
_SECRET = 0x5DEECE66D
#: A reply of three frames, 3, 3 and 2 bytes, is one message, or comes in two or three parts.
_PART_BYTES = (8, 5, 3)
#: Making an answer takes this part of what the target takes.
_ENCODING = 0.75


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
            self.incarnation,
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
        """The target goes on; the answer is made meanwhile."""
        if self.alive:
            self.receive(TargetFree())
            self.world.later(took_s * _ENCODING, self._encoded, packet, took_s)

    def _encoded(self, packet: Packet, took_s: float) -> None:
        if self.alive:
            self.receive(Computed(packet.message.id, self._answer(packet, took_s)))  # type: ignore[union-attr]

    def _answer(self, packet: Packet, took_s: float) -> tuple[Packet, ...]:
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
        supervision = struct.pack("<Q", tokens ^ _SECRET)
        frames = [supervision[at : at + 3] for at in range(0, len(supervision), 3)]
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
            (m.TensorSpec("supervision", "uint8", (8,), len(frames)),),
        )
        return in_parts(reply, frames, nbytes=_PART_BYTES[tokens % len(_PART_BYTES)])


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
            name, self.incarnation, world.endpoints, self.now, job=job, rank=0, config=config
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
            m.RequestId(self.name, self.incarnation, self._number),
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


def _failure(request: m.Request, code: str, text: str) -> tuple[Packet, ...]:
    return (encode(m.Failure(request.id, code, text)),)
