"""All parts on one GPU through a worker's death: ``python -m tests.gpu.ends OUT [STEPS]``.

Trainers on the GPU by CUDA IPC and by wire, and on the CPU by shared memory, Gloo and wire, train
at the same time. Trainers of one device must have the same losses, bit for bit. One of two workers
is killed and another comes. Without a GPU, the CPU's trainers alone.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu.programs import GPU, card, say
from trainer_client.commands.demo import Processes, listening
from worker.targets.embedded import continuations_file

#: Name, device, direct.
TRAINERS = {
    "gpu-ipc": ("cuda:0", "ipc"),
    "gpu-wire": ("cuda:0", "off"),
    "cpu-shm": ("cpu", "shm"),
    "cpu-gloo": ("cpu", "gloo"),
    "cpu-wire": ("cpu", "off"),
}
LIMIT_S = 90.0


def start_worker(processes: Processes, url: str, name: str) -> subprocess.Popen[bytes]:
    place = ["--device", "cuda:0", "--dtype", "bfloat16"] if GPU else ["--threads", 1]
    ends = ["--broker", url, "--target", "embedded", "--name", name]
    return processes.start(name, ["worker", *ends, *place])


def start_trainer(
    processes: Processes, url: str, out: Path, name: str, steps: int
) -> subprocess.Popen[bytes]:
    device, direct = TRAINERS[name]
    options = {
        "--broker": url,
        "--data": continuations_file(),
        "--output": out / name,
        "--max-steps": steps,
        "--device": device,
        "--direct": direct,
        "--batch-size": 16,
        "--max-length": 256,
        "--draft-vocab-size": 512,
        "--ttt-depths": 4,
        "--checkpoint-every": 0,
    }
    flat = [part for option in options.items() for part in option]
    return processes.start(name, ["trainer_client", *flat, "--json"])


def outcome(directory: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    late = lines[len(lines) // 2 :]
    return {
        "losses": [line["loss"] for line in lines],
        "accept_length": summary["simulated_accept_length"],
        "waiting_share": summary["waiting_share"],
        "tokens_per_s": sum(line["tokens_per_s"] for line in late) / len(late),
        "requests": summary["requests"],
    }


def run(out: Path, steps: int) -> dict[str, Any]:
    names = [name for name, (device, _) in TRAINERS.items() if GPU or device == "cpu"]
    with Processes(out) as processes:
        ends = ["--clients", "tcp://127.0.0.1:0", "--workers", "tcp://127.0.0.1:0"]
        processes.start("broker", ["broker", *ends, "--http", "off", "--log-format", "json"])
        where, until = listening(processes), time.monotonic() + LIMIT_S
        first = start_worker(processes, where["workers"], "w0")
        start_worker(processes, where["workers"], "w1")
        trainers = {
            name: start_trainer(processes, where["clients"], out, name, steps) for name in names
        }
        metrics = out / names[0] / "metrics.jsonl"
        while time.monotonic() < until and not _lines(metrics) >= steps // 4:
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        start_worker(processes, where["workers"], "w2")
        for trainer in trainers.values():
            trainer.wait(max(0.0, until - time.monotonic()))
    found: dict[str, Any] = {name: outcome(out / name) for name in names}
    losses = {name: found[name].pop("losses") for name in names}
    found["same_losses"] = {
        name: losses[name] == losses[f"{name[:3]}-wire"]
        for name in names
        if not name.endswith("wire")
    }
    return found


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def main(out: str, steps: str = "200") -> None:
    with tempfile.TemporaryDirectory(prefix="draftmq-ends-") as directory:
        say(card() | run(Path(directory), int(steps)), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
