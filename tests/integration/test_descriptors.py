"""Workers and trainers that run out of file descriptors, and must reconnect."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from broker.chaos.proxy import ChaosProxy
from broker.service import Broker
from trainer_client import Client
from worker.service import Worker
from worker.targets.stub import StubTarget

#: Long enough for several attempts to connect again.
DEPRIVED_S = 1.0
PATIENCE_S = 30.0

TRAINER = """
import sys
from trainer_client import Client
with Client([sys.argv[1]]) as client:
    while sys.stdin.readline():
        client.submit("input_embeddings", timeout_s=30.0).result()
        print("ok", flush=True)
"""


class Deprived:
    """A child process that can open nothing while :meth:`__enter__` holds."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._pid = child.pid

    def __enter__(self) -> None:
        self._before = resource.prlimit(self._pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self._pid, resource.RLIMIT_NOFILE, (3, self._before[1]))

    def __exit__(self, *error: object) -> None:
        resource.prlimit(self._pid, resource.RLIMIT_NOFILE, self._before)


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as service:
        yield service


def child(*arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], text=True, **pipes)


def end(process: subprocess.Popen[str]) -> str:
    """What it wrote to its log."""
    process.terminate()
    return process.communicate(timeout=PATIENCE_S)[1]


def ask(trainer: subprocess.Popen[str]) -> None:
    assert trainer.stdin is not None
    trainer.stdin.write("\n")
    trainer.stdin.flush()


def answered(trainer: subprocess.Popen[str]) -> bool:
    assert trainer.stdout is not None
    return trainer.stdout.readline() == "ok\n"


def test_a_trainer_without_descriptors_goes_on_when_it_has_some(broker: Broker) -> None:
    with (
        Worker(StubTarget(), broker.worker_endpoint),
        ChaosProxy(listen="tcp://127.0.0.1:0", upstream=broker.client_endpoint) as proxy,
    ):
        trainer = child("-c", TRAINER, proxy.endpoint)
        try:
            ask(trainer)
            assert answered(trainer)
            with Deprived(trainer):
                proxy.cut()
                ask(trainer)
                time.sleep(DEPRIVED_S)
            assert answered(trainer)
        finally:
            log = end(trainer)
    assert "loop_failed" not in log


def test_a_worker_without_descriptors_goes_on_when_it_has_some(broker: Broker) -> None:
    with (
        ChaosProxy(listen="tcp://127.0.0.1:0", upstream=broker.worker_endpoint) as proxy,
        Client([broker.client_endpoint]) as client,
    ):
        where = ["--broker", proxy.endpoint, "--target-factory", "worker.targets.stub:StubTarget"]
        worker = child("-m", "worker", *where)
        try:
            client.submit("input_embeddings", timeout_s=PATIENCE_S).result()
            with Deprived(worker):
                proxy.cut()
                late = client.submit("input_embeddings", timeout_s=PATIENCE_S)
                time.sleep(DEPRIVED_S)
                assert not late.done()
            late.result()
        finally:
            log = end(worker)
    assert worker.returncode == 0, log
    assert "this process has no file descriptor left" in log
