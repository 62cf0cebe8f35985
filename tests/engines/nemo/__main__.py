"""NeMo AutoModel through brokers.

Its recipe against its co-located run: losses and the draft. Its wrappers as targets against its own
server, tensor by tensor (:mod:`tests.engines.nemo.tensors`). Its drafts, exported, against its own
network (:mod:`tests.engines.nemo.drafts`).

Usage, from the checkout: ``python -m tests.engines.nemo [PYTHON]``, with the Python of an
environment that has requirements.txt (default: build/engines/nemo/bin/python).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.ports import free_port
from trainer_client.commands.demo import Processes
from worker.targets import EMBEDDED
from worker.targets.embedded import heldout

ROOT = Path(__file__).parents[3]
STEPS, ROWS = 20, 40
#: A run takes about ten seconds.
_LIMIT_S = 300.0
#: At a step, do this.
Fault = tuple[int, Callable[[], None]]


@dataclass(frozen=True)
class Ended:
    """A run of NeMo's recipe, as its log and its draft have it."""

    code: int
    losses: list[str]
    draft: list[str]
    capped: bool
    faults: int


class Cluster:
    """A broker and two workers, of which one can be killed, and the broker started again."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._ports = [free_port() for _ in range(3)]
        self._names: dict[int, str] = {}  # by process id
        self.url = f"tcp://127.0.0.1:{self._ports[0]}"
        self._broker = self._start_broker()
        self._workers = [self._start_worker(), self._start_worker()]

    def kill_worker(self) -> None:
        self._workers[0].kill()
        self._workers[0].wait()
        self._workers[0] = self._start_worker()

    def restart_broker(self) -> None:
        self._broker.kill()
        self._broker.wait()
        self._broker = self._start_broker()

    def check(self) -> None:
        """End all with the log's last lines where one has ended that nobody killed."""
        for child in (self._broker, *self._workers):
            if child.poll() is not None:
                said = self._processes.log(self._names[child.pid]).splitlines()[-5:]
                raise SystemExit("\n".join([f"{child.args} ended by itself:", *said]))

    def _start_broker(self) -> subprocess.Popen[bytes]:
        clients, workers, http = (f"127.0.0.1:{port}" for port in self._ports)
        ends = ["--clients", f"tcp://{clients}", "--workers", f"tcp://{workers}", "--http", http]
        return self._start("broker", *ends)

    def _start_worker(self) -> subprocess.Popen[bytes]:
        where = f"tcp://127.0.0.1:{self._ports[1]}"
        return self._start("worker", "--broker", where, "--target", "embedded", "--threads", 1)

    def _start(self, command: str, *arguments: object) -> subprocess.Popen[bytes]:
        name = f"{command}.{len(self._names) + 1}"
        child = self._processes.start(name, [command, *arguments])
        self._names[child.pid] = name
        return child


class Nemo:
    """Runs the recipe in NeMo's environment, in one folder; ``check`` ends a run that waits for
    nobody.
    """

    def __init__(self, python: Path, folder: Path, check: Callable[[], None]) -> None:
        self._python, self._folder, self._check = python, folder, check
        self._draft = ""
        self._write_data()

    def begin(self) -> Path:
        """Train the draft that all other runs begin with: NeMo does not seed its weights.

        Returns its checkpoint.
        """
        if self.run("begin", 1).code:
            raise SystemExit(f"NeMo's co-located run failed; see {self._folder}/begin.log")
        draft = next((self._folder / "begin").rglob("consolidated"))
        self._draft = str(draft)
        return draft.parents[1]

    def run(self, name: str, ranks: int, faults: Sequence[Fault] = (), **recipe_args: Any) -> Ended:
        """A run of ``STEPS`` steps. The faults strike at their steps, in their order."""
        config = self._folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(self._config(name, ranks, recipe_args)))
        log, left = self._folder / f"{name}.log", list(faults)
        launch = ["--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        command = [self._python, "-m", "torch.distributed.run", *launch]
        module = ["-m", "nemo_automodel.cli.app", str(config)]
        with log.open("w") as out:
            child = subprocess.Popen(
                [*map(str, command), *module],
                env=_environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            end = time.monotonic() + _LIMIT_S
            try:
                while child.poll() is None and time.monotonic() < end:
                    steps = re.findall(r"step=(\d+) train_loss", log.read_text(errors="replace"))
                    if left and steps and int(steps[-1]) >= left[0][0]:
                        left.pop(0)[1]()
                    self._check()
                    time.sleep(0.02)
            finally:
                if child.poll() is None:
                    child.terminate()
            code = child.wait()
        said = log.read_text(errors="replace")
        drafts = sorted((self._folder / name).rglob("consolidated/*.safetensors"))
        return Ended(
            code,
            re.findall(r"step=\d+ train_loss=[\d.]+ train_acc=[\d.]+", said),
            [hashlib.sha256(path.read_bytes()).hexdigest() for path in drafts],
            "Capping target_prefetch_depth" in said,
            len(faults) - len(left),
        )

    def _config(self, name: str, ranks: int, recipe_args: dict[str, Any]) -> dict[str, Any]:
        output = self._folder / name
        remote = recipe_args.get("target_model_backend") == "remote"
        ours, theirs = "trainer_client.nemo.TrainEagle3Recipe", "tests.engines.nemo.colocated"
        return {
            "recipe": ours if remote else f"{theirs}.ColocatedOnCpu",
            "dist_env": {"backend": "gloo", "timeout_minutes": 5},
            "recipe_args": {
                "target_model_name_or_path": str(EMBEDDED),
                "train_data_path": str(self._folder / "data.jsonl"),
                "output_dir": str(output),
                "draft_weights_path": self._draft or None,
                "seq_length": 128,
                "micro_batch_size": 2 // ranks,
                "num_epochs": 1,
                "ttt_steps": 3,
                "draft_vocab_size": 512,
                "log_every_steps": 1,
                **recipe_args,
            },
            "optimizer": {"lr": 1e-3},
            "checkpoint": {
                "enabled": True,
                "checkpoint_dir": str(output / "checkpoints"),
                "model_save_format": "safetensors",
                "save_consolidated": True,
            },
        }

    def _write_data(self) -> None:
        words, draw, lines = heldout().split(), random.Random(0), []
        for row in range(ROWS):
            said = words[row * 60 : row * 60 + draw.randrange(12, 60)]
            turns = (("user", said[:6]), ("assistant", said[6:]))
            messages = [{"role": role, "content": " ".join(part)} for role, part in turns]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (self._folder / "data.jsonl").write_text("".join(lines))


def _environment() -> dict[str, str]:
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **here}


def _inside(python: Path, name: str, *arguments: object) -> int:
    """Run a module of this folder in NeMo's environment."""
    command = [python, "-m", f"tests.engines.nemo.{name}", *arguments]
    return subprocess.call(list(map(str, command)), env=_environment())


def main() -> int:
    """Print a line for each way to run, and return 1 where one is not as the co-located run."""
    default = ROOT / "build" / "engines" / "nemo" / "bin" / "python"
    python = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    folder = ROOT / "build" / "engines" / "nemo-runs"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    failed = _inside(python, "tensors", folder / "logs")
    with Processes(folder / "logs") as processes:
        cluster = Cluster(processes)
        nemo = Nemo(python, folder, cluster.check)
        failed += _inside(python, "drafts", nemo.begin(), folder / "drafts")
        remote = {"target_model_backend": "remote", "remote_urls": [cluster.url]}
        for ranks in (1, 2):
            wanted = nemo.run(f"colocated-{ranks}", ranks)
            for depth in (0, 4):
                for faults in ([], [(4, cluster.kill_worker), (10, cluster.restart_broker)]):
                    name = f"ranks-{ranks}-prefetch-{depth}{'-faults' if faults else ''}"
                    got = nemo.run(name, ranks, faults, target_prefetch_depth=depth, **remote)
                    equal = len(got.losses) == STEPS and got.losses == wanted.losses
                    same = bool(got.draft) and got.draft == wanted.draft
                    holds = not got.code and equal and same and not got.capped
                    holds = holds and got.faults == len(faults)
                    failed += not holds
                    print(
                        f"{'ok  ' if holds else 'FAIL'}  {name}: exit code {got.code}, losses "
                        f"equal: {equal}, draft equal: {same}, faults {got.faults}",
                        flush=True,
                    )
    print(f"logs: {folder}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
