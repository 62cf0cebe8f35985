"""The draft vocabulary: the target tokens that the data uses most (EAGLE-3, FR-Spec)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from trainer_client.errors import DataError
from trainer_client.training.data import Dataset, Sample
from worker.supervision.mapping import VocabMapping

#: A tokenizer with more special tokens keeps some for its users.
_MANY = 64


def token_counts(dataset: Dataset, vocab_size: int) -> torch.Tensor:
    """How often each token is to be predicted; int64 [V].

    A draft that has read a token with loss learns the one after it, so that is what counts: the
    stop token too, where it stands behind the loss. The first that it reads is the second of a
    sample. Raises :class:`DataError` for an id that the target does not have.
    """
    known = dataset.known.counts
    if len(known) > vocab_size:
        _refuse(dataset.samples, vocab_size)
    return torch.nn.functional.pad(torch.from_numpy(known), (0, vocab_size - len(known)))


def _refuse(samples: Sequence[Sample], vocab_size: int) -> NoReturn:
    """Name the sample with a token that the target does not have."""
    for sample in samples:
        if (largest := max(sample.input_ids)) >= vocab_size:
            raise DataError(
                f"{sample.origin} has the token {largest}, and the target's vocabulary has "
                f"{vocab_size} tokens; was the data made with another tokenizer?"
            )
    raise AssertionError("no sample has the token that was counted")


def always_known(tokenizer: Any, vocab_size: int) -> list[int]:
    """Tokens that the target may emit whatever the data says: its special ones, few as they are."""
    ids = {getattr(tokenizer, "eos_token_id", None), *getattr(tokenizer, "all_special_ids", ())}
    return sorted(each for each in ids if isinstance(each, int) and 0 <= each < vocab_size)[:_MANY]


def frequent_tokens(
    counts: torch.Tensor, draft_vocab_size: int, known: Sequence[int] = ()
) -> tuple[VocabMapping, float]:
    """The mapping to the D most frequent tokens, and the share of all occurrences they cover.

    Of equally frequent tokens the lower ids are taken; those of ``known`` come first. A size of V
    or more takes them all.
    """
    vocab_size = counts.numel()
    size = min(draft_vocab_size, vocab_size)
    ranked = counts.clone()
    ranked[list(known)] = torch.iinfo(torch.int64).max
    order = torch.argsort(ranked, descending=True, stable=True)
    chosen = order[:size].sort().values
    coverage = float(counts[chosen].sum() / counts.sum().clamp_min(1))
    return VocabMapping(chosen, vocab_size), coverage
