"""Checks the sizes and values of what a target gave, before anybody learns from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from broker.protocol.wish import Wish
from worker.errors import TargetError
from worker.supervision.requests import Tokens
from worker.supervision.topk import TOP_K


def expected_shapes(
    tokens: Tokens, wish: Wish, *, hidden_size: int, layers: int, draft_vocab_size: int
) -> dict[str, tuple[int, ...]]:
    """What the tensors of a reply have for shapes, by their names.

    ``layers`` is L, of the wish or of the target's own; ``draft_vocab_size`` is D, or 0 where the
    wish is not over a vocabulary.
    """
    *rows, positions = tokens["input_ids"].shape
    first, end = wish.rows or (0, positions)
    all_of = (*rows, end - first)
    chosen = all_of
    if wish.at_loss:
        chosen = (int(tokens["loss_mask"][..., first:end].bool().sum()),)
    if wish.name:
        return _named_shapes(all_of, wish, hidden_size, layers, draft_vocab_size)
    shapes: dict[str, tuple[int, ...]] = {}
    if wish.layers:
        shapes |= _travelling("states", (*all_of, layers, hidden_size), wish.fp8_states)
    if wish.last:
        shapes |= _travelling("last", (*chosen, hidden_size), wish.fp8_last)
    if wish.probs:
        shapes["probs"] = (*chosen, draft_vocab_size)
    if wish.topk:
        shapes |= _topk_shapes(chosen, min(wish.topk, draft_vocab_size))
    return shapes


def _named_shapes(
    lead: tuple[int, ...], wish: Wish, hidden_size: int, layers: int, draft_vocab_size: int
) -> dict[str, tuple[int, ...]]:
    supervision = {
        "probs": {"target_probs": (*lead, draft_vocab_size)},
        "hidden": {"last_hidden_state": (*lead, hidden_size)},
        "topk": _topk_shapes(lead, min(TOP_K, draft_vocab_size)),
    }
    return {
        "aux_hidden_states": (*lead, layers * hidden_size),
        "position_mask": (*lead, 1),
        "input_ids": lead,
        "loss_mask": lead,
        **supervision[wish.name],
    }


def _topk_shapes(lead: tuple[int, ...], k: int) -> dict[str, tuple[int, ...]]:
    return {"topk_log_probs": (*lead, k), "topk_ids": (*lead, k), "rest_mass": (*lead, 1)}


def _travelling(name: str, shape: tuple[int, ...], fp8: bool) -> dict[str, tuple[int, ...]]:
    return {name: shape, f"{name}_scale": shape[:-1]} if fp8 else {name: shape}


def check_shapes(
    got: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], who: str = "the target"
) -> None:
    """Raise :class:`TargetError` where tensors by name have not the shapes that were expected."""
    if set(got) != set(wanted):
        raise TargetError(f"{who} gave the tensors {sorted(got)}, {sorted(wanted)} were expected")
    for name, shape in wanted.items():
        if tuple(got[name]) != tuple(shape):
            raise TargetError(
                f"{who} gave {name} of shape {tuple(got[name])}, {tuple(shape)} was expected"
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
        advice = _OF_WEIGHTS if name in ("weight", "bias") else _OF_STATES
        raise TargetError(
            f"the target gave {float(tensor[tuple(place)])} in {name} at "
            f"{_where(name, place, hidden_size, layers)}; nothing of it was sent. {advice}"
        )


_OF_STATES = (
    "Half precision overflows in some models: try --dtype bfloat16 or float32, and look at that "
    "sample"
)
_OF_WEIGHTS = "Its embeddings or its head have it: is the checkpoint whole?"


def _where(name: str, place: list[int], hidden_size: int, layers: Sequence[int]) -> str:
    """``place`` in words, where it has a layer."""
    if name == "aux_hidden_states":
        *slot, layer = *place[:-1], place[-1] // hidden_size
    elif name in ("states", "states_scale"):
        *slot, layer = place[: len(place) - (name == "states")]
    else:
        return f"{place}"
    row = f"row {slot[0]}, " if len(slot) > 1 else ""
    return f"{row}position {slot[-1]}, layer {layers[layer]}"


def says_unsound(text: str) -> bool:
    """Whether a failure is that of :func:`name_unsound`, by what a trainer hears of it."""
    return re.search(r"the target gave (nan|-?inf) in ", text) is not None


def _has_values(tensor: Tensor) -> bool:
    # what is fp8 shows in its scale, and has no isfinite of its own
    wide = tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn
    return wide and bool(tensor.numel())


def _good(name: str, tensor: Tensor) -> Tensor:
    if name == "topk_log_probs":  # of a token that is impossible it is minus infinity
        return ~(tensor.isnan() | tensor.isposinf())
    return tensor.isfinite()
