"""Peers with bad manners: any message in any order, and nothing in it need be true.

They have models of their own, and do not ask for those of the honest. All else is theirs to try:
several hellos on one connection, requests and answers in another's name, sizes and times that
cannot be.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from broker.core import BadBytes, ConnectionLost, Moving, Received, Side
from broker.protocol import LocalProtocolError, Packet, RemoteProtocolError, decode, encode
from broker.protocol import messages as m
from tests.broker.core.rig import mapping_offer, model
from tests.sim.peers import FIRST_INCARNATION

if TYPE_CHECKING:
    from tests.sim.peers import BrokerProcess
    from tests.sim.world import World

#: Names that the rude have, together; a broker may keep something for each.
NAMES = ("r1", "r2", "r3", "r4")
MODELS = ("x", "y")
#: Names that are believed by nobody, and those of the honest, for what is not a hello.
_ANY_NAME = (*NAMES, "c1", "w1", "", "é" * 300, "n" * (1 << 18))
_NUMBERS = (0, 1, 2, 7, 1 << 40, -1)
_SECONDS = (0.0, 5e-324, 1e-6, 0.1, 1.0, 60.0, 1e6, 1.7e308, float("inf"), float("nan"), -1.0)
_SIZES = (0, 1, 10, 200, 100_000, 1 << 40, -1)
#: Bytes of a tensor that is really sent.
_PAYLOADS = (0, 1, 8, 1000, 50_000)
_MAX_CONNECTIONS = 12
#: Replies in parts of which one is yet to be heard.
_MAX_ANNOUNCED = 8


class Crowd:
    """Rude peers at one broker, until their time is up; then all of their connections are cut."""

    def __init__(
        self, world: World, broker: BrokerProcess, seed: int, rng: random.Random | None = None
    ) -> None:
        self.world = world
        self.broker = broker
        self.seed = seed
        self.rng = rng or random.Random(seed)
        #: connection -> its side
        self.connections: dict[bytes, Side] = {}
        #: what the broker asked of them
        self.asked: list[tuple[bytes, m.RequestId]] = []
        #: parts of replies that were announced: who said so, of which request, and what is to come
        self._announced: list[tuple[bytes, m.RequestId, int, int]] = []
        self._numbers = 0

    def act(self, until: float) -> None:
        """Do one rude thing, and the next a little later."""
        if not self.broker.alive:
            return
        if self.world.now >= until:
            for connection in list(self.connections):
                self._hang_up(connection)
            return
        self._once()
        wait_s = 1.5 if self.rng.random() < 0.01 else self.rng.choice((0.0, 0.001, 0.02, 0.2))
        self.world.later(wait_s, self.act, until)

    def _once(self) -> None:
        rng = self.rng
        if not self.connections or (
            len(self.connections) < _MAX_CONNECTIONS and rng.random() < 0.1
        ):
            self._dial()
            return
        connection = rng.choice(list(self.connections))
        side = self.connections[connection]
        luck = rng.random()
        if luck < 0.04:
            self._hang_up(connection)
        elif luck < 0.06:
            self.broker.receive(BadBytes(side, connection, "noise", rng.random() < 0.5))
        elif luck < 0.08:
            self.broker.receive(Moving(side, connection))
        elif luck < 0.2 and (mine := [a for a in self._announced if a[0] == connection]):
            self._next_part(rng.choice(mine))
        elif luck < 0.4 and (mine := [i for c, i in self.asked if c == connection]):
            self._say(connection, self._answer(rng.choice(mine)))
        else:
            self._say(connection, self._anything(side))

    def _dial(self) -> None:
        self._numbers += 1
        connection = b"rude-%d-%d" % (self.seed, self._numbers)
        side = self.connections[connection] = self.rng.choice(list(Side))
        self.broker.rude[connection] = self._heard(connection)
        self._say(connection, self._hello(side, self.rng.choice(NAMES)))

    def _hang_up(self, connection: bytes) -> None:
        side = self.connections.pop(connection)
        self.asked = [asked for asked in self.asked if asked[0] != connection]
        self._announced = [part for part in self._announced if part[0] != connection]
        del self.broker.rude[connection]
        self.broker.receive(ConnectionLost(side, connection))

    def _heard(self, connection: bytes) -> Callable[[Packet], None]:
        def heard(packet: Packet) -> None:
            if isinstance(packet.message, m.Request):
                self.asked.append((connection, packet.message.id))

        return heard

    def _say(self, connection: bytes, make: tuple[m.Message, list[bytes]]) -> None:
        side = self.connections[connection]
        message, payload = make
        try:
            packet = on_the_wire(message, payload)
        except (LocalProtocolError, RemoteProtocolError) as error:
            self.broker.receive(BadBytes(side, connection, str(error)[:200]))
        else:
            if isinstance(message, m.WorkerHello):  # what it says that it holds it may answer
                self.asked += [(connection, request_id) for request_id in message.held[:3]]
            if isinstance(message, m.Reply) and 0 < message.parts < 3:
                self._announced.append(
                    (connection, message.id, message.parts, message.tensor_bytes)
                )
                del self._announced[:-_MAX_ANNOUNCED]
            self.broker.receive(Received(side, connection, packet))

    def _next_part(self, announced: tuple[bytes, m.RequestId, int, int]) -> None:
        """One that was announced: as it was said, or too many, or with too much in it."""
        self._announced.remove(announced)
        connection, request_id, parts, nbytes = announced
        luck = self.rng.random()
        for number in range(parts if luck < 0.8 else 3 * parts):
            size = nbytes // parts + (number == parts - 1) * (nbytes % parts) + (luck < 0.1)
            self._say(connection, (m.Part(request_id, number), [b"p" * max(1, size)]))

    # -- what they say --------------------------------------------------------------------------

    def _anything(self, side: Side) -> tuple[m.Message, list[bytes]]:
        rng = self.rng
        hello = self._hello(
            rng.choice((side, side, *Side)), rng.choice((*NAMES, *NAMES, "", "é" * 300))
        )
        kinds: list[Callable[[], tuple[m.Message, list[bytes]]]] = [
            lambda: hello,
            self._request,
            self._request,
            self._request,
            self._mapping,
            lambda: self._answer(self._id()),
            lambda: (m.Cancel(self._id()), []),
            lambda: (m.Received(tuple(self._id() for _ in range(rng.choice((0, 1, 50))))), []),
            lambda: (m.Part(self._id(), rng.choice(_NUMBERS)), [b"p" * rng.choice(_PAYLOADS)]),
            lambda: (m.Heartbeat(rng.choice(_NUMBERS), rng.choice(_ANY_NAME)), []),
            lambda: (m.Goodbye(rng.choice(_ANY_NAME)), []),
            lambda: (m.Draining(), []),
            lambda: (m.RequestWanted(self._id()), []),
            lambda: (m.MappingWanted(rng.choice(_ANY_NAME)), []),
            lambda: (m.HelloWanted(rng.choice(_ANY_NAME)), []),
            lambda: (m.Refused(rng.choice(_ANY_NAME), rng.choice(_ANY_NAME)), []),
            lambda: (m.Welcome("w", *(rng.choice(_NUMBERS) for _ in range(8))), []),
        ]
        return rng.choice(kinds)()

    def _hello(self, side: Side, name: str) -> tuple[m.Message, list[bytes]]:
        rng = self.rng
        life = rng.choice((1, 1, 2, 3, 1 << 40))
        number = rng.choice(
            (None, None, None, m.Admission(rng.choice(("b1.1", "", "other")), rng.choice(_NUMBERS)))
        )
        if side is Side.CLIENT:
            job = rng.choice(("", "job", f"job{rng.randrange(1000)}", rng.choice(_ANY_NAME)))
            return m.ClientHello(name, life, job, rng.choice(_NUMBERS), number), []
        held = tuple(self._id() for _ in range(rng.choice((0, 0, 1, 3, 20))))
        serves = model(rng.choice(MODELS), fingerprint=rng.choice(("f0", "f0", "f1", "g" * 5000)))
        return m.WorkerHello(
            name, life, serves, rng.choice((1, 2, 8, 0, 1 << 40)), held, number
        ), []

    def _id(self) -> m.RequestId:
        rng = self.rng
        if self.asked and rng.random() < 0.3:
            return rng.choice(self.asked)[1]
        if rng.random() < 0.2:  # one of the honest client's
            return m.RequestId("c1", FIRST_INCARNATION, rng.randrange(1, 13))
        return m.RequestId(rng.choice(_ANY_NAME[:6]), rng.choice((1, 1, 2)), rng.randrange(20))

    def _request(self) -> tuple[m.Message, list[bytes]]:
        rng = self.rng
        name, nbytes = rng.choice(MODELS), rng.choice(_PAYLOADS)
        tokens = m.TensorSpec("input_ids", "uint8", (nbytes,), 1)
        return m.Request(
            self._id(),
            rng.choice((*m.OPERATIONS, "generate", "generate", "dance")),
            rng.choice((name, name, "nobody has it")),
            rng.choice(_NUMBERS),
            rng.choice(_SIZES),
            rng.choice(("", "", "m-nobody-has-it", mapping_offer(1, 2).message.mapping_id)),  # type: ignore[union-attr]
            rng.choice(("probs", "hidden", "e" * 1000)),
            rng.choice(_SECONDS),
            (tokens,),
            offer=rng.choice(("", model(name).offer, "no such offer")),
            avoid=rng.choice(("", rng.choice(_ANY_NAME))),
        ), [b"t" * nbytes]  # fmt: skip

    def _mapping(self) -> tuple[m.Message, list[bytes]]:
        rng = self.rng
        honest = mapping_offer(*(rng.randrange(64) for _ in range(3)))
        offer: Any = honest.message
        vocab_size = rng.choice((64, 64, 0, -1, 1 << 60))
        return m.MappingOffer(
            rng.choice((offer.mapping_id, "another")), vocab_size, offer.manifest
        ), [bytes(frame) for frame in honest.payload]

    def _answer(self, request_id: m.RequestId) -> tuple[m.Message, list[bytes]]:
        rng = self.rng
        if rng.random() < 0.3:
            code = rng.choice((*m.FAILURE_CODES, rng.choice(_ANY_NAME)))
            return m.Failure(request_id, code, rng.choice(_ANY_NAME)), []
        serves, nbytes = model(rng.choice(MODELS)), rng.choice(_PAYLOADS)
        parts = rng.choice((0, 0, 0, 1, 2, 1 << 30))
        frames = parts if 0 < parts < 3 else 1
        spec = m.TensorSpec("supervision", "uint8", (nbytes,), frames)
        return m.Reply(
            request_id,
            rng.choice(_ANY_NAME),
            serves.model,
            serves.fingerprint,
            serves.aux_layer_ids,
            rng.getrandbits(32),
            "",
            "probs",
            rng.choice(_SECONDS),
            "",
            (spec,),
            parts=parts,
            offer=serves.offer,
        ), [] if parts else [b"a" * nbytes]


def on_the_wire(message: m.Message, payload: list[bytes]) -> Packet:
    """What the broker reads of it. Raises where the bytes cannot be, or are refused."""
    return decode([bytes(frame) for frame in encode(message, payload).frames])
