"""The draft vocabulary: which of the target's tokens a draft can emit."""

from __future__ import annotations

import torch
from torch import Tensor

from broker.protocol import mapping_id


class VocabMapping:
    """A selection of D distinct target token ids out of V, named by its content.

    ``selected_token_ids`` is an integer tensor [D]. Draft id d is the target's
    ``selected_token_ids[d]``, in whatever order they come: NeMo AutoModel puts special tokens first
    and the others by frequency. The order is part of the content. Raises ``ValueError`` when ids
    are not distinct or not within ``0 <= id < vocab_size``.
    """

    def __init__(self, selected_token_ids: Tensor, vocab_size: int) -> None:
        ids = selected_token_ids.detach().cpu()
        _check(ids, vocab_size)
        #: int64 [D], on the CPU
        self.selected_token_ids = ids.to(torch.int64).contiguous().clone()
        self.vocab_size = vocab_size
        #: bool [V], on the CPU
        self.selected_token_mask = torch.zeros(vocab_size, dtype=torch.bool)
        self.selected_token_mask[self.selected_token_ids] = True
        #: equal exactly when the content is equal, in every process
        self.id = mapping_id(vocab_size, [self.selected_token_ids.numpy().astype("<i8").data])
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_mask_and_ids(cls, ids: Tensor, mask: Tensor) -> VocabMapping:
        """From ids [D] and mask bool [V]. Raises ``ValueError`` if they do not say the same."""
        if mask.ndim != 1:
            raise ValueError(f"selected_token_mask must have one dimension, got {_shape(mask)}")
        mapping = cls(ids, mask.numel())
        differs = (mapping.selected_token_mask != mask.detach().cpu().bool()).nonzero()
        if len(differs):
            token = int(differs[0])
            said = "selects it" if bool(mask[token]) else "does not"
            other = "do not" if bool(mask[token]) else "do"
            raise ValueError(
                f"selected_token_mask and selected_token_ids differ at {len(differs)} of "
                f"{mask.numel()} tokens: of token {token} the mask {said}, the ids {other}"
            )
        return mapping

    @property
    def draft_vocab_size(self) -> int:
        """D."""
        return self.selected_token_ids.numel()

    @property
    def d2t(self) -> Tensor:
        """int64 [D], offset form: target id minus draft id, as engines load it."""
        return self.selected_token_ids - torch.arange(self.draft_vocab_size)

    @property
    def t2d(self) -> Tensor:
        """bool [V]: the draft knows this target token."""
        return self.selected_token_mask

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(selected_token_ids, selected_token_mask)`` on a device, copied there once."""
        if device not in self._on:
            self._on[device] = (
                self.selected_token_ids.to(device),
                self.selected_token_mask.to(device),
            )
        return self._on[device]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VocabMapping) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<VocabMapping {self.id[:9]} {self.draft_vocab_size} of {self.vocab_size} tokens>"


def _check(ids: Tensor, vocab_size: int) -> None:
    if ids.ndim != 1:
        raise ValueError(f"selected_token_ids must have one dimension, got {_shape(ids)}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"selected_token_ids must be integers, got {ids.dtype}")
    if not ids.numel():
        raise ValueError("selected_token_ids is empty; a draft needs at least one token")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"selected_token_ids has {int(outside[0])}, and the target's vocabulary has "
            f"{vocab_size} tokens (valid: 0 to {vocab_size - 1})"
        )
    values, counts = ids.unique(return_counts=True)
    twice = values[counts > 1].tolist()
    if twice:
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise ValueError(f"selected_token_ids has duplicates: {twice[:5]}{more}")


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
