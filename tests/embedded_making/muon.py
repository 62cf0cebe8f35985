"""Muon, the optimizer the embedded target's matrices are trained with, in float32 for CPUs.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). The one in
torch orthogonalizes in bfloat16, which a CPU without bfloat16 units does thirty times slower.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

#: The quintic that drives singular values towards 1 in five steps (from the source).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return the float32 [N, R, C] matrices with all singular values brought to about 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: for the two-dimensional weights between embedding and head."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter; those of one shape are orthogonalized together."""
        for group in self.param_groups:
            momentum = group["momentum"]
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append((parameter, parameter.grad))
            for (rows, columns), pairs in by_shape.items():
                updates = []
                for parameter, gradient in pairs:
                    state = self.state[parameter]
                    average = state.setdefault("average", torch.zeros_like(parameter))
                    average.lerp_(gradient, 1 - momentum)
                    updates.append(gradient.lerp(average, momentum))  # Nesterov
                learning_rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                orthogonal = orthogonalize(torch.stack(updates))
                for (parameter, _), update in zip(pairs, orthogonal, strict=True):
                    parameter.add_(update, alpha=-learning_rate)
