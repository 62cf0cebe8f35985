"""A checkpoint without every tensor of its model is no target: the rest would be random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.worker.targets.tiny_models import VOCAB, make
from worker.errors import TargetError
from worker.targets import load_target

Tensors = dict[str, Tensor]
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model, as transformers saves it."""
    make("llama").save_pretrained(tmp_path)
    return tmp_path


def changed(folder: Path, change: Callable[[Tensors], object]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def renamed(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.upward.weight"] = tensors.pop(LAYER)


def reshaped(tensors: Tensors) -> None:
    tensors[LAYER] = torch.zeros(31, 16)


def test_a_whole_checkpoint_is_a_target(folder: Path) -> None:
    assert load_target(str(folder), device="cpu").vocab_size == VOCAB


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(LAYER), f"lacks {LAYER}. They would be random"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lacks lm_head.weight"),
        (renamed, "lacks .*it has model.layers.1.mlp.upward.weight, which the model does not know"),
        (reshaped, "cannot load target|lacks"),
    ],
)
def test_a_checkpoint_without_all_tensors_is_refused_by_their_names(
    folder: Path, change: Callable[[Tensors], object], says: str
) -> None:
    with pytest.raises(TargetError, match=says):
        load_target(str(changed(folder, change)), device="cpu")


def test_a_damaged_file_is_one_sentence(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TargetError, match="cannot load target"):
        load_target(str(folder), device="cpu")
