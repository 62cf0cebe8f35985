"""Hidden states in half the bytes: float8_e4m3fn, with a scale for each token and layer.

vLLM's speculators takes one scale a token over all layers; a scale for each layer keeps the others
from an outlier in one of them (SmolLM2's first token has 22,863 in a layer whose median is 0.75).
``docs/encodings.md`` has what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: The largest number of the format.
_MOST = torch.finfo(torch.float8_e4m3fn).max
#: Of states that are all zero.
_LEAST = 1e-12


def to_fp8(states: Tensor) -> tuple[Tensor, Tensor]:
    """``(values, scale)`` of states [..., H]: float8_e4m3fn [..., H] and float32 [...].

    A row that has a value which is no number has such a scale.
    """
    wide = states.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_min(_LEAST) / _MOST
    # the quotient can be a hair above the largest, which other versions of torch make a NaN of
    values = (wide / scale).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn)
    return values, scale.squeeze(-1)


def from_fp8(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """States [..., H] in ``dtype``, of float8_e4m3fn [..., H] and scales float32 [...]."""
    return (values.float() * scale.unsqueeze(-1)).to(dtype)


def fp8_errors(made: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """For each tensor that is float8_e4m3fn: :func:`relative_error` to what it was before."""
    return {
        name: relative_error(exact[name], tensor, made[f"{name}_scale"])
        for name, tensor in made.items()
        if tensor.dtype == torch.float8_e4m3fn
    }


def relative_error(states: Tensor, values: Tensor, scale: Tensor) -> float:
    """The norm of what got lost over the norm of states [..., H]."""
    wide = states.float()
    lost = from_fp8(values, scale, torch.float32) - wide
    return float(lost.norm() / wide.norm().clamp_min(_LEAST))
