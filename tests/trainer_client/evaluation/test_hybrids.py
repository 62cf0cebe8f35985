"""Decoding with targets that have a recurrent state beside their keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tests.trainer_client.evaluation.test_decoding import Oracle, make_draft
from trainer_client.evaluation.decoding import evaluate, greedy_decode
from worker.targets.huggingface import HuggingFaceTarget

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 4,
}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_MAMBA = {"mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": _LINEAR,
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "bamba": _MAMBA | {"mamba_n_heads": 8, "attn_layer_indices": [1, 3, 5]},
    "lfm2": {"full_attn_idxs": [1, 3, 5], "block_auto_adjust_ff_dim": False},
}


@pytest.mark.parametrize("kind", sorted(HYBRIDS))
def test_the_text_of_a_hybrid_is_that_of_greedy_decoding(kind: str) -> None:
    try:
        config = hf.AutoConfig.for_model(kind, **_SIZES, **HYBRIDS[kind])
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    target = HuggingFaceTarget(hf.AutoModelForCausalLM.from_config(config), name=kind)
    try:
        oracle = Oracle(make_draft(target, 128).config, torch.arange(128))
        oracle.expect([9, 10, 11, *greedy_decode(target, [9, 10, 11], 14, ()).tokens])
        result = evaluate(target, oracle, [[9, 10, 11]], max_new_tokens=14, draft_tokens=4, eos=())
    finally:
        target.close()
    assert result.first_difference is None
    assert 1.5 < result.accept_length < 4  # some are accepted, and some not
