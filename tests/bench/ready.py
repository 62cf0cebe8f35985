"""A target whose supervision stands ready, for ``--target-factory tests.bench.ready:ready``.

Random tensors stand for what a large target and a projection on its accelerator give, so that what
is measured is the way to the trainer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import worker.answers
from worker.supervision.topk import TOP_K
from worker.targets.stub import StubConfig, StubTarget

TOKENS = 2048
HIDDEN_SIZE = 4096
DRAFT_VOCAB = 32000


class Ready(StubTarget):
    """With the sizes above, bfloat16; its vocabulary is the draft's."""

    def __init__(self) -> None:
        super().__init__(name="ready", vocab_size=DRAFT_VOCAB, hidden_size=2, dtype=torch.bfloat16)
        config = StubConfig(DRAFT_VOCAB, HIDDEN_SIZE, 8, max_position_embeddings=TOKENS)
        self.model = SimpleNamespace(config=config)
        self._head = torch.randn(DRAFT_VOCAB, HIDDEN_SIZE, dtype=torch.bfloat16)

    def get_output_embeddings(self) -> SimpleNamespace:
        """``weight`` [V, H]."""
        return SimpleNamespace(weight=self._head, bias=None)


def ready() -> Ready:
    """The target; from then on this process computes no supervision, but has it."""
    target = Ready()
    common = {
        "aux_hidden_states": torch.randn(1, TOKENS, 3 * HIDDEN_SIZE, dtype=torch.bfloat16),
        "position_mask": torch.ones(1, TOKENS, 1, dtype=torch.bool),
        "input_ids": torch.zeros(1, TOKENS, dtype=torch.int64),
        "loss_mask": torch.ones(1, TOKENS, dtype=torch.int64),
    }
    special = {
        "probs": {"target_probs": torch.rand(1, TOKENS, DRAFT_VOCAB)},
        "hidden": {"last_hidden_state": torch.randn(1, TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16)},
        "topk": {
            "topk_log_probs": torch.randn(1, TOKENS, TOP_K),
            "topk_ids": torch.randint(DRAFT_VOCAB, (1, TOKENS, TOP_K), dtype=torch.int16),
            "rest_mass": torch.rand(1, TOKENS, 1),
        },
    }

    def supervision(*_: Any, encoding: str, **__: Any) -> dict[str, Tensor]:
        return common | special[encoding]

    worker.answers.compute = supervision
    return target
