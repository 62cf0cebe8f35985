"""NeMo AutoModel's wrappers of targets, for ``draftmq worker --target-factory``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel
from nemo_automodel.components.speculative.eagle.target_runner import RunnerEagle3TargetModel
from torch import Tensor
from transformers import AutoModelForCausalLM


def hugging_face(
    path: str, dtype: str = "float32", aux_layer_ids: Sequence[int] | None = None
) -> HFEagle3TargetModel:
    """NeMo's wrapper of a model of transformers'."""
    return HFEagle3TargetModel(_model(path, dtype), aux_layer_ids=aux_layer_ids)


def engine(
    path: str, dtype: str = "float32", aux_layer_ids: Sequence[int] | None = None
) -> RunnerEagle3TargetModel:
    """NeMo's wrapper of SGLang's and vLLM's engines, over an engine that runs on a CPU."""
    return RunnerEagle3TargetModel(Runner(_model(path, dtype)), aux_layer_ids)


class Runner:
    """What NeMo asks of an engine (its ``TargetRunner``), by transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layers: list[int] = []

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        self._layers = list(aux_layer_ids)

    def forward_eagle3(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and states [B, T, 3H], both not shifted."""
        made = self.model(input_ids, attention_mask, output_hidden_states=True, use_cache=False)
        states = [made.hidden_states[layer + 1] for layer in self._layers]
        return made.logits, torch.cat(states, dim=-1)

    def input_embedding_weight(self) -> Tensor:
        return self.model.get_input_embeddings().weight


def _model(path: str, dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)
