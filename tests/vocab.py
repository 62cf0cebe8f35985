"""Draft vocabularies as trainers make them: their ids come in any order."""

from __future__ import annotations

import torch
from torch import Tensor


def shuffled(ids: Tensor, seed: int = 0) -> Tensor:
    """The same ids [D] in another order, which is the same for the same seed."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return ids[order]
