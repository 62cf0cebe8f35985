"""A model with its lowest layers only, on one device: what states of others are compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from worker.targets.contract import text_config
from worker.targets.huggingface import HuggingFaceTarget, decoder_layers

#: Layers that are loaded: enough for states to compare an engine's, or the ranks', with.
LOWEST_LAYERS = 3


def load_lowest(
    where: str,
    name: str,
    dtype: Any,
    options: Mapping[str, Any],
    config: Any,
    device: str = "cpu",
) -> HuggingFaceTarget:
    """Load embeddings, lowest layers, final norm and head from a checkpoint; tensors of the layers
    above are left where they are. Each layer that is loaded is an aux layer.

    Raises :class:`TargetError` in one sentence.
    """
    from worker.targets import load_model

    config = copy.deepcopy(config)
    inner = text_config(config)
    layers = min(LOWEST_LAYERS, inner.num_hidden_layers)
    inner.num_hidden_layers = layers
    for field in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if isinstance(of_layers := getattr(inner, field, None), list):
            setattr(inner, field, of_layers[:layers])
    model = load_model(name, where, dtype, options, config).to(device)
    every = tuple(range(len(decoder_layers(model))))
    return HuggingFaceTarget(model, name=name, aux_layer_ids=every)
