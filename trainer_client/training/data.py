"""A data set of a run: its samples, each of which says where it came from, and their order."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer_client.data.building import in_memory
from trainer_client.data.cache import cached
from trainer_client.data.reading import Options
from trainer_client.data.samples import Dataset, Sample
from trainer_client.data.showing import ReadingProgress
from trainer_client.data.sources import Given, files_of

T = TypeVar("T")

__all__ = [
    "Dataset",
    "MicroBatch",
    "Options",
    "Sample",
    "Schedule",
    "ask",
    "collate",
    "in_bins",
    "in_one_row",
    "read_dataset",
    "stored_dataset",
]


@dataclass(frozen=True)
class MicroBatch:
    """Samples padded on the right to the longest, or one behind the other in one row, which then
    has their ``lengths``; int64 [B, T] each.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    origins: tuple[str, ...]
    lengths: tuple[int, ...] = ()

    def one_by_one(self) -> Iterator[MicroBatch]:
        """Each sample alone."""
        tensors = (self.input_ids, self.attention_mask, self.loss_mask)
        pieces = zip(*(each.split(*by_sample(self.lengths)) for each in tensors), strict=True)
        for (ids, attention, loss), origin in zip(pieces, self.origins, strict=True):
            yield MicroBatch(ids, attention, loss, (origin,))


def ask(call: Callable[..., T], batch: Any) -> T:
    """Call a target's ``generate_batch``, or the like, for a micro-batch; with ``lengths`` only
    where it has some, for not every target takes packed samples.
    """
    more = {"lengths": batch.lengths} if getattr(batch, "lengths", ()) else {}
    return call(batch.input_ids, batch.attention_mask, batch.loss_mask, **more)


def by_sample(lengths: Sequence[int]) -> tuple[Any, int]:
    """How tensors [B, T, ...] are split into one for each sample: sizes, and along what."""
    return (list(lengths), 1) if lengths else (1, 0)


def read_dataset(
    given: Given,
    tokenizer: Any,
    max_length: int,
    *,
    skip_bad_lines: bool = False,
    loss_on: str = "all",
    template_options: Mapping[str, Any] | None = None,
) -> Dataset:
    """Read and tokenize data files, whatever their format (:mod:`trainer_client.data.files`).

    The samples are in memory and nowhere else; :func:`stored_dataset` is for data of any size.
    Raises :class:`DataError` with the first line that is wrong; with ``skip_bad_lines`` what is
    wrong is left out, and counted by reason.
    """
    options = Options(max_length, skip_bad_lines, loss_on, template_options)
    return in_memory(files_of(given), tokenizer, options)


def stored_dataset(
    given: Given, tokenizer: Any, options: Options, watch: ReadingProgress | None = None
) -> Dataset:
    """The same from the token cache (:mod:`trainer_client.data.cache`), where all processes of this
    node find it. ``watch`` shows how far it is.
    """
    watch = watch or ReadingProgress()
    with watch:
        return cached(files_of(given), tokenizer, options, told=watch.told, waits=watch.waits)


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


def in_one_row(samples: Sequence[Sample]) -> MicroBatch:
    """Samples one behind the other, without padding."""
    ids = [token for sample in samples for token in sample.input_ids]
    loss = [kept for sample in samples for kept in sample.loss_mask]
    row = torch.tensor([ids])
    lengths = tuple(len(sample.input_ids) for sample in samples)
    origins = tuple(sample.origin for sample in samples)
    return MicroBatch(row, torch.ones_like(row), torch.tensor([loss]), origins, lengths)


def in_bins(numbers: Sequence[int], lengths: Any, tokens: int) -> list[list[int]]:
    """Samples by number in few groups of at most so many ``tokens``: the longest first, each where
    it fits first, which takes at most 11/9 of the groups that it must (and a constant: Johnson,
    1973). ``lengths`` are those of all samples; one of more tokens is alone.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(numbers, key=lambda number: (-int(lengths[number]), number)):
        length = int(lengths[number])
        at = next((at for at, left in enumerate(room) if length <= left), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(tokens)
        bins[at].append(number)
        room[at] -= length
    return bins


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

    def of_rank(self, step: int, rank: int, world: int) -> list[int]:
        """Sample numbers of ``rank`` of ``world`` at ``step``, all from 0."""
        return self.samples(step)[rank::world]

    def micro_batches(self, step: int, rank: int, world: int, batch_size: int) -> list[list[int]]:
        """The same, by micro-batch."""
        mine = self.of_rank(step, rank, world)
        return [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]


@functools.lru_cache(maxsize=2)
def _order(n_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of one epoch; made once, for it takes as long as there are samples."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n_samples, generator=generator)
