"""A broker as a process of its own, and what the kernel says of it."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port
from trainer_client.commands.demo import Processes

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
KIB = 1 << 10


@dataclass(frozen=True)
class Broker:
    """Where it listens, its process, and where others may be started beside it."""

    clients: str
    workers: str
    pid: int
    processes: Processes

    def cpu_s(self) -> float:
        """CPU time of all its threads, its own and the kernel's for it."""
        return cpu_s(self.pid)


def cpu_s(pid: int) -> float:
    """User and system time of a process, in seconds (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def reset_peak(pid: int) -> None:
    """Begin to measure the peak of a process's memory anew (proc(5): 5 into clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """Most resident memory since :func:`reset_peak`, as the kernel kept it."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * KIB


@contextlib.contextmanager
def broker(transport: str = "tcp") -> Iterator[Broker]:
    """A broker on loopback, or on sockets in a directory of its own (``ipc``)."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="draftmq-")))
        if transport == "ipc":
            clients, workers = (f"ipc://{directory}/{side}" for side in ("clients", "workers"))
        else:
            clients, workers = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        processes = stack.enter_context(Processes(directory))
        ends = ["--clients", clients, "--workers", workers, "--http", "off"]
        child = processes.start("broker", ["broker", *ends])
        yield Broker(clients, workers, child.pid, processes)


def raise_descriptor_limit() -> None:
    """As many sockets as this process may ever have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
