"""A reply that takes longer than the liveness limit, on a network that is only slow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from broker.core import BrokerConfig
from broker.service import Broker
from tests.waiting import eventually
from trainer_client.service import Client
from worker.service import Worker
from worker.targets.stub import StubTarget

PATIENCE_S = 20.0
#: What the reply has: more than the kernels' buffers on its way.
REPLY_BYTES = 24 << 20
BYTES_PER_S = 6 << 20
CONFIG = BrokerConfig(heartbeat_s=0.2, liveness_s=1.0)


class Large(StubTarget):
    weight = torch.arange(REPLY_BYTES // 4, dtype=torch.int32).view(torch.float32).view(-1, 1024)

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.weight)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on at the network's speed until either end closes."""
    due = time.monotonic()
    try:
        while octets := source.recv(64 << 10):
            sink.sendall(octets)
            due = max(due, time.monotonic() - 0.05) + len(octets) / BYTES_PER_S
            time.sleep(max(0.0, due - time.monotonic()))
    except OSError:
        pass
    finally:
        for end in (source, sink):
            end.close()


def small(sock: socket.socket) -> socket.socket:
    """With as little memory of its own as a network has, so that both ends see its speed."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 64 << 10)
    return sock


@contextmanager
def slow(upstream: str) -> Iterator[str]:
    """An endpoint from which everything goes slowly to and from ``upstream``."""
    host, port = upstream.removeprefix("tcp://").split(":")
    listener = small(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = small(socket.socket())
            far.connect((host, int(port)))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def take_slowly(broker: Broker, clients: str, workers: str) -> None:
    with Worker(Large(), workers, name="w"), Client([clients], name="c") as client:
        client.submit("model_info", timeout_s=PATIENCE_S).result()
        began = time.monotonic()
        answer = client.submit("input_embeddings", timeout_s=PATIENCE_S).result()
        took_s = time.monotonic() - began
        assert torch.equal(
            answer.tensors["weight"].view(torch.int32), Large.weight.view(torch.int32)
        )
        assert client.counters()["resends"] == 0
    assert took_s > 2 * CONFIG.liveness_s, "the network was not slow"
    assert broker.core.counters["requeues"] == 0


def test_a_worker_on_a_slow_network_is_not_lost() -> None:
    with Broker(config=CONFIG) as broker, slow(broker.worker_endpoint) as workers:
        take_slowly(broker, broker.client_endpoint, workers)


def test_a_client_on_a_slow_network_is_not_lost() -> None:
    with Broker(config=CONFIG) as broker, slow(broker.client_endpoint) as clients:
        take_slowly(broker, clients, broker.worker_endpoint)


class Gated(Large):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def get_input_embeddings(self) -> SimpleNamespace:
        assert self.gate.wait(PATIENCE_S)
        return super().get_input_embeddings()


def test_a_worker_that_drains_on_a_slow_network_leaves_when_its_answer_has() -> None:
    target = Gated()
    with (
        Broker(config=CONFIG) as broker,
        slow(broker.worker_endpoint) as workers,
        Client([broker.client_endpoint], name="c") as client,
    ):
        worker = Worker(target, workers, name="w", drain_s=PATIENCE_S).start()
        client.submit("model_info", timeout_s=PATIENCE_S).result()
        target.gate.clear()
        pending = client.submit("input_embeddings", timeout_s=PATIENCE_S)
        eventually(lambda: worker.core.computing)
        worker.drain()
        eventually(lambda: worker.core.released)  # nothing but the answer is left to be said
        began = time.monotonic()
        target.gate.set()
        assert worker.wait(PATIENCE_S)
        worker.stop()
        assert pending.result().tensors["weight"].nbytes == REPLY_BYTES
        assert time.monotonic() - began > 2 * CONFIG.liveness_s, "the network was not slow"
        assert broker.core.counters["requeues"] == 0
