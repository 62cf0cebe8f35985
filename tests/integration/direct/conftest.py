"""A trainer in this process, with a default group of its own, and workers in others."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from broker.core import BrokerConfig
from broker.service import Broker
from tests.integration.direct.worker import BATCH, LENGTH, make_target, patience
from tests.vocab import shuffled
from trainer_client.commands.demo import Processes
from trainer_client.core import ClientConfig
from trainer_client.targets.batch import Eagle3TargetBatch
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.direct.config import DirectConfig
from worker.direct.segment import NAME
from worker.supervision.mapping import VocabMapping
from worker.targets.stub import StubTarget

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def default_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The trainer's own process group of two, as its DDP would have it."""
    directory = tmp_path_factory.mktemp("group")
    meeting = f"file://{directory}/meeting"
    with Processes(directory) as processes:
        other = processes.start("other_rank", ["tests.integration.direct.other_rank", meeting])
        limit = timedelta(seconds=PATIENCE_S)
        dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=2, timeout=limit)
        yield
        dist.all_reduce(torch.zeros(2))
        dist.destroy_process_group()
        assert other.wait(PATIENCE_S) == 0


class Trainer:
    """Asks for batches, checks every tensor of them, and reduces with its other rank."""

    def __init__(
        self,
        remote: RemoteEagle3TargetModel,
        target: StubTarget,
        shape: tuple[int, int] = (BATCH, LENGTH),
    ) -> None:
        self.remote = remote
        self._shape = shape
        self._target = target
        self.steps_s: list[float] = []
        mapping = VocabMapping(shuffled(torch.arange(0, 64, 2)), 64)
        remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)

    def step(self) -> None:
        draw = torch.Generator().manual_seed(len(self.steps_s))
        ids = torch.randint(0, 64, self._shape, generator=draw)
        began = time.monotonic()
        batch = self.remote.generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids))
        self.steps_s.append(time.monotonic() - began)
        self._check(ids, batch)
        if dist.is_initialized():
            both = torch.ones(2)
            dist.all_reduce(both)
            assert both.tolist() == [2.0, 2.0]

    def _check(self, ids: torch.Tensor, batch: Eagle3TargetBatch) -> None:
        states, layers = self._target.states, self._target.aux_layer_ids
        aux = torch.cat([states[layer][ids] for layer in layers], -1)
        assert torch.equal(batch.aux_hidden_states, aux)
        assert batch.last_hidden_state is not None
        assert torch.equal(batch.last_hidden_state[:, :-1], states[-1][ids[:, 1:]])

    def counter(self, name: str) -> int:
        return self.remote.counters()[name]

    def until_direct(self, more: int = 2) -> None:
        """Step until ``more`` further replies have come directly."""
        wanted, end = self.counter("direct") + more, time.monotonic() + PATIENCE_S
        while self.counter("direct") < wanted:
            assert time.monotonic() < end, self.remote.counters()
            self.step()

    def until_ended(self, process: subprocess.Popen[bytes]) -> None:
        """Step until a process has come to its end."""
        end = time.monotonic() + PATIENCE_S
        while process.poll() is None:
            assert time.monotonic() < end, self.remote.counters()
            self.step()

    def until_failed(self, more: int = 1) -> None:
        """Step until a direct transfer has failed and its request was answered all the same."""
        wanted, end = self.counter("direct_failed") + more, time.monotonic() + PATIENCE_S
        while self.counter("direct_failed") < wanted:
            assert time.monotonic() < end, self.remote.counters()
            self.step()


def settings(backend: str) -> dict[str, Any]:
    """How the tests' trainers are made."""
    return {
        "device": "cpu",
        "timeout": PATIENCE_S,
        "encoding": "hidden",
        "direct": DirectConfig(mode=backend, channel=patience()),
        "config": ClientConfig(resend_s=2.0),
    }


class Scene:
    """A broker and this process's trainer; workers come as processes."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path, backend: str) -> None:
        self.stack = stack
        self.backend = backend
        self.processes = stack.enter_context(Processes(directory))
        config = BrokerConfig(heartbeat_s=0.2, liveness_s=2.0)
        ends = ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "127.0.0.1:0")
        self.broker = stack.enter_context(Broker(*ends, config))
        self.target = make_target()
        #: ports of connections that are not the channels', such as the default group's
        self._spared = {port for each in _connections() for port in _ports(each)}
        ends = (self.broker.client_endpoint, self.broker.worker_endpoint)
        self._spared |= {int(end.rsplit(":", 1)[1]) for end in ends}

    def cut(self) -> None:
        """Cut the connections of every channel of this process's trainers."""
        for connection in _connections():
            if not self._spared & _ports(connection):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def worker(self, name: str, *options: object) -> subprocess.Popen[bytes]:
        ends = ["--broker", self.broker.worker_endpoint, "--name", name, "--direct", self.backend]
        return self.processes.start(name, ["tests.integration.direct.worker", *ends, *options])

    def trainer_process(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        ends = [self.broker.client_endpoint, self.backend]
        return self.processes.start(name, ["tests.integration.direct.trainer", *ends, *options])

    def trainer(
        self, url: str = "", shape: tuple[int, int] = (BATCH, LENGTH), **options: Any
    ) -> Trainer:
        urls = [url or self.broker.client_endpoint]
        remote = RemoteEagle3TargetModel.from_urls(urls, **settings(self.backend) | options)
        return Trainer(self.stack.enter_context(remote), self.target, shape)


@pytest.fixture(params=["gloo", "shm"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scene(tmp_path: Path, backend: str) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        yield Scene(stack, tmp_path, backend)


def _connections() -> list[socket.socket]:
    """A duplicate of every established TCP connection of this process, and of each to a segment."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(entry).startswith("socket:"):
                found.append(socket.socket(fileno=os.dup(int(entry.name))))
    for connection in list(found):
        if not _ports(connection) and not _to_segment(connection):
            connection.close()
            found.remove(connection)
    return found


def _to_segment(connection: socket.socket) -> bool:
    try:
        local = connection.family == socket.AF_UNIX
        return local and os.fsencode(connection.getpeername()).startswith(NAME)
    except OSError:
        return False


def _ports(connection: socket.socket) -> set[int]:
    """Both ports of a TCP connection; nothing for any other socket."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return set()
    try:
        return {connection.getsockname()[1], connection.getpeername()[1]}
    except OSError:
        return set()
