"""A share of the samples is asked for of two workers, and training is the same to the bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import Cluster, make_target
from tests.integration.test_training import ByteTokenizer, assert_same, run, settings
from trainer_client.errors import TrainerClientError
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.training import metrics
from trainer_client.training.run import train
from worker.targets.contract import TargetOutputs
from worker.targets.huggingface import HuggingFaceTarget


class Off(HuggingFaceTarget):
    """Says that it is the same, and gives states that are off by a part of themselves."""

    def __init__(self, by: float, where: str = "aux_hidden_states") -> None:
        self._right = make_target()
        super().__init__(self._right.model, name="tiny")
        self._by, self._where = by, where

    def forward(self, *args: Any, **more: Any) -> TargetOutputs:
        made = super().forward(*args, **more)
        object.__setattr__(made, self._where, getattr(made, self._where) * (1 + self._by))
        return made


def verified(line: dict[str, Any]) -> tuple[int, int, int]:
    return tuple(line[n] for n in ("verified", "verify_differing", "verify_alone"))  # type: ignore[return-value]


@pytest.mark.parametrize("encoding", ["topk", "layers=1,3,4;last;states=fp8"])
def test_what_two_workers_agree_on_is_counted_and_changes_no_bit(
    cluster: Cluster, tmp_path: Path, encoding: str
) -> None:
    for _ in range(2):
        cluster.worker(make_target())
    plain = run(cluster.trainer(encoding=encoding), settings(tmp_path, "plain", max_steps=6))
    wanted = settings(tmp_path, "twice", max_steps=6, verify_share=0.5)
    twice = run(cluster.trainer(encoding=encoding), wanted)
    assert_same(plain, twice)
    summary = json.loads((twice / "summary.json").read_text())
    count, differing, alone = verified(summary)
    assert 0 < count < 6
    assert (differing, alone) == (0, 0)
    assert verified(metrics.read(twice / "metrics.jsonl")[-1]) == (count, 0, 0)
    assert "verified" not in json.loads((plain / "summary.json").read_text())


@pytest.mark.parametrize(
    ("where", "named"),
    [("aux_hidden_states", "aux_hidden_states"), ("last_hidden_state", "last_hidden_state")],
)
def test_a_worker_that_differs_ends_the_run_and_is_named(
    cluster: Cluster, tmp_path: Path, where: str, named: str
) -> None:
    cluster.worker(make_target(), name="right")
    cluster.worker(Off(1e-3, where), name="wrong")
    wanted = settings(tmp_path, "run", max_steps=30, verify_share=1.0)
    said = (
        rf"(right and wrong|wrong and right) do not serve the same target: {named} is off by 0.001"
    )
    with pytest.raises(TrainerClientError, match=said):
        run(cluster.trainer(encoding="hidden"), wanted)


def test_a_difference_can_be_a_warning(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.worker(make_target(), name="right")
    cluster.worker(Off(1e-3), name="wrong")
    wanted = settings(tmp_path, "run", max_steps=4, verify_share=1.0, verify_differs="warn")
    with caplog.at_level(logging.WARNING, "draftmq.train"):
        output = run(cluster.trainer(encoding="hidden"), wanted)
    count, differing, alone = verified(json.loads((output / "summary.json").read_text()))
    assert (count, differing, alone) == (4, 4, 0)
    assert [r.getMessage() for r in caplog.records].count("verify_differs") == 4


def test_rounding_is_no_difference(cluster: Cluster, tmp_path: Path) -> None:
    cluster.worker(make_target())
    cluster.worker(Off(1e-6))
    wanted = settings(tmp_path, "run", max_steps=3, verify_share=1.0)
    output = run(cluster.trainer(encoding="hidden"), wanted)
    assert verified(json.loads((output / "summary.json").read_text())) == (3, 0, 0)


def test_values_that_are_no_numbers_agree_with_nothing(cluster: Cluster, tmp_path: Path) -> None:
    cluster.worker(make_target(), name="right")
    cluster.worker(Off(float("nan")), name="wrong")
    wanted = settings(tmp_path, "run", max_steps=30, verify_share=1.0, skip_non_finite=100)
    with pytest.raises(TrainerClientError, match="do not serve the same target: it failed there"):
        run(cluster.trainer(encoding="hidden"), wanted)


def test_a_pool_of_one_worker_says_that_it_verifies_nothing(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.worker(make_target(), name="only")
    wanted = settings(tmp_path, "run", max_steps=3, verify_share=1.0)
    with caplog.at_level(logging.WARNING, "draftmq.train"):
        output = run(cluster.trainer(encoding="hidden"), wanted)
    assert verified(json.loads((output / "summary.json").read_text())) == (0, 0, 3)
    assert [r.getMessage() for r in caplog.records].count("verify_alone") == 1


def test_a_target_without_workers_cannot_be_verified(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", verify_share=0.1)
    with pytest.raises(TrainerClientError, match="--verify-share asks a second worker"):
        train(wanted, ColocatedTarget(make_target(), "probs"), ByteTokenizer())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="verify_share must be a share from 0 to 1"):
        settings(tmp_path, "run", verify_share=share)


def test_a_resumed_run_may_verify_more(cluster: Cluster, tmp_path: Path) -> None:
    for _ in range(2):
        cluster.worker(make_target())
    run(cluster.trainer(encoding="hidden"), settings(tmp_path, "run", max_steps=2))
    longer = settings(tmp_path, "run", max_steps=4, resume=True, verify_share=1.0)
    output = run(cluster.trainer(encoding="hidden"), longer)
    assert verified(json.loads((output / "summary.json").read_text())) == (2, 0, 0)
    assert torch.isfinite(torch.tensor(metrics.read(output / "metrics.jsonl")[-1]["loss"]))
