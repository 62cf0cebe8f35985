"""A broker, two workers and a trainer, each on a host of its own, as users start them."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from broker.errors import BrokerError
from broker.watch.look import fetch
from tests.hosts.lab import Lab
from tests.waiting import eventually

HOSTS = ("broker", "other", "w1", "w2", "trainer")
PATIENCE_S = 60.0
#: Short, so that a fault is found within the seconds of a test.
LIVENESS_S = 2.0
CLIENTS, WORKERS, HTTP = 5555, 5556, "127.0.0.1:8080"


class Hosts:
    """The processes of one lab; the second broker's host is empty until it is asked for."""

    def __init__(self, lab: Lab, directory: Path, liveness_s: float = LIVENESS_S) -> None:
        self.lab = lab
        self._liveness_s = liveness_s
        self.directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._said: queue.Queue[str] = queue.Queue()
        self.trainer: subprocess.Popen[bytes] | None = None

    # -- processes --------------------------------------------------------------------------------

    def broker(self, host: str = "broker") -> None:
        ends = ["--clients", f"tcp://[::]:{CLIENTS}", "--workers", f"tcp://[::]:{WORKERS}"]
        patience = ["--liveness-s", self._liveness_s, "--heartbeat-s", self._liveness_s / 5]
        self._start(host, "broker", *ends, "--http", HTTP, "--insecure", *patience)

    def worker(self, host: str, *, name: str = "", broker: str = "broker") -> None:
        served = ["--target-factory", "tests.hosts.target:tiny", "--no-canary", "--threads", 1]
        direct = ["--direct", "gloo", "--direct-address", "auto"]
        where = ["--broker", f"tcp://{broker}:{WORKERS}", "--name", name or host]
        self._start(host, "worker", *where, *served, *direct)

    def all_there(self) -> None:
        """Everything is started that is missing, and attached."""
        if not self._runs("broker", "broker"):
            self.broker()
        for host in ("w1", "w2"):
            if not self._runs(host, "worker"):
                self.worker(host)
        if self.trainer is None or self.trainer.poll() is not None:
            self._start_trainer()
        self.wait_for_workers("w1", "w2")

    def signal(self, host: str, command: str, number: int) -> None:
        self._processes[f"{host}.{command}"].send_signal(number)

    def end(self, host: str, command: str) -> None:
        """End a process at once."""
        process = self._processes.pop(f"{host}.{command}")
        process.kill()
        process.wait()

    def log(self, host: str, command: str) -> str:
        return self._log(f"{host}.{command}").read_text()

    # -- looking ----------------------------------------------------------------------------------

    def status(self, host: str = "broker") -> dict[str, Any]:
        """A broker's, seen from its own host; nothing while it does not answer."""
        try:
            return self.lab.on(host, lambda: fetch(HTTP, "/status"))
        except BrokerError:
            return {}

    def workers(self, host: str = "broker") -> set[str]:
        return {worker["worker"] for worker in self.status(host).get("workers", ())}

    def wait_for_workers(self, *names: str, host: str = "broker") -> None:
        eventually(lambda: self.workers(host) == set(names), PATIENCE_S)

    # -- training ---------------------------------------------------------------------------------

    def train(
        self,
        output: Path,
        fault: Callable[[], None],
        *,
        brokers: Sequence[str] = (f"tcp://broker:{CLIENTS}",),
        **options: Any,
    ) -> None:
        """Train to the end, with a fault in the middle: the trainer stands still meanwhile, and the
        requests that it made ahead do not.
        """
        self._tell({"output": str(output), "brokers": list(brokers), "hold": 6} | options)
        assert self._hear() == "held"
        fault()
        self._tell({})
        assert self._hear() == "done"

    def _start_trainer(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        log = self._log("trainer")
        self.trainer = self.lab.start("trainer", "tests.hosts.trainer", log=log, **pipes)
        stdout = self.trainer.stdout
        assert stdout is not None

        def listen() -> None:
            for line in stdout:
                self._said.put(line.decode().strip())

        threading.Thread(target=listen, daemon=True).start()

    def _tell(self, line: dict[str, Any]) -> None:
        assert self.trainer is not None
        assert self.trainer.stdin is not None
        self.trainer.stdin.write(json.dumps(line).encode() + b"\n")
        self.trainer.stdin.flush()

    def _hear(self) -> str:
        try:
            return self._said.get(timeout=PATIENCE_S)
        except queue.Empty:
            tail = "\n".join(self._log("trainer").read_text().splitlines()[-10:])
            raise AssertionError(
                f"the trainer said nothing for {PATIENCE_S:g} s:\n{tail}"
            ) from None

    def close(self) -> None:
        """Resume what is stopped, and end the trainer's pipes; the lab ends the processes."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
        if self.trainer is not None:
            self.trainer.kill()
            self.trainer.wait()
            for pipe in (self.trainer.stdin, self.trainer.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    # -- inside -----------------------------------------------------------------------------------

    def _runs(self, host: str, command: str) -> bool:
        process = self._processes.get(f"{host}.{command}")
        return process is not None and process.poll() is None

    def _start(self, host: str, command: str, *arguments: object) -> None:
        name = f"{host}.{command}"
        module = ["broker.commands", command]
        self._processes[name] = self.lab.start(host, *module, *arguments, log=self._log(name))

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"
