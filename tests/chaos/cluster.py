"""Broker, workers and trainer as real processes, with a proxy that injects faults between them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.chaos.proxy import ChaosProxy
from tests.ports import free_port
from trainer_client.commands.demo import Processes
from worker.targets.embedded import heldout

N_WORKERS = 2
CLIENTS, WORKERS = 1, 2  # the pairs of the proxy
_START_S = 60.0
_SETTINGS: dict[str, object] = {
    "epochs": 1000,
    "batch-size": 2,
    "max-length": 48,
    "draft-vocab-size": 256,
    "ttt-depths": 2,
    "learning-rate": 1e-3,
    "checkpoint-every": 25,
    "encoding": "probs",
    "timeout-s": 60,
}


@dataclass
class Process:
    """One process, and how it is expected to end."""

    name: str
    child: subprocess.Popen[bytes]
    log: str
    #: exit codes that are no surprise
    may_end: set[int] = field(default_factory=lambda: {0})
    #: what its log must then say
    wants: str = ""

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(number)

    @property
    def alive(self) -> bool:
        return self.child.poll() is None

    def n_files(self) -> int:
        return len(list(Path(f"/proc/{self.child.pid}/fd").iterdir()))

    def rss_mib(self) -> float:
        fields = Path(f"/proc/{self.child.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Cluster:
    """Starts what is missing, notices what died unasked, and keeps count of all of it."""

    def __init__(self, directory: Path, seed: int, steps: int) -> None:
        self.directory = directory
        self.steps = steps
        self.broken: list[str] = []
        self.broker_counters: dict[str, dict[str, int]] = {}
        self.client_counters: Counter[str] = Counter()
        self.groups: list[int] = []
        self._numbers: Counter[str] = Counter()
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._stack = contextlib.ExitStack()
        logs = directory / "logs"
        logs.mkdir(parents=True)
        proxy_log = logging.FileHandler(logs / "proxy.log")
        proxy_log.setFormatter(logging.Formatter("%(asctime)s %(message)s %(fields)s"))
        logger = logging.getLogger("draftmq.chaos")
        logger.addHandler(proxy_log)
        logger.setLevel("INFO")
        self._stack.callback(logger.removeHandler, proxy_log)
        self._stack.callback(proxy_log.close)
        self._processes = self._stack.enter_context(Processes(logs))
        self.data = directory / "data.txt"
        self.data.write_text(heldout()[:60_000])
        self._ports = [f"127.0.0.1:{free_port()}" for _ in range(3)]
        upstream = [f"tcp://{port}" for port in self._ports[:2]]
        self.proxy = self._stack.enter_context(
            ChaosProxy(["tcp://127.0.0.1:0"] * 2, upstream, seed=seed)
        )
        self.broker: Process | None = None
        #: how long a broker that has ended stays away
        self.broker_away_s = 0.0
        self.workers: dict[str, Process] = {}
        self.trainer: Process | None = None
        self.output = directory / "none"
        #: whether the trainer is past its first step
        self.stepping = False
        #: processes that a fault has now
        self.claimed: set[str] = set()

    def close(self) -> None:
        """End all processes, and the proxy after them."""
        for process in [self.broker, self.trainer, *self.workers.values()]:
            if process is not None:
                process.signal(signal.SIGCONT)
        self._stack.close()

    # -- processes --------------------------------------------------------------------------------

    def start_broker(self) -> None:
        clients, workers, http = self._ports
        ends = ["--clients", f"tcp://{clients}", "--workers", f"tcp://{workers}", "--http", http]
        self.broker = self._start("broker", "broker", *ends)

    def start_worker(self, name: str) -> None:
        where = ["--broker", self.proxy.endpoints[WORKERS - 1], "--name", name]
        target = ["--target", "embedded", "--threads", 1]
        self.workers[name] = self._start(name, "worker", *where, *target)

    def start_trainer(self, output: Path) -> None:
        """Begin a run, or go on with it from its newest checkpoint."""
        self.output = output
        settings = [part for name, value in _SETTINGS.items() for part in (f"--{name}", value)]
        where = ["--broker", self.proxy.endpoints[CLIENTS - 1], "--output", output]
        steps = ["--data", self.data, "--max-steps", self.steps, "--resume", "--json"]
        self.trainer = self._start("trainer", "trainer_client", *where, *steps, *settings)

    def _start(self, name: str, *arguments: object) -> Process:
        self._numbers[name] += 1
        log = f"{name}.{self._numbers[name]}"
        child = self._processes.start(log, arguments)
        self.groups.append(child.pid)
        return Process(name, child, log)

    def log_of(self, process: Process) -> str:
        return self._processes.log(process.log)

    def dismiss(self, name: str) -> None:
        """Have a worker leave for good."""
        self.workers.pop(name).signal(signal.SIGTERM)

    def later(self, wait_s: float, call: Callable[[], None]) -> None:
        """Do it after a while, in :meth:`turn`."""
        self._later.append((time.monotonic() + wait_s, call))

    def turn(self) -> None:
        """What is due, and whether all are there that should be."""
        now = time.monotonic()
        due = [call for when, call in self._later if when <= now]
        self._later = [(when, call) for when, call in self._later if when > now]
        for call in due:
            call()
        for process in [self.broker, *self.workers.values()]:
            if process is not None and not process.alive:
                self._ended(process)

    @property
    def settled(self) -> bool:
        """Nothing is waited for."""
        return not self._later

    def _ended(self, process: Process) -> None:
        code = process.child.returncode
        if code not in process.may_end:
            tail = " | ".join(self.log_of(process).splitlines()[-3:])
            self.broken.append(f"{process.log} ended with {code}: {tail}")
        if process is self.broker:
            self.broker = None
            self.later(self.broker_away_s, self.start_broker)
        elif self.workers.get(process.name) is process:
            self.start_worker(process.name)

    # -- looking ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any] | None:
        """The broker's, or None while it does not answer."""
        try:
            url = f"http://{self._ports[2]}/status"
            with urllib.request.urlopen(url, timeout=0.5) as response:
                status: dict[str, Any] = json.load(response)
        except (OSError, ValueError):
            return None
        self.broker_counters[status["broker"]] = status["counters"]
        return status

    def listens(self) -> bool:
        """Whether a broker is there again; it listens for HTTP last."""
        host, _, port = self._ports[2].partition(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def wait_for_workers(self, n_workers: int) -> None:
        end = time.monotonic() + _START_S
        while len((self.status() or {"workers": []})["workers"]) < n_workers:
            if time.monotonic() > end:
                raise TimeoutError(f"{n_workers} workers did not come within {_START_S} s")
            self.turn()
            time.sleep(0.1)

    def finish_round(self) -> None:
        """Take the counters of a trainer that has ended."""
        summary = json.loads((self.output / "summary.json").read_text())
        self.client_counters.update(summary["requests"])

    def orphans(self) -> list[int]:
        """Processes of ours that are still there after the end."""
        return [pid for pid, group in process_groups() if group in self.groups]


def process_groups() -> Iterator[tuple[int, int]]:
    """``(pid, process group)`` of all processes that run."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                yield int(path.parent.name), int(group)
