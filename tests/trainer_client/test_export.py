from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.errors import ExportError
from trainer_client.export import read_draft, write_draft
from trainer_client.lint import check_draft

INFO: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "max_position_embeddings": 4096,
    "aux_layer_ids": [1, 5, 8],
    "config": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def make_draft(size: int = 24) -> Eagle3Draft:
    torch.manual_seed(0)
    draft = Eagle3Draft(DraftConfig.from_target_info(INFO, size), torch.arange(60)[-size:])
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return draft


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    write_draft(make_draft(), tmp_path / "draft", target_info=INFO)
    return tmp_path / "draft"


def test_a_draft_survives_the_disk(exported: Path) -> None:
    expected = make_draft().state_dict()
    draft = read_draft(exported)
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert draft.config == make_draft().config
    assert sorted(file.name for file in exported.parent.iterdir()) == ["draft"]


def test_the_tensors_are_exactly_those_that_engines_know(exported: Path) -> None:
    layer = "hidden_norm input_layernorm post_attention_layernorm mlp.down_proj mlp.gate_proj"
    layer += " mlp.up_proj self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    wanted = {f"midlayer.{name}.weight" for name in layer.split()}
    wanted |= {"fc.weight", "norm.weight", "lm_head.weight", "embed_tokens.weight", "d2t", "t2d"}
    tensors = load_file(exported / "model.safetensors")
    assert set(tensors) == wanted
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool
    assert tensors["d2t"].tolist() == [36] * 24  # target id minus draft id


def test_the_aux_layers_are_said_in_both_engines_ways(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 6, 9]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 5, 8]


def test_rope_is_written_in_both_forms(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == INFO["config"]["rope_parameters"]


def test_a_full_vocabulary_has_no_d2t(tmp_path: Path) -> None:
    write_draft(make_draft(60), tmp_path / "draft", target_info=INFO)
    assert "d2t" not in load_file(tmp_path / "draft" / "model.safetensors")
    assert read_draft(tmp_path / "draft").d2t.tolist() == [0] * 60
    assert not [found for found in check_draft(tmp_path / "draft") if found.severity == "error"]


def test_a_good_draft_has_no_findings(exported: Path) -> None:
    assert check_draft(exported) == []


def change_config(**changes: Any) -> Callable[[dict, dict], None]:
    return lambda config, tensors: config.update(changes)


def drop_key(name: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: config.pop(name)


def drop(name: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.pop(name)


def put(name: str, make: Callable[[dict], torch.Tensor]) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.update({name: make(tensors)})


def rename(old: str, new: str) -> Callable[[dict, dict], None]:
    def apply(config: dict, tensors: dict) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return apply


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (drop("d2t"), "error: d2t is missing and the draft vocab has 24 of 60"),
        (put("d2t", lambda t: t["d2t"] + torch.arange(24)), "looks like target ids"),
        (put("d2t", lambda t: t["d2t"].int()), "d2t is torch.int32"),
        (put("d2t", lambda t: -torch.arange(24)), "maps two draft ids to one"),
        (put("t2d", lambda t: ~t["t2d"]), "d2t and t2d disagree about 60"),
        (drop("t2d"), "warning: t2d is missing"),
        (drop("midlayer.hidden_norm.weight"), "hidden_norm.weight is missing; vLLM takes ones"),
        (drop("fc.weight"), "error: tensor fc.weight is missing"),
        (put("extra.weight", lambda t: torch.ones(3)), "extra.weight is unknown"),
        (rename("midlayer.", "layers.0."), "warning: the layer is called 'layers.0'"),
        (rename("fc.", "model.fc."), "error: tensors begin with 'model.'"),
        (put("fc.weight", lambda t: t["fc.weight"][:, :16]), "the config says (16, 48)"),
        (put("fc.weight", lambda t: t["fc.weight"] * float("nan")), "not finite"),
        (put("lm_head.weight", lambda t: t["lm_head.weight"] * 0), "lm_head.weight is all zeros"),
        (put("norm.weight", lambda t: torch.ones(16)), "norm.weight is all ones"),
        (put("fc.weight", lambda t: t["fc.weight"].half()), "several dtypes"),
        (change_config(eagle_aux_hidden_state_layer_ids=[1, 5, 8]), "aux layers disagree"),
        (drop_key("eagle_aux_hidden_state_layer_ids"), "vLLM finds no eagle_aux"),
        (drop_key("eagle_config"), "SGLang finds no eagle_config"),
        (drop_key("draft_vocab_size"), "draft_vocab_size is None: SGLang reads it without"),
        (drop_key("norm_before_residual"), "norm_before_residual is not said"),
        (drop_key("target_hidden_size"), "target_hidden_size is missing"),
        (drop_key("rope_theta"), "RoPE is said in one form only"),
        (change_config(rope_theta=1e4), "rope_theta is 10000.0 in one place and 500000.0"),
        (change_config(max_position_embeddings=2048), "max_position_embeddings is 2048"),
        (change_config(tie_word_embeddings=True), "tie_word_embeddings is not false"),
        (change_config(num_hidden_layers=2), "num_hidden_layers is 2"),
        (change_config(architectures=["LlamaForCausalLM"]), "engines want LlamaForCausalLMEagle3"),
    ],
)
def test_each_trap_is_found(
    exported: Path, fault: Callable[[dict, dict], None], match: str
) -> None:
    config = json.loads((exported / "config.json").read_text())
    tensors = load_file(exported / "model.safetensors")
    fault(config, tensors)
    (exported / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, exported / "model.safetensors")
    found = [f"{finding.severity}: {finding.text}" for finding in check_draft(exported)]
    assert any(match in text for text in found), found


def test_what_is_no_draft_is_said(tmp_path: Path, exported: Path) -> None:
    for call in (read_draft, check_draft):
        with pytest.raises(ExportError, match="nowhere"):
            call(tmp_path / "nowhere")
        (exported / "model.safetensors").write_bytes(b"not safetensors")
        with pytest.raises(ExportError, match="draft"):
            call(exported)
