"""Rows without their padding, and what comes for them as long as it was before.

NeMo AutoModel pads every row to its ``seq_length``. No draft learns from the padding, so it need
not travel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.targets.contract import shift_left

#: What happens to columns that are padding in every row of a batch.
#: ``exact``: they are not sent back; the target still sees them, so all bits are as they were.
#: ``fast``: the target does not see them either, which may change the last bits of the rest.
#: ``off``: they are sent back like the others.
TRIMS = ("exact", "fast", "off")


@dataclass(frozen=True)
class Rows:
    """A batch of NeMo's, and how much of it is asked about."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    loss_mask: Tensor  # [B, T]
    #: of the longest row
    length: int
    #: whether the target sees the padding
    padded: bool

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, trim: str) -> Rows:
        """Find the longest row; a column with loss counts as a part of it."""
        total = length = input_ids.shape[-1]
        if trim != "off" and input_ids.ndim == 2:
            used = (attention_mask.bool() | loss_mask.bool()).any(dim=0).nonzero()
            length = int(used[-1]) + 1 if len(used) else total
        return cls(input_ids, attention_mask, loss_mask, length, trim != "fast")

    @property
    def asked(self) -> tuple[Tensor, Tensor, Tensor]:
        """``input_ids, attention_mask, loss_mask`` as the target sees them: [B, T] or [B, L]."""
        end = self.input_ids.shape[-1] if self.padded else self.length
        return self.input_ids[:, :end], self.attention_mask[:, :end], self.loss_mask[:, :end]

    @property
    def slots(self) -> int:
        """How many slots of each row are wanted: L, or 0 for all that the target sees."""
        return self.length if self.padded and self.length < self.input_ids.shape[-1] else 0

    def whole(
        self, aux_hidden_states: Tensor, target_probs: Tensor, position_mask: Tensor
    ) -> dict[str, Tensor]:
        """NeMo's fields for all T columns, on the device of what came for the first L.

        aux_hidden_states [B, L, 3H], target_probs [B, L, D], position_mask [B, L, 1]. Behind them
        the states are 0, no position counts, and the probabilities are equal: a distribution, so
        that no loss makes a NaN of what it then multiplies by 0.
        """
        more = self.input_ids.shape[-1] - self.length
        device = aux_hidden_states.device
        return {
            "aux_hidden_states": _longer(aux_hidden_states, more),
            "target_probs": _longer(target_probs, more, 1.0 / target_probs.shape[-1]),
            "position_mask": _longer(position_mask.bool(), more),
            "input_ids": shift_left(self.input_ids.to(device)),
            "attention_mask": self.attention_mask.to(device),
            "loss_mask": shift_left(self.loss_mask.to(device)),
        }


def probs_of_hidden(last_hidden_state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The target's probabilities [B, L, D] float32, of its last states [B, L, H] and the D rows of
    its head [D, H] for the draft vocabulary.

    The product of D rows is not always summed in the order of the whole head's: on a CPU in float32
    the probabilities are equal to about 1e-6, in bfloat16 to its own precision.
    """
    logits = F.linear(last_hidden_state.to(weight.dtype), weight, bias)
    return torch.softmax(logits.float(), dim=-1)


def _longer(tensor: Tensor, more: int, value: float = 0.0) -> Tensor:
    return F.pad(tensor, (0, 0, 0, more), value=value) if more else tensor
