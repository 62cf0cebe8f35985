"""Training-time test: the draft is unrolled over its own outputs, and learns at every depth.

EAGLE-3 (arXiv:2503.01840) section 3.2; the depth weights 0.8^i and the shift of supervision per
depth are SpecForge's, the mean over the weights and the simulated accept length are NeMo
AutoModel's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer_client.eagle3.draft import Eagle3Draft, PackedCache, TTTCache
from trainer_client.eagle3.loss import HeadLoss, head_loss, reached
from trainer_client.eagle3.packing import positions, shifted
from trainer_client.eagle3.supervision import known_slots, of_sent
from trainer_client.targets.batch import Eagle3TargetBatch, LmHeadRows


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
        lengths: Sequence[int] = (),
        lm_head: LmHeadRows | None = None,
        counts: Tensor | None = None,
        **sent: Tensor,
    ) -> UnrollOutput:
        """Unroll on one batch, given as ``Eagle3TargetBatch.to_trainer_inputs()``.

        ``sent`` is the batch's supervision in any encoding; ``lm_head`` is needed with the encoding
        ``hidden``. A row of packed documents has their ``lengths``. ``counts`` int64 [depths] are
        those of :meth:`counts` over all batches of the step; without them this one is the whole.
        Raises ``ValueError`` without supervision.
        """
        loss_mask = loss_mask.bool()
        supervision = of_sent(sent, loss_mask, self.draft, lm_head)
        guesses = self._guesses(input_ids, attention_mask, aux_hidden_states, lengths)
        if counts is not None:
            counts = counts[: len(guesses)]
        at, weight = positions(input_ids, lengths), self.draft.lm_head.weight
        head = head_loss(guesses, weight, supervision, self.weights, counts, at)
        return self._output(head, supervision.known, loss_mask, at)

    def counts(self, batch: Eagle3TargetBatch) -> Tensor:
        """What the depths of a batch have to learn from: slots with supervision, int64 [depths]."""
        inputs = batch.to_trainer_inputs()
        known = known_slots(inputs, inputs["loss_mask"].bool(), self.draft)
        lengths = batch.lengths or ()
        depths = self._depths_of(known, lengths)
        return self._padded(reached(known, depths, positions(known, lengths)))

    def _depths_of(self, rows: Tensor, lengths: Sequence[int]) -> int:
        """No more depths than the longest sequence has tokens."""
        return min(self.depths, max(lengths or rows.shape[1:]))

    def _guesses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        aux_hidden_states: Tensor,
        lengths: Sequence[int],
    ) -> list[Tensor]:
        """What the head multiplies at each depth, [B, T, H].

        At depth i slot t has read token t + 1 + i and predicts the one after it.
        """
        hidden, guesses = self.draft.fuse(aux_hidden_states), []
        cache = PackedCache(lengths, hidden.device) if lengths else TTTCache()
        for depth in range(self._depths_of(input_ids, lengths)):
            if depth:
                input_ids = shifted(input_ids, lengths)
            hidden = self.draft.step(input_ids, hidden, cache, attention_mask)
            guesses.append(self.draft.norm(hidden))
            hidden = self.draft.fed_back(hidden, guesses[-1])
        return guesses

    def _output(self, head: HeadLoss, known: Tensor, loss_mask: Tensor, at: Tensor) -> UnrollOutput:
        counts = []
        hit = chain = torch.ones_like(loss_mask)
        length = loss_mask.shape[1]
        for depth, correct in enumerate(head.correct):
            left = length - depth  # slots that still have a token to read, if it is their own
            own, right = at[:, depth:] >= depth, correct[:, depth:]
            chain = chain[:, :left] & loss_mask[:, depth:] & own
            hit = hit[:, :left] & right & chain
            supervised = known[:, depth:] & own
            counts.append((right.sum(), supervised.sum(), hit.sum(), chain.sum()))
        columns = [self._padded(torch.stack(column)) for column in zip(*counts, strict=True)]
        return UnrollOutput(head.loss, self._padded(head.depth_losses), *columns)

    def _padded(self, counts: Tensor) -> Tensor:
        """Counts of every depth, with zeros for those that the sequence was too short for."""
        return F.pad(counts, (0, self.depths - counts.numel()))
