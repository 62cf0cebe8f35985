"""Where a rank trains, on hosts with and without GPUs."""

from __future__ import annotations

from typing import Any

import click
import pytest
import torch

from trainer_client.commands.train import own_device
from trainer_client.training import ranks
from trainer_client.training.ranks import Ranks


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A host that claims two GPUs; which ones became the current device."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("wanted", ["", "cuda"])
def test_each_local_rank_has_a_gpu_of_its_own(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    assert own_device(wanted) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(wanted) == "cuda:1"
    assert gpus == [0, 1]


def test_a_rank_beyond_the_gpus_is_told_both_numbers(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(click.UsageError, match="local rank 2 has no GPU: this host shows 2"):
        own_device("")
    assert own_device("cpu") == "cpu"


def test_without_a_gpu_the_cpu_is_taken_and_a_gpu_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("") == "cpu"
    with pytest.raises(click.UsageError, match="say --device cpu"):
        own_device("cuda")


def test_ranks_of_a_gpu_host_can_reduce_tensors_of_both_kinds(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(ranks, "join_process_group", lambda kind, _: asked.append(kind))
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 1)
    Ranks.from_environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Ranks.from_environment()
    assert asked == ["cpu:gloo,cuda:nccl", "gloo"]


def test_a_device_that_torch_does_not_know_is_one_sentence() -> None:
    with pytest.raises(click.UsageError, match="knows no device 'tpu'; say --device cpu"):
        own_device("tpu")
