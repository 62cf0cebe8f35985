"""Documents that follow one another in one row [1, N]: where each slot is, and what is next to it.

``lengths`` are the tokens of each document, and add up to N; of rows [B, T] they are empty. What is
made of packed documents is what each has alone: none attends to another, and positions restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.targets.contract import shift_left


def positions(like: Tensor, lengths: Sequence[int]) -> Tensor:
    """How far each slot of ``like`` [B, T] is from the beginning of its document; int64 [B, T]."""
    each = [torch.arange(n, device=like.device) for n in lengths or like.shape[1:]]
    return torch.cat(each).expand(like.shape)


def shifted(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B, T, ...] moved left by one, with zeros at the end of each document."""
    if not lengths:
        return shift_left(tensor)
    return torch.cat([shift_left(each) for each in tensor.split(list(lengths), dim=1)], dim=1)
