"""Tiny random models of the layouts that a target may have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

VOCAB = 128
#: torch.compile needs one on a CPU.
HAS_COMPILER = bool(shutil.which("g++") or shutil.which("clang++"))
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = SIZES | {"head_dim": 8, "sliding_window": 4}


def _gemma3_multimodal() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = hf.Gemma3TextConfig(**_GEMMA)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


def _llava() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**SIZES), image_token_id=5
    )
    return hf.LlavaForConditionalGeneration(config)


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=4)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SIZES, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GEMMA)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA)),
    "gemma3_multimodal": _gemma3_multimodal,
    "llava": _llava,
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=4.0)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=8, n_head=4, n_positions=64)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=True)
    ),
}


def make(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MAKERS[kind]().eval()


@cache
def shared(kind: str) -> Any:
    """One model of a kind for all tests that do not change it."""
    return make(kind)


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """ids without special tokens, masks of ones: each [batch, length] int64."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCAB, (batch, length), generator=draw)
    return ids, torch.ones_like(ids), torch.ones_like(ids)
