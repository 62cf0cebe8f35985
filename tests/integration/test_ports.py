"""Ports that are swapped, and brokers that are not there: both sides say so, in one sentence."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker.service import Broker
from tests.integration.conftest import Cluster, cluster, target
from tests.ports import free_port
from tests.waiting import eventually
from trainer_client.errors import RequestError
from worker.errors import WorkerError
from worker.service import Worker

__all__ = ["cluster", "target"]  # fixtures


def test_a_worker_at_the_port_for_trainers_is_told_and_ends(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "draftmq")
    worker = Worker(cluster.target, cluster.broker.client_endpoint, name="lost")
    with worker, pytest.raises(WorkerError) as told:
        worker.wait(20)
    assert cluster.broker.client_endpoint in str(told.value)
    assert "port for clients, and workers have one of their own" in str(told.value)
    assert "5556 by default" in str(told.value)
    said = [r for r in caplog.records if r.getMessage() == "wrong_port"]
    assert [record.fields["name"] for record in said] == ["lost"]  # type: ignore[attr-defined]


def test_a_trainer_at_the_port_for_workers_is_told(cluster: Cluster) -> None:
    cluster.worker()
    from trainer_client import RemoteEagle3TargetModel

    with (
        RemoteEagle3TargetModel([cluster.broker.worker_endpoint], timeout=20) as remote,
        pytest.raises(RequestError, match=r"port for workers, and clients have .* 5555 by default"),
    ):
        remote.model_info()


def test_a_worker_is_ready_when_a_broker_has_welcomed_it_and_says_why_it_is_not(
    tmp_path: Path,
) -> None:
    """As systemd hears it."""
    said: list[str] = []
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(tmp_path / "notify"))

    def listen() -> None:
        while line := notified.recv(4096).decode():
            said.append(line)

    threading.Thread(target=listen, daemon=True).start()
    clients, workers = free_port(), free_port()
    command = [sys.executable, "-m", "worker", "--broker", f"tcp://127.0.0.1:{workers}"]
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([*command, "--target", "embedded"], env=environment)
    try:
        eventually(lambda: any("STATUS=no broker answers at tcp://127" in line for line in said))
        assert not any("READY=1" in line for line in said)
        ends = f"tcp://127.0.0.1:{clients}", f"tcp://127.0.0.1:{workers}"
        with Broker(*ends):
            eventually(lambda: any("READY=1" in line for line in said))
    finally:
        process.terminate()
        process.wait(60)
        notified.close()
