"""How far two ways to the same states may be apart: two batches, two engines, two workers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from worker.targets.contract import text_config

#: Relative norm by which states may differ between two ways to the same: rounding, and kernels that
#: add in another order. A quantised target is what its dtype says, and more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
QUANTISED_TOLERANCE = 1e-1
#: Behind the final norm what a large value hid is to be seen: so many times that is allowed there.
BEHIND_THE_NORM = 3
#: Where experts are chosen, a rounding can choose another: then so many tokens must still agree.
EQUAL_ARGMAX = 0.9
#: And so far states may be apart there, of their norm: some tokens through another expert are, and
#: another layer's states are further.
ROUTED_TOLERANCE = 0.3

#: What configs call the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def allowed(dtype: torch.dtype, *, quantised: bool = False) -> float:
    """The relative norm by which states of a target may differ; see :data:`TOLERANCE`."""
    return QUANTISED_TOLERANCE if quantised else TOLERANCE.get(dtype, 2e-2)


def chooses_experts(config: Any) -> bool:
    """Whether a rounding can send a token to other experts; of a config, or of one in JSON."""
    if isinstance(config, dict):
        return any(config.get(name) for name in _EXPERTS)
    return any(getattr(text_config(config), name, 0) for name in _EXPERTS)


def bound(tolerance: float, *, routed: bool, behind: bool) -> float:
    """How far tensors may be apart of a target with this ``tolerance``. ``routed``: it chooses
    experts; ``behind``: they are behind its final norm.
    """
    if routed:
        return max(tolerance, ROUTED_TOLERANCE)
    return tolerance * (BEHIND_THE_NORM if behind else 1)


def agree(off: float, same: float, limit: float, *, by_share: bool = False) -> bool:
    """Whether tensors that :func:`differ` so are the same but for rounding: by norm, or by the
    share of equal argmax. No NaN agrees with anything.
    """
    return same >= EQUAL_ARGMAX and not math.isnan(off) if by_share else off <= limit


def differ(made: Tensor, expected: Tensor) -> tuple[float, float]:
    """The norm of the difference by that of ``expected``, and the share of rows [..., N] whose
    largest entry is at the same place.
    """
    same = float((made.argmax(-1) == expected.argmax(-1)).float().mean())
    off = float((made - expected).norm() / expected.norm().clamp_min(1e-12))
    return off, same
