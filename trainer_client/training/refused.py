"""Samples that a target cannot give numbers for: found one by one, left out and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from trainer_client.errors import TargetFailedError
from trainer_client.targets.batch import Eagle3TargetBatch, TargetBackend
from trainer_client.training.data import MicroBatch
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
    good, left_out, story = [], [], ""
    for row, origin in enumerate(asked.origins):
        alone = slice(row, row + 1)
        try:
            if not says_unsound(str(error)):
                raise error
            masks = asked.attention_mask[alone], asked.loss_mask[alone]
            batch = backend.generate_batch(asked.input_ids[alone], *masks)
            good.append(replace(batch, origins=(origin,)))
        except TargetFailedError as again:
            if not says_unsound(str(again)):
                names = ", ".join(asked.origins[:8])
                raise TargetFailedError(again.code, f"{again} (samples: {names})") from error
            left_out.append(origin)
            story = story or str(again)
    return PartialBatch(tuple(good), tuple(left_out), story)


def rows(batch: Eagle3TargetBatch) -> list[Eagle3TargetBatch]:
    """A batch of each of its samples alone."""
    count = batch.input_ids.shape[0]
    origins = batch.origins or ("",) * count
    return [
        replace(batch.map(lambda t, at=row: t[at : at + 1]), origins=(origins[row],))  # type: ignore[misc]
        for row in range(count)
    ]
