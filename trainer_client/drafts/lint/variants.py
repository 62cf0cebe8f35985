"""What is wrong with the switches that change the network, and which engine knows them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from trainer_client.drafts.lint.findings import Finding, error, warning

_BIASES = tuple(f"self_attn.{each}_proj.bias" for each in "qkvo")
_IDS = "eagle_aux_hidden_state_layer_ids"


def said(config: Mapping[str, Any], name: str) -> Any:
    """A switch, which engines read from ``eagle_config`` first, then from the top level."""
    inside = config.get("eagle_config") or {}
    return inside.get(name, config.get(name))


def aux_count(config: Mapping[str, Any]) -> int:
    """How many aux states engines feed: both look here, in this order, and end at 3."""
    number = config.get("num_aux_hidden_states")
    ids = (config.get("eagle_config") or {}).get(_IDS)
    return number if isinstance(number, int) and number > 0 else len(ids or ()) or 3


def optional_names(config: Mapping[str, Any], layers: int) -> set[str]:
    """Tensors that the switches of a config call for."""
    names = set()
    if config.get("fc_norm"):
        names |= {f"fc_norm.{at}.weight" for at in range(aux_count(config))}
    if said(config, "norm_before_fc"):
        names.add("input_norm.weight")
    if config.get("attention_bias"):
        names |= {f"midlayer.{bias}" for bias in _BIASES[:3]}
        names |= {f"layers.{at}.{bias}" for at in range(1, layers) for bias in _BIASES[:3]}
    return names


def variant_findings(config: Mapping[str, Any], names: Collection[str]) -> Iterator[Finding]:
    """The switches of a well-typed config against the canonical names of the tensors."""
    yield from _norm_findings(config, names)
    yield from _aux_findings(config)
    biased = [name for name in names if name.endswith("_proj.bias")]
    if config.get("attention_bias") and not biased:
        yield error(
            "attention_bias is true and no bias is among the tensors: engines keep what they "
            "started with; write the biases, or false"
        )
    elif biased and not config.get("attention_bias"):
        yield error(
            f"tensor {biased[0]} is there and attention_bias is not true: vLLM fails, SGLang "
            "skips it silently; write attention_bias true"
        )
    elif biased:
        yield warning("attention_bias is true: vLLM obeys it, SGLang's draft has no biases")


def _norm_findings(config: Mapping[str, Any], names: Collection[str]) -> Iterator[Finding]:
    per_layer = sorted(name for name in names if name.startswith("fc_norm."))
    wanted = [f"fc_norm.{at}.weight" for at in range(aux_count(config))]
    if config.get("fc_norm"):
        for name in wanted:
            if name not in names:
                yield error(
                    f"fc_norm is true and tensor {name} is missing: engines take ones in its "
                    "place, silently; write it, or fc_norm false"
                )
    elif per_layer:
        yield error(
            f"tensor {per_layer[0]} is there and fc_norm is not true: vLLM fails, SGLang skips it "
            "silently; write fc_norm true"
        )
    before = said(config, "norm_before_fc")
    if before and "input_norm.weight" not in names:
        yield error(
            "norm_before_fc is true and tensor input_norm.weight is missing: engines take ones in "
            "its place, silently; write it, or norm_before_fc false"
        )
    if not before and "input_norm.weight" in names:
        yield error(
            "tensor input_norm.weight is there and norm_before_fc is not true: vLLM fails, SGLang "
            "skips it silently; write norm_before_fc true"
        )
    if before and config.get("fc_norm"):
        yield error("fc_norm and norm_before_fc are both true; a draft has one of them")
    alone = "" if before or config.get("fc_norm") else ", and neither fc_norm nor norm_before_fc"
    if config.get("norm_output") and (alone or config.get("trained_with") != "draftmq"):
        yield warning(
            f"norm_output is true{alone}: engines feed the normed state to the next depth, and no "
            "tensor tells whether the draft was trained so; SpecForge up to 0.3.0 gave this name "
            "another meaning; compare the acceptance with norm_output false"
        )
    if config.get("norm_before_residual"):
        yield error(
            "norm_before_residual is true: vLLM obeys it, SGLang never reads it and computes "
            "another network, silently; serve this draft with vLLM, or train with false"
        )


def _aux_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    inside = config.get("eagle_config") or {}
    if any(each.get("use_aux_hidden_state") is False for each in (config, inside)):
        yield error(
            "use_aux_hidden_state is false: engines feed the last hidden state in place of the "
            "aux layers, silently; write true, unless the draft was trained so"
        )
    ids = inside.get(_IDS) or config.get(_IDS)
    if ids and len(ids) != aux_count(config):
        yield error(
            f"engines feed {aux_count(config)} aux states (num_aux_hidden_states "
            f"{config.get('num_aux_hidden_states')}, else the layers of eagle_config, else 3), and "
            f"{len(ids)} aux layers are named; write num_aux_hidden_states {len(ids)}"
        )
    if aux_count(config) == 1:
        yield error("there is one aux layer: SGLang then leaves fc out; train with more layers")
