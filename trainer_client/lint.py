"""What engines get wrong silently about an EAGLE-3 draft on disk, found before they do.

Read from vLLM's and SGLang's ``models/llama_eagle3.py``; the issue numbers are of threads in which
somebody met the trap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer_client.errors import ExportError
from trainer_client.export import ARCHITECTURE

_LAYER = (
    "hidden_norm.weight",
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
)
_REQUIRED = {"fc.weight", "norm.weight", "lm_head.weight", *(f"midlayer.{n}" for n in _LAYER)}
_OPTIONAL = {"d2t", "t2d", "embed_tokens.weight"}
_SIZES = (
    "vocab_size",
    "draft_vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``error`` breaks the draft in some engine, ``warning`` may."""

    severity: str
    text: str


def check_draft(directory: Path) -> list[Finding]:
    """All findings of a draft's ``config.json`` and ``model.safetensors``.

    Raises :class:`ExportError` where these cannot be read at all.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
        tensors = load_file(directory / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{directory} cannot be read as a draft: {error}") from error
    renamed, findings = _canonical(tensors)
    findings += _config_findings(config)
    findings += _key_findings(renamed)
    if all(isinstance(config.get(name), int) for name in _SIZES):
        findings += _shape_findings(config, renamed)
        findings += _vocabulary_findings(config, renamed)
    findings += _weight_findings(renamed)
    return findings


def _error(text: str) -> Finding:
    return Finding("error", text)


def _warning(text: str) -> Finding:
    return Finding("warning", text)


def _canonical(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Finding]]:
    findings, renamed = [], {}
    for name, tensor in tensors.items():
        new = name
        if new.startswith("model."):
            new = new.removeprefix("model.")
        if new.startswith("layers.0."):
            new = "midlayer." + new.removeprefix("layers.0.")
        renamed[new] = tensor
    if any(name.startswith("model.") for name in tensors):
        findings.append(_error("tensors begin with 'model.', which engines skip; drop the prefix"))
    if any(name.startswith("layers.0.") for name in tensors):
        findings.append(
            _warning("the layer is called 'layers.0'; older SGLang knows 'midlayer' only")
        )
    return renamed, findings


def _config_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("architectures") != [ARCHITECTURE]:
        yield _error(f"architectures is {config.get('architectures')}, engines want {ARCHITECTURE}")
    for name in _SIZES:
        if not isinstance(config.get(name), int):
            says = "SGLang reads it without a default" if name == "draft_vocab_size" else "missing"
            yield _error(f"{name} is {config.get(name)!r}: {says}; write it")
    yield from _layer_id_findings(config)
    if "norm_before_residual" not in config:
        yield _warning("norm_before_residual is not said; readers' defaults differ, write false")
    if config.get("tie_word_embeddings") is not False:
        yield _error("tie_word_embeddings is not false: the draft's head would be overwritten")
    if config.get("num_hidden_layers") != 1:
        yield _error(f"num_hidden_layers is {config.get('num_hidden_layers')}, a draft has 1")
    if "target_hidden_size" not in config:
        yield _warning("target_hidden_size is missing; write the target's hidden size")
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 2048:
        yield _warning(
            f"max_position_embeddings is {positions}: vLLM fails on longer prompts; write the "
            "target's, unless that is what it is"
        )
    if "rope_parameters" not in config and "rope_theta" not in config:
        yield _error("no RoPE is said (rope_parameters, rope_theta): engines assume 10000")
    elif "rope_parameters" not in config or "rope_theta" not in config:
        yield _warning(
            "RoPE is said in one form only; transformers 4 reads rope_theta and rope_scaling, "
            "transformers 5 rope_parameters (vllm#38111, Automodel#2920)"
        )
    elif config["rope_parameters"].get("rope_theta") != config["rope_theta"]:
        yield _error(
            f"rope_theta is {config['rope_theta']} in one place and "
            f"{config['rope_parameters'].get('rope_theta')} in rope_parameters"
        )


def _layer_id_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    vllm = config.get("eagle_aux_hidden_state_layer_ids")
    sglang = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if vllm is None:
        yield _warning("vLLM finds no eagle_aux_hidden_state_layer_ids and takes its own default")
    if sglang is None:
        yield _warning("SGLang finds no eagle_config.eagle_aux_hidden_state_layer_ids; the same")
    if vllm is not None and sglang is not None and list(vllm) != [layer + 1 for layer in sglang]:
        yield _error(
            f"aux layers disagree: vLLM reads {vllm} at the top level as indices of hidden_states, "
            f"SGLang reads {sglang} and adds 1; the first must be the second plus 1 (sglang#25454)"
        )


def _key_findings(tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    for name in sorted(_REQUIRED - set(tensors)):
        silent = "; vLLM takes ones in its place, silently" if "hidden_norm" in name else ""
        yield _error(f"tensor {name} is missing{silent}")
    for name in sorted(set(tensors) - _REQUIRED - _OPTIONAL):
        yield _error(f"tensor {name} is unknown: SGLang skips it silently, vLLM fails")


def _shape_findings(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "fc.weight": (hidden, 3 * config.get("target_hidden_size", hidden)),
        "norm.weight": (hidden,),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
        "embed_tokens.weight": (config["vocab_size"], hidden),
        "d2t": (config["draft_vocab_size"],),
        "t2d": (config["vocab_size"],),
        "midlayer.self_attn.q_proj.weight": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, queries),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
    }
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape)
            yield _error(f"tensor {name} has shape {got}, the config says {shape}")


def _vocabulary_findings(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[Finding]:
    size, vocab = config["draft_vocab_size"], config["vocab_size"]
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if d2t is None:
        if size != vocab:
            yield _error(
                f"d2t is missing and the draft vocab has {size} of {vocab} tokens: "
                "acceptance will be about 0, with no message"
            )
        return
    if d2t.dtype != torch.int64:
        yield _error(f"d2t is {d2t.dtype}, engines want int64")
    if d2t.numel() != size:
        return  # said with the shapes
    target_ids = d2t.long() + torch.arange(size)
    if int(target_ids.min()) < 0 or int(target_ids.max()) >= vocab:
        hint = ""
        if bool((d2t[1:] > d2t[:-1]).all()) and int(d2t.max()) < vocab:
            hint = "; it looks like target ids, engines want target id minus draft id"
        yield _error(f"d2t leads outside the target's vocabulary of {vocab}{hint}")
        return
    if target_ids.unique().numel() != size:
        yield _error("d2t maps two draft ids to one target id")
    if t2d is None:
        yield _warning("t2d is missing; some readers want it")
    elif t2d.numel() == vocab:
        known = torch.zeros(vocab, dtype=torch.bool)
        known[target_ids] = True
        if differ := int((known != t2d.bool()).sum()):
            yield _error(f"d2t and t2d disagree about {differ} target tokens")


def _weight_findings(tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    dtypes = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) > 1:
        yield _warning(f"weights have several dtypes: {', '.join(sorted(dtypes))}")
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not bool(tensor.isfinite().all()):
            yield _error(f"tensor {name} has values that are not finite")
        elif not bool(tensor.any()):
            yield _error(f"tensor {name} is all zeros")
        elif "norm" in name and bool((tensor == 1).all()):
            yield _warning(f"tensor {name} is all ones: untrained, or lost on the way")
