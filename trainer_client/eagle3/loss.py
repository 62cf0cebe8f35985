"""Cross entropy of a draft's guesses at every depth, without the guesses' logits ever being whole.

Few slots are taken at a time: the target's distribution there is made once, compared with what the
draft guesses at each depth, and the gradients are taken at once, while the logits are there. So no
[B, T, D] is made, kept or made again. Taking a loss's gradients in the forward is Liger Kernel's
idea (Hsu et al., 2024, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer_client.eagle3.packing import positions
from trainer_client.eagle3.supervision import Supervision

#: Float32 logits taken at a time: a few of them fit a CPU's cache; a GPU, which takes a kernel's
#: launch for each product, wants large ones (``docs/gpu.md``).
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


@dataclass
class HeadLoss:
    """The loss over all depths, and by depth what it is made of."""

    loss: Tensor  # scalar, weighted mean over depths
    depth_losses: Tensor  # [depths], detached
    correct: Tensor  # bool [depths, B, T]: depth i guessed best what the target finds best there


def head_loss(
    guesses: Sequence[Tensor],
    weight: Tensor,
    supervision: Supervision,
    weights: Sequence[float],
    counts: Tensor | None = None,
    at: Tensor | None = None,
) -> HeadLoss:
    """Compare ``guesses`` [B, T, H], one a depth, through the head ``weight`` [D, H].

    Slot t of depth i is a guess at what the target says in slot t + i of the same sequence; ``at``
    int64 [B, T] says how far each slot is from the beginning of its own (default: of its row).
    ``weights`` are those of all depths, of which short sequences reach the first few.

    The loss of a depth is the sum over the slots with supervision that it reaches, divided by
    ``counts`` [depths]: their number in all that makes one step (:func:`reached`), so that losses
    and gradients of its parts add up to those of the whole. Without ``counts`` this batch is the
    whole.
    """
    share = torch.tensor(weights, dtype=torch.promote_types(weight.dtype, torch.float32))
    share = share[: len(guesses)] / sum(weights)
    grad = torch.is_grad_enabled()
    if at is None:
        at = positions(supervision.known, ())
    if counts is None:
        counts = reached(supervision.known, len(guesses), at)
    loss, depth_losses, correct = _HeadLoss.apply(
        weight, supervision, share.to(weight.device), counts, at, grad, *guesses
    )
    return HeadLoss(loss, depth_losses, correct)


def reached(known: Tensor, depths: int, at: Tensor) -> Tensor:
    """How many slots with supervision (bool [B, T]) each depth reaches, where they are ``at`` in
    their sequences: int64 [depths].
    """
    return torch.stack([(known & (at >= depth)).sum() for depth in range(depths)])


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        supervision: Supervision,
        share: Tensor,
        counts: Tensor,
        at: Tensor,
        grad: bool,
        *guesses: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = weight.device.type
        in_autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if in_autocast else weight.dtype
        with torch.autocast(kind, enabled=False):
            head = _Head(weight, dtype, guesses, supervision, share, counts, at)
            step = max(1, CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"]) // (4 * weight.shape[0]))
            for slots in supervision.slots.split(step):
                head.take(slots, grad)
        ctx.gradients = (head.weight_grad, head.guess_grads) if grad else None
        depth_losses = head.sums / head.counts
        ctx.mark_non_differentiable(depth_losses, head.correct)
        return (depth_losses * share).sum(), depth_losses, head.correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss are taken once; run the forward again")
        weight_grad, guess_grads = ctx.gradients
        ctx.gradients = None
        for taken in (weight_grad, *guess_grads):
            taken.mul_(grad)
        return weight_grad, None, None, None, None, None, *guess_grads


class _Head:
    """Losses and gradients of all depths, added up chunk by chunk."""

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        guesses: Sequence[Tensor],
        supervision: Supervision,
        share: Tensor,
        counts: Tensor,
        at: Tensor,
    ) -> None:
        depths = len(guesses)
        self.at = at.flatten()  # [B * T]
        self.weight = weight.to(dtype)  # [D, H]
        #: what losses are computed in: float32, and float64 where the draft is
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.guesses = [guess.flatten(0, 1) for guess in guesses]  # [B * T, H]
        self.probs = supervision.probs
        self.counts = counts.clamp_min(1)
        #: what one slot of each depth weighs in the loss
        self.share = share.to(self.wide) / self.counts
        self.sums = torch.zeros(depths, dtype=self.wide, device=weight.device)
        shape = (depths, *supervision.known.shape)
        self.correct = torch.zeros(shape, dtype=torch.bool, device=weight.device)
        self.weight_grad = torch.zeros_like(weight)
        self.guess_grads = [torch.zeros_like(guess) for guess in guesses]

    def take(self, slots: Tensor, grad: bool) -> None:
        """Add what these slots of the target [n] say about every depth."""
        target = self.probs(slots).to(self.wide)  # [n, D]
        best, column = target.argmax(-1), self.at.index_select(0, slots)
        for depth, guesses in enumerate(self.guesses):
            reached = column >= depth
            at = torch.where(reached, slots - depth, slots)  # what is not reached counts nothing
            guess = guesses.index_select(0, at).to(self.weight.dtype)
            logits = (guess @ self.weight.T).to(self.wide)
            right = (logits.argmax(-1) == best) & reached
            self.correct[depth].view(-1)[slots] = right
            log_probs = torch.log_softmax(logits, -1)
            losses = torch.linalg.vecdot(target, log_probs)
            self.sums[depth] -= (losses * reached).sum()
            if grad:
                wrong = log_probs.exp_().sub_(target)
                wrong *= (self.share[depth] * reached).unsqueeze(-1)
                self._learn(depth, at, guess, wrong.to(self.weight.dtype))

    def _learn(self, depth: int, at: Tensor, guess: Tensor, wrong: Tensor) -> None:
        """Gradients of logits that are off by ``wrong`` [n, D]."""
        grads = self.guess_grads[depth].flatten(0, 1)
        grads.index_add_(0, at, (wrong @ self.weight).to(grads.dtype))
        if self.weight_grad.dtype == wrong.dtype:
            self.weight_grad.addmm_(wrong.T, guess)
        else:
            self.weight_grad += wrong.T @ guess
