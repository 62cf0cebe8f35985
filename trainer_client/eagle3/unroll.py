"""Training-time test: the draft is unrolled over its own outputs, and learns at every depth.

EAGLE-3 (arXiv:2503.01840) section 3.2; the depth weights 0.8^i and the shift of supervision per
depth are SpecForge's, the mean over the weights and the simulated accept length are NeMo
AutoModel's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer_client.batch import LmHeadRows
from trainer_client.eagle3.draft import Eagle3Draft, TTTCache


@dataclass
class UnrollOutput:
    """The loss, and counts [depths] that add up over batches and ranks."""

    loss: Tensor  # scalar, weighted mean over depths
    depth_losses: Tensor  # [depths], detached
    correct: Tensor  # supervised slots where the draft's best token is the target's
    supervised: Tensor  # slots with a target token in the draft vocab
    chain_hits: Tensor  # chains that are right from depth 0 to this depth
    chains: Tensor  # chains with loss at every depth so far, in the draft vocab or not


def simulated_accept_length(chain_hits: Tensor, chains: Tensor) -> float:
    """Tokens for one target forward if drafts were checked greedily: 1 + sum of survival rates."""
    return float(1.0 + (chain_hits.double() / chains.double().clamp_min(1.0)).sum())


class Eagle3Unroll(nn.Module):
    """Wraps a draft so that one forward is the whole unroll, which is what DDP wants."""

    def __init__(self, draft: Eagle3Draft, *, depths: int = 7, decay: float = 0.8) -> None:
        super().__init__()
        if depths < 1:
            raise ValueError(f"the unroll needs at least 1 depth, got {depths}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
        self.draft = draft
        self.depths = depths
        self.weights = [decay**depth for depth in range(depths)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        aux_hidden_states: Tensor,
        *,
        target_probs: Tensor | None = None,
        target_logits: Tensor | None = None,
        last_hidden_state: Tensor | None = None,
        position_mask: Tensor | None = None,
        lm_head: LmHeadRows | None = None,
    ) -> UnrollOutput:
        """Unroll on one batch, given as ``Eagle3TargetBatch.to_trainer_inputs()``.

        ``lm_head`` is needed with ``last_hidden_state``. Raises ``ValueError`` without supervision.
        """
        if target_logits is not None:
            top = target_logits.argmax(-1)
            position_mask = (self.draft.t2d[top] & loss_mask.bool()).unsqueeze(-1)
            selected = target_logits.index_select(-1, self.draft.selected_token_ids)
            target_probs = torch.softmax(selected.float(), dim=-1)
        elif last_hidden_state is not None and lm_head is not None:
            target_probs = draft_vocab_probs(last_hidden_state, lm_head)
        if target_probs is None or position_mask is None:
            raise ValueError(
                "no supervision: give target_logits, or position_mask with target_probs, or with "
                "last_hidden_state and lm_head"
            )
        return self._unroll(
            input_ids,
            attention_mask,
            loss_mask.bool(),
            aux_hidden_states,
            target_probs,
            position_mask.squeeze(-1).bool(),
        )

    def _unroll(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        aux_hidden_states: Tensor,
        target_probs: Tensor,
        position_mask: Tensor,
    ) -> UnrollOutput:
        """At depth i slot t has read token t + 1 + i and predicts the one after it."""
        cache, hidden = TTTCache(), self.draft.fuse(aux_hidden_states)
        length = input_ids.shape[1]
        best = target_probs.argmax(-1)  # [B, T]
        losses, counts = [], []
        hit = chain = torch.ones_like(loss_mask)
        for depth in range(min(self.depths, length)):
            left = length - depth  # slots that still have a token to read
            if depth:
                zeros = torch.zeros_like(input_ids[:, :1])
                input_ids = torch.cat((input_ids[:, 1:], zeros), dim=1)
            hidden = self.draft.step(input_ids, hidden, cache, attention_mask)
            logits = self.draft.logits(hidden[:, :left]).float()  # [B, left, D]
            supervised = position_mask[:, depth:]
            cross_entropy = -(target_probs[:, depth:] * torch.log_softmax(logits, -1)).sum(-1)
            losses.append((cross_entropy * supervised).sum() / supervised.sum().clamp_min(1))
            right = (logits.argmax(-1) == best[:, depth:]) & supervised
            chain = chain[:, :left] & loss_mask[:, depth:]
            hit = hit[:, :left] & right & chain
            counts.append((right.sum(), supervised.sum(), hit.sum(), chain.sum()))
        weights = self.weights[: len(losses)]
        loss = sum(w * part for w, part in zip(weights, losses, strict=True)) / sum(weights)
        assert isinstance(loss, Tensor)
        columns = [self._padded(torch.stack(column)) for column in zip(*counts, strict=True)]
        return UnrollOutput(loss, self._padded(torch.stack(losses).detach()), *columns)

    def _padded(self, counts: Tensor) -> Tensor:
        """Counts of every depth, with zeros for those that the sequence was too short for."""
        return F.pad(counts, (0, self.depths - counts.numel()))


@torch.no_grad()
def draft_vocab_probs(last_hidden_state: Tensor, lm_head: LmHeadRows) -> Tensor:
    """Target probabilities [B, T, D] float32 of hidden states [B, T, H], row by row of the batch.

    Only the D selected rows of the head are multiplied; [B, T, V] never exists.
    """
    batch, length, _ = last_hidden_state.shape
    size = (batch, length, lm_head.weight.shape[0])
    probs = torch.empty(size, dtype=torch.float32, device=last_hidden_state.device)
    for row, hidden in enumerate(last_hidden_state):
        logits = torch.nn.functional.linear(
            hidden.to(lm_head.weight.dtype), lm_head.weight, lm_head.bias
        )
        torch.softmax(logits.float(), dim=-1, out=probs[row])
    return probs
