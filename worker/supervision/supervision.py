"""From a target's outputs to what a draft learns from: ``probs``, ``hidden``, ``topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.errors import BadRequest
from worker.supervision.mapping import VocabMapping
from worker.supervision.projection import draft_probs
from worker.supervision.topk import top_probs
from worker.targets.contract import Target, TargetOutputs, full_tensor, shift_left

_INTEGERS = (torch.int64, torch.int32)
_MASKS = (torch.bool, torch.int64, torch.int32, torch.uint8)


@torch.no_grad()
def compute_supervision(
    target: Target,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    *,
    mapping: VocabMapping,
    encoding: str,
    slots: int = 0,
) -> dict[str, Tensor]:
    """Run the target on ids and masks [B, T] and say what slot t should learn of token t + 1.

    ``probs``: aux_hidden_states [B, T, 3H], target_probs [B, T, D] float32, position_mask
    [B, T, 1] bool, input_ids [B, T] int64, loss_mask [B, T]. ``hidden``: the same with
    last_hidden_state [B, T, H] in place of target_probs; ``topk``: with the tensors of
    :func:`worker.supervision.topk.top_probs` in place of target_probs. All but the aux states are
    moved left by one with zeros at the end. ``probs`` has the bits of NeMo AutoModel's co-located
    EAGLE-3 target: the argmax over the full vocabulary in the logits' dtype, the softmax in float32
    over the selected logits only, so that no full-vocabulary float32 copy is ever made, and of the
    draft's no second one (:func:`worker.supervision.projection.draft_probs`). With ``slots`` the
    answer is of the first so many slots of each row, with the bits that they have in the whole.
    Raises :class:`BadRequest` for an encoding or a mapping that does not suit the target.
    """
    suits(target, mapping, encoding)
    outputs = target.forward(input_ids, attention_mask, loss_mask)
    if slots:  # the last of them speaks of one token more
        kept = slice(0, slots + 1)
        outputs = outputs.cut(slice(None), kept)
        input_ids, loss_mask = input_ids[:, kept], loss_mask[:, kept]
    made = supervision(outputs, input_ids, loss_mask, mapping=mapping, encoding=encoding)
    return first_slots(made, slots)


def first_slots(made: dict[str, Tensor], slots: int) -> dict[str, Tensor]:
    """Supervision [B, T, ...] of the first ``slots`` slots of each row, or of all with 0."""
    return {name: tensor[:, :slots] for name, tensor in made.items()} if slots else made


def supervision(
    outputs: TargetOutputs,
    input_ids: Tensor,
    loss_mask: Tensor,
    *,
    mapping: VocabMapping,
    encoding: str,
) -> dict[str, Tensor]:
    """:func:`compute_supervision` of a forward that has run."""
    device = outputs.logits.device
    selected_token_ids, selected_token_mask = mapping.on(device)
    shifted_loss_mask = shift_left(loss_mask.to(device))
    top_ids = _aligned(outputs, outputs.logits.argmax(dim=-1))  # [B, T]
    known = selected_token_mask[top_ids] & shifted_loss_mask.bool()
    common = {
        "aux_hidden_states": outputs.aux_hidden_states,
        "position_mask": known.unsqueeze(-1),
        "input_ids": shift_left(input_ids.to(device, torch.int64)),
        "loss_mask": shifted_loss_mask,
    }
    if encoding == "hidden":
        assert outputs.last_hidden_state is not None  # by target.encodings
        last = _aligned(outputs, full_tensor(outputs.last_hidden_state).to(device))
        return common | {"last_hidden_state": last}
    if encoding == "topk":
        top = top_probs(outputs.logits, selected_token_ids)
        return common | {name: _aligned(outputs, part) for name, part in top.items()}
    probs = draft_probs(outputs.logits, selected_token_ids, shifted=outputs.shifted)
    return common | {"target_probs": probs}


def validate_request(
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    vocab_size: int,
    max_tokens: int | None = None,
    slots: int = 0,
) -> None:
    """Check ids and masks [B, T] before the target sees them; on a GPU a bad id ends the process.

    ``max_tokens`` is the longest sequence that the target has positions for (0: it does not say).
    Raises :class:`BadRequest` with both numbers.
    """
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
    for name, tensor in tensors.items():
        allowed = _INTEGERS if name == "input_ids" else _MASKS
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise BadRequest(f"{name} is {tensor.dtype}; it must be one of {names}")
        if tensor.ndim != 2:
            raise BadRequest(f"{name} must be [batch, tokens], got shape {tuple(tensor.shape)}")
        if tensor.shape != input_ids.shape:
            raise BadRequest(
                f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(input_ids.shape)}; "
                "they must be equal"
            )
    if not input_ids.numel():
        raise BadRequest(f"the batch is empty: input_ids has shape {tuple(input_ids.shape)}")
    if max_tokens and input_ids.shape[1] > max_tokens:
        raise BadRequest(
            f"the sequences have {input_ids.shape[1]} tokens, the target has positions for "
            f"{max_tokens}; cut the data to that"
        )
    if slots > input_ids.shape[1]:
        raise BadRequest(
            f"supervision of {slots} slots is asked for, and the rows have {input_ids.shape[1]}"
        )
    lowest, highest = (int(bound) for bound in input_ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        _name_bad_id(input_ids, vocab_size)


def lm_head_rows(target: Target, mapping: VocabMapping) -> dict[str, Tensor]:
    """The rows of the target's head for the draft vocab: weight [D, H] and, if any, bias [D].

    Raises :class:`BadRequest` where the target has no head to show, or for another vocabulary.
    """
    _same_vocabulary(target, mapping)
    head = target.get_output_embeddings()
    if head is None:
        raise BadRequest(f"target {target.name!r} has no lm_head to send rows of; use 'probs'")
    weight, bias = full_tensor(head.weight.detach()), getattr(head, "bias", None)
    selected_token_ids, _ = mapping.on(weight.device)
    rows = {"weight": weight.index_select(0, selected_token_ids)}
    if bias is not None:
        rows["bias"] = full_tensor(bias.detach()).index_select(0, selected_token_ids)
    return rows


def input_embeddings(target: Target) -> dict[str, Tensor]:
    """The target's input embeddings: weight [V, H]."""
    return {"weight": full_tensor(target.get_input_embeddings().weight.detach())}


def _aligned(outputs: TargetOutputs, tensor: Tensor) -> Tensor:
    return tensor if outputs.shifted else shift_left(tensor)


def suits(target: Target, mapping: VocabMapping, encoding: str) -> None:
    """Raises :class:`BadRequest` for an encoding or a mapping that does not suit the target."""
    if encoding not in target.encodings:
        why = getattr(target, "hidden_refused", "") if encoding == "hidden" else ""
        raise BadRequest(
            f"target {target.name!r} does not offer the encoding {encoding!r}"
            f"{f' because {why}' if why else ''}; it offers {', '.join(target.encodings)}"
        )
    _same_vocabulary(target, mapping)


def _same_vocabulary(target: Target, mapping: VocabMapping) -> None:
    if mapping.vocab_size != target.vocab_size:
        raise BadRequest(
            f"the vocab mapping is for {mapping.vocab_size} target tokens, target "
            f"{target.name!r} has {target.vocab_size}"
        )


def _name_bad_id(input_ids: Tensor, vocab_size: int) -> None:
    row, column = ((input_ids < 0) | (input_ids >= vocab_size)).nonzero()[0].tolist()
    raise BadRequest(
        f"input_ids[{row}, {column}] is {int(input_ids[row, column])}, and the target's vocabulary "
        f"has {vocab_size} tokens (valid: 0 to {vocab_size - 1}); was the data tokenized with the "
        "target's tokenizer?"
    )
