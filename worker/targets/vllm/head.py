"""The ends of a model without its middle: embeddings, some lower layers, the final norm, the head.

An engine gives states as they are between layers. What the head multiplies is behind the final
norm, which differs by family (Gemma's adds one, others are LayerNorms, some scale or cap): so the
model's own modules are loaded by transformers, and its forward says whether they are all there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worker.errors import TargetError
from worker.targets.contract import Needs
from worker.targets.huggingface import HuggingFaceTarget, decoder_layers
from worker.targets.lowest import load_lowest


class Ends:
    """``lower`` is the model with its lowest layers only, ``norm`` its final norm.

    Raises :class:`TargetError` where the head's input is not the norm of the last layer's output.
    """

    def __init__(self, lower: HuggingFaceTarget, name: str) -> None:
        self.lower = lower
        if self.lower.hidden_refused:
            raise TargetError(
                f"target {name!r} cannot be served from an engine's states: "
                f"{self.lower.hidden_refused}; serve it with --target {name}"
            )
        self.norm = self._final_norm(name)
        self.head: Any = self.lower.get_output_embeddings()

    def _final_norm(self, name: str) -> nn.Module:
        """The module that makes of the last layer's output what enters the head."""
        seen: list[tuple[nn.Module, Any, Any]] = []
        handles = [
            module.register_forward_hook(lambda m, args, out: seen.append((m, args, out)))
            for module in self.lower.model.modules()
            if not list(module.children())
        ]
        last = len(decoder_layers(self.lower.model)) - 1
        ids = torch.arange(8).unsqueeze(0)
        try:
            made = self.lower.forward(
                ids, torch.ones_like(ids), needs=Needs((last,), last=True, logits=False)
            )
        finally:
            for handle in handles:
                handle.remove()
        head_input = made.last_hidden_state
        assert head_input is not None  # it was needed
        for module, args, out in reversed(seen):
            if args and _equal(out, head_input) and _equal(args[0], made.aux_hidden_states):
                return module
        raise TargetError(
            f"target {name!r} has no final norm between its last layer and its head that could be "
            f"applied to an engine's states; serve it with --target {name}"
        )


def _equal(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)


def load_ends(
    where: str, name: str, dtype: Any, device: str, options: Mapping[str, Any], config: Any
) -> Ends:
    """Load them from a checkpoint. Raises :class:`TargetError` in one sentence."""
    return Ends(load_lowest(where, name, dtype, options, config, device), name)
