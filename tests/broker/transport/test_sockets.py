"""Waiting for sockets, and who owns a buffer while libzmq has it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import zmq

from broker.peer.memory import Pool
from broker.peer.tensors import to_frames
from broker.transport.dealer import Dealer
from broker.transport.sockets import Monitor, Waiter, Wakeup, has_message

PATIENCE_S = 30.0
MIB = 1 << 20


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as made:
        yield made
        made.destroy(linger=0)


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    made = Wakeup()
    yield made
    made.close()


def wait_for(waiter: Waiter, thing: object) -> None:
    end = time.monotonic() + PATIENCE_S
    while thing not in waiter.wait(end, time.monotonic()):
        assert time.monotonic() < end, "nothing came"


def router(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], str]:
    made = context.socket(zmq.ROUTER)
    made.rcvtimeo = int(1000 * PATIENCE_S)
    made.bind("tcp://127.0.0.1:0")
    return made, made.get_string(zmq.LAST_ENDPOINT).rstrip("\0")


def test_each_message_of_many_wakes(
    context: zmq.Context[zmq.Socket[bytes]], wakeup: Wakeup
) -> None:
    server, endpoint = router(context)
    client = context.socket(zmq.DEALER)
    client.connect(endpoint)
    there, here = Waiter(wakeup, [server]), Waiter(wakeup, [client])
    for number in range(200):
        client.send(b"%d" % number)
        while not has_message(server):  # its descriptor tells of more than messages
            wait_for(there, server)
        while has_message(server):
            server.send_multipart(server.recv_multipart())
        while not has_message(client):
            wait_for(here, client)
        assert client.recv(zmq.NOBLOCK) == b"%d" % number


def test_what_came_before_the_waiter_wakes_it(
    context: zmq.Context[zmq.Socket[bytes]], wakeup: Wakeup
) -> None:
    server, endpoint = router(context)
    monitor = Monitor(server, zmq.EVENT_ACCEPTED)
    client = context.socket(zmq.DEALER)
    client.connect(endpoint)
    client.send(b"early")
    assert server.poll(int(1000 * PATIENCE_S))
    for _ in range(2):  # not read in between, so it is still there
        waiter = Waiter(wakeup, [server], [monitor])
        wait_for(waiter, server)
    wait_for(Waiter(wakeup, [], [monitor]), monitor.socket)
    assert [event for event, _ in monitor.read()] == [zmq.EVENT_ACCEPTED]
    monitor.close()


def test_a_monitor_that_was_read_empty_wakes_again(
    context: zmq.Context[zmq.Socket[bytes]], wakeup: Wakeup
) -> None:
    server, endpoint = router(context)
    monitor = Monitor(server, zmq.EVENT_ACCEPTED)
    waiter = Waiter(wakeup, [server], [monitor])
    for _ in range(3):
        assert monitor.socket not in waiter.wait(time.monotonic(), time.monotonic())
        context.socket(zmq.DEALER).connect(endpoint)
        wait_for(waiter, monitor.socket)
        assert len(monitor.read()) == 1
    monitor.close()


def test_waiting_ends_at_the_timer_and_at_a_wakeup(wakeup: Wakeup) -> None:
    waiter = Waiter(wakeup, [])
    began = time.monotonic()
    assert waiter.wait(began + 0.02, began) == set()
    assert time.monotonic() >= began + 0.02
    for _ in range(5000):
        wakeup.set()
    assert waiter.wait(None, time.monotonic()) == {wakeup}
    wakeup.clear()
    assert waiter.wait(time.monotonic(), time.monotonic()) == set()


def test_memory_is_not_used_again_before_it_was_sent(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    pool = Pool()
    server, endpoint = router(context)
    server.unbind(endpoint)
    dealer = Dealer(context, endpoint)
    memory = pool.take(4 * MIB)
    memory[:] = 7
    address = memory.ctypes.data
    _, frames = to_frames({"x": torch.from_numpy(memory)})
    assert len(frames) > 1
    dealer.send(frames)
    del memory, frames
    other = pool.take(4 * MIB)
    assert other.ctypes.data != address, "libzmq still has it to send"
    other[:] = 9
    server.bind(endpoint)
    _, *came = server.recv_multipart()
    assert b"".join(came) == b"\7" * (4 * MIB)
    end = time.monotonic() + PATIENCE_S
    while (again := pool.take(4 * MIB)).ctypes.data != address:
        assert time.monotonic() < end, "the memory never came back"
        del again
        time.sleep(0.01)
    dealer.close()


LEAVING = """
import torch, sys
from types import SimpleNamespace
from broker.service import Broker
from trainer_client.service import Client
from worker.service import Worker
from worker.targets.stub import StubTarget

class Large(StubTarget):
    weight = torch.ones(64 << 8, 1024)

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.weight)

broker = Broker().start()
worker = Worker(Large(), broker.worker_endpoint).start()
client = Client([broker.client_endpoint])
replies = [client.submit("input_embeddings", timeout_s=30) for _ in range(3)]
replies[0].result()
sys.exit(7)
"""


def test_a_process_may_leave_while_large_replies_are_on_their_way() -> None:
    """Buffers that are freed while libzmq sends them abort the process (Bad address)."""
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, timeout=60)
    assert (ended.returncode, b"Bad address" in ended.stderr) == (7, False), ended.stderr
