"""Answers libzmq's question who may connect (ZAP, https://rfc.zeromq.org/spec/27/).

The handler is a socket of the broker's own loop, not a thread: a decision and what follows from it
are never out of step, and libzmq holds the connection back until it is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import zmq

from broker.keys.files import PublicKey

#: Questions answered before the sockets get a turn.
_BATCH = 64


@dataclass(frozen=True)
class Refusal:
    """A peer that proved to hold a key which may not connect there."""

    domain: str
    address: str
    key: bytes


class ZapHandler:
    """``find(domain, key)`` gives the entry of a key (32 bytes) that may connect to ``domain``, or
    None. Admitted connections carry the key's fingerprint as ``User-Id``.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        find: Callable[[str, bytes], PublicKey | None],
    ) -> None:
        self._find = find
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")

    def serve(self) -> list[Refusal]:
        """Answer what was asked; who was refused."""
        refusals = []
        for _ in range(_BATCH):
            try:
                question = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            # libzmq itself asks, so the form is sure: name, "", version, request, domain,
            # address, routing id, mechanism, credentials
            name, _, version, request, domain, address, _, mechanism, *credentials = question
            key = credentials[0] if mechanism == b"CURVE" and credentials else b""
            entry = self._find(domain.decode(), key) if key else None
            if entry is None:
                refusals.append(Refusal(domain.decode(), address.decode(), key))
                answer = [b"400", b"this key may not connect here", b"", b""]
            else:
                answer = [b"200", b"", entry.fingerprint.encode(), b""]
            self.socket.send_multipart([name, b"", version, request, *answer])
        return refusals

    def close(self) -> None:
        self.socket.close(linger=0)
