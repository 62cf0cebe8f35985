"""What a data file is to a run: kinds of records, lengths, loss, what is left out, coverage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer_client.data.samples import lengths_of
from trainer_client.data.showing import ReadingProgress
from trainer_client.data.sources import Given
from trainer_client.training.data import Dataset, Options, Sample, stored_dataset
from trainer_client.training.vocab import always_known, frequent_tokens, token_counts

#: Sizes of a draft vocabulary whose coverage is shown, where the target has more.
_VOCABULARIES = (8_000, 16_000, 32_000, 64_000)
_SHOWN = 5


@dataclass(frozen=True)
class DataReport:
    """A data file as a run would train it, with one tokenizer."""

    #: "conversation", "text", "tokens" -> records
    kinds: Mapping[str, int]
    samples: int
    tokens: int
    #: tokens with loss, of those that can be predicted
    supervised: int
    truncated: int
    without_loss: int
    left_out: Mapping[str, int]
    #: samples by length: the first bucket has up to 64 tokens, each next up to twice as many
    lengths: Mapping[int, int]
    #: size of the draft vocabulary -> share of what is to be predicted
    coverage: Mapping[int, float]
    shown: Sequence[Sample] = field(default_factory=list)

    @property
    def supervised_share(self) -> float:
        """Of the tokens that can be predicted."""
        return self.supervised / max(1, self.tokens - self.samples)

    @property
    def trouble(self) -> str:
        """Why this cannot be what was meant, or nothing."""
        if self.supervised_share == 1.0 and set(self.kinds) != {"text"}:
            return (
                "every token has loss, also of what was asked: a draft would learn the prompts "
                "too; look at the roles, the loss masks or the chat template"
            )
        return ""


def report(given: Given, tokenizer: Any, options: Options, *, quiet: bool = False) -> DataReport:
    """Read files as ``train`` does, which then finds their tokens.

    Raises the :class:`trainer_client.errors.DataError` that it raises.
    """
    found = stored_dataset(given, tokenizer, options, ReadingProgress(quiet=quiet))
    samples = found.samples
    lengths = Counter(map(_bucket, lengths_of(samples).tolist()))
    every = max(1, len(samples) // _SHOWN)
    return DataReport(
        kinds=found.kinds,
        samples=len(samples),
        tokens=found.n_tokens,
        supervised=found.known.supervised,
        truncated=found.truncated,
        without_loss=found.without_loss,
        left_out=found.left_out,
        lengths=dict(sorted(lengths.items())),
        coverage=_coverage(found, tokenizer),
        shown=samples[::every][:_SHOWN],
    )


def _bucket(length: int) -> int:
    bucket = 64
    while bucket < length:
        bucket *= 2
    return bucket


def _coverage(found: Dataset, tokenizer: Any) -> dict[int, float]:
    vocab_size = max(len(tokenizer), len(found.known.counts))
    counts = token_counts(found, vocab_size)
    known = always_known(tokenizer, vocab_size)
    sizes = [size for size in _VOCABULARIES if size < vocab_size]
    return {size: frequent_tokens(counts, size, known)[1] for size in sizes}
