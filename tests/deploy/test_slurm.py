"""The Slurm script in a cluster that is played: its programs are stand-ins that take notes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy import command_lines as lines

SCRIPT = lines.DEPLOY / "slurm" / "draftmq.sbatch"

#: Notes its start and, being told to stop, its end; goes on until then.
_SERVICE = """#!/bin/bash
note() { echo "$*" >>"$LOG"; }
trap 'note stop "$name"; exit 0' TERM
name=%(name)s
note start "$name" $$ "$@"
%(ready)s
while :; do sleep 0.02; done
"""
_PROGRAMS = {
    "scontrol": "#!/bin/bash\nprintf '%s\\n' ${NODES:-n1 n2 n3}\n",
    # drops its own options and becomes the program, as one task of one node
    "srun": '#!/bin/bash\necho "srun $*" >>"$LOG"\n'
    'while [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "curl": '#!/bin/bash\n[[ -e "$LOG.ready" ]]\n',
    "sleep": "#!/bin/bash\nexec /bin/sleep 0.02\n",
    "draftmq": _SERVICE % {
        "name": '$1',
        "ready": '[[ $1 == worker && ${WORKER_DIES:-} ]] && exit 3\n'
        '[[ $1 == worker ]] && touch "$LOG.ready"',
    },
    "torchrun": _SERVICE % {
        "name": "torchrun",
        "ready": '[[ ${TRAINER_EXIT:-} ]] && { note stop torchrun; exit "$TRAINER_EXIT"; }',
    },
}  # fmt: skip


class Cluster:
    """Runs the script with stand-ins, and tells what they noted."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        programs = folder / "bin"
        programs.mkdir()
        for name, text in _PROGRAMS.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_ON_NODE": "64",
            "SLURM_GPUS_ON_NODE": "4",
            "TARGET": "org/model",
            "DATA": "/shared/my data.jsonl",
            "OUTPUT": "/shared/run",
        }

    def start(self, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT)],
            env=self.environment | settings,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, **settings: str) -> tuple[int, str]:
        process = self.start(**settings)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    def noted(self, word: str) -> list[list[str]]:
        rows = [line.split() for line in self.log.read_text().splitlines()]
        return [row[1:] for row in rows if row[0] == word]

    def running(self) -> list[int]:
        """The programs that were started and have not ended."""
        started = [int(row[1]) for row in self.noted("start")]
        return [pid for pid in started if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    playing = Cluster(tmp_path)
    yield playing
    for pid in playing.running():  # only after a failure
        os.kill(pid, signal.SIGKILL)


def _wait_until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        subprocess.run(["/bin/sleep", "0.02"], check=True)
    raise AssertionError("never happened")


@pytest.mark.parametrize("status", ["0", "5"])
def test_the_job_ends_as_its_trainer_does_and_leaves_nothing(cluster: Cluster, status: str) -> None:
    code, errors = cluster.run(TRAINER_EXIT=status)
    assert code == int(status), errors
    started = [row[0] for row in cluster.noted("start")]
    assert sorted(started[:2]) == ["broker", "worker"]
    assert started[2:] == ["torchrun"]
    assert [row[0] for row in cluster.noted("stop")] == ["torchrun", "worker", "broker"]
    assert not cluster.running()


def test_sigterm_before_the_time_limit_stops_trainer_then_workers_then_broker(
    cluster: Cluster,
) -> None:
    process = cluster.start()
    _wait_until(lambda: "torchrun" in [row[0] for row in cluster.noted("start")])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert [row[0] for row in cluster.noted("stop")] == ["torchrun", "worker", "broker"]
    assert not cluster.running()


def test_commands_are_what_the_parser_takes(cluster: Cluster) -> None:
    cluster.environment["DATA"] = "/shared/data.jsonl"
    cluster.run(TRAINER_EXIT="0", WORKER_NODES="2")
    said = {row[0]: row[2:] for row in cluster.noted("start")}
    broker = lines.parse(said["broker"])
    assert lines.option(broker, "insecure")
    worker = lines.parse(said["worker"])
    assert lines.option(worker, "broker") == ("tcp://n1:5556",)
    assert (lines.option(worker, "target"), lines.option(worker, "device")) == (
        "org/model",
        "cuda",
    )
    torchrun, _, train = " ".join(said["torchrun"]).partition(" -m trainer_client ")
    trainer = lines.parse(["train", *train.split()])
    assert lines.option(trainer, "broker") == ("tcp://n1:5555",)
    assert lines.option(trainer, "resume")
    assert "--nnodes=1 --nproc-per-node=4" in torchrun
    assert "--rdzv-endpoint=n3:29500" in torchrun


def test_keys_take_the_place_of_insecure(cluster: Cluster) -> None:
    cluster.environment["DATA"] = "/shared/data.jsonl"
    cluster.run(TRAINER_EXIT="0", KEYS="/shared/keys")
    said = {row[0]: row[2:] for row in cluster.noted("start")}
    _, _, train = " ".join(said["torchrun"]).partition(" -m trainer_client ")
    broker = lines.parse(said["broker"])
    assert not lines.option(broker, "insecure")
    assert lines.option(broker, "allow") == (Path("/shared/keys"),)
    for kind, arguments in (
        ("broker", said["broker"]),
        ("worker", said["worker"]),
        ("trainer", ["train", *train.split()]),
    ):
        context = lines.parse(arguments)
        assert str(lines.option(context, "key")) == f"/shared/keys/{kind}.secret"
        if kind != "broker":
            assert lines.option(context, "broker_key") == ("/shared/keys/broker.public",)


def test_steps_take_the_nodes_gpus_and_cpus_that_they_should(cluster: Cluster) -> None:
    cluster.run(TRAINER_EXIT="0", WORKER_NODES="2")
    workers, trainer = (" ".join(row) for row in cluster.noted("srun"))
    for wanted in ("n1,n2", "--nodes=2", "--ntasks=8", "--gpus-per-task=1", "--cpus-per-task=16"):
        assert wanted in workers
    for wanted in ("n3", "--nodes=1", "--ntasks=1", "--cpus-per-task=64"):
        assert wanted in trainer


def test_without_gpus_nothing_asks_for_them(cluster: Cluster) -> None:
    cluster.run(TRAINER_EXIT="0", GPUS="0")
    assert "gpu" not in cluster.log.read_text()
    assert "--device cpu" in cluster.log.read_text()


def test_workers_that_die_before_they_are_ready_end_the_job(cluster: Cluster) -> None:
    code, errors = cluster.run(WORKER_DIES="1")
    assert code == 1
    assert "broker or workers ended before they were ready" in errors
    assert not cluster.running()


def test_workers_that_are_never_ready_end_the_job(cluster: Cluster) -> None:
    code, errors = cluster.run(READY_S="0", NODES="n1 n2", PATH=_never_ready(cluster))
    assert code == 1
    assert "no worker was ready within 0 s; raise READY_S" in errors
    assert not cluster.running()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TARGET": ""}, "TARGET: say which model"),
        ({"DATA": ""}, "DATA: say which data"),
        ({"WORKER_NODES": "3"}, "WORKER_NODES is 3 and the job has 3 nodes"),
        ({"WORKER_NODES": "0"}, "WORKER_NODES is 0"),
    ],
)
def test_wrong_usage_is_named_and_starts_nothing(
    cluster: Cluster, settings: dict[str, str], message: str
) -> None:
    code, errors = cluster.run(**settings)
    assert code != 0
    assert message in errors
    assert not cluster.noted("start")


def _never_ready(cluster: Cluster) -> str:
    other = cluster.log.parent / "never"
    other.mkdir()
    (other / "curl").write_text("#!/bin/bash\nexit 22\n")
    (other / "curl").chmod(0o755)
    return f"{other}:{cluster.environment['PATH']}"
