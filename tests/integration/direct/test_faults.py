"""What a direct transfer does when a process, a port, a message or a connection fails under it.

Each test names the instant. In all of them every request ends with the right tensors, the
trainer's own default group goes on, and the channel, or that of a worker that replaces it, is back
afterwards.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Any

import pytest
import zmq

from broker.protocol import decode
from broker.protocol import messages as m
from tests.integration.direct.conftest import Scene, Trainer
from tests.integration.direct.worker import LIMIT_S, patience
from tests.ports import free_port
from tests.waiting import eventually
from worker.direct.config import DirectConfig
from worker.direct.gloo import GlooBackend
from worker.direct.shm import ShmBackend

pytestmark = pytest.mark.usefixtures("default_group")
#: What each backend does many times while it receives a reply.
INNER: dict[str, tuple[type, str]] = {
    "gloo": (GlooBackend, "_post_receive"),
    "shm": (ShmBackend, "_say"),
}
#: What the promise allows beyond the limit.
BEYOND_S = 2.0


def recovered_in_time(trainer: Trainer) -> None:
    assert max(trainer.steps_s) < LIMIT_S + BEYOND_S, sorted(trainer.steps_s)[-3:]


@pytest.mark.parametrize("instant", ["before_send", "mid_send"])
def test_worker_is_killed(scene: Scene, instant: str) -> None:
    doomed = scene.worker("doomed", "--strike", instant)
    trainer = scene.trainer()
    trainer.until_direct(1)
    scene.worker("heir")
    trainer.until_ended(doomed)
    assert doomed.returncode == -signal.SIGKILL
    trainer.until_direct()
    recovered_in_time(trainer)


def test_worker_is_killed_after_the_send(scene: Scene) -> None:
    doomed = scene.worker("doomed", "--strike", "after_send")
    trainer = scene.trainer()
    trainer.until_direct(1)
    scene.worker("heir")
    trainer.until_ended(doomed)
    assert doomed.returncode == -signal.SIGKILL
    assert trainer.counter("direct_failed") == 0  # the data was there, and counts
    trainer.until_direct()
    recovered_in_time(trainer)


def test_worker_is_stopped_in_mid_send_and_continued_later(scene: Scene) -> None:
    stopped = scene.worker("stopped", "--strike", "mid_send", "--how", "stop")
    trainer = scene.trainer()
    trainer.until_direct(1)
    scene.worker("heir")
    trainer.until_failed()
    recovered_in_time(trainer)
    os.kill(stopped.pid, signal.SIGCONT)
    eventually(lambda: len(scene.broker.core.workers) == 2)
    trainer.until_direct(4)
    assert stopped.poll() is None


def test_client_is_killed_in_mid_receive(scene: Scene) -> None:
    worker = scene.worker("worker")
    other = scene.trainer()
    other.until_direct(1)
    victim = scene.trainer_process("victim", "--strike")
    assert victim.wait(60) == -signal.SIGKILL
    other.until_direct()
    successor = scene.trainer_process("successor")
    assert successor.wait(60) == 0, scene.processes.log("successor")
    assert worker.poll() is None
    assert other.counter("direct_failed") == 0


def test_a_forked_child_leaves_the_channel_alone(scene: Scene) -> None:
    scene.worker("worker")
    trainer = scene.trainer_process("trainer", "--fork")
    assert trainer.wait(60) == 0, scene.processes.log("trainer")


@pytest.mark.parametrize("block", ["refused", "silent"])
def test_the_rendezvous_port_is_blocked(scene: Scene, block: str) -> None:
    blocked = socket.socket()
    scene.stack.callback(blocked.close)
    blocked.bind(("127.0.0.1", 0))
    if block == "silent":  # connections are taken, and nobody ever says anything
        blocked.listen()
    host, port = blocked.getsockname()
    worker = scene.worker("worker", "--advertise", f"{host}:{port}", "--backoff-s", 0.01)
    trainer = scene.trainer()
    for _ in range(5):
        trainer.step()
    recovered_in_time(trainer)
    assert trainer.counter("direct") == 0
    assert worker.poll() is None


class ReplyDropper:
    """A ZeroMQ proxy for one client that loses the first ``count`` direct replies."""

    def __init__(self, upstream: str, count: int) -> None:
        self.dropped = 0
        self._count = count
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.bind("tcp://127.0.0.1:0")
        self.endpoint = self._front.last_endpoint.decode()
        self._back = self._context.socket(zmq.DEALER)
        self._back.connect(upstream)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        client = b""
        while not self._leaving.is_set():
            if self._front.poll(5):
                client, *frames = self._front.recv_multipart()
                self._back.send_multipart(frames)
            while self._back.poll(5):
                frames = self._back.recv_multipart()
                message = decode(frames).message
                direct = isinstance(message, m.Reply) and message.transfer is not None
                if direct and self.dropped < self._count:
                    self.dropped += 1
                else:
                    self._front.send_multipart([client, *frames])

    def close(self) -> None:
        self._leaving.set()
        self._thread.join()
        self._context.destroy(linger=0)


def test_the_reply_is_dropped_by_a_proxy(scene: Scene) -> None:
    scene.worker("worker")
    proxy = ReplyDropper(scene.broker.client_endpoint, 2)
    scene.stack.callback(proxy.close)
    trainer = scene.trainer(proxy.endpoint)
    while proxy.dropped < 2:
        trainer.step()
    trainer.until_direct()
    assert trainer.counter("resends") >= 2
    recovered_in_time(trainer)


def test_the_store_is_killed_while_connecting_and_when_ready(scene: Scene) -> None:
    """The store is reached through a process of its own, which is what dies."""
    ports = [free_port(), free_port()]
    forward = ["tests.integration.direct.forwarder", *ports]
    first = scene.processes.start("store1", forward)
    worker = scene.worker(
        "worker", "--advertise", f"127.0.0.1:{ports[0]}", "--store-port", ports[1]
    )
    trainer = scene.trainer()
    trainer.until_direct(1)
    first.kill()  # ready: nothing needs the store any more
    first.wait()
    trainer.until_direct(3)
    assert trainer.counter("direct_failed") == 0
    scene.cut()
    trainer.until_failed()
    for _ in range(3):  # connecting, and there is none
        trainer.step()
    scene.processes.start("store2", forward)
    trainer.until_direct()
    recovered_in_time(trainer)
    assert worker.poll() is None


def test_a_channel_is_cut_50_times_in_one_run(scene: Scene) -> None:
    worker = scene.worker("worker", "--backoff-s", 0.01, "--min-bytes", 1)
    trainer = scene.trainer(shape=(1, 16))
    for cuts in range(50):
        trainer.until_direct(1)
        scene.cut()
        trainer.until_failed()
        assert trainer.counter("direct_failed") == cuts + 1
    trainer.until_direct()
    recovered_in_time(trainer)
    assert worker.poll() is None


def test_a_channel_is_cut_in_mid_transfer(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = 0
    backend, name = INNER[scene.backend]
    original = getattr(backend, name)

    def move(*arguments: Any) -> Any:
        nonlocal moved
        moved += 1
        if moved % 50 == 0:
            scene.cut()
        return original(*arguments)

    monkeypatch.setattr(backend, name, move)
    scene.worker("worker", "--backoff-s", 0.01)
    trainer = scene.trainer()
    trainer.until_failed(5)
    moved = -(10**9)
    trainer.until_direct()
    recovered_in_time(trainer)


def test_rebuilding_leaks_nothing(scene: Scene) -> None:
    worker = scene.worker("worker", "--backoff-s", 0.001, "--min-bytes", 1)
    direct = DirectConfig(mode=scene.backend, channel=patience(backoff_s=0.001))
    trainer = scene.trainer(shape=(1, 16), direct=direct)  # small, for the allocator's own ups
    _rebuild(scene, trainer, 20)  # what is made once
    before = {process: _held(process) for process in ("self", worker.pid)}
    _rebuild(scene, trainer, 200)
    for process, held in before.items():
        eventually(lambda process=process, held=held: _no_more(_held(process), held))


def _no_more(now: tuple[int, int, int], before: tuple[int, int, int]) -> bool:
    """No thread and no descriptor more, and at most 20 MB: what was cut takes a moment to go."""
    return now[0] <= before[0] and now[1] <= before[1] and now[2] - before[2] < 20 * 1024


def _rebuild(scene: Scene, trainer: Trainer, times: int) -> None:
    for _ in range(times):
        trainer.until_direct(1)
        scene.cut()
    trainer.until_direct(2)  # what was cut is gone, and what replaces it is there


def _held(process: object) -> tuple[int, int, int]:
    """Threads, file descriptors and KiB of memory that a process holds."""
    with open(f"/proc/{process}/status") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    files = len(os.listdir(f"/proc/{process}/fd"))
    return int(fields["Threads"]), files, int(fields["VmRSS"].split()[0])
