"""Training on packed samples gives what padded ones give, and asks for no padding."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import Cluster, make_target
from tests.integration.test_training import ByteTokenizer, assert_same, losses, run, settings
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.training.probe import probe
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from trainer_client.training.trainer import NonFiniteError
from worker.targets.contract import TargetOutputs
from worker.targets.huggingface import HuggingFaceTarget

ENCODINGS = ["hidden", "probs", "topk", "layers=1,3,4;last", "layers=1,3,4;last;at=loss;states=fp8"]


def wanted(tmp_path: Path, name: str, **changes: Any) -> TrainSettings:
    """Eight samples a step, of very different lengths."""
    data, draw = tmp_path / "data.jsonl", random.Random(1)
    texts = (f"{draw.random():.17f} is a number."[: draw.randint(3, 24)] for _ in range(64))
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {"data": data, "batch_size": 4, "accumulation": 2, "max_steps": 8, "pack": 48}
    return settings(tmp_path, name, **(values | changes))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_packed_samples_are_learned_as_padded_ones(
    cluster: Cluster, tmp_path: Path, encoding: str
) -> None:
    alone = ColocatedTarget(make_target(), encoding)
    padded = run(alone, wanted(tmp_path, "padded", pack=0))
    packed = run(alone, wanted(tmp_path, "packed"))
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-5)
    cluster.worker(make_target())
    through = run(cluster.trainer(encoding=encoding), wanted(tmp_path, "through"))
    assert_same(packed, through)


def test_no_padding_is_asked_for_and_no_row_is_too_long(tmp_path: Path) -> None:
    asked: list[torch.Tensor] = []

    class Seen(ColocatedTarget):
        def generate_batch(self, input_ids: torch.Tensor, *masks: Any, **more: Any) -> Any:
            asked.append(input_ids)
            return super().generate_batch(input_ids, *masks, **more)

    plan_of = wanted(tmp_path, "packed", max_steps=8)
    run(Seen(make_target(), "hidden"), plan_of)
    lines = [json.loads(line)["text"] for line in Path(str(plan_of.data)).read_text().splitlines()]
    assert sum(ids.numel() for ids in asked) == sum(map(len, lines))
    assert all(ids.numel() <= 48 for ids in asked)


def test_a_run_may_be_resumed_with_another_packing(tmp_path: Path) -> None:
    alone = ColocatedTarget(make_target(), "hidden")
    whole = run(alone, wanted(tmp_path, "whole", max_steps=8))
    begun = wanted(tmp_path, "begun", max_steps=8, checkpoint_every=4)

    def leave(step: Any) -> None:
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(begun, alone, ByteTokenizer(), on_step=leave)
    run(alone, dataclasses.replace(begun, pack=0, resume=True))
    assert losses(begun.output) == pytest.approx(losses(whole), abs=1e-5)


class WithoutNumbers(HuggingFaceTarget):
    """Has none for the documents that hold a certain token."""

    bad = ord("7")

    def forward(self, input_ids: Any, *args: Any, **more: Any) -> TargetOutputs:
        made = super().forward(input_ids, *args, **more)
        if (input_ids[:, :6] == self.bad).any():
            made.aux_hidden_states[:] = torch.nan
        return made


def test_a_sample_without_numbers_is_left_out_of_its_row(tmp_path: Path) -> None:
    bad = ColocatedTarget(WithoutNumbers(make_target().model, name="tiny"), "hidden")
    with pytest.raises(NonFiniteError, match=r"from .*data.jsonl:\d+"):
        train(wanted(tmp_path, "stops"), bad, ByteTokenizer())
    found = []
    for name, pack in (("padded", 0), ("packed", 48)):
        of_it = wanted(tmp_path, name, pack=pack, batch_size=1, accumulation=8, skip_non_finite=64)
        found.append(set(train(of_it, bad, ByteTokenizer())["samples_not_finite"]))
        assert losses(of_it.output)[-1] > 0
    assert 0 < len(found[0]) < 64
    assert found[0] == found[1]
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), abs=1e-5)


def test_a_second_worker_is_asked_for_the_same_row(cluster: Cluster, tmp_path: Path) -> None:
    for _ in range(2):
        cluster.worker(make_target())
    plain = run(cluster.trainer(encoding="hidden"), wanted(tmp_path, "plain"))
    twice = run(cluster.trainer(encoding="hidden"), wanted(tmp_path, "twice", verify_share=0.5))
    assert_same(plain, twice)
    summary = json.loads((twice / "summary.json").read_text())
    assert summary["verified"] > 0
    assert summary["verify_differing"] == 0


def test_a_dry_run_takes_a_full_row(tmp_path: Path) -> None:
    alone = ColocatedTarget(make_target(), "hidden")
    assert 40 < probe(wanted(tmp_path, "dry"), alone, ByteTokenizer())["probe_tokens"] <= 48


def test_a_row_that_is_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least max_length \(24 tokens\), got 23"):
        wanted(tmp_path, "run", pack=23)
    with pytest.raises(ValueError, match=r"pack must .*got -1"):
        wanted(tmp_path, "run", pack=-1)


def test_packed_documents_cannot_be_had_as_logits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be had as logits; say hidden or probs"):
        run(ColocatedTarget(make_target(), "logits"), wanted(tmp_path, "run"))
