"""``ipc://`` endpoints: whose they are, what they replace, and what they leave behind."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.errors import BrokerError
from broker.service import Broker
from trainer_client.service import Client
from worker.service import Worker
from worker.targets.stub import StubTarget

PATIENCE_S = 30.0


@pytest.fixture
def ends(tmp_path: Path) -> tuple[str, str]:
    return f"ipc://{tmp_path}/clients", f"ipc://{tmp_path}/workers"


@pytest.fixture
def anyones() -> Iterator[None]:
    """New files may be opened by anyone, unless who makes them says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


def asked(clients: str) -> str:
    with Client([clients]) as client:
        return client.submit("model_info", timeout_s=PATIENCE_S).result().reply.model


def test_requests_are_answered_and_no_file_is_left(ends: tuple[str, str], tmp_path: Path) -> None:
    with Broker(*ends) as broker, Worker(StubTarget(), broker.worker_endpoint):
        assert asked(broker.client_endpoint) == "stub"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("anyones")
def test_only_the_same_user_can_connect(ends: tuple[str, str], tmp_path: Path) -> None:
    with Broker(*ends):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        (tmp_path / "later").touch()
        assert stat.S_IMODE((tmp_path / "later").stat().st_mode) == 0o666
    assert modes == {"clients": 0o600, "workers": 0o600}


def test_a_broker_takes_the_place_of_a_killed_one(ends: tuple[str, str], tmp_path: Path) -> None:
    serve = ["-m", "broker.commands", "broker", "--http", "off"]
    arguments = [*serve, "--clients", ends[0], "--workers", ends[1]]
    killed = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE_S
        while {path.name for path in tmp_path.iterdir()} != {"clients", "workers"}:
            assert time.monotonic() < end, "the broker did not begin to listen"
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"clients", "workers"}
    with Broker(*ends) as broker, Worker(StubTarget(), broker.worker_endpoint):
        assert asked(broker.client_endpoint) == "stub"


def test_a_closing_broker_leaves_the_next_ones_socket(tmp_path: Path) -> None:
    path = tmp_path / "clients"
    with Broker(f"ipc://{path}"):
        path.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as next_one:
            next_one.bind(str(path))
    assert path.exists()


def test_a_running_broker_keeps_its_place(ends: tuple[str, str]) -> None:
    with Broker(*ends) as broker, Worker(StubTarget(), broker.worker_endpoint):
        with pytest.raises(BrokerError, match="somebody listens there"):
            Broker(*ends).start()
        assert asked(broker.client_endpoint) == "stub"


def test_a_file_that_is_no_socket_is_left_alone(ends: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("precious")
    with pytest.raises(BrokerError, match="not a socket"):
        Broker(*ends).start()
    assert (tmp_path / "workers").read_text() == "precious"
    assert not (tmp_path / "clients").exists()


def test_a_socket_that_cannot_be_asked_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "clients"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(BrokerError, match="cannot listen"):
            Broker(f"ipc://{path}").start()
        assert path.exists()
