from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.vocab import shuffled
from trainer_client.drafts.checkpoint import save
from trainer_client.drafts.export import export_checkpoint, read_draft, write_draft
from trainer_client.drafts.layers import aux_layer_ids
from trainer_client.drafts.lint import check_draft
from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.errors import ExportError

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
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


def make_draft(size: int = 24, ids: torch.Tensor | None = None) -> Eagle3Draft:
    torch.manual_seed(0)
    ids = torch.arange(60)[-size:] if ids is None else ids
    draft = Eagle3Draft(DraftConfig.from_target_info(INFO, size), ids)
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif parameter.requires_grad:  # training leaves more than noise
            rows, columns = parameter.shape
            parameter.data += 0.1 * torch.randn(rows, 1) @ torch.randn(1, columns)
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


def test_layers_that_do_not_ascend_are_an_error(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    config[LAYER_IDS], config["eagle_config"][LAYER_IDS] = [9, 2, 6], [8, 1, 5]
    (exported / "config.json").write_text(json.dumps(config))
    found = [finding.text for finding in check_draft(exported) if finding.severity == "error"]
    assert any("aux layers [8, 1, 5] do not ascend" in text for text in found)


@pytest.mark.parametrize("size", [24, 60])
def test_ids_in_any_order_survive_the_disk(tmp_path: Path, size: int) -> None:
    ids = shuffled(torch.arange(60))[:size]
    write_draft(make_draft(size, ids), tmp_path / "draft", target_info=INFO)
    assert torch.equal(read_draft(tmp_path / "draft").selected_token_ids, ids)
    assert check_draft(tmp_path / "draft") == []


@pytest.mark.parametrize("with_mask", [True, False])
def test_ids_in_any_order_in_place_of_offsets_are_found(tmp_path: Path, with_mask: bool) -> None:
    ids = shuffled(torch.arange(60))[:24]
    write_draft(make_draft(24, ids), tmp_path / "draft", target_info=INFO)
    tensors = load_file(tmp_path / "draft" / "model.safetensors") | {"d2t": ids}
    if not with_mask:
        del tensors["t2d"]
    save_file(tensors, tmp_path / "draft" / "model.safetensors")
    found = [str(finding.text) for finding in check_draft(tmp_path / "draft")]
    assert any("looks like target ids" in text for text in found)


def test_a_good_draft_has_no_findings(exported: Path) -> None:
    assert check_draft(exported) == []


def change_config(**changes: Any) -> Callable[[dict, dict], None]:
    return lambda config, tensors: config.update(changes)


def drop_key(name: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: config.pop(name)


def drop_keys(*names: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: [config.pop(name) for name in names] and None


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
        (put("d2t", lambda t: t["d2t"] * 0 + 40), "d2t leads outside the target's vocabulary"),
        (put("d2t", lambda t: t["d2t"] - 1), "d2t and t2d disagree about 2 target"),
        (put("d2t", lambda t: t["d2t"][:20]), "d2t has shape (20,), the config says (24,)"),
        (drop("midlayer.hidden_norm.weight"), "hidden_norm.weight is missing; vLLM takes ones"),
        (drop("fc.weight"), "error: tensor fc.weight is missing"),
        (put("extra.weight", lambda t: torch.ones(3)), "extra.weight is unknown"),
        (rename("midlayer.", "layers.0."), "warning: the layer is called 'layers.0'"),
        (rename("fc.", "model.fc."), "error: tensors begin with 'model.'"),
        (put("fc.weight", lambda t: t["fc.weight"][:, :16]), "the config says (16, 48)"),
        (put("norm.weight", lambda t: t["norm.weight"][:8]), "norm.weight has shape (8,)"),
        (put("embed_tokens.weight", lambda t: t["lm_head.weight"].clone()), "says (60, 16)"),
        (drop("lm_head.weight"), "lm_head.weight is missing; vLLM takes the target's head"),
        (put("lm_head.weight", lambda t: torch.randn(24, 16)), "looks like fresh random numbers"),
        (change_config(torch_dtype="bfloat16"), "weights are float32, the config says bfloat16"),
        (put("fc.weight", lambda t: t["fc.weight"] * float("nan")), "not finite"),
        (put("lm_head.weight", lambda t: t["lm_head.weight"] * 0), "lm_head.weight is all zeros"),
        (put("norm.weight", lambda t: torch.ones(16)), "norm.weight is all ones"),
        (put("fc.weight", lambda t: t["fc.weight"].half()), "several dtypes"),
        (change_config(eagle_aux_hidden_state_layer_ids=[1, 5, 8]), "aux layers disagree"),
        (drop_key("eagle_aux_hidden_state_layer_ids"), "error: vLLM finds no eagle_aux"),
        (change_config(eagle_aux_hidden_state_layer_ids="2,6,9"), "which no engine understands"),
        (change_config(eagle_config=[1, 5, 8]), "which no engine understands"),
        (change_config(eagle_config={LAYER_IDS: [1, 1, 5]}), "[1, 1, 5] are not distinct layers"),
        (change_config(eagle_aux_hidden_state_layer_ids=[0, 6, 9]), "not distinct layers"),
        (drop_key("eagle_config"), "SGLang finds no eagle_config"),
        (drop_key("draft_vocab_size"), "draft_vocab_size is None: SGLang reads it without"),
        (drop_key("norm_before_residual"), "norm_before_residual is not said"),
        (drop_key("target_hidden_size"), "target_hidden_size is missing"),
        (drop_key("rope_theta"), "the config has RoPE in one form only"),
        (drop_keys("rope_theta", "rope_parameters"), "no RoPE is said"),
        (change_config(rope_scaling=None), "RoPE scaling is {'rope_type': 'default'} in rope_sc"),
        (change_config(rope_theta=1e4), "rope_theta is 10000.0 in one place and 500000.0"),
        (change_config(max_position_embeddings=2048), "warning: max_position_embeddings is 2048"),
        (drop_key("max_position_embeddings"), "error: max_position_embeddings is None"),
        (change_config(tie_word_embeddings=True), "tie_word_embeddings is not false"),
        (drop_key("tie_word_embeddings"), "warning: tie_word_embeddings is not said"),
        (change_config(num_hidden_layers=2), "warning: num_hidden_layers is 2: vLLM norms"),
        (change_config(hidden_act="gelu"), "vLLM's draft knows silu only"),
        (drop_key("model_type"), "model_type is None"),
        (change_config(num_attention_heads=0), "num_attention_heads is 0"),
        (change_config(architectures=["LlamaForCausalLM"]), "engines want LlamaForCausalLMEagle3"),
    ],
)
def test_each_trap_is_found(
    exported: Path, fault: Callable[[dict, dict], None], match: str
) -> None:
    change(exported, fault)
    found = [f"{finding.severity}: {finding.text}" for finding in check_draft(exported)]
    assert any(match in text for text in found), found


def change(directory: Path, fault: Callable[[dict, dict], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    fault(config, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("size", [24, 40])
@pytest.mark.parametrize("with_t2d", [True, False])
def test_absolute_token_ids_are_told_from_offsets(
    tmp_path: Path, size: int, with_t2d: bool
) -> None:
    """Also where they stay inside the vocabulary, so that no engine could notice."""
    config = DraftConfig.from_target_info(INFO, size)
    write_draft(Eagle3Draft(config, torch.arange(size)), tmp_path / "draft", target_info=INFO)

    def fault(config: dict, tensors: dict) -> None:
        tensors["d2t"] += torch.arange(size)
        if not with_t2d:
            del tensors["t2d"]

    change(tmp_path / "draft", fault)
    assert any("looks like target ids" in found.text for found in check_draft(tmp_path / "draft"))


def test_an_untrained_draft_is_noticed(tmp_path: Path) -> None:
    draft = Eagle3Draft(DraftConfig.from_target_info(INFO, 24), torch.arange(24))
    write_draft(draft, tmp_path / "draft", target_info=INFO)
    noticed = [found.text.split()[1] for found in check_draft(tmp_path / "draft")]
    assert set(noticed) >= {"fc.weight", "lm_head.weight", "midlayer.self_attn.q_proj.weight"}


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats(allow_nan=False) | st.text("a1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=4,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_config_breaks_the_check_or_the_reader(exported: Path, data: st.DataObject) -> None:
    config = json.loads((exported / "config.json").read_text())
    name = data.draw(st.sampled_from(sorted(config)))
    changed = {**config, name: data.draw(JSON)}
    try:
        (exported / "config.json").write_text(json.dumps(changed))
        assert all(found.severity in ("error", "warning") for found in check_draft(exported))
        with contextlib.suppress(ExportError):
            read_draft(exported)
    finally:
        (exported / "config.json").write_text(json.dumps(config))


def test_a_draft_replaces_an_older_one_and_nothing_else(exported: Path) -> None:
    write_draft(make_draft(30), exported, target_info=INFO)
    assert read_draft(exported).config.draft_vocab_size == 30
    (exported / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"more than a draft in it \(thesis.tex\)"):
        write_draft(make_draft(), exported, target_info=INFO)
    assert (exported / "thesis.tex").read_text() == "years of work"
    assert read_draft(exported).config.draft_vocab_size == 30
    with pytest.raises(ExportError, match="is a file"):
        write_draft(make_draft(), exported / "thesis.tex", target_info=INFO)


def test_a_failing_write_leaves_the_older_draft(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".") and not self.name.endswith(".old"):
            raise OSError("disk on fire")
        return honest(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="disk on fire"):
        write_draft(make_draft(30), exported, target_info=INFO)
    assert read_draft(exported).config.draft_vocab_size == 24
    assert [file.name for file in exported.parent.iterdir()] == ["draft"]


def test_other_peoples_drafts_are_read(exported: Path) -> None:
    """As SpecForge and EAGLE's authors publish them: the target's embeddings, Llama's defaults."""
    expected = read_draft(exported)

    def theirs(config: dict, tensors: dict) -> None:
        drop_keys("head_dim", "target_hidden_size")(config, tensors)
        rename("midlayer.", "layers.0.")(config, tensors)
        del tensors["embed_tokens.weight"]

    change(exported, theirs)
    with pytest.raises(ExportError, match=r"embed_tokens\.weight"):
        read_draft(exported)
    torch.save(load_file(exported / "model.safetensors"), exported / "pytorch_model.bin")
    (exported / "model.safetensors").unlink()
    draft = read_draft(exported, expected.embed_tokens.weight)
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert "pickle" in " ".join(found.text for found in check_draft(exported))


def test_the_trained_layers_are_read_from_either_place(exported: Path, tmp_path: Path) -> None:
    assert aux_layer_ids(exported) == (1, 5, 8)
    change(exported, drop_key("eagle_config"))
    assert aux_layer_ids(exported) == (1, 5, 8)
    change(exported, drop_key(LAYER_IDS))
    assert aux_layer_ids(exported) is None
    with pytest.raises(ExportError, match="cannot be read as a draft"):
        aux_layer_ids(tmp_path / "nowhere")


def test_a_pickle_that_runs_code_is_refused(exported: Path) -> None:
    (exported / "model.safetensors").unlink()
    torch.save({"fc.weight": os.system}, exported / "pytorch_model.bin")
    with pytest.raises(ExportError, match="cannot be read"):
        read_draft(exported)


def test_another_network_is_not_taken_for_ours(exported: Path) -> None:
    change(exported, change_config(attention_bias=True))
    with pytest.raises(ExportError, match="another kind of EAGLE-3 draft: attention_bias=True"):
        read_draft(exported)


@pytest.mark.parametrize(
    "switches",
    [
        {"fc_norm": True, "norm_output": True},
        {"norm_before_fc": True},
        {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True},
    ],
)
@pytest.mark.parametrize("layers", [[1, 5], [1, 5, 8], [1, 2, 3, 5, 8]])
def test_every_form_of_the_network_survives_the_disk_and_the_check(
    tmp_path: Path, switches: dict[str, bool], layers: list[int]
) -> None:
    torch.manual_seed(0)
    info = INFO | {"aux_layer_ids": layers}
    draft = Eagle3Draft(DraftConfig.from_target_info(info, 24, **switches), torch.arange(24))
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(len(parameter), 1) * torch.randn(parameter.shape[1])
    write_draft(draft, tmp_path / "draft", target_info=info)
    again = read_draft(tmp_path / "draft")
    assert again.config == draft.config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert aux_layer_ids(tmp_path / "draft") == tuple(layers)
    told = [each.text for each in check_draft(tmp_path / "draft")]
    only_for_vllm = [text for text in told if "norm_before_residual is true" in text]
    assert told == only_for_vllm
    assert bool(told) == switches.get("norm_before_residual", False)


@pytest.mark.parametrize("name", ["fc_norm", "norm_before_fc"])
def test_a_switch_without_its_tensors_is_refused(exported: Path, name: str) -> None:
    change(exported, change_config(**{name: True}))
    with pytest.raises(ExportError, match=r"does not fit its config: .*Missing key"):
        read_draft(exported)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_transformers_reads_the_rope_that_was_trained(tmp_path: Path, rope: dict) -> None:
    """Whichever of the two forms it looks at: frequencies are the same, bit for bit."""
    info = INFO | {"config": INFO["config"] | {"rope_parameters": rope | {"rope_theta": 5e5}}}
    draft = Eagle3Draft(DraftConfig.from_target_info(info, 24), torch.arange(24))
    write_draft(draft, tmp_path / "draft", target_info=info)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    old = {name: value for name, value in config.items() if name != "rope_parameters"}
    new = {name: v for name, v in config.items() if name not in ("rope_theta", "rope_scaling")}
    for form in (config, old, new):
        rotary = LlamaRotaryEmbedding(LlamaConfig.from_dict(form))
        assert torch.equal(rotary.inv_freq, draft._rotary.inv_freq)
        assert rotary.attention_scaling == draft._rotary.attention_scaling
    assert read_draft(tmp_path / "draft").config == draft.config


def test_a_run_or_one_of_its_checkpoints_is_exported(tmp_path: Path) -> None:
    ids = shuffled(torch.arange(60))[:24]
    drafts = {1: make_draft(20), 2: make_draft(24, ids)}
    optimizer = torch.optim.SGD(drafts[1].parameters())
    for step, draft in drafts.items():
        save(tmp_path / "run" / "checkpoints", step, draft, optimizer, {}, INFO, keep=5)
    checkpoints = tmp_path / "run" / "checkpoints"
    for where, size in (
        (tmp_path / "run", 24),
        (checkpoints, 24),
        (checkpoints / "step-000001", 20),
        (checkpoints / ".." / "checkpoints" / "step-000001", 20),
    ):
        export_checkpoint(where, tmp_path / "draft")
        read = read_draft(tmp_path / "draft")
        assert read.config.draft_vocab_size == size
        assert size == 20 or torch.equal(read.selected_token_ids, ids)
    for nothing in (checkpoints / "step-000003", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ExportError, match="neither a run with a complete checkpoint nor"):
            export_checkpoint(nothing, tmp_path / "other")
    (checkpoints / "step-000002" / "draft.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="step-000002 is damaged"):
        export_checkpoint(tmp_path / "run", tmp_path / "draft")
    assert read_draft(tmp_path / "draft").config.draft_vocab_size == 20


def test_what_is_no_draft_is_said(tmp_path: Path, exported: Path) -> None:
    for call in (read_draft, check_draft):
        with pytest.raises(ExportError, match="nowhere"):
            call(tmp_path / "nowhere")
        (exported / "model.safetensors").write_bytes(b"not safetensors")
        with pytest.raises(ExportError, match="draft"):
            call(exported)
