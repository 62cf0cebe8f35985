"""The draft vocabulary: the target tokens that the data uses most (EAGLE-3, FR-Spec)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trainer_client.training.data import Sample
from worker.supervision.mapping import VocabMapping


def token_counts(samples: Iterable[Sample], vocab_size: int) -> torch.Tensor:
    """How often each token is to be predicted; int64 [V]."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for sample in samples:
        mask = torch.tensor(sample.loss_mask, dtype=torch.bool)
        counts += torch.bincount(torch.tensor(sample.input_ids)[mask], minlength=vocab_size)
    return counts


def frequent_tokens(counts: torch.Tensor, draft_vocab_size: int) -> tuple[VocabMapping, float]:
    """The mapping to the D most frequent tokens, and the share of all occurrences they cover.

    Of equally frequent tokens the lower ids are taken. A size of V or more takes them all.
    """
    vocab_size = counts.numel()
    size = min(draft_vocab_size, vocab_size)
    order = torch.argsort(counts, descending=True, stable=True)
    chosen = order[:size].sort().values
    coverage = float(counts[chosen].sum() / counts.sum().clamp_min(1))
    return VocabMapping(chosen, vocab_size), coverage
