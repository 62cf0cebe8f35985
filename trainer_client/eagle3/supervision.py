"""The target's distribution over the draft vocabulary, made for few slots at a time.

Whatever the target sends (probabilities, hidden states, the top K, whole logits), a learner asks
for the slots that it works on, so that neither [B, T, V] nor a float32 [B, T, D] is ever made here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_client.batch import LmHeadRows


@dataclass(frozen=True)
class Supervision:
    """What there is to learn from one batch [B, T].

    ``probs`` takes slots of the flattened batch, int64 [n], and gives the target's probabilities
    there, float32 [n, D]; each row adds up to 1.
    """

    known: Tensor  # bool [B, T]: the target's own token is in the draft vocab, and counts
    slots: Tensor  # int64 [n]: those slots, in the flattened batch
    probs: Callable[[Tensor], Tensor]


def of_probs(target_probs: Tensor, known: Tensor) -> Supervision:
    """From probabilities [B, T, D] float32."""
    rows = target_probs.flatten(0, 1)
    return _supervision(known, lambda slots: rows.index_select(0, slots))


def of_logits(target_logits: Tensor, known: Tensor, selected_token_ids: Tensor) -> Supervision:
    """From logits of the whole vocabulary [B, T, V]; the ids are int64 [D]."""
    rows = target_logits.flatten(0, 1)

    def probs(slots: Tensor) -> Tensor:
        selected = rows.index_select(0, slots).index_select(1, selected_token_ids)
        return torch.softmax(selected.float(), dim=-1)

    return _supervision(known, probs)


def of_hidden(last_hidden_state: Tensor, known: Tensor, lm_head: LmHeadRows) -> Supervision:
    """From hidden states [B, T, H]; only the D selected rows of the head are multiplied."""
    rows = last_hidden_state.flatten(0, 1)

    def probs(slots: Tensor) -> Tensor:
        hidden = rows.index_select(0, slots).to(lm_head.weight.dtype)
        return torch.softmax(F.linear(hidden, lm_head.weight, lm_head.bias).float(), dim=-1)

    return _supervision(known, probs)


def _supervision(known: Tensor, probs: Callable[[Tensor], Tensor]) -> Supervision:
    return Supervision(known, known.flatten().nonzero().squeeze(-1), probs)
