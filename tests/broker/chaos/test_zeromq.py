"""ZeroMQ peers and the project's own services through the proxy."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
import torch
import zmq

from broker.chaos.faults import read_fault
from broker.chaos.proxy import ChaosProxy
from broker.core import BrokerConfig
from broker.service import Broker
from tests.waiting import eventually
from trainer_client.service import Client, PendingReply
from worker.service import Worker
from worker.targets.stub import StubTarget

PATIENCE_S = 30.0
#: Embeddings of 12 MiB: a reply of three parts.
_LARGE_VOCAB = 196_608
#: Which way a reply goes through the proxy of the clients, and of the workers.
_WAY = {1: "bytes_down", 2: "bytes_up"}


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


def test_a_dealer_comes_back_after_each_cut(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        for peer in (router, dealer):
            peer.linger = 0
            peer.rcvtimeo = 10_000
        dealer.reconnect_ivl = 10
        with ChaosProxy(upstream=f"tcp://127.0.0.1:{port}") as proxy:
            dealer.connect(proxy.endpoint)
            for number in range(5):
                dealer.send(b"%d" % number)
                name, text = router.recv_multipart()
                router.send_multipart((name, text))
                assert dealer.recv() == b"%d" % number
                eventually(lambda: proxy.cut() == 1)
                eventually(lambda: proxy.snapshot()["connections"])


class Cluster:
    """A broker, a worker and a client, with a proxy between the broker and both."""

    def __init__(self, stack: contextlib.ExitStack, vocab_size: int = 2048) -> None:
        config = BrokerConfig(heartbeat_s=0.1, liveness_s=0.5)
        self.broker = stack.enter_context(Broker(config=config))
        upstream = [self.broker.client_endpoint, self.broker.worker_endpoint]
        self.proxy = stack.enter_context(ChaosProxy(["tcp://127.0.0.1:0"] * 2, upstream))
        clients, workers = self.proxy.endpoints
        self.target = StubTarget(vocab_size=vocab_size)
        stack.enter_context(Worker(self.target, workers, name="w"))
        self.client = stack.enter_context(Client([clients]))

    def passed(self, pair: int) -> int:
        """Bytes that have gone the way of replies through the clients' proxy, or the workers'."""
        return int(self.proxy.snapshot()["counters"][_WAY[pair]])

    def ask(self) -> PendingReply:
        return self.client.submit("input_embeddings", timeout_s=PATIENCE_S)

    def expect(self, pending: PendingReply) -> None:
        (weight,) = pending.result(PATIENCE_S).tensors.values()
        assert torch.equal(weight, self.target.states[0])


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(stack)


@pytest.mark.parametrize("pair", [1, 2])
@pytest.mark.parametrize(
    "said",
    [
        {"kind": "cut"},
        {"kind": "cut", "how": "fin"},
        {"kind": "truncate"},
        {"kind": "corrupt", "bits": 64},
        {"kind": "half-close", "direction": "up"},
        {"kind": "half-close", "direction": "down"},
        {"kind": "stall", "for": 0.8},
        {"kind": "blackhole", "for": 0.8},
        {"kind": "delay", "delay_s": 0.05, "for": 0.5},
        {"kind": "throttle", "bytes_per_s": 1_000_000, "for": 0.5},
    ],
    ids=lambda said: "-".join(str(value) for value in said.values()),
)
def test_requests_are_answered_through_a_fault(
    cluster: Cluster, said: dict[str, object], pair: int
) -> None:
    cluster.expect(cluster.ask())
    cluster.proxy.inject(read_fault({**said, "pair": pair}))
    for pending in [cluster.ask() for _ in range(4)]:
        cluster.expect(pending)
    assert sum(cluster.proxy.snapshot()["injected"].values()) > 0


@pytest.mark.parametrize("pair", [1, 2])
@pytest.mark.parametrize("kind", ["cut", "truncate", "corrupt", "stall"])
def test_a_fault_strikes_between_two_parts_of_a_reply(kind: str, pair: int) -> None:
    with contextlib.ExitStack() as stack:
        cluster = Cluster(stack, vocab_size=_LARGE_VOCAB)
        cluster.expect(cluster.ask())
        passed = cluster.passed(pair)
        slowly = {"kind": "throttle", "bytes_per_s": passed, "pair": pair}
        cluster.proxy.inject(read_fault(slowly))  # the reply takes a second
        pending = cluster.ask()
        eventually(lambda: cluster.passed(pair) > 1.4 * passed)
        cluster.proxy.heal()
        seconds = {"for": 0.8} if kind == "stall" else {}
        cluster.proxy.inject(read_fault({"kind": kind, "pair": pair, **seconds}))
        assert cluster.passed(pair) < 2 * passed, "the reply was through before the fault"
        cluster.expect(pending)
        cluster.expect(cluster.ask())


def test_a_handshake_that_was_damaged_is_begun_again() -> None:
    """A greeting with a flipped bit looks like ZMTP 1: libzmq then waits for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = Client([f"tcp://127.0.0.1:{port}"])
        stranger, _ = listener.accept()
        stranger.sendall(b"\x01\x00")
    with contextlib.closing(client), contextlib.closing(stranger):
        pending = client.submit("model_info", timeout_s=PATIENCE_S)
        with (
            Broker(clients=f"tcp://127.0.0.1:{port}") as broker,
            Worker(StubTarget(), broker.worker_endpoint),
        ):
            assert pending.result(PATIENCE_S)


def test_peers_wait_out_a_proxy_that_refuses(cluster: Cluster) -> None:
    cluster.expect(cluster.ask())
    cluster.proxy.inject(read_fault({"kind": "refuse", "for": 0.5}))
    cluster.proxy.cut()
    cluster.expect(cluster.ask())
    assert cluster.proxy.snapshot()["counters"]["refused"] > 0
