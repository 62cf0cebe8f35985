"""The target's distribution over the draft vocabulary, made for few slots at a time.

Whatever the target sends (probabilities, hidden states, the top K, whole logits), a learner asks
for the slots that it works on, so that neither [B, T, V] nor a float32 [B, T, D] is ever made here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_client.targets.batch import LmHeadRows

if TYPE_CHECKING:
    from trainer_client.eagle3.draft import Eagle3Draft


@dataclass(frozen=True)
class Supervision:
    """What there is to learn from one batch [B, T].

    ``probs`` takes slots of the flattened batch, int64 [n], and gives the target's probabilities
    there, float32 [n, D]; each row adds up to 1.
    """

    known: Tensor  # bool [B, T]: the target's own token is in the draft vocab, and counts
    slots: Tensor  # int64 [n]: those slots, in the flattened batch
    probs: Callable[[Tensor], Tensor]


def of_probs(target_probs: Tensor, known: Tensor) -> Supervision:
    """From probabilities [B, T, D] float32."""
    rows = target_probs.flatten(0, 1)
    return _supervision(known, lambda slots: rows.index_select(0, slots))


def of_logits(target_logits: Tensor, known: Tensor, selected_token_ids: Tensor) -> Supervision:
    """From logits of the whole vocabulary [B, T, V]; the ids are int64 [D]."""
    rows = target_logits.flatten(0, 1)

    def probs(slots: Tensor) -> Tensor:
        selected = rows.index_select(0, slots).index_select(1, selected_token_ids)
        return torch.softmax(selected.float(), dim=-1)

    return _supervision(known, probs)


def of_hidden(last_hidden_state: Tensor, known: Tensor, lm_head: LmHeadRows) -> Supervision:
    """From hidden states [B, T, H]; only the D selected rows of the head are multiplied."""
    rows = last_hidden_state.flatten(0, 1)

    def probs(slots: Tensor) -> Tensor:
        hidden = rows.index_select(0, slots).to(lm_head.weight.dtype)
        return torch.softmax(F.linear(hidden, lm_head.weight, lm_head.bias).float(), dim=-1)

    return _supervision(known, probs)


def of_topk(
    log_probs: Tensor, ids: Tensor, rest_mass: Tensor, known: Tensor, draft_vocab_size: int
) -> Supervision:
    """From the K most likely draft ids [B, T, K] and what is left for all others [B, T, 1].

    The rest is spread evenly, which is not exact.
    """
    log_probs, ids, rest = (tensor.flatten(0, 1) for tensor in (log_probs, ids, rest_mass))
    others = max(1, draft_vocab_size - ids.shape[-1])

    def probs(slots: Tensor) -> Tensor:
        rows = (rest.index_select(0, slots) / others).repeat(1, draft_vocab_size)
        top = log_probs.index_select(0, slots).exp()
        return rows.scatter_(1, ids.index_select(0, slots).long(), top)

    return _supervision(known, probs)


def of_sent(
    sent: Mapping[str, Tensor], loss_mask: Tensor, draft: Eagle3Draft, lm_head: LmHeadRows | None
) -> Supervision:
    """From what ``Eagle3TargetBatch.to_trainer_inputs`` has beside the tokens, by its names.

    Raises ``ValueError`` when that is no supervision.
    """
    known = known_slots(sent, loss_mask, draft)
    if "target_logits" in sent:
        return of_logits(sent["target_logits"], known, draft.selected_token_ids)
    if "position_mask" in sent:
        if "target_probs" in sent:
            return of_probs(sent["target_probs"], known)
        if "last_hidden_state" in sent and lm_head is not None:
            return of_hidden(sent["last_hidden_state"], known, lm_head)
        if "topk_log_probs" in sent:
            return of_topk(
                sent["topk_log_probs"],
                sent["topk_ids"],
                sent["rest_mass"],
                known,
                draft.config.draft_vocab_size,
            )
    raise ValueError(
        f"no supervision in {sorted(sent) or 'nothing'}: give target_logits, or position_mask with "
        "target_probs, with last_hidden_state and lm_head, or with topk_log_probs, topk_ids and "
        "rest_mass"
    )


def known_slots(sent: Mapping[str, Tensor], loss_mask: Tensor, draft: Eagle3Draft) -> Tensor:
    """Bool [B, T]: where the target's own token is in the draft vocab, and counts."""
    if "target_logits" in sent:
        return draft.t2d[sent["target_logits"].argmax(-1)] & loss_mask
    if "position_mask" in sent:
        return sent["position_mask"].squeeze(-1).bool()
    return torch.zeros_like(loss_mask)


def _supervision(known: Tensor, probs: Callable[[Tensor], Tensor]) -> Supervision:
    return Supervision(known, known.flatten().nonzero().squeeze(-1), probs)
