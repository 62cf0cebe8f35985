"""A real broker under many clients and large replies: what memory it takes at most.

``python -m tests.integration.memory`` runs the full form and prints its figures as JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zmq

from broker.core import BrokerConfig
from broker.protocol import decode, encode
from broker.protocol import messages as m
from broker.protocol.limits import KIB, MIB
from tests.broker.core.rig import model
from tests.zmtp import connect, frame, null_handshake, read_message

#: What docs/memory.md says: for a broker without peers, and for each connection.
BASE_BYTES = 64 * MIB
CONNECTION_BYTES = 128 * KIB
#: Bytes of a reply for one token of its request, and of one of its frames.
TOKEN_BYTES, FRAME_BYTES = 256, MIB
SMALL_REPLY_BYTES = 64 * KIB
#: Nothing moves for so long: what is left waits for room.
_QUIET_MS = 500
_PATIENCE_S = 60.0

_BROKER = """
import json, sys
from broker.core import BrokerConfig
from broker.service import Broker
with Broker(config=BrokerConfig(**json.loads(sys.argv[1]))) as broker:
    print(json.dumps([broker.client_endpoint, broker.worker_endpoint]), flush=True)
    broker.wait()
"""


@dataclass(frozen=True)
class Load:
    """``clients`` are connected and take a small reply each. ``readers`` take ``rounds`` large ones
    each, one after the other; ``stalled`` ask for as many as they may and read nothing.
    """

    clients: int
    reply_bytes: int
    readers: int = 4
    rounds: int = 4
    stalled: int = 2
    #: large replies that may lie in the broker for one client, and for all
    client_replies: int = 2
    total_replies: int = 6

    @property
    def limits(self) -> dict[str, int]:
        whole_bytes = self.reply_bytes + MIB  # with its header
        return {
            "max_client_bytes": self.client_replies * whole_bytes,
            "max_total_bytes": self.total_replies * whole_bytes,
            "held_answer_bytes": whole_bytes,
        }

    @property
    def formula_bytes(self) -> int:
        """What docs/memory.md allows a broker with these limits."""
        limits = self.limits["max_total_bytes"] + self.limits["held_answer_bytes"]
        return BASE_BYTES + self.clients * CONNECTION_BYTES + limits


FULL = Load(clients=1000, reply_bytes=256 * MIB, rounds=2)
SMALL = Load(clients=100, reply_bytes=32 * MIB)


@dataclass
class Figures:
    """Peaks of the broker's resident memory: without peers, with them all, in the end."""

    alone_bytes: int = 0
    connected_bytes: int = 0
    peak_bytes: int = 0
    formula_bytes: int = 0
    large_replies: int = 0
    small_replies: int = 0
    seconds: float = 0.0


def measure(load: Load, **limits: int) -> Figures:
    """Put the load on a broker with the load's limits, but for these, until all is done that can
    be, or it has twice the memory that the formula allows.
    """
    began = time.monotonic()
    figures = Figures(formula_bytes=load.formula_bytes)
    with contextlib.ExitStack() as stack:
        pid, clients, workers = stack.enter_context(_broker({**load.limits, **limits}))
        figures.alone_bytes = _peak_bytes(pid)
        crowd = [stack.enter_context(_Raw(clients, f"crowd{n}")) for n in range(load.clients)]
        stalled = [stack.enter_context(_Raw(clients, f"stalled{n}")) for n in range(load.stalled)]
        figures.connected_bytes = _peak_bytes(pid)
        context = stack.enter_context(zmq.Context())
        context.linger = 0
        worker = stack.enter_context(_Worker(context, workers, load.reply_bytes))
        readers = [
            stack.enter_context(_Reader(context, clients, f"reader{n}", load.reply_bytes))
            for n in range(load.readers)
        ]
        for client in stalled:
            for _ in range(BrokerConfig().window):
                client.ask(load.reply_bytes)
        for client in crowd:
            client.ask(SMALL_REPLY_BYTES)
        poller = zmq.Poller()
        for peer in (worker, *readers):
            poller.register(peer.dealer, zmq.POLLIN)
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end and figures.peak_bytes < 2 * load.formula_bytes:
            ready = dict(poller.poll(_QUIET_MS))
            for peer in (worker, *readers):
                if peer.dealer in ready:
                    peer.turn(load.rounds)
            before, figures.peak_bytes = figures.peak_bytes, _peak_bytes(pid)
            served = all(reader.taken == load.rounds for reader in readers)
            if served and not ready and figures.peak_bytes == before:
                break
        figures.large_replies = sum(reader.taken for reader in readers)
        figures.small_replies = sum(client.has_reply() for client in crowd)
    figures.seconds = time.monotonic() - began
    return figures


@contextlib.contextmanager
def _broker(config: dict[str, int]) -> Iterator[tuple[int, str, str]]:
    """A process; gives its number and its endpoints for clients and for workers."""
    settings = json.dumps({"liveness_s": 600.0, **config})
    child = subprocess.Popen([sys.executable, "-c", _BROKER, settings], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        yield (child.pid, *json.loads(child.stdout.readline()))
    finally:
        child.kill()
        child.communicate()


def _peak_bytes(pid: int) -> int:
    """The most that was ever resident."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * KIB


def _request(client: str, number: int, reply_bytes: int) -> bytes:
    fields = ("generate", "", number, reply_bytes // TOKEN_BYTES, "", "probs", 600.0, ())
    return bytes(encode(m.Request(m.RequestId(client, 1, number), *fields)).frames[0])


class _Raw:
    """A client that reads only when it is told to, on a socket of its own."""

    def __init__(self, endpoint: str, name: str) -> None:
        self._name = name
        self._asked = itertools.count()
        self._socket = connect(endpoint)
        null_handshake(self._socket)
        self._socket.sendall(frame(encode(m.ClientHello(name, 1, name, 0)).frames[0]))
        assert isinstance(decode(read_message(self._socket)).message, m.Welcome)

    def ask(self, reply_bytes: int) -> None:
        self._socket.sendall(frame(_request(self._name, next(self._asked), reply_bytes)))

    def has_reply(self) -> bool:
        try:
            return isinstance(decode(read_message(self._socket)).message, m.Reply)
        except TimeoutError:
            return False

    def __enter__(self) -> _Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()


class _Peer:
    """A DEALER that has said hello."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, hello: m.Message):
        self.dealer = context.socket(zmq.DEALER)
        self.dealer.connect(endpoint)
        self.dealer.send_multipart(encode(hello).frames)
        assert isinstance(self._receive(), m.Welcome)

    def _receive(self) -> m.Message:
        return decode(self.dealer.recv_multipart(copy=False)).message

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.dealer.close()


class _Worker(_Peer):
    """Answers each request with as many bytes as its tokens ask for."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, largest_bytes: int
    ) -> None:
        super().__init__(context, endpoint, m.WorkerHello("w", 1, model(), 8, ()))
        self._octets = memoryview(os.urandom(MIB) * (largest_bytes // MIB))

    def turn(self, rounds: int) -> None:
        request = self._receive()
        if not isinstance(request, m.Request):
            return
        nbytes = request.n_tokens * TOKEN_BYTES
        cuts = range(0, nbytes, FRAME_BYTES)
        payload = [self._octets[at : min(nbytes, at + FRAME_BYTES)] for at in cuts]
        manifest = (m.TensorSpec("x", "uint8", (nbytes,), len(payload)),)
        fields = ("w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 0.1, "", manifest)
        self.dealer.send_multipart(encode(m.Reply(request.id, *fields), payload).frames, copy=False)


class _Reader(_Peer):
    """Asks for the next large reply when it has the one before."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, name: str, reply_bytes: int
    ) -> None:
        super().__init__(context, endpoint, m.ClientHello(name, 1, name, 0))
        self._name = name
        self._reply_bytes = reply_bytes
        self.taken = 0
        self._ask()

    def turn(self, rounds: int) -> None:
        reply = self._receive()
        assert isinstance(reply, m.Reply)
        self.dealer.send_multipart(encode(m.Received((reply.id,))).frames)
        self.taken += 1
        if self.taken < rounds:
            self._ask()

    def _ask(self) -> None:
        self.dealer.send(_request(self._name, self.taken, self._reply_bytes))


if __name__ == "__main__":
    print(json.dumps({"full": asdict(measure(FULL)), "limits": FULL.limits}, indent=1))
