"""What is wrong in ``config.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer_client.drafts.export import ARCHITECTURE
from trainer_client.drafts.lint.findings import Finding, error, warning
from trainer_client.eagle3.config import rope_parameters

SIZES = (
    "vocab_size",
    "draft_vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "eagle_config": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "rope_theta": (int, float),
    "target_hidden_size": int,
    "num_aux_hidden_states": int,
    "num_hidden_layers": int,
    "head_dim": int,
    _LAYER_IDS: list,
}


def config_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """All that can be said without the tensors."""
    yield from _type_findings(config)
    config = well_typed(config)
    yield from _size_findings(config)
    yield from _layer_id_findings(config)
    yield from _network_findings(config)
    yield from _rope_findings(config)


def sizes_are_said(config: Mapping[str, Any]) -> bool:
    """Whether shapes can be compared with the config at all."""
    return all(_is_size(config.get(name)) for name in SIZES)


def well_typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what has a wrong type."""
    return {name: value for name, value in config.items() if _has_type(name, value)}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _has_type(name: str, value: Any) -> bool:
    """What is null is as good as not said."""
    if name in _TYPES and not isinstance(value, _TYPES[name]):
        return False
    if name == "eagle_config":
        value = value.get(_LAYER_IDS, [])
        return isinstance(value, list) and _has_type(_LAYER_IDS, value)
    return name != _LAYER_IDS or all(isinstance(layer, int) for layer in value)


def _type_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    for name, value in config.items():
        if value is not None and not _has_type(name, value):
            yield error(f"{name} is {value!r}, which no engine understands; write it anew")


def _size_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("architectures") == ["Eagle3LlamaForCausalLM"]:
        yield warning(f"architectures is Eagle3LlamaForCausalLM, vLLM's name; write {ARCHITECTURE}")
    elif config.get("architectures") != [ARCHITECTURE]:
        yield error(f"architectures is {config.get('architectures')}, engines want {ARCHITECTURE}")
    if config.get("model_type") != "llama":
        yield error(f"model_type is {config.get('model_type')!r}; transformers wants 'llama'")
    for name in SIZES:
        if not _is_size(config.get(name)):
            says = "SGLang reads it without a default" if name == "draft_vocab_size" else "missing"
            yield error(f"{name} is {config.get(name)!r}: {says}; write it")
    positions = config.get("max_position_embeddings")
    if not _is_size(positions):
        yield error(f"max_position_embeddings is {positions!r}; write the target's")
    elif positions == 2048:
        yield warning(
            "max_position_embeddings is 2048, Llama's default: vLLM fails on longer prompts; "
            "write the target's, unless that is what it is"
        )


def _network_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    if "norm_before_residual" not in config:
        yield warning("norm_before_residual is not said; readers' defaults differ, write false")
    if config.get("tie_word_embeddings"):
        yield error(
            "tie_word_embeddings is not false: the draft's head would be its embeddings; write "
            "false"
        )
    elif "tie_word_embeddings" not in config:
        yield warning("tie_word_embeddings is not said; write false")
    layers = config.get("num_hidden_layers")
    if not _is_size(layers):
        yield error(f"num_hidden_layers is {layers!r}; write 1")
    elif layers != 1:
        yield warning(
            f"num_hidden_layers is {layers}: vLLM norms what enters a later layer by its "
            "input_layernorm, SGLang by its hidden_norm; such a draft fits one of them"
        )
    if config.get("hidden_act", "silu") != "silu":
        yield error(f"hidden_act is {config['hidden_act']!r}; vLLM's draft knows silu only")
    if "target_hidden_size" not in config:
        yield warning("target_hidden_size is missing; write the target's hidden size")


def _layer_id_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    name = _LAYER_IDS
    vllm, sglang = config.get(name), config.get("eagle_config", {}).get(name)
    if sglang is None:
        yield warning(f"SGLang finds no eagle_config.{name} and takes its own default")
    if vllm is None and sglang is None:
        yield warning(f"vLLM finds no {name} and takes its own default")
    elif vllm is None:
        yield error(
            f"vLLM finds no {name} at the top level and takes {sglang} of eagle_config as indices "
            "of hidden_states, one layer too low; write each of them plus 1 at the top level"
        )
    elif sglang is not None and vllm != [layer + 1 for layer in sglang]:
        yield error(
            f"aux layers disagree: vLLM reads {vllm} at the top level as indices of hidden_states, "
            f"SGLang reads {sglang} and adds 1; the first must be the second plus 1 (sglang#25454)"
        )
    for ids, lowest in ((vllm, 1), (sglang, 0)):
        if ids is not None and (not ids or len(set(ids)) != len(ids) or min(ids) < lowest):
            yield error(f"aux layers {ids} are not distinct layers; write the trained ones")
        elif ids is not None and ids != sorted(ids):
            yield error(
                f"aux layers {ids} do not ascend: engines sort them, and read another network than "
                "was trained; train with them in order"
            )


def _rope_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    new, theta = config.get("rope_parameters"), config.get("rope_theta")
    if new is None and theta is None:
        yield error("no RoPE is said (rope_parameters, rope_theta): engines assume 10000")
        return
    if new is None or theta is None:
        yield warning(
            "the config has RoPE in one form only; transformers 4 reads rope_theta and "
            "rope_scaling, transformers 5 rope_parameters (vllm#38111, Automodel#2920)"
        )
        return
    if new.get("rope_theta") != theta:
        yield error(
            f"rope_theta is {theta} in one place and {new.get('rope_theta')} in rope_parameters"
        )
        return
    old = {"rope_theta": theta, "rope_scaling": config.get("rope_scaling")}
    one, other = (
        {k: v for k, v in rope_parameters(form).items() if k != "rope_theta"}
        for form in (old, {"rope_parameters": new})
    )
    if one != other:
        yield error(
            f"RoPE scaling is {one} in rope_scaling (transformers 4) and {other} in "
            "rope_parameters (transformers 5); say the same in both"
        )
