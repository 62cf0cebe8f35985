"""A direct channel between two processes on one GPU, measured: ``python -m tests.gpu.channel OUT``.

This process is the worker and a child is the trainer. Measured are the rate by size; a transfer
while the worker's, or the trainer's, default stream is busy, and how long the trainer's launches
stand still meanwhile; memory over many replies; what stays allocated when trainers die in mid-run;
and a trainer with a ``/dev/shm`` of its own, as a container has. Without a GPU the backend is shm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from broker.protocol.limits import MIB
from broker.protocol.messages import Invitation
from tests.gpu.programs import DEVICE, GPU, card, keep_busy, say, settle
from tests.worker.direct.pairs import invitation
from worker.direct.backend import Backend, TransferError
from worker.direct.channel import ChannelConfig
from worker.direct.rendezvous import End, Rendezvous, join

LIMIT_S = 10.0
#: Longer than a transfer, shorter than its limit.
BUSY_S = 0.4
RATES = ((1, 40), (16, 40), (64, 20), (256, 10)) if GPU else ((1, 4), (16, 4))
#: A reply of 2,048 tokens of a target with H=1024, in the encoding ``hidden``.
REPLY = [2048 * 3072 * 2, 2048, 2048 * 8, 2048 * 8, 2048 * 1024 * 2]
REPLIES = 300 if GPU else 10
WAYS = ("idle", "worker busy", "trainer busy")
DEAD = 3


def plan() -> Iterator[tuple[str, list[int]]]:
    """What each transfer is for and its sizes in bytes; both ends go through it in this order."""
    for mib, count in RATES:
        for number in range(count + 3):
            yield (f"{mib} MiB" if number >= 3 else "warm up"), [mib * MIB]
    for way in WAYS:
        for _ in range(3):
            yield way, [64 * MIB]
    for _ in range(REPLIES):
        yield "replies", REPLY


def end() -> End:
    return End("127.0.0.1", DEVICE, ChannelConfig(limit_s=LIMIT_S, connect_s=60.0))


@contextlib.contextmanager
def channel(does: str, prefix: list[str] | None = None) -> Iterator[tuple[Backend, Any]]:
    """The worker's end, and the trainer's process, which does ``plan``, ``die`` or ``three``."""
    rendezvous = Rendezvous("127.0.0.1", (0, 0))
    invited = invitation(rendezvous, "ipc" if GPU else "shm")
    command = [sys.executable, "-m", "tests.gpu.channel", "--trainer", does]
    command = [*(prefix or []), *command, json.dumps(asdict(invited))]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        backend = rendezvous.meet(invited, end(), threading.Event())
        yield backend, trainer
        backend.close()
    finally:
        trainer.kill()
        trainer.wait()
        rendezvous.close()


def allocated_mib() -> float:
    return torch.cuda.memory_allocated() / MIB if GPU else 0.0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def worker() -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    states = []
    with channel("plan") as (backend, trainer):
        for seq, (what, sizes) in enumerate(plan()):
            tensors = [
                torch.full((size,), seq % 251, dtype=torch.uint8).to(DEVICE) for size in sizes
            ]
            settle()
            busy = keep_busy(BUSY_S) if what == "worker busy" else None
            began = time.perf_counter()
            backend.send(seq, tensors, LIMIT_S)
            times.setdefault(what, []).append(time.perf_counter() - began)
            del tensors, busy
            settle()
            if what == "replies" and len(times[what]) in (10, REPLIES):
                states.append({"allocated_mib": allocated_mib(), "descriptors": descriptors()})
        trainers = json.loads(trainer.communicate(timeout=60)[0])
    rates = {f"{mib} MiB": mib / 1024 / statistics.median(times[f"{mib} MiB"]) for mib, _ in RATES}
    return {
        "gib_per_s": rates,
        "send_ms": {way: 1000 * statistics.median(times[way]) for way in WAYS},
        "after_10_and_all_replies": states,
        "trainer": trainers,
    }


def dying() -> dict[str, Any]:
    """Trainers that die in mid-run: what stays allocated here, and what it is called."""
    before, errors = allocated_mib(), []
    for _ in range(DEAD):
        with channel("die") as (backend, trainer):
            tensor = torch.zeros(256 * MIB, dtype=torch.uint8, device=DEVICE)
            try:
                for seq in range(4):
                    backend.send(seq, [tensor], LIMIT_S)
            except TransferError as error:
                errors.append(str(error))
            trainer.wait(30)
            del tensor
    return {"errors": errors, "left_mib": allocated_mib() - before}


def own_shm() -> dict[str, Any] | str:
    """A trainer with another ``/dev/shm``, as two containers of one host have."""
    if not shutil.which("unshare") or os.geteuid() != 0:
        return "not tried: it wants root and unshare"
    prefix = ["unshare", "--mount", "sh", "-c"]
    prefix += ['mount -t tmpfs none /dev/shm && exec "$@"', "sh"]
    before = allocated_mib()
    try:
        with channel("three", prefix) as (backend, trainer):
            for seq in range(3):
                tensor = torch.full((64 * MIB,), seq, dtype=torch.uint8, device=DEVICE)
                backend.send(seq, [tensor], LIMIT_S)
                del tensor
            said = trainer.communicate(timeout=30)[0].strip()
    except TransferError as error:
        said = str(error)
    return {"received": said, "left_mib": allocated_mib() - before}


def trainer_of_the_plan(backend: Backend) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    longest: dict[str, float] = {}
    wrong = 0
    for seq, (what, sizes) in enumerate(plan()):
        launches = Launches() if what in WAYS else None
        busy = keep_busy(BUSY_S) if what == "trainer busy" else None
        if launches is not None:
            launches.start()
        began = time.perf_counter()
        got = backend.receive(seq, sizes, LIMIT_S)
        times.setdefault(what, []).append(time.perf_counter() - began)
        if launches is not None:
            longest[what] = max(longest.get(what, 0.0), launches.stop())
        if not what.endswith("MiB"):  # a look at them would take time of the next transfer
            wrong += sum(not bool((tensor == seq % 251).all()) for tensor in got)
        del got, busy
    return {
        "receive_ms": {way: 1000 * statistics.median(times[way]) for way in WAYS},
        "longest_ms_between_launches": longest,
        "wrong_tensors": wrong,
    }


class Launches(threading.Thread):
    """Launches small kernels, as a training loop does, and times the longest wait between two."""

    def __init__(self) -> None:
        super().__init__()
        self._going, self._longest_s = True, 0.0

    def run(self) -> None:
        small = torch.zeros(16, device=DEVICE)
        stream = torch.cuda.stream(torch.cuda.Stream(DEVICE)) if GPU else contextlib.nullcontext()
        with stream:
            last = time.perf_counter()
            while self._going:
                small.add_(1)
                now = time.perf_counter()
                self._longest_s, last = max(self._longest_s, now - last), now
                time.sleep(0.0002)  # a loop without it would hold the interpreter's lock

    def stop(self) -> float:
        self._going = False
        self.join()
        return 1000 * self._longest_s


def trainer(does: str, invited: str) -> None:
    backend = join(Invitation(**json.loads(invited)), end(), threading.Event())
    if does == "die":
        backend.receive(0, [256 * MIB], LIMIT_S)
        os._exit(1)
    if does == "three":
        print([int(backend.receive(seq, [64 * MIB], LIMIT_S)[0][-1]) for seq in range(3)])
    else:
        print(json.dumps(trainer_of_the_plan(backend)))
    backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", default="channel.json")
    parser.add_argument("--trainer", nargs=2, metavar=("DOES", "INVITATION"))
    wanted = parser.parse_args()
    if wanted.trainer:
        trainer(*wanted.trainer)
        return
    say(card() | worker() | {"dead_trainers": dying(), "own_shm": own_shm()}, wanted.out)


if __name__ == "__main__":
    main()
