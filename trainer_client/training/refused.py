"""Samples that a target cannot give numbers for: found one by one, left out and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from trainer_client.errors import TargetFailedError
from trainer_client.targets.batch import Eagle3TargetBatch, TargetBackend
from trainer_client.training.data import MicroBatch, ask, by_sample
from worker.supervision.checks import says_unsound


@dataclass(frozen=True)
class PartialBatch:
    """A micro-batch without those of its samples for which the target gave no numbers."""

    #: of one sample each
    good: tuple[Eagle3TargetBatch, ...]
    #: where the others came from
    left_out: tuple[str, ...]
    #: what the target said of the first of them
    story: str

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self.good)

    def map(self, change: Callable[[Tensor], Tensor]) -> PartialBatch:
        """The same with each tensor changed."""
        return replace(self, good=tuple(batch.map(change) for batch in self.good))


def ask_one_by_one(
    backend: TargetBackend, asked: MicroBatch, error: TargetFailedError
) -> PartialBatch:
    """Ask for each sample of a micro-batch alone, where the target said that it has no numbers.

    Raises :class:`TargetFailedError`, with the samples' names, where it failed otherwise.
    """
    good: list[Eagle3TargetBatch] = []
    left_out: list[str] = []
    story = ""
    for sample in asked.one_by_one():
        try:
            if not says_unsound(str(error)):
                raise error
            good.append(replace(ask(backend.generate_batch, sample), origins=sample.origins))
        except TargetFailedError as again:
            if not says_unsound(str(again)):
                names = ", ".join(asked.origins[:8])
                raise TargetFailedError(again.code, f"{again} (samples: {names})") from error
            left_out += sample.origins
            story = story or str(again)
    return PartialBatch(tuple(good), tuple(left_out), story)


def rows(batch: Eagle3TargetBatch) -> list[Eagle3TargetBatch]:
    """A batch of each of its samples alone."""
    how = by_sample(batch.lengths or ())
    count = len(batch.input_ids.split(*how))
    origins = batch.origins or ("",) * count
    alone = replace(batch, lengths=None)
    return [
        replace(alone.map(lambda t, at=at: t.split(*how)[at]), origins=(origins[at],))  # type: ignore[misc]
        for at in range(count)
    ]
