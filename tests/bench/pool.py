"""A broker and workers as processes, as a user starts them."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from broker.errors import BrokerError
from broker.watch.look import fetch
from tests.ports import free_port
from trainer_client.commands.demo import Processes
from trainer_client.targets.remote import RemoteEagle3TargetModel

PATIENCE_S = 60.0


class Pool:
    """``draftmq broker`` and any number of ``draftmq worker``."""

    def __init__(self, processes: Processes, options: Sequence[object] = ()) -> None:
        self._processes = processes
        self._options = options
        ports = [free_port() for _ in range(3)]
        self.clients, self.workers = (f"tcp://127.0.0.1:{port}" for port in ports[:2])
        self._http = f"127.0.0.1:{ports[2]}"
        self._started = 0
        self._broker: subprocess.Popen[bytes] | None = None
        #: of the workers, by name
        self.pids: dict[str, int] = {}

    def broker(self) -> None:
        """Start a broker, always on the same addresses."""
        ends = ["--clients", self.clients, "--workers", self.workers, "--http", self._http]
        self._broker = self._start("broker", [*ends, *self._options])

    def kill_broker(self) -> None:
        """End it by SIGKILL."""
        assert self._broker is not None, "there is no broker yet"
        self._broker.kill()
        self._broker.wait()

    def worker(self, factory: str, name: str) -> None:
        """Start a worker with the target that ``package.module:callable`` makes."""
        target = ["--target-factory", factory, "--threads", 1, "--name", name]
        self.pids[name] = self._start("worker", ["--broker", self.workers, *target]).pid

    def wait_for_workers(self, count: int) -> None:
        """Until so many are there. Raises ``TrainerClientError`` with its log if one has ended."""
        end = time.monotonic() + PATIENCE_S
        while len(self.look("/status").get("workers", ())) < count:
            self._processes.check()
            assert time.monotonic() < end, f"{count} workers did not come in {PATIENCE_S} s"
            time.sleep(0.05)

    def look(self, path: str) -> dict[str, Any]:
        """What the broker says at ``/status`` or ``/trace``; nothing while there is none."""
        try:
            return fetch(self._http, path)
        except BrokerError:
            return {}

    def client(self, **options: Any) -> RemoteEagle3TargetModel:
        return RemoteEagle3TargetModel([self.clients], direct="off", **options)

    def _start(self, module: str, arguments: Sequence[object]) -> subprocess.Popen[bytes]:
        self._started += 1
        return self._processes.start(f"{module}{self._started}", [module, *arguments])


@contextlib.contextmanager
def pool(factories: Sequence[str], options: Sequence[object] = ()) -> Iterator[Pool]:
    """A pool with one worker for each factory, all there; ``options`` are the broker's."""
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        started = Pool(processes, options)
        started.broker()
        for number, factory in enumerate(factories):
            started.worker(factory, f"w{number}")
        started.wait_for_workers(len(factories))
        yield started
