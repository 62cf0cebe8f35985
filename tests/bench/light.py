"""Peers that speak the protocol and do nothing else: what they cost is the same on every way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import zmq

from broker.protocol import Packet, RemoteProtocolError, decode, encode, payload_hash
from broker.protocol import messages as m
from broker.protocol.limits import Limits
from broker.protocol.names import new_incarnation
from broker.transport.sockets import configure

MODEL = m.ModelDescription(
    model="light",
    fingerprint="light",
    num_hidden_layers=4,
    hidden_size=8,
    vocab_size=64,
    max_position_embeddings=1024,
    aux_layer_ids=(1, 2, 3),
    dtype="float32",
    encodings=("probs",),
    layers=(),
    engine="",
    tokenizer="",
    config_json="{}",
)
_PAYLOAD = bytes(1024)
_MANIFEST = (m.TensorSpec("octets", "uint8", (len(_PAYLOAD),), 1),)
#: As often as a client says something. Who asks and is answered beats only this often.
HEARTBEAT_S, _BUSY_HEARTBEAT_S = 1.0, 5.0
#: Far above any wait here.
_TTL_S = 60.0


def dealer(context: zmq.Context[Any]) -> zmq.Socket[bytes]:
    sock = context.socket(zmq.DEALER)
    configure(sock, Limits())
    return sock


def packets(sock: zmq.Socket[bytes]) -> Iterator[Packet]:
    """What has come."""
    while True:
        try:
            frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        yield decode(frames)


class LightClient:
    """Asks for 1 KiB with 1 KiB, over a connection of its own to a broker or to a worker."""

    def __init__(
        self, context: zmq.Context[Any], where: str | zmq.Socket[bytes], name: str
    ) -> None:
        if isinstance(where, str):
            self.socket = dealer(context)
            self.socket.connect(where)
        else:  # a socket that is connected
            self.socket = where
        self.welcome = False
        self._name = name
        self._incarnation = new_incarnation()
        self._number = 0
        self._spoke_at = self._beat_at = 0.0
        self._send(m.ClientHello(name, self._incarnation, "", 0))

    def ask(self) -> None:
        self._number += 1
        request = m.Request(
            id=m.RequestId(self._name, self._incarnation, self._number),
            operation="generate",
            model=MODEL.model,
            step=self._number,
            n_tokens=len(_PAYLOAD),
            mapping_id="",
            encoding="probs",
            ttl_s=_TTL_S,
            manifest=_MANIFEST,
        )
        self._send(request, [_PAYLOAD])

    def take(self) -> m.Reply | None:
        """The reply, if it has come; anything else is read too."""
        for packet in packets(self.socket):
            if isinstance(packet.message, m.Reply):
                packet.verify()
                return packet.message
            if isinstance(packet.message, (m.Failure, m.Refused)):
                raise RemoteProtocolError(packet.message.text)
            self.welcome |= isinstance(packet.message, m.Welcome)
        return None

    def acknowledge(self, reply: m.Reply) -> None:
        self._send(m.Received((reply.id,)))

    def beat(self) -> None:
        """As :class:`broker.peer.link.Link` does: not where something else was said just now."""
        now = time.monotonic()
        quiet = now >= self._spoke_at + HEARTBEAT_S
        if quiet or now >= self._beat_at + _BUSY_HEARTBEAT_S:
            self._send(m.Heartbeat(-1))
            self._beat_at = now

    def _send(self, message: m.Message, payload: list[bytes] | None = None) -> None:
        self._spoke_at = time.monotonic()
        self.socket.send_multipart(encode(message, payload or []).frames, copy=False)


def reply_to(packet: Packet) -> Packet:
    """What a worker answers that has its 1 KiB at hand."""
    packet.verify()
    request = packet.message
    assert isinstance(request, m.Request)
    reply = m.Reply(
        id=request.id,
        worker="light",
        model=MODEL.model,
        fingerprint=MODEL.fingerprint,
        aux_layer_ids=MODEL.aux_layer_ids,
        tokens_hash=payload_hash(packet),
        mapping_id=request.mapping_id,
        encoding=request.encoding,
        compute_s=0.0,
        info_json="{}",
        manifest=_MANIFEST,
    )
    return encode(reply, [_PAYLOAD])
