"""What a target gave, looked at before anybody learns from it: its sizes and its values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from worker.errors import TargetError


def check_sizes(
    tensors: Mapping[str, Tensor],
    shape: Sequence[int],
    *,
    hidden_size: int,
    aux_layer_ids: Sequence[int],
    draft_vocab_size: int,
) -> None:
    """Raise :class:`TargetError` where supervision for ids [B, T] (``shape``) has other sizes."""
    widths = {
        "aux_hidden_states": hidden_size * len(aux_layer_ids),
        "last_hidden_state": hidden_size,
        "target_probs": draft_vocab_size,
        "position_mask": 1,
        "rest_mass": 1,
    }
    for name, tensor in tensors.items():
        wanted = (*shape, widths[name]) if name in widths else None
        if name in ("input_ids", "loss_mask"):
            wanted = tuple(shape)
        if wanted is not None and tuple(tensor.shape) != wanted:
            raise TargetError(
                f"the target gave {name} of shape {tuple(tensor.shape)}, {wanted} was expected "
                f"(batch, tokens, width; layers {tuple(aux_layer_ids)}, H={hidden_size})"
            )


def soundness(tensors: Mapping[str, Tensor]) -> Tensor:
    """Whether all values are numbers: bool [1] on the tensors' device, which is not waited for."""
    sound = [_good(name, tensor).all() for name, tensor in tensors.items() if _has_values(tensor)]
    if not sound:
        return torch.ones(1, dtype=torch.bool)
    return torch.stack([each.to(sound[0].device) for each in sound]).all().view(1)


def name_unsound(tensors: Mapping[str, Tensor], hidden_size: int, layers: Sequence[int]) -> None:
    """Raise :class:`TargetError` that says where the first value is that is no number."""
    for name, tensor in tensors.items():
        if not _has_values(tensor) or bool(_good(name, tensor).all()):
            continue
        place = (~_good(name, tensor)).nonzero()[0].tolist()
        value, where = float(tensor[tuple(place)]), f"{place}"
        if name == "aux_hidden_states":
            layer = layers[place[2] // hidden_size]
            where = f"row {place[0]}, position {place[1]}, layer {layer}"
        raise TargetError(
            f"the target gave {value} in {name} at {where}; nothing of it was sent. Half precision "
            "overflows in some models: try --dtype bfloat16 or float32, and look at that sample"
        )


def says_unsound(text: str) -> bool:
    """Whether a failure is that of :func:`name_unsound`, by what a trainer hears of it."""
    return re.search(r"the target gave (nan|-?inf) in ", text) is not None


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.numel())


def _good(name: str, tensor: Tensor) -> Tensor:
    if name == "topk_log_probs":  # of a token that is impossible it is minus infinity
        return ~(tensor.isnan() | tensor.isposinf())
    return tensor.isfinite()
