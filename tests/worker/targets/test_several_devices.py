"""Models over several devices: what is refused, and with what words."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.targets.tiny_models import make, tokens
from worker.errors import TargetError
from worker.targets import load_parallel_target, load_target


@pytest.fixture
def llama(tmp_path: Path) -> str:
    make("llama").save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.mark.parametrize("device_map", ["auto", "sequential", {"": "cpu"}])
def test_a_device_map_gives_the_same_model(llama: str, device_map: Any) -> None:
    laid, whole = load_target(llama, device="", device_map=device_map), load_target(llama)
    assert laid.fingerprint == whole.fingerprint
    got, expected = laid.forward(*tokens()), whole.forward(*tokens())
    assert torch.equal(got.aux_hidden_states, expected.aux_hidden_states)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def placed(*away: str) -> dict[str, str]:
    """Everything on the CPU, but for some parts on disk."""
    layers = [f"model.layers.{number}" for number in range(8)]
    every = ["model.embed_tokens", "model.rotary_emb", *layers, "model.norm", "lm_head"]
    return dict.fromkeys(every, "cpu") | dict.fromkeys(away, "disk")


@pytest.mark.parametrize(
    ("away", "said"),
    [
        (["model.layers.7"], "model.layers.7 would be on disk"),
        (["model.embed_tokens"], "model.embed_tokens would be on disk"),
        ([f"model.layers.{n}" for n in range(3, 8)], "and 2 more parts would be on disk"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetError, match=f"does not fit on its devices: .*{said}"):
        load_target(llama, device="", device_map=placed(*away))


def test_layers_in_main_memory_are_refused_where_others_are_on_a_gpu(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 1, "lm_head": "cpu"}
    monkeypatch.setattr("worker.targets.load_model", lambda *_, **__: model)
    with pytest.raises(TargetError, match="lm_head would be on cpu"):
        load_target(llama, device="", device_map="auto")


def test_a_device_and_a_device_map_are_not_said_together(llama: str) -> None:
    with pytest.raises(TargetError, match="either the device cpu or a device map"):
        load_target(llama, device="cpu", device_map="auto")


@pytest.mark.parametrize(
    ("option", "load"),
    [
        ("--device-map", lambda name: load_target(name, device="", device_map="auto")),
        ("--tp", load_parallel_target),
    ],
)
def test_accelerate_that_is_missing_is_named(
    llama: str, monkeypatch: pytest.MonkeyPatch, option: str, load: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=rf"{option} needs accelerate.*pip install"):
        load(llama)


def test_a_model_without_a_tensor_parallel_plan_is_refused_with_what_to_do(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(TargetError, match=r"no tensor parallel plan .*gpt2.* --device-map auto"):
        load_parallel_target(str(tmp_path / "gpt2"))
