"""A data set of a run: its samples, each of which says where it came from, and their order."""

from __future__ import annotations

import functools
import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer_client.data.files import BadLine, Record, read_records
from trainer_client.data.records import Chat, Tokens, understand
from trainer_client.data.rendering import Renderer, Spans, sound
from trainer_client.data.tokens import Encoder
from trainer_client.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens; the loss counts where ``loss_mask`` is 1."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    origin: str  # file:line


@dataclass(frozen=True)
class Dataset:
    """All samples of a file, and what was cut or left out on the way."""

    samples: list[Sample]
    truncated: int
    without_loss: int
    #: records that were left out, by reason
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of what is trained: all tokens and loss masks, in their order."""
        content = hashlib.blake2b(digest_size=16)
        for sample in self.samples:
            content.update(len(sample.input_ids).to_bytes(8, "little"))
            content.update(array("q", sample.input_ids).tobytes())
            content.update(bytes(sample.loss_mask))
        return content.hexdigest()


@dataclass(frozen=True)
class MicroBatch:
    """Samples padded on the right to the longest; int64 [B, T] each."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    origins: tuple[str, ...]


def read_dataset(
    path: Path,
    tokenizer: Any,
    max_length: int,
    *,
    skip_bad_lines: bool = False,
    loss_on: str = "all",
    template_options: Mapping[str, Any] | None = None,
) -> Dataset:
    """Read and tokenize a data file, whatever its format (:mod:`trainer_client.data.files`).

    Raises :class:`DataError` with the first line that is wrong; with ``skip_bad_lines`` what is
    wrong is left out, and counted by reason.
    """
    reader = _Reader(tokenizer, max_length, loss_on, template_options)
    samples, truncated, without_loss = [], 0, 0
    left_out: Counter[str] = Counter()
    for record in read_records(path):
        try:
            if isinstance(record, BadLine):
                raise record
            found = reader.samples(record)
        except BadLine as error:
            if not skip_bad_lines:
                raise
            left_out[error.reason] += 1
            continue
        for sample in found:
            if len(sample.input_ids) > max_length:
                truncated += 1
                ids, mask = sample.input_ids[:max_length], sample.loss_mask[:max_length]
                sample = Sample(ids, mask, sample.origin)
            if any(sample.loss_mask[1:]):  # the first token is never predicted
                samples.append(sample)
            else:
                without_loss += 1
    if not samples:
        said = "".join(f", {count} {reason}" for reason, count in left_out.items())
        raise DataError(
            f"{path} has no sample with anything to learn from ({without_loss} had no loss within "
            f"{max_length} tokens{said}); give more data or a larger --max-length"
        )
    return Dataset(samples, truncated, without_loss, dict(left_out))


class _Reader:
    """Records to samples, for one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        loss_on: str,
        template_options: Mapping[str, Any] | None,
    ) -> None:
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(tokenizer, loss_on=loss_on, options=template_options)
        self._max_length = max_length

    def samples(self, record: Record) -> list[Sample]:
        """What a record has to train on. Raises :class:`BadLine`."""
        origin, known = record.origin, understand(record)
        if isinstance(known, Tokens):
            return [Sample(known.input_ids, known.loss_mask, origin)]
        if isinstance(known, Chat):
            rendered = self._renderer.samples(origin, known, self._too_long)
            return [Sample(*self._encoder.spans(each), origin) for each in rendered]
        if isinstance(record.value, str):
            return self._cut(origin, known.text)
        sound(origin, known.text)
        if known.said:  # in pieces, as it is served: what was asked, then the rest
            ids, mask = self._encoder.pieces(Spans(known.text, known.said))
            begins = self._encoder.missing(ids)
            return [Sample((*begins, *ids), (*(0 for _ in begins), *mask), origin)]
        ids = tuple(self._encoder.text(known.text))
        return [Sample(ids, (1,) * len(ids), origin)]

    def _too_long(self, prompt: str) -> bool:
        return len(prompt) > self._max_length and (
            len(self._encoder.plain(prompt)) >= self._max_length
        )

    def _cut(self, origin: str, text: str) -> list[Sample]:
        """Running text in samples of full length, each with the beginning of sequence."""
        begins, ids = self._encoder.begins, self._encoder.plain(text)
        size = max(1, self._max_length - len(begins))
        parts = [(*begins, *ids[at : at + size]) for at in range(0, len(ids) - 1, size)]
        return [
            Sample(part, (1,) * len(part), f"{origin}:token {number * size}")
            for number, part in enumerate(parts)
        ]


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Pad samples on the right to the longest of them."""
    length = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), length)
    ids, attention, loss = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, sample in enumerate(samples):
        count = len(sample.input_ids)
        ids[row, :count] = torch.tensor(sample.input_ids)
        attention[row, :count] = 1
        loss[row, :count] = torch.tensor(sample.loss_mask)
    return MicroBatch(ids, attention, loss, tuple(sample.origin for sample in samples))


@dataclass(frozen=True)
class Schedule:
    """Which samples make each step, and who trains on which: a pure function of the step.

    Every epoch is a permutation of its own (seed and epoch alone decide), cut into global batches,
    of which the last of an epoch may be smaller: each sample is trained once an epoch. A global
    batch is dealt round, so ranks differ by one sample at the most, and the same samples make the
    same steps on any number of ranks.
    """

    n_samples: int
    #: samples of one optimizer step, over all ranks
    global_batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.n_samples / self.global_batch)

    def samples(self, step: int) -> list[int]:
        """Sample numbers of a step, from 0, in their order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        begin = within * self.global_batch
        order = _order(self.n_samples, self.seed, epoch)
        mine: list[int] = order[begin : begin + self.global_batch].tolist()
        return mine

    def micro_batches(self, step: int, rank: int, world: int, batch_size: int) -> list[list[int]]:
        """Sample numbers of each micro-batch of ``rank`` of ``world`` at ``step``, all from 0."""
        mine = self.samples(step)[rank::world]
        return [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]


@functools.lru_cache(maxsize=2)
def _order(n_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of one epoch; made once, for it takes as long as there are samples."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n_samples, generator=generator)
