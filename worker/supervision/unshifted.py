"""A wish in parts: hidden states of any layers, the last one, probabilities; nothing is moved."""

from __future__ import annotations

from torch import Tensor

from broker.protocol.wish import Wish
from worker.errors import BadRequest
from worker.supervision.fp8 import to_fp8
from worker.supervision.mapping import VocabMapping
from worker.supervision.projection import draft_probs
from worker.supervision.topk import top_probs
from worker.targets.contract import TargetOutputs, full_tensor

#: The tensors that ``at=loss`` does not choose from.
OF_ALL_POSITIONS = ("states", "states_scale")


def unshifted(
    outputs: TargetOutputs, loss_mask: Tensor, wish: Wish, mapping: VocabMapping | None
) -> dict[str, Tensor]:
    """What was asked for of a forward of B rows, at the R positions of each that ``rows`` names.

    ``states`` [B, R, L, H] of the L layers, the target's dtype or float8_e4m3fn, then with
    ``states_scale`` [B, R, L] float32. ``last`` [B, R, H] and ``last_scale`` [B, R] likewise.
    ``probs`` [B, R, D] float32, slot t the target's law of token t + 1; or ``topk_log_probs``,
    ``topk_ids`` [B, R, K] and ``rest_mass`` [B, R, 1], as of
    :func:`worker.supervision.topk.top_probs`. With ``at=loss`` all but the states have [M, ...] for
    the M of these positions whose loss mask, as it was sent, is 1, in their order.
    """
    if outputs.shifted and (wish.last or wish.over_vocabulary):
        raise BadRequest(
            "the target gives outputs that are moved left by one, and the first position is gone; "
            "ask for its layers, or for 'probs'"
        )
    rows = slice(*wish.rows) if wish.rows else slice(None)
    outputs = outputs.cut(slice(None), rows)
    made: dict[str, Tensor] = {}
    if wish.layers:
        states = outputs.aux_hidden_states.unflatten(-1, (len(wish.layers), -1))
        made |= _travelling("states", states, fp8=wish.fp8_states)
    chosen = loss_mask[:, rows].bool() if wish.at_loss else None
    if wish.last:
        assert outputs.last_hidden_state is not None  # it was needed
        last = full_tensor(outputs.last_hidden_state)
        made |= _travelling("last", _at(last, chosen), fp8=wish.fp8_last)
    if wish.over_vocabulary:
        assert outputs.logits is not None  # they were needed
        assert mapping is not None
        made |= _over_vocabulary(_at(outputs.logits, chosen), mapping, wish.topk)
    return made


def _at(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    return tensor if chosen is None else tensor[chosen.to(tensor.device)]


def _travelling(name: str, states: Tensor, *, fp8: bool) -> dict[str, Tensor]:
    if not fp8:
        return {name: states}
    values, scale = to_fp8(states)
    return {name: values, f"{name}_scale": scale}


def _over_vocabulary(logits: Tensor, mapping: VocabMapping, k: int) -> dict[str, Tensor]:
    """Of logits [..., V]: all probabilities, or with ``k`` the largest."""
    selected_token_ids, _ = mapping.on(logits.device)
    rows = logits.flatten(0, -2).unsqueeze(0)  # [1, n, V]
    if k:
        made = top_probs(rows, selected_token_ids, k)
    else:
        made = {"probs": draft_probs(rows, selected_token_ids, shifted=True)}
    return {name: each.view(*logits.shape[:-1], each.shape[-1]) for name, each in made.items()}
