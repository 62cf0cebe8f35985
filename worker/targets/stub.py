"""A target for tests: stated sizes and speed, outputs that a test can work out, faults."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from worker.targets.contract import (
    Needs,
    TargetBatch,
    TargetOutputs,
    choose_aux_layer_ids,
    colocated_batch,
)


@dataclass(frozen=True)
class StubConfig:
    """As much of a Llama config as a draft is built from."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    intermediate_size: int = 32
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_act: str = "silu"
    model_type: str = "llama"

    def to_dict(self) -> dict[str, Any]:
        """As a Hugging Face config has it."""
        return asdict(self)


class StubTarget:
    """Deterministic and without a model: what it gives for a token depends on that token only.

    Layer l's hidden state of token id v is ``states[l, v]`` (float, seeded; of layer -1, the
    embeddings, that of layer 0), the last hidden state ``states[-1, v]``, the logits
    that times ``lm_head`` [V, H]; so a test can say what is right without running anything.
    ``delay_s`` and ``s_per_token`` make it slow; ``failures`` are raised by the calls of those
    numbers, counted from 0. ``calls`` counts forwards.
    """

    def __init__(
        self,
        *,
        name: str = "stub",
        vocab_size: int = 64,
        hidden_size: int = 16,
        num_hidden_layers: int = 8,
        aux_layer_ids: Iterable[int] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        delay_s: float = 0.0,
        s_per_token: float = 0.0,
        failures: dict[int, Exception] | None = None,
        tokenizer: str = "",
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.model = SimpleNamespace(config=StubConfig(vocab_size, hidden_size, num_hidden_layers))
        requested = None if aux_layer_ids is None else tuple(aux_layer_ids)
        self.aux_layer_ids = choose_aux_layer_ids(requested, num_hidden_layers)
        self.batchable = True
        self.encodings = ("probs", "hidden", "topk")
        self.layers: tuple[int, ...] = ()
        self.engine = "stub"
        self.vocab_size = vocab_size
        self.dtype = dtype
        draw = torch.Generator().manual_seed(seed)
        #: [layers, V, H]
        self.states = torch.randn(num_hidden_layers, vocab_size, hidden_size, generator=draw).to(
            dtype
        )
        #: [V, H]
        self.lm_head = torch.randn(vocab_size, hidden_size, generator=draw).to(dtype)
        sizes = f"{vocab_size} {hidden_size} {num_hidden_layers} {dtype} {seed}"
        self.fingerprint = "stub" + hashlib.blake2b(sizes.encode(), digest_size=8).hexdigest()
        self.delay_s = delay_s
        self.s_per_token = s_per_token
        self.failures = dict(failures or {})
        self.calls = 0

    def get_input_embeddings(self) -> SimpleNamespace:
        """``weight`` [V, H]: the states of layer 0."""
        return SimpleNamespace(weight=self.states[0])

    def get_output_embeddings(self) -> SimpleNamespace:
        """``weight`` [V, H]."""
        return SimpleNamespace(weight=self.lm_head, bias=None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor | None = None,
        needs: Needs | None = None,
    ) -> TargetOutputs:
        """Look the states up. Raises the failure that this call was given, if any."""
        call, self.calls = self.calls, self.calls + 1
        pause_s = self.delay_s + self.s_per_token * input_ids.numel()
        if pause_s:
            time.sleep(pause_s)
        if call in self.failures:
            raise self.failures[call]
        ids = input_ids.to(torch.int64)
        needs = needs or Needs(self.aux_layer_ids, last=True, logits=True)
        states = [self.states[max(0, layer)][ids] for layer in needs.layers]
        last = self.states[-1][ids]
        return TargetOutputs(
            torch.cat(states, dim=-1) if states else last[..., :0],
            last @ self.lm_head.T if needs.logits else None,
            last,
        )

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> TargetBatch:
        """The co-located contract."""
        outputs = self.forward(input_ids, attention_mask, loss_mask)
        return colocated_batch(outputs, input_ids, attention_mask, loss_mask)

    def close(self) -> None:
        """Nothing to let go of."""

    def __repr__(self) -> str:
        return f"<StubTarget {self.name} V={self.vocab_size} calls={self.calls}>"
