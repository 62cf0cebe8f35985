"""Do workers inside vLLM serve what workers over transformers serve? Exits 1 when they do not.

``python -m tests.engines.vllm_workers --python ENGINES_PYTHON [--target MODEL]``: the modes of
``in_vllm_target.py``; 64 requests in flight, some of them cancelled; a training through two workers
of which one is killed; an engine with two ranks that is killed. The broker is here, the workers run
in the other environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from broker.service import Broker
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.training import metrics
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from worker.targets import load_target, resolve
from worker.targets.embedded import heldout
from worker.targets.vllm.leavings import descendants

WORK = Path("build/engines/vllm")
#: Of the states' norm, in float32.
TOLERANCE = 1e-4
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path.cwd()),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
_MODES = ("plain", "chunked", "prefix-caching", "synchronous", "two-ranks")
_PATIENCE_S = 300.0
_STEPS = 16


def check_modes(python: str, target: str) -> None:
    """Each mode of the engine, in a process of its own."""
    for mode in _MODES:
        command = [python, "-m", "tests.engines.in_vllm_target", target, mode]
        done = subprocess.run(
            command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            sys.exit(f"vLLM, {mode}: {done.stderr[-2000:]}")
        print(f"vLLM, {mode}: {lines[-1]}")
        result = json.loads(lines[-1])
        if result["largest_error"] > TOLERANCE or result["equal_argmax"] < 1:
            sys.exit(f"vLLM, {mode}: states are not those of transformers")


class Workers:
    """Workers of one environment, each a process with its log in a folder; in vLLM, or with another
    ``engine`` in transformers.
    """

    def __init__(
        self, python: str, target: str, endpoint: str, logs: Path = WORK, engine: str = "vllm:"
    ) -> None:
        self._base = [python, "-m", "worker", "--broker", endpoint, "--target", engine + target]
        self._base += ["--dtype", "float32", "--model-name", "target"]
        if engine:
            self._base += ["--engine-arg", "enforce_eager=true", "--layers", "0"]
        self._logs = logs
        self.all: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *options: str) -> None:
        log = (self._logs / f"{name}.log").open("wb")
        environment = os.environ | ENVIRONMENT
        self.all[name] = subprocess.Popen(
            [*self._base, "--name", name, *options], env=environment, stdout=log, stderr=log
        )

    def kill(self, name: str) -> None:
        self.all[name].kill()
        self.all[name].wait()

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text(errors="replace")

    def end(self) -> None:
        for process in self.all.values():
            process.terminate()
        for process in self.all.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def wait_for(what: str, happened: Any) -> None:
    """Raise ``SystemExit`` where it does not happen in time."""
    deadline = time.monotonic() + _PATIENCE_S
    while not happened():
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not happen within {_PATIENCE_S} s; see {WORK}")
        time.sleep(0.2)


def attached(broker: Broker, workers: Workers, count: int) -> None:
    """Wait for so many workers; one that ended by itself is an error at once."""

    def there() -> bool:
        for name, process in workers.all.items():
            if process.poll() not in (None, -signal.SIGKILL):
                sys.exit(f"worker {name} ended: {workers.log(name)[-2000:]}")
        return len(broker.snapshot()["workers"]) == count

    wait_for(f"{count} workers", there)


def check_in_flight(broker: Broker, target: str) -> None:
    """64 requests at once, every sixth cancelled: the others have the rows of their own prompts."""
    alone = ColocatedTarget(load_target(target, dtype="float32"))
    aux = alone.facts.aux_layer_ids
    wish = f"layers={','.join(map(str, sorted({0, *aux})))};last"
    draw = torch.Generator().manual_seed(1)
    worst = 0.0
    with RemoteEagle3TargetModel([broker.client_endpoint]) as remote:
        asked = []
        for number in range(64):
            length = 3 + 7 * number % 61
            ids = torch.randint(10, 200, (1 + number % 2, length), generator=draw)
            asked.append((number, ids, remote.supervise(wish, ids)))
        cancelled = [handle.cancel() for number, _, handle in asked if number % 6 == 5]
        for number, ids, handle in asked:
            if number % 6 == 5:
                continue
            got, expected = handle.result(), alone.supervise(wish, ids)
            for ours, right in ((got.states, expected.states), (got.last, expected.last)):
                worst = max(worst, float((ours - right).norm() / right.norm()))
    print(f"64 requests in flight, {sum(cancelled)} cancelled: largest error {worst:.1e}")
    if worst > TOLERANCE:
        sys.exit("a request got other rows than its prompt's")


def training(broker: Broker, target: str, output: str, on_step: Any = None) -> list[float]:
    """The losses of a short run, one sequence a step."""
    data = WORK / "data.txt"
    data.write_text(heldout()[:30_000], encoding="utf-8")
    settings = TrainSettings(
        data=data,
        output=WORK / f"{output}-{time.time_ns()}",
        max_steps=_STEPS,
        batch_size=1,
        max_length=48,
        draft_vocab_size=256,
        ttt_depths=2,
        learning_rate=1e-3,
    )
    tokenizer = AutoTokenizer.from_pretrained(resolve(target))
    with RemoteEagle3TargetModel([broker.client_endpoint], encoding="hidden") as remote:
        options = {} if on_step is None else {"on_step": on_step}
        train(settings, remote, tokenizer, **options)
    return [line["loss"] for line in metrics.read(settings.output / "metrics.jsonl")]


def check_killed_worker(broker: Broker, workers: Workers, target: str) -> None:
    """A run through two workers, one killed in its middle, against an undisturbed one."""
    undisturbed = training(broker, target, "undisturbed")

    def kill_one(step: Any, *_: Any) -> None:
        if step.step == _STEPS // 2:
            workers.kill("two")

    disturbed = training(broker, target, "disturbed", kill_one)
    off = max(abs(one - other) for one, other in zip(undisturbed, disturbed, strict=True))
    same = "to the bit" if undisturbed == disturbed else f"within {off:.1e}"
    print(f"{_STEPS} steps, one of two workers killed: losses equal {same}")
    if undisturbed != disturbed:
        sys.exit("with one sequence a step the bits are those of the undisturbed run")


def check_killed_engine(broker: Broker, workers: Workers) -> None:
    """The engine's processes are killed: its worker says so and ends, and nothing is left."""
    before = sorted(os.listdir("/dev/shm"))
    workers.start("ranks", "--tp", "2")
    attached(broker, workers, 2)
    children = list(descendants(workers.all["ranks"].pid))
    for pid in children:
        with contextlib.suppress(OSError):
            if b"VLLM" in Path(f"/proc/{pid}/cmdline").read_bytes().upper():
                os.kill(pid, signal.SIGKILL)
    with RemoteEagle3TargetModel([broker.client_endpoint]) as remote:
        handles = [remote.supervise("last", torch.arange(10, 20)[None]) for _ in range(8)]
        for handle in handles:
            handle.result()  # the other worker has answered what was given to this one
    wait_for("the end of the worker", lambda: workers.all["ranks"].poll() is not None)
    said = [line for line in workers.log("ranks").splitlines() if "is gone" in line]
    left = sorted(set(os.listdir("/dev/shm")) - set(before))
    print(f"engine of two ranks killed: {said[-1] if said else 'nothing was said'}; left: {left}")
    if not said or workers.all["ranks"].returncode == 0:
        sys.exit("the worker of a killed engine did not end in a sentence")


def main(python: str, target: str) -> None:
    """Run everything. Raises ``SystemExit`` with what went wrong."""
    WORK.mkdir(parents=True, exist_ok=True)
    if "--no-modes" not in sys.argv:
        check_modes(python, target)
    with Broker() as broker:
        workers = Workers(python, target, broker.worker_endpoint)
        try:
            workers.start("one", "--coalesce-tokens", "0")
            workers.start("two", "--coalesce-tokens", "0")
            attached(broker, workers, 2)
            check_killed_worker(broker, workers, target)
            attached(broker, workers, 1)
            workers.start("many")
            attached(broker, workers, 2)
            workers.kill("one")
            attached(broker, workers, 1)
            check_in_flight(broker, target)
            check_killed_engine(broker, workers)
        finally:
            workers.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True)
    parser.add_argument("--target", default="embedded")
    arguments = parser.parse_args()
    main(os.path.abspath(arguments.python), arguments.target)
