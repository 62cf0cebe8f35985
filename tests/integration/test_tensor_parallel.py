"""A target that is cut over two ranks (gloo, on the CPU), started as a user starts it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from broker.service import Broker
from tests.integration.test_processes import PATIENCE_S, SETTINGS
from tests.waiting import eventually
from trainer_client.commands.demo import Processes
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.training import metrics
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from worker.supervision.mapping import VocabMapping
from worker.targets import EMBEDDED, load_target
from worker.targets.embedded import heldout
from worker.targets.vllm.leavings import descendants

_STEPS = 12


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as made:
        yield made


def start(processes: Processes, broker: Broker, **torchrun: object) -> Any:
    options = [part for name, value in torchrun.items() for part in (f"--{name}", value)]
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, *options]
    worker = ["-m", "worker", "--tp", "--broker", broker.worker_endpoint, "--target", "embedded"]
    process = processes.start("ranks", [*ranks, *worker])
    eventually(lambda: broker.snapshot()["workers"] or process.poll(), PATIENCE_S)
    assert process.poll() is None, processes.log("ranks")
    return process


def pid_of_rank(torchrun: Any, rank: int) -> int:
    for pid in descendants(torchrun.pid):
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError(f"rank {rank} is not there")


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(output / "metrics.jsonl")]


@pytest.mark.heavy
def test_rank_dies_under_training_and_all_come_back_and_drain(
    processes: Processes, tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    data.write_text(heldout()[:20_000])
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)

    def settings(name: str) -> TrainSettings:
        wanted = SETTINGS | {"max_steps": _STEPS}
        return TrainSettings(data=data, output=tmp_path / name, **wanted)

    alone = ColocatedTarget(load_target("embedded"), "hidden")
    train(settings("alone"), alone, tokenizer)
    with Broker() as broker:
        torchrun = start(processes, broker, **{"max-restarts": 1})

        def kill(step: Any) -> None:
            if step.step == _STEPS // 2:
                os.kill(pid_of_rank(torchrun, 1), signal.SIGKILL)

        with RemoteEagle3TargetModel([broker.client_endpoint], encoding="hidden") as remote:
            train(settings("ranks"), remote, tokenizer, on_step=kill)
            assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), abs=1e-3)
            said = processes.log("ranks")
            assert "event=target_gone" in said
            assert "rank 1 has ended" in said
            assert said.count("event=attached") == 2

            ids = torch.arange(40, 60).unsqueeze(0)
            weight = load_target("embedded").get_input_embeddings().weight
            assert torch.equal(remote.get_input_embeddings().weight, weight)
            mapping = VocabMapping(torch.arange(0, len(weight), 2), len(weight))
            remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
            assert torch.equal(remote.lm_head_rows().weight, alone.target.model.lm_head.weight[::2])
            held = [remote.supervise("layers=1,5;last", ids + n) for n in range(2)]
            ranks = [pid_of_rank(torchrun, rank) for rank in range(2)]

            def with_the_worker() -> bool:  # what is not stays with the broker, for another one
                done = sum(handle.done() for handle in held)  # first: none is counted twice
                return bool(done + broker.snapshot()["requests"]["running"] >= len(held))

            eventually(with_the_worker, PATIENCE_S)
            torchrun.send_signal(signal.SIGTERM)
            for n, handle in enumerate(held):
                expected, made = alone.supervise("layers=1,5;last", ids + n), handle.result()
                for ours, right in ((made.states, expected.states), (made.last, expected.last)):
                    assert float((ours - right).norm() / right.norm()) < 1e-4
        torchrun.wait(PATIENCE_S)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    assert processes.log("ranks").count("event=draining") >= 1
    assert "event=leader_gone" not in processes.log("ranks").rpartition("event=attached")[2]
