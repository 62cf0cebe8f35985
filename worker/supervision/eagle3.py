"""The named wishes: EAGLE-3's supervision, moved left by one, with ``position_mask``."""

from __future__ import annotations

import torch
from torch import Tensor

from broker.protocol.wish import Wish
from worker.supervision.mapping import VocabMapping
from worker.supervision.projection import draft_probs
from worker.supervision.topk import top_probs
from worker.targets.contract import TargetOutputs, full_tensor, shift_left


def named(
    outputs: TargetOutputs, input_ids: Tensor, loss_mask: Tensor, wish: Wish, mapping: VocabMapping
) -> dict[str, Tensor]:
    """What slot t of ids [B, T] should learn of token t + 1.

    ``probs``: aux_hidden_states [B, T, 3H], target_probs [B, T, D] float32, position_mask
    [B, T, 1] bool, input_ids [B, T] int64, loss_mask [B, T]. ``hidden``: the same with
    last_hidden_state [B, T, H] in place of target_probs; ``topk``: with the tensors of
    :func:`worker.supervision.topk.top_probs` in place of target_probs. All but the aux states are
    moved left by one with zeros at the end. ``probs`` has the bits of NeMo AutoModel's co-located
    EAGLE-3 target: the argmax over the full vocabulary in the logits' dtype, the softmax in float32
    over the selected logits only, so that no full-vocabulary float32 copy is ever made, and of the
    draft's no second one (:func:`worker.supervision.projection.draft_probs`). With ``rows`` the
    answer is of these slots of each row, with the bits that they have in the whole.
    """
    if wish.rows is None:
        return _all_slots(outputs, input_ids, loss_mask, wish.name, mapping)
    first, end = wish.rows
    kept = slice(0, end + 1)  # the last slot speaks of one token more
    outputs = outputs.cut(slice(None), kept)
    made = _all_slots(outputs, input_ids[:, kept], loss_mask[:, kept], wish.name, mapping)
    return {name: tensor[:, first:end] for name, tensor in made.items()}


def _all_slots(
    outputs: TargetOutputs, input_ids: Tensor, loss_mask: Tensor, name: str, mapping: VocabMapping
) -> dict[str, Tensor]:
    logits = outputs.logits
    assert logits is not None  # a forward without needs has all
    selected_token_ids, selected_token_mask = mapping.on(logits.device)
    shifted_loss_mask = shift_left(loss_mask.to(logits.device))
    top_ids = _aligned(outputs, logits.argmax(dim=-1))  # [B, T]
    known = selected_token_mask[top_ids] & shifted_loss_mask.bool()
    common = {
        "aux_hidden_states": outputs.aux_hidden_states,
        "position_mask": known.unsqueeze(-1),
        "input_ids": shift_left(input_ids.to(logits.device, torch.int64)),
        "loss_mask": shifted_loss_mask,
    }
    if name == "hidden":
        assert outputs.last_hidden_state is not None  # by target.encodings
        last = _aligned(outputs, full_tensor(outputs.last_hidden_state).to(logits.device))
        return common | {"last_hidden_state": last}
    if name == "topk":
        top = top_probs(logits, selected_token_ids)
        return common | {name: _aligned(outputs, part) for name, part in top.items()}
    probs = draft_probs(logits, selected_token_ids, shifted=outputs.shifted)
    return common | {"target_probs": probs}


def _aligned(outputs: TargetOutputs, tensor: Tensor) -> Tensor:
    return tensor if outputs.shifted else shift_left(tensor)
