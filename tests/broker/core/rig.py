"""A broker core with its own clock and named peers; every step checks every invariant."""

from __future__ import annotations

import numpy as np

from broker.core import (
    BadBytes,
    BrokerConfig,
    BrokerCore,
    ConnectionLost,
    Log,
    Received,
    Send,
    Side,
    Tick,
)
from broker.core.inspect import validate
from broker.protocol import Packet, decode, encode, mapping_id, payload_hash
from broker.protocol import messages as m

#: What a reply says of a request without tensors.
NO_PAYLOAD = payload_hash(encode(m.Goodbye("")))


def model(name: str = "tiny", **changes: object) -> m.ModelDescription:
    facts: dict[str, object] = {
        "model": name,
        "fingerprint": "f0",
        "num_hidden_layers": 8,
        "hidden_size": 16,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "aux_layer_ids": (1, 3, 4),
        "dtype": "float32",
        "encodings": ("probs", "hidden"),
        "layers": (),
        "engine": "",
        "tokenizer": "",
        "config_json": "{}",
    }
    return m.ModelDescription(**(facts | changes))  # type: ignore[arg-type]


def mapping_offer(*ids: int, vocab_size: int = 64) -> Packet:
    octets = np.array(ids, dtype="<i8").tobytes()
    spec = m.TensorSpec("selected_token_ids", "int64", (len(ids),), 1)
    return encode(m.MappingOffer(mapping_id(vocab_size, [octets]), vocab_size, (spec,)), [octets])


class Rig:
    """Speaks to a core for clients and workers by name, and keeps what each was sent."""

    def __init__(self, **config: object) -> None:
        self.core = BrokerCore("b1", BrokerConfig(**config))  # type: ignore[arg-type]
        self.now = 100.0
        self.sent: dict[str, list[m.Message]] = {}
        self.logs: list[str] = []
        self.incarnations: dict[str, int] = {}

    # -- peers ----------------------------------------------------------------------------------

    def client(
        self, name: str, *, incarnation: int = 1, connection: str = "", job: str = "job"
    ) -> None:
        self.incarnations[name] = incarnation
        hello = m.ClientHello(name, incarnation, job, 0)
        self.from_client(connection or name, hello)

    def worker(
        self,
        name: str,
        *,
        incarnation: int = 1,
        connection: str = "",
        credits: int = 1,
        held: tuple[m.RequestId, ...] = (),
        description: m.ModelDescription | None = None,
    ) -> None:
        hello = m.WorkerHello(name, incarnation, description or model(), credits, held)
        self.from_worker(connection or name, hello)

    def id(self, client: str, number: int) -> m.RequestId:
        return m.RequestId(client, self.incarnations.get(client, 1), number)

    def ask(
        self, client: str, number: int, *, connection: str = "", **fields: object
    ) -> m.RequestId:
        request_id = self.id(client, number)
        values: dict[str, object] = {
            "operation": "generate",
            "model": "",
            "step": number,
            "n_tokens": 100,
            "mapping_id": "",
            "encoding": "probs",
            "ttl_s": 60.0,
            "manifest": (),
        }
        self.from_client(connection or client, m.Request(request_id, **(values | fields)))  # type: ignore[arg-type]
        return request_id

    def reply(self, worker: str, request_id: m.RequestId, compute_s: float = 1.0) -> None:
        """Answer, not before it can have been computed: more than that nobody believes."""
        session = self.core.workers.get(worker)
        if session is not None and (since := session.running.get(request_id)) is not None:
            self.now = max(self.now, since + compute_s)
        self.from_worker(
            worker,
            m.Reply(
                request_id,
                worker,
                "tiny",
                "f0",
                (1, 3, 4),
                NO_PAYLOAD,
                "",
                "probs",
                compute_s,
                "",
                (),
            ),
        )

    def fail(self, worker: str, request_id: m.RequestId, code: str, text: str = "") -> None:
        self.from_worker(worker, m.Failure(request_id, code, text))

    # -- the core -------------------------------------------------------------------------------

    def from_client(self, connection: str, message: m.Message | Packet) -> None:
        self._received(Side.CLIENT, connection, message)

    def from_worker(self, connection: str, message: m.Message | Packet) -> None:
        self._received(Side.WORKER, connection, message)

    def _received(self, side: Side, connection: str, message: m.Message | Packet) -> None:
        packet = message if isinstance(message, Packet) else encode(message)
        self.handle(Received(side, connection.encode(), packet))

    def cut(self, side: Side, connection: str) -> None:
        self.handle(ConnectionLost(side, connection.encode()))

    def garbage(self, side: Side, connection: str, *, other_version: bool = False) -> None:
        self.handle(BadBytes(side, connection.encode(), "not a message", other_version))

    def pass_time(self, seconds: float, *alive: tuple[Side, str]) -> None:
        """Let time pass in steps of a second, while the peers named ``alive`` say something."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            for side, connection in alive:
                self._received(side, connection, m.Heartbeat(-1))
            self.handle(Tick())

    def handle(self, event: object) -> None:
        for action in self.core.handle(event, self.now):  # type: ignore[arg-type]
            if isinstance(action, Send):
                message = decode([bytes(frame) for frame in action.frames]).message
                self.sent.setdefault(action.connection.decode(), []).append(message)
            elif isinstance(action, Log):
                self.logs.append(action.event)
        validate(self.core)

    # -- what came out --------------------------------------------------------------------------

    def got(self, peer: str, kind: type | None = None) -> list[m.Message]:
        """What a peer was sent since the last call; only one kind of it, if asked."""
        messages = self.sent.pop(peer, [])
        return messages if kind is None else [x for x in messages if isinstance(x, kind)]

    def requests(self, worker: str) -> list[str]:
        """The requests that a worker was given since the last call, like ``rank0#1``."""
        return [str(message.id) for message in self.got(worker, m.Request)]  # type: ignore[union-attr]
