"""What is wrong with a draft's tensors, alone or against ``config.json``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer_client.drafts.lint.findings import Finding, error, warning
from trainer_client.drafts.lint.variants import aux_count, optional_names

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
#: The largest singular value of fresh random numbers, over what theory says of their size and
#: spread, is 0.95 to 1.0; of a matrix after a minute of training it is 1.9 or more.
_RANDOM = 1.15
_NEVER_TRAINED = 1.02


def name_findings(tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Names as they stand in the file."""
    if any(name.startswith("model.") for name in tensors):
        yield error("tensors begin with 'model.', which engines skip; drop the prefix")
    if any(name.startswith("layers.0.") for name in tensors):
        yield warning("the layer is called 'layers.0'; older SGLang knows 'midlayer' only")


def key_findings(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Exactly the tensors that engines know, by their canonical names."""
    layers = config.get("num_hidden_layers") or 1
    optional = _OPTIONAL | optional_names(config, layers)
    optional |= {f"layers.{at}.{name}" for at in range(1, min(layers, 64)) for name in _LAYER}
    # the switches' own findings have said what they miss, or have without being on
    switched = ("fc_norm.", "input_norm.")
    for name in sorted(_REQUIRED - set(tensors)):
        silent = ""
        if "hidden_norm" in name:
            silent = "; vLLM takes ones in its place, silently"
        elif name == "lm_head.weight":
            silent = "; vLLM takes the target's head in its place"
        yield error(f"tensor {name} is missing{silent}")
    for name in sorted(set(tensors) - _REQUIRED - optional):
        if name.startswith(switched) or name.endswith("_proj.bias"):
            continue
        yield error(f"tensor {name} is unknown: SGLang skips it silently, vLLM fails")


def shape_findings(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Shapes against a config that says all sizes."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = dict.fromkeys((name for name in _REQUIRED if "norm" in name), (hidden,)) | {
        "fc.weight": (hidden, aux_count(config) * (config.get("target_hidden_size") or hidden)),
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
    for name, shape in sorted(shapes.items()):
        if name in tensors and tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape)
            yield error(f"tensor {name} has shape {got}, the config says {shape}")


def vocabulary_findings(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[Finding]:
    """``d2t`` [D] and ``t2d`` [V] against each other and the config."""
    size, vocab = config["draft_vocab_size"], config["vocab_size"]
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if d2t is None:
        if size != vocab:
            yield error(
                f"d2t is missing and the draft vocab has {size} of {vocab} tokens: "
                "acceptance will be about 0, with no message"
            )
        return
    if d2t.dtype != torch.int64:
        yield error(f"d2t is {d2t.dtype}, engines want int64")
    if tuple(d2t.shape) != (size,) or (t2d is not None and tuple(t2d.shape) != (vocab,)):
        return  # said with the shapes
    if size == vocab and not d2t.any():
        yield warning("d2t is there and the draft vocab is the target's; leave it out")
    if t2d is None:
        yield warning("t2d is missing; speculators wants it")
    d2t = d2t.long()
    known = None if t2d is None else t2d.bool().nonzero().flatten()
    target_ids = d2t + torch.arange(size)
    if known is not None and torch.equal(target_ids.sort().values, known):
        return
    if _are_target_ids(d2t, known, vocab):
        yield error(
            "d2t looks like target ids, engines want offsets: target id minus draft id (else "
            "acceptance is about 0, with no message)"
        )
    elif int(target_ids.min()) < 0 or int(target_ids.max()) >= vocab:
        yield error(f"d2t leads outside the target's vocabulary of {vocab}")
    elif target_ids.unique().numel() != size:
        yield error("d2t maps two draft ids to one target id")
    elif t2d is not None:
        said = torch.zeros(vocab, dtype=torch.bool)
        said[target_ids] = True
        if differ := int((said != t2d.bool()).sum()):
            yield error(f"d2t and t2d disagree about {differ} target tokens")


def _are_target_ids(d2t: Tensor, known: Tensor | None, vocab: int) -> bool:
    """Whether these int64 [D] are the ids themselves, in any order, and not offsets.

    Without ``t2d`` (``known`` None), distinct values of the vocabulary that are no valid offsets,
    or that rise strictly, are taken for ids: offsets of ascending ids stand still somewhere, but
    for drafts that skip a token at each step.
    """
    if known is not None:
        return torch.equal(d2t.sort().values, known)
    distinct = d2t.unique().numel() == d2t.numel()
    if not distinct or int(d2t.min()) < 0 or int(d2t.max()) >= vocab:
        return False
    target_ids = d2t + torch.arange(d2t.numel())
    fits = int(target_ids.max()) < vocab and target_ids.unique().numel() == d2t.numel()
    return not fits or bool((d2t[1:] > d2t[:-1]).all())


def weight_findings(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Values and dtypes."""
    floats = {name: t for name, t in sorted(tensors.items()) if t.is_floating_point()}
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in floats.values()})
    said = config.get("dtype") or config.get("torch_dtype")
    if len(dtypes) > 1:
        yield warning(f"weights have several dtypes: {', '.join(dtypes)}")
    elif dtypes and said != dtypes[0]:
        yield warning(f"weights are {dtypes[0]}, the config says {said} (torch_dtype)")
    broken = _not_finite(floats)
    yield from map(_is_not_finite, broken)
    random = _random_names(floats, broken)
    for name, tensor in floats.items():
        if name in broken:
            continue
        if not bool(tensor.any()):
            yield error(f"tensor {name} is all zeros")
        elif "norm" in name and bool((tensor == 1).all()):
            yield warning(f"tensor {name} is all ones: untrained, or lost on the way")
        elif name in random:
            yield warning(
                f"tensor {name} looks like fresh random numbers: untrained, or lost on the way "
                "(sglang#27908)"
            )


def finite_findings(tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Values that are no numbers."""
    return map(_is_not_finite, _not_finite(tensors))


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, tensor in sorted(tensors.items())
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all())
    ]


def _is_not_finite(name: str) -> Finding:
    return error(f"tensor {name} has values that are not finite")


def _random_names(floats: Mapping[str, Tensor], broken: Collection[str]) -> set[str]:
    """Matrices that were never trained, or were lost on the way.

    A short training leaves most matrices as random as they were, and moves every norm. So a matrix
    is called untrained where no norm has moved, or where most others are past randomness.
    """
    spreads = {
        name: _spread(tensor)
        for name, tensor in floats.items()
        if tensor.ndim == 2 and "embed" not in name and name not in broken
    }
    fresh = all(bool((tensor == 1).all()) for name, tensor in floats.items() if "norm" in name)
    trained = [spread for spread in spreads.values() if spread >= _RANDOM]
    if not fresh and 2 * len(trained) < len(spreads):
        return set()
    limit = _RANDOM if fresh else _NEVER_TRAINED
    return {name for name, spread in spreads.items() if spread < limit}


def _spread(matrix: Tensor) -> float:
    """Largest singular value, over that of random numbers of this size and spread (Bai-Yin)."""
    matrix = matrix.float()
    rows, columns = matrix.shape
    vector = torch.ones(columns).index_fill_(0, torch.arange(0, columns, 2), -0.5)
    for _ in range(20):  # power iteration
        vector = torch.nn.functional.normalize(matrix.T @ (matrix @ vector), dim=0)
    chance = matrix.square().mean().sqrt() * (rows**0.5 + columns**0.5)
    return float((matrix @ vector).norm() / chance)
