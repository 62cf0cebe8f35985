"""Real processes and real signals: the commands, as a user runs and kills them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from broker.errors import BrokerError
from broker.watch.look import fetch
from tests.ports import free_port
from tests.waiting import eventually
from trainer_client.commands.demo import Processes
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.training import metrics
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from worker.service import Worker
from worker.targets import EMBEDDED, load_target
from worker.targets.embedded import heldout

STEPS = 40
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "batch_size": 2,
    "max_length": 48,
    "draft_vocab_size": 256,
    "ttt_depths": 2,
    "checkpoint_every": 4,
    "learning_rate": 1e-3,
}
PATIENCE_S = 120.0


class Commands:
    """The ``draftmq`` commands of one cluster, each a process."""

    def __init__(self, processes: Processes, directory: Path) -> None:
        self.processes = processes
        self.output = directory / "run"
        self.data = directory / "data.txt"
        self.data.write_text(heldout()[:60_000])
        ports = [free_port() for _ in range(3)]
        self.clients, self.workers = (f"tcp://127.0.0.1:{port}" for port in ports[:2])
        self.http = f"127.0.0.1:{ports[2]}"
        self._count = 0

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        self._count += 1
        return self.processes.start(f"{arguments[0]}{self._count}", arguments)

    def broker(self) -> subprocess.Popen[bytes]:
        ends = ["--clients", self.clients, "--workers", self.workers, "--http", self.http]
        return self.start("broker", *ends)

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        target = ["--target", "embedded", "--threads", 1, "--name", name]
        return self.start("worker", "--broker", self.workers, *target)

    def training(self, output: Path) -> list[object]:
        options = [
            part
            for name, value in SETTINGS.items()
            for part in ("--" + name.replace("_", "-"), value)
        ]
        ends = ["--broker", self.clients, "--data", self.data, "--output", output]
        return [*ends, *options, "--encoding", "probs", "--resume"]

    def trainer(self) -> subprocess.Popen[bytes]:
        return self.start("trainer_client", *self.training(self.output))

    def ranks(self, count: int, output: Path) -> subprocess.Popen[bytes]:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", count]
        return self.start(*torchrun, "-m", "trainer_client", *self.training(output))

    def status(self) -> dict[str, Any]:
        """The broker's, or nothing while it does not answer."""
        try:
            return fetch(self.http, "/status")
        except BrokerError:
            return {}

    def steps(self, output: Path | None = None) -> int:
        return len(metrics.read((output or self.output) / "metrics.jsonl"))


def draftmq(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "broker.commands", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with Processes(tmp_path) as processes:
        yield Commands(processes, tmp_path)


def ends_well(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(PATIENCE_S) == 0


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(output / "metrics.jsonl")]


def undisturbed(commands: Commands, directory: Path) -> list[float]:
    """The losses of the same run with the target in this process."""
    settings = TrainSettings(data=commands.data, output=directory / "undisturbed", **SETTINGS)
    target = ColocatedTarget(load_target("embedded"), "probs")
    train(settings, target, AutoTokenizer.from_pretrained(EMBEDDED))
    return losses(settings.output)


@pytest.mark.heavy
def test_killing_each_kind_of_peer_in_mid_run_changes_no_loss(
    commands: Commands, tmp_path: Path
) -> None:
    broker, first = commands.broker(), commands.worker("first")
    commands.worker("second")
    trainer = commands.trainer()

    def after(steps: int) -> None:
        eventually(lambda: trainer.poll() is not None or commands.steps() >= steps, PATIENCE_S)
        assert trainer.poll() is None, "the run was over before anything could happen"

    after(6)
    first.send_signal(signal.SIGKILL)
    after(12)
    broker.send_signal(signal.SIGKILL)
    broker.wait()
    commands.broker()
    after(18)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    commands.worker("third")
    trainer = commands.trainer()
    ends_well(trainer)
    assert losses(commands.output) == undisturbed(commands, tmp_path)


@pytest.mark.heavy
def test_two_ranks_do_not_notice_workers_that_attach_and_detach(
    commands: Commands, tmp_path: Path
) -> None:
    commands.broker()
    first = commands.worker("first")
    commands.worker("second")
    quiet, churned = tmp_path / "quiet", tmp_path / "churned"
    ends_well(commands.ranks(2, quiet))
    ranks = commands.ranks(2, churned)
    target = load_target("embedded")
    eventually(lambda: commands.steps(churned) >= 5, PATIENCE_S)
    with Worker(target, commands.workers, name="third"):  # there at once, and in mid-run
        eventually(lambda: len(commands.status()["workers"]) == 3, PATIENCE_S)
        assert commands.steps(churned) < STEPS, "the run was over before anything could happen"
        first.send_signal(signal.SIGTERM)
        ends_well(first)
        ends_well(ranks)
        status = commands.status()
    assert losses(churned) == losses(quiet)
    assert len(losses(quiet)) == STEPS
    answered = {worker["worker"]: worker["answered"] for worker in status["workers"]}
    assert set(answered) == {"second", "third"}
    assert answered["third"] > 0
    assert status["counters"]["requeues"] == 0


def test_a_broker_ends_cleanly_on_sigterm_and_sigint(commands: Commands) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        broker = commands.broker()
        eventually(commands.status, PATIENCE_S)
        broker.send_signal(number)
        ends_well(broker)


def test_exit_codes_and_errors_mean_something(tmp_path: Path) -> None:
    wrong = draftmq("broker", "--window", "many")
    assert wrong.returncode == 2
    assert "'many' is not a valid integer" in wrong.stderr
    nobody = draftmq("status", "--http", f"127.0.0.1:{free_port()}")
    assert nobody.returncode == 1
    assert nobody.stderr.startswith("draftmq: no broker answers at")
    both = draftmq("worker", "--broker", "tcp://127.0.0.1:1")
    assert both.returncode == 2
    assert "--target or --target-factory" in both.stderr
    missing = draftmq(
        "worker", "--broker", "tcp://127.0.0.1:1", "--target", str(tmp_path / "nothing")
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("draftmq: there is no model at")
    assert "Traceback" not in missing.stderr


def python(code: str, *, ends: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ENDPOINT": ends}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
        check=False,
    )


CLIENT = """
import os, torch
from trainer_client import Client
client = Client([os.environ["ENDPOINT"]])
pending = client.submit("generate", {"a": torch.zeros(1 << 20)}, timeout_s=60)
"""


def test_a_process_that_exits_without_closing_its_client_ends() -> None:
    """Also with requests that libzmq has not been able to send."""
    done = python(CLIENT + "print('last words')", ends=f"tcp://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (0, "last words\n"), done.stderr


def test_a_forked_child_is_told_to_make_its_own_client() -> None:
    forked = """
if os.fork() == 0:
    for ask in (pending.result, lambda: client.submit("model_info", timeout_s=1)):
        try:
            ask()
        except Exception as error:
            print(type(error).__name__, "parent process" in str(error), flush=True)
    client.close()
    os._exit(0)
os.wait()
print("parent", pending.done())
client.close()
"""
    done = python(CLIENT + forked, ends=f"tcp://127.0.0.1:{free_port()}")
    assert done.returncode == 0, done.stderr
    expected = ["ClientClosedError True", "ClientClosedError True", "parent False"]
    assert done.stdout.splitlines() == expected


def test_ctrl_c_leaves_no_process_of_the_demo_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "broker.commands", "demo", "--output", str(tmp_path)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    eventually(lambda: (tmp_path / "metrics.jsonl").exists(), PATIENCE_S)
    children = descendants(demo.pid)
    assert len(children) >= 6  # broker, two workers, torchrun, two ranks
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 1
    eventually(lambda: not any(map(alive, children)), 10)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(path.parent.name)
            found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
