"""What engines do with a draft that is not quite ours, said before they do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer_client.drafts.test_export import INFO, change, make_draft
from trainer_client.drafts.export import read_draft, write_draft
from trainer_client.drafts.layers import aux_layer_ids
from trainer_client.drafts.lint import check_draft
from trainer_client.errors import ExportError

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
Fault = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    write_draft(make_draft(), tmp_path / "draft", target_info=INFO)
    return tmp_path / "draft"


def said(directory: Path) -> list[str]:
    return [f"{finding.severity}: {finding.text}" for finding in check_draft(directory)]


def with_norms(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config.update(fc_norm=True, norm_output=True)
    tensors.update({f"fc_norm.{at}.weight": torch.rand(16) + 0.5 for at in range(3)})


def five_layers(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    ids = [1, 2, 3, 5, 8]
    config.update({"num_aux_hidden_states": 5, LAYER_IDS: [k + 1 for k in ids]})
    config["eagle_config"][LAYER_IDS] = ids
    tensors["fc.weight"] = torch.cat([tensors["fc.weight"], tensors["fc.weight"][:, :32]], 1)


def two_layers(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["num_hidden_layers"] = 2
    for name in [name for name in tensors if name.startswith("midlayer.")]:
        tensor = tensors[name]
        narrow = name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        tensors["layers.1." + name[9:]] = tensor[:, :16].clone() if narrow else tensor.clone()


def biased(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["attention_bias"] = True
    for each in "qkv":
        rows = tensors[f"midlayer.self_attn.{each}_proj.weight"].shape[0]
        tensors[f"midlayer.self_attn.{each}_proj.bias"] = torch.rand(rows)


def as_speculators(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """As speculators 0.9 writes it: the layer's config one level down, and ``layers.0``."""
    ours = dict(config)
    config.clear()
    own = ("draft_vocab_size", "norm_before_residual", LAYER_IDS)
    config.update({name: ours[name] for name in own})
    config.update(
        architectures=["Eagle3DraftModel"],
        speculators_model_type="eagle3",
        tie_word_embeddings=False,
        torch_dtype="float32",
    )
    outside = (*own, "eagle_config", "architectures", "target_hidden_size", "torch_dtype")
    config["transformer_layer_config"] = {n: v for n, v in ours.items() if n not in outside}
    for name in [name for name in tensors if name.startswith("midlayer.")]:
        tensors["layers.0." + name[9:]] = tensors.pop(name)


def as_nemo(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["architectures"] = ["LlamaEagle3DraftModel"]
    for name in list(tensors):
        if name not in ("d2t", "t2d", "lm_head.weight"):
            tensors["model." + name] = tensors.pop(name)


def inside(**changes: Any) -> Fault:
    return lambda config, tensors: config["eagle_config"].update(changes)


def outside(**changes: Any) -> Fault:
    return lambda config, tensors: config.update(changes)


def tensors_only(apply: Fault) -> Fault:
    return lambda config, tensors: apply({}, tensors)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (outside(fc_norm=True), "error: fc_norm is true and tensor fc_norm.0.weight is missing"),
        (tensors_only(with_norms), "error: tensor fc_norm.0.weight is there and fc_norm is not"),
        (outside(norm_before_fc=True), "error: norm_before_fc is true and tensor input_norm"),
        (inside(norm_before_fc=True), "error: norm_before_fc is true and tensor input_norm"),
        (outside(norm_output=True), "warning: norm_output is true, and neither fc_norm nor"),
        (outside(norm_before_residual=True), "error: norm_before_residual is true: vLLM obeys it"),
        (inside(use_aux_hidden_state=False), "error: use_aux_hidden_state is false"),
        (outside(use_aux_hidden_state=False), "error: use_aux_hidden_state is false"),
        (outside(num_aux_hidden_states=4), "error: engines feed 4 aux states"),
        (outside(attention_bias=True), "error: attention_bias is true and no bias"),
        (tensors_only(biased), "bias is there and attention_bias is not true"),
        (inside(**{LAYER_IDS: [8, 1, 5]}), "aux layers [8, 1, 5] do not ascend"),
        (outside(architectures=["Eagle3LlamaForCausalLM"]), "warning: architectures is Eagle3Ll"),
    ],
)
def test_a_switch_that_engines_take_silently_is_found(
    exported: Path, fault: Fault, match: str
) -> None:
    change(exported, fault)
    assert any(match in text for text in said(exported)), said(exported)


@pytest.mark.parametrize("fault", [with_norms, five_layers, two_layers, biased, as_speculators])
def test_a_draft_that_an_engine_loads_is_not_called_a_failure(exported: Path, fault: Fault) -> None:
    change(exported, fault)
    assert not [text for text in said(exported) if text.startswith("error")]


def test_the_number_of_aux_states_is_written(exported: Path) -> None:
    assert json.loads((exported / "config.json").read_text())["num_aux_hidden_states"] == 3


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (as_speculators, "EAGLE-3 draft in speculators' format"),
        (as_nemo, "EAGLE-3 draft as NeMo AutoModel writes it"),
        (outside(architectures=["PeagleLlamaForCausalLM"]), "P-EAGLE draft"),
        (lambda c, t: t.update(mask_hidden=torch.rand(1, 1, 48)), "P-EAGLE draft"),
        (outside(architectures=["DFlashDraftModel"], dflash_config={}), "DFlash draft"),
        (outside(architectures=["Qwen3DSparkModel"]), "DSpark draft"),
        (outside(speculators_model_type="mtp"), "mtp draft in speculators' format"),
    ],
)
def test_a_draft_is_named_for_what_it_is(exported: Path, fault: Fault, name: str) -> None:
    change(exported, fault)
    assert name in said(exported)[0]
    if not name.startswith("EAGLE-3"):
        assert len(said(exported)) == 1
        with pytest.raises(ExportError, match=name):
            read_draft(exported)


def test_speculators_format_is_read_as_the_draft_that_it_is(exported: Path) -> None:
    expected = read_draft(exported)
    change(exported, as_speculators)
    draft = read_draft(exported)
    assert aux_layer_ids(exported) == (1, 5, 8)
    assert draft.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(draft.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "fault",
    [
        inside(use_aux_hidden_state=False),
        outside(num_hidden_layers=2),
        outside(hidden_act="gelu"),
        outside(sliding_window=64, layer_types=["sliding_attention"]),
    ],
)
def test_a_switch_that_the_reader_does_not_honour_is_refused(exported: Path, fault: Fault) -> None:
    change(exported, fault)
    with pytest.raises(ExportError, match="is another kind of EAGLE-3 draft: "):
        read_draft(exported)


def test_a_short_training_is_not_called_fresh_random_numbers(exported: Path) -> None:
    """Its norms have moved, and its matrices are as random as they were."""
    torch.manual_seed(1)
    tensors = load_file(exported / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "embed" not in name:
            tensors[name] = 0.02 * torch.randn(tensor.shape)
    save_file(tensors, exported / "model.safetensors")
    assert not [text for text in said(exported) if "fresh random" in text]


def test_a_runs_folder_is_taken_for_its_draft(exported: Path) -> None:
    run = exported.parent
    assert said(run) == said(exported)
    assert aux_layer_ids(run) == (1, 5, 8)
    assert read_draft(run).config == read_draft(exported).config
